"""`--attribute RUN`: what each principle bought and cost; with `--without ID`, what is lost without its pairs.

Owns the order of that experiment; `head_to_head` asks and judges, `cai.evaluate.attribution` ranks, the page is
`cai.report.attribution`'s. Everything is in the run's folder, `eval/attribution/`: `principles.jsonl` holds the answers
of base and tuned and their judgements, `without-FORK.jsonl` those of each fork that was trained without a principle.
A fork that stands is on the page of every later call.
"""

from __future__ import annotations

import argparse
import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cai import errors
from cai.commands.experiments import whole_runs
from cai.commands.experiments.cost import cost_lines
from cai.commands.experiments.whole_runs import FORKED_FROM, Milestone
from cai.errors import CaiError
from cai.evaluate import attribution, head_to_head
from cai.evaluate.external import closing, external_of
from cai.evaluate.head_to_head import Arm, Question
from cai.evaluate.head_to_head_figures import Texts
from cai.evaluate.scores import KEY, Evaluation, load_judge
from cai.inputs import Inputs, locate
from cai.recipe.load import Recipe
from cai.report.snapshot import read_story, recipe_of
from cai.run.context import Context
from cai.run.lines import near
from cai.run.loop import open_marked
from cai.session import session
from cai.store import records
from cai.store.jsonl import Row
from cai.terminal import printable, say, word

NAME = "attribution"


def command(args: argparse.Namespace, milestone: Milestone) -> int:
    """Judge the tuned model over its base under each principle; train the forks that are asked for; write the page."""
    run = locate(args, args.attribute)
    inputs = whole_runs.inputs_of(run, args)
    records.refuse_missing(run / "records.jsonl")
    questions = head_to_head.heldout(records.look(run / "records.jsonl"))
    if not whole_runs.finished(run):
        raise CaiError(f"--attribute: {run}: it has no whole adapter and figures. Resume it first.")
    if not questions:
        raise CaiError(f"--attribute: {run}: it has no held-out prompt. Take a run with heldout.items above 0.")
    pairs = trained_on(run)
    left_out = _left_out(args, inputs, pairs)
    if args.dry_run:
        return dry_run(args, run, inputs, questions, pairs, left_out)
    if left_out:
        value = ", ".join(f'"{name}"' for name in left_out)
        fork = whole_runs.forked(run, args, [f"hygiene.without_principles=[{value}]"])
        whole_runs.finish(fork, args, milestone)
    measure(run, inputs, questions, pairs, args)
    return errors.DONE


def trained_on(run: Path) -> dict[str, int]:
    """Principle id -> training pairs with a round under it."""
    story = read_story(run)
    drawn = story.pairs.drawn
    return dict(Counter(id_ for pair in story.cleaned.kept for id_ in set(drawn.get(pair["item"], ()))))


def _left_out(args: argparse.Namespace, inputs: Inputs, pairs: dict[str, int]) -> list[str]:
    """The principles that --without names. Errors: none of that name, none of its pairs, no other pair."""
    asked = [name.strip() for name in (args.without or "").split(",") if name.strip()]
    known = [principle.id for principle in inputs.constitution.principles]
    for name in asked:
        if name not in known:
            near_ = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"Did you mean {near_[0]}?" if near_ else f"It has: {', '.join(known)}."
            raise CaiError(f"--without: {name}: no principle of this run. {hint}")
        if not pairs.get(name):
            raise CaiError(f"--without: {name}: no training pair is about it, so nothing would be lost without it.")
    return asked


def forks(run: Path) -> list[tuple[Path, list[str]]]:
    """Finished forks of the run that differ in nothing but the principles left out, oldest first; and these."""
    found = []
    whole = recipe_of(run)
    for path, manifest in whole_runs.manifests(run.parent):
        if manifest.get(FORKED_FROM) == run.name and whole_runs.finished(path):
            recipe = recipe_of(path)
            if recipe.hygiene.without_principles and _alike(recipe, whole):
                found.append((path, list(recipe.hygiene.without_principles)))
    return found[::-1]


