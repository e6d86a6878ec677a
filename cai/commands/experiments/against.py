"""`--against OTHER`: two constitutions, or two runs, against each other: what changed in behaviour.

Owns the order of that experiment and its cost beforehand; `whole_runs` finds and finishes the two runs, `head_to_head`
asks and judges, `cai.report.against` makes the page. A is the recipe's run (or --resume RUN), B the fork of A under the
other constitution (or the run that is named). Everything is in A's folder, `eval/against/B.*`: the log of answers and
judgements, appended at once, and the page that follows from it alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cai import errors
from cai.commands import fork as forking
from cai.commands.experiments import whole_runs
from cai.commands.experiments.cost import cost_lines
from cai.commands.experiments.whole_runs import Milestone
from cai.errors import CaiError
from cai.evaluate import head_to_head, head_to_head_figures
from cai.evaluate.external import closing, external_of
from cai.evaluate.head_to_head import Arm, Question
from cai.evaluate.head_to_head_figures import Asked
from cai.evaluate.scores import KEY, Evaluation, load_judge
from cai.inputs import Inputs, locate, read_inputs
from cai.recipe import load as recipes
from cai.recipe.constitution import load_constitution
from cai.run.lines import near
from cai.run.loop import open_marked
from cai.run.manifest import read_manifest
from cai.session import session
from cai.store import records
from cai.store.row_types import Record
from cai.terminal import printable, say, word

NAME = "against"
NEITHER = "neither a file of principles nor a run"


@dataclass(frozen=True)
class Sides:
    """Both runs with their inputs; `questions`: the held-out prompts that stand in both."""

    a: Path
    b: Path
    inputs_a: Inputs
    inputs_b: Inputs
    questions: Sequence[Question]
    asked: Sequence[Asked]


def command(args: argparse.Namespace, milestone: Milestone) -> int:
    """Both runs to their end, then the comparison. Killed anywhere, the same command goes on."""
    constitution = _constitution(args)
    other = None
    if constitution:
        load_constitution(constitution)  # its faults before anything is spent
        _require_heldout(args)
    else:
        other = _other(args)
    if args.dry_run:
        return dry_run(args, constitution)
    a = whole_runs.first(args, milestone)
    b = other or whole_runs.forked(a, args, [_set_of(args, constitution)])
    whole_runs.finish(b, args, milestone)
    found = sides(a, b, args)
    measure(found, args)
    return errors.DONE


def _constitution(args: argparse.Namespace) -> Path | None:
    """The file of principles that --against names; None: it names a run. Error: neither."""
    path = Path(args.against).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml", ".txt", ".json", ".md"):
        raise CaiError(f"--against: {args.against}: no such file. Give a constitution, or a run (runs/ID).")
    try:
        locate(args, args.against)
    except CaiError as error:
        raise CaiError(f"--against: {args.against}: {NEITHER} ({error})", error.code) from None
    return None


def _other(args: argparse.Namespace) -> Path:
    """The run that --against names, before A is made: then runs/latest is A. Errors: one that cannot be compared."""
    other, mine = locate(args, args.against), whole_runs.named(args)
    if mine is not None and mine.name == other.name:
        raise CaiError(f"--against: {other}: is the run itself. Name another one, or another constitution.")
    read_manifest(other / "manifest.json")
    records.refuse_missing(other / "records.jsonl")
    return other


def _set_of(args: argparse.Namespace, constitution: Path | None) -> str:
    """As the fork's recipe has it: relative to the recipe's folder."""
    assert constitution is not None, "without one another run was named"
    return f"constitution={os.path.relpath(constitution.resolve(), recipes.read(args.recipe).folder.resolve())}"


def _require_heldout(args: argparse.Namespace) -> None:
    run = locate(args, args.resume) if args.resume else None
    recipe = whole_runs.inputs_of(run, args).recipe if run else read_inputs(whole_runs.plain(args, fork=None)).recipe
    if not recipe.heldout.items:
        raise CaiError(
            f"{recipe.milestone}: heldout.items: is 0, and answers are compared on held-out prompts. "
            "Take milestone m2, or: --set heldout.items=20"
        )


def sides(a: Path, b: Path, args: argparse.Namespace) -> Sides:
    """Both runs as they hold their inputs. Errors: the same run, other models, nothing shared, no whole adapter."""
    if a.name == b.name:
        raise CaiError(f"--against: {a}: is the run itself. Name another one, or another constitution.")
    inputs_a, inputs_b = whole_runs.inputs_of(a, args), whole_runs.inputs_of(b, args)
    for run in (a, b):
        if not whole_runs.finished(run):
            raise CaiError(f"{run}: it has no whole adapter and figures. Resume it first.")
    models = [read_manifest(run / "manifest.json").get("model") or {} for run in (a, b)]
    for name in ("model", "revision", "quantization"):
        if models[0].get(name) != models[1].get(name):
            raise CaiError(
                f"--against: {b}: {name} {models[1].get(name)}, and {a} has {models[0].get(name)}: one base."
            )
    questions = shared([records.look(run / "records.jsonl") for run in (a, b)])
    if not questions:
        raise CaiError(f"--against: {a} and {b} share no held-out prompt. Fork one from the other: --against FILE")
    asked = head_to_head_figures.union(inputs_a.constitution, inputs_b.constitution)
    return Sides(a, b, inputs_a, inputs_b, questions, asked)


def shared(rows: Sequence[Sequence[Record]]) -> list[Question]:
    """The held-out prompts of the first run that are held out in the second too."""
    ours, theirs = (head_to_head.heldout(of) for of in rows)
    known = {question.prompt for question in theirs}
    return [question for question in ours if question.prompt in known]


def measure(found: Sides, args: argparse.Namespace) -> None:
    """Answers and judgements that are still missing, then the page."""
    from cai.report import against as pages

    with session(found.inputs_a, whole_runs.going_on_with(found.a, args)) as context:
        questions = head_to_head.chosen(found.questions, args.limit, context)
        folder = context.run.eval / NAME
        path = folder / f"{found.b.name}.jsonl"
        judge = load_judge(context)
        arms, principles = arms_of(found), [asked.principle for asked in found.asked]
        external, mark = external_of(context), head_to_head.mark(context, arms, principles, judge)
        with closing(external), open_marked(context, path, mark, KEY) as log:
            evaluation = Evaluation(context, log, context.run.adapter, judge, external)
            say(f"against: {len(questions)} held-out prompts, {len(found.asked)} principles, A {found.a.name}")
            answered = {arm.name: head_to_head.answers(evaluation, NAME, arm, questions) for arm in arms}
            texts = {name: {item: row["text"] for item, row in rows.items()} for name, rows in answered.items()}
            rows = head_to_head.judged(evaluation, f"{NAME}.judged", questions, texts["b"], texts["a"], principles)
            content = pages.gather(found.a, found.b, found.asked, questions, texts, rows, evaluation.judge_name)
        written = pages.write(folder, found.b.name, content)
        say(printable("\n".join(pages.lines(content))))
        say(f"what changed in behaviour: {word(near(written))}")


def arms_of(found: Sides) -> list[Arm]:
    a, b = found.inputs_a, found.inputs_b
    return [
        Arm("base", None, a.recipe.lora, a.prompts["policy"]),
        Arm("a", found.a / "adapter", a.recipe.lora, a.prompts["policy"]),
        Arm("b", found.b / "adapter", b.recipe.lora, b.prompts["policy"]),
    ]


def dry_run(args: argparse.Namespace, constitution: Path | None) -> int:
    """What stands, what would be made, and what it would take. Writes nothing, loads nothing."""
    a = whole_runs.named(args)
    inputs = whole_runs.inputs_of(a, args) if a else read_inputs(whole_runs.plain(args, fork=None))
    recipe, texts = inputs.recipe, {p.principle.strip() for p in inputs.constitution.principles}
    say(_stands("A", a, f"a new run of {args.recipe}; what it costs: the same without --against"))
    b: Path | None
    if constitution is None:
        b = locate(args, args.against)
        texts |= {p.principle.strip() for p in whole_runs.inputs_of(b, args).constitution.principles}
        say(_stands("B", b, ""))
    else:
        texts |= {p.principle.strip() for p in load_constitution(constitution).principles}
        shares = f"a fork of A under {constitution}: instructions and answers are shared, the rest is made again"
        forked = whole_runs.forked_inputs(a, args, [_set_of(args, constitution)]) if a else None
        b = whole_runs.going_on(forked, a.name) if a and forked else None
        say(_stands("B", b, shares))
        if a and forked and not b:
            say("\n".join(forking.describe(forking.plan_of(a, forked), recipe.budget.usd_per_hour)))
    prompts = min(args.limit or recipe.evaluation.fresh_items or recipe.heldout.items, recipe.heldout.items)
    say("\n".join(cost_lines(recipe, a, prompts=prompts, arms=3, judgements=1 + len(texts))))
    say("Nothing was loaded and nothing was written.")
    return errors.DONE


def _stands(name: str, run: Path | None, otherwise: str) -> str:
    if run is None:
        return f"{name}: {otherwise}"
    return f"{name}: {near(run)}, {'finished' if whole_runs.finished(run) else 'to be taken to its end'}"
