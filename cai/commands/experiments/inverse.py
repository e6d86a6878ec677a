"""`--inverse RUN`: from a run's pairs alone the base proposes rules; how much of the constitution comes back out.

Owns the order of that experiment; `cai.evaluate.inverse` asks and matches, the page is `cai.report.inverse`'s. Both are
in the run's folder, `eval/inverse/`: `rules.jsonl` and the page beside it. No adapter is on and none is needed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import orjson

from cai import errors
from cai.commands.experiments import whole_runs
from cai.commands.experiments.attribute import trained_on
from cai.commands.experiments.whole_runs import Milestone
from cai.errors import CaiError
from cai.evaluate import inverse
from cai.evaluate.external import closing, external_of
from cai.evaluate.judge import Judge
from cai.evaluate.scores import KEY, SHIPPED_PROMPTS, Evaluation, load_judge
from cai.inputs import Inputs, locate
from cai.metrics.figure import sample
from cai.recipe.prompts import Prompt, load_prompt
from cai.report.snapshot import read_story
from cai.run.context import Context
from cai.run.lines import near
from cai.run.loop import open_marked
from cai.session import session
from cai.store.row_types import Pair
from cai.terminal import printable, say, word

NAME = "inverse"


def command(args: argparse.Namespace, milestone: Milestone) -> int:
    """Propose, match, judge; then the page. Killed anywhere, the same command goes on."""
    run = locate(args, args.inverse)
    inputs, story = whole_runs.inputs_of(run, args), read_story(run)
    pairs = list(story.cleaned.kept)
    if not whole_runs.finished(run):
        raise CaiError(f"--inverse: {run}: it is not finished. Resume it first.")
    if len(inputs.constitution.principles) < 2:
        raise CaiError(f"--inverse: {run}: one principle alone gives no bar for a match. Take a run with two or more.")
    if args.limit:
        chosen = set(sample([pair["item"] for pair in pairs], args.limit))
        pairs = [pair for pair in pairs if pair["item"] in chosen]
    tried = story.pairs.heldout or pairs
    if args.dry_run:
        return dry_run(run, inputs, pairs, tried)
    prompt = _prompt(run, inputs)
    with session(inputs, whole_runs.going_on_with(run, args)) as context:
        measure(context, inputs, prompt, pairs, tried, trained_on(run))
    return errors.DONE


def _prompt(run: Path, inputs: Inputs) -> Prompt:
    """The wording from the project's prompts; it came later than the run's own copies."""
    folders = (run / "prompts", inputs.folder / inputs.recipe.prompts, SHIPPED_PROMPTS)
    folder = next(folder for folder in folders if (folder / "inverse.yaml").is_file())
    return load_prompt(folder / "inverse.yaml", inverse.FIELDS)


def measure(
    context: Context,
    inputs: Inputs,
    prompt: Prompt,
    pairs: Sequence[Pair],
    tried: Sequence[Pair],
    about: dict[str, int],
) -> None:
    """What is still missing of proposals, matches and judgements; then the page."""
    from cai.report import inverse as pages

    principles, judge, external = inputs.constitution.principles, load_judge(context), external_of(context)
    folder = context.run.eval / NAME
    mark = _mark(context, inputs, prompt, pairs, tried, judge)
    say(f"inverse: {len(pairs)} training pairs, {len(principles)} principles, {context.run.id}")
    with closing(external), open_marked(context, folder / "rules.jsonl", mark, KEY) as log:
        evaluation = Evaluation(context, log, context.run.adapter, judge, external)
        proposed = inverse.propose(evaluation, prompt, pairs)
        requests = [principle.revision_request for principle in principles]
        above, sensitivity = inverse.bar(inverse.matched(evaluation, "inverse.calibration", requests, principles))
        arms = {}
        for arm, name in ((inverse.LABELS, "labels"), (inverse.SWAPPED, "swapped")):
            rules, copied = inverse.distinct([row for row in proposed if row["round"] == arm], prompt)
            first = arm * (1 + len(pairs))  # the rules of both arms have numbers of their own
            values = inverse.matched(evaluation, "inverse.match", rules, principles, first)
            wanted = sorted(about) or [p.id for p in principles]
            arms[name] = inverse.summary(rules, values, above, principles, wanted) | {"copied": copied}
        rules = [one["rule"] for one in arms["labels"]["rules"]]
        explained = inverse.explained(evaluation, rules, tried) if judge is not None else []
        for one, figure in zip(arms["labels"]["rules"], explained, strict=False):
            one["explains"] = figure.as_dict()
        content = pages.gather(context.run.id, len(pairs), len(tried), about, above, sensitivity, arms)
    written = pages.write(folder, content)
    say(printable("\n".join(pages.lines(content))))
    say(f"what came back out: {word(near(written))}")


def _mark(
    context: Context, inputs: Inputs, prompt: Prompt, pairs: Sequence[Pair], tried: Sequence[Pair], judge: Judge | None
) -> str:
    """16 hex of all that a proposal, a match or a judgement depends on."""
    section = context.recipe.evaluation
    parts = [
        [[pair["prompt"], pair["chosen"], pair["rejected"]] for pair in (*pairs, *tried)],
        [[p.id, p.principle, p.revision_request] for p in inputs.constitution.principles],
        [prompt.sha, context.recipe.seed, section.max_text_tokens, section.judge_model],
        [judge.single.sha, judge.pair.sha] if judge else None,
    ]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:16]


def dry_run(run: Path, inputs: Inputs, pairs: Sequence[Pair], tried: Sequence[Pair]) -> int:
    """What it would take. Writes nothing, loads nothing."""
    rules, size = 2 * len(inverse.groups(pairs)), len(inputs.constitution.principles)
    judged = rules // 2 * min(len(tried), inverse.TRIED)
    say(f"{near(run)}: {len(pairs)} training pairs, at most {rules} rules of {inverse.LONGEST} tokens, half of them of")
    say(f"swapped labels; {(rules + size) * size:,} matches; at most {judged:,} blind comparisons in both orders")
    say("Nothing was loaded and nothing was written.")
    return errors.DONE