def _alike(fork: Recipe, whole: Recipe) -> bool:
    ours = fork.hygiene.model_copy(update={"without_principles": whole.hygiene.without_principles})
    return (fork.dpo, fork.lora, ours) == (whole.dpo, whole.lora, whole.hygiene)


def measure(
    run: Path, inputs: Inputs, questions: Sequence[Question], pairs: dict[str, int], args: argparse.Namespace
) -> None:
    """Answers and judgements that are still missing, of the run and of its forks; then the page."""
    from cai.report import attribution as pages

    with session(inputs, whole_runs.going_on_with(run, args)) as context:
        asked = head_to_head.chosen(questions, args.limit, context)
        principles = inputs.constitution.principles
        say(f"attribution: {len(asked)} held-out prompts, {len(principles)} principles, {run.name}")
        policy, lora = context.prompts["policy"], context.recipe.lora
        base, tuned = Arm("base", None, lora, policy), Arm("tuned", context.run.adapter, lora, policy)
        texts, rows = _compared(context, "principles", asked, inputs, tuned, base)
        judge = Evaluation(context, context.log, context.run.adapter, None, external_of(context)).judge_name
        left_out = []
        for fork, names in forks(run):
            other = Arm("without", fork / "adapter", lora, policy)
            beside, judged = _compared(context, f"without-{fork.name}", asked, inputs, tuned, other)
            left_out.append({"run": fork.name, **attribution.without(judged, principles, names, beside, judge)})
        content = pages.gather(run.name, asked, principles, texts, rows, pairs, left_out, judge)
        written = pages.write(context.run.eval / NAME, content)
        say(printable("\n".join(pages.lines(content))))
        say(f"what each principle bought and cost: {word(near(written))}")


def _compared(
    context: Context, log_name: str, asked: Sequence[Question], inputs: Inputs, ours: Arm, theirs: Arm
) -> tuple[Texts, list[Row]]:
    """Both arms' answers and their judgements, from one log of its own."""
    judge, principles = load_judge(context), inputs.constitution.principles
    path = context.run.eval / NAME / f"{log_name}.jsonl"
    external, mark = external_of(context), head_to_head.mark(context, (ours, theirs), principles, judge)
    with closing(external), open_marked(context, path, mark, KEY) as log:
        evaluation = Evaluation(context, log, context.run.adapter, judge, external)
        found = [head_to_head.answers(evaluation, NAME, arm, asked) for arm in (theirs, ours)]
        said = [{item: row["text"] for item, row in rows.items()} for rows in found]
        rows = head_to_head.judged(evaluation, f"{NAME}.judged", asked, said[1], said[0], principles)
    return Texts(said[1], said[0]), rows


def dry_run(
    args: argparse.Namespace,
    run: Path,
    inputs: Inputs,
    questions: Sequence[Question],
    pairs: dict[str, int],
    left_out: Sequence[str],
) -> int:
    """What it would take. Writes nothing, loads nothing."""
    recipe, total = inputs.recipe, len(read_story(run).cleaned.kept)
    prompts = min(args.limit or recipe.evaluation.fresh_items or len(questions), len(questions))
    compared = 1 + len(forks(run)) + bool(left_out)
    say(f"{near(run)}: {len(questions)} held-out prompts; training pairs by principle: {pairs}")
    if left_out:
        gone = sum(pairs[name] for name in left_out)
        say(f"a fork without {', '.join(left_out)}: at most {gone} of {total} training pairs go, trained and measured")
    judgements = compared * (1 + len(inputs.constitution.principles))
    say("\n".join(cost_lines(recipe, run, prompts=prompts, arms=2 * compared, judgements=judgements)))
    say("Nothing was loaded and nothing was written.")
    return errors.DONE
