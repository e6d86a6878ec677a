"""`--next-round runs/ID`: the same requests again, answered by that run's adapter; DPO goes on from it.

Owns what a round takes along from its parent: the instructions (so that every figure is on the same prompts), the
adapter (adapter-start/, the policy that answers and the reference of DPO) and the figures of the rounds before. The
pipeline runs as for any run, and a kill is resumed as of any run (`--resume`). Whether a round may begin is the rule
of `on_policy.metric`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cai import errors
from cai.commands import fork
from cai.commands.experiments.whole_runs import Milestone, going_on_with, plain
from cai.data import on_policy
from cai.errors import CaiError
from cai.inputs import Inputs, locate, read_inputs
from cai.recipe.load import flatten
from cai.report import rounds
from cai.report.snapshot import Snapshot, read_story
from cai.run import digests, lines
from cai.run.events import read_events
from cai.session import create_run
from cai.terminal import printable, say
from cai.training.train import load_result


def command(args: argparse.Namespace, milestone: Milestone) -> int:
    """Make the new run and run it. With --dry-run only what it would take over, and its cost."""
    path = locate(args, args.next_round)
    if load_result(path / "train") is None:
        raise CaiError(f"{path}: has no finished adapter to answer with. Go on with it first: {lines.resume(path)}")
    digests.refuse_edited(path, read_events(path / "events.jsonl"), digests.holds_figures, "--next-round")
    parent = read_story(path)
    asked = arguments(args, path, parent)
    inputs = read_inputs(asked)
    _check(path, parent, inputs)
    plan = fork.plan_of(path, inputs)
    count = sum(row["stage"] == "instructions" and row["status"] == "ok" for row in plan.kept)
    say(f"round {inputs.recipe.on_policy.round}: the adapter of {path.name} answers {count} instructions again")
    say("\n".join(fork.describe(plan, inputs.recipe.budget.usd_per_hour)))
    if args.dry_run:
        return errors.DONE
    with create_run(inputs, asked) as run:
        on_policy.take(path / "adapter", run)
        run.update_manifest(parent=path.name, rounds=rounds.of_run(parent))
        fork.fill(plan, run)
        made = run.path
    say(f"killed or stopped, it goes on with: {lines.resume(made)}")
    own = going_on_with(made, asked)
    code = milestone(read_inputs(own), own)
    for line in rounds.lines(read_story(made)):
        say(printable(line))
    return code


def arguments(args: argparse.Namespace, path: Path, parent: Snapshot) -> argparse.Namespace:
    """The parent's milestone and --set hold on, as in a fork; what is given now goes before."""
    adapter = digests.digest_of(path / "adapter" / on_policy.WEIGHTS)
    own = [f"on_policy.round={parent.recipe.on_policy.round + 1}", f'on_policy.parent="{path.name}"']
    own += [f'on_policy.adapter="{adapter}"', 'dpo.start="adapter"']
    return plain(args, fork=str(path), set=[*own, *args.set])


def _check(path: Path, parent: Snapshot, inputs: Inputs) -> None:
    """Errors: CaiError where the parent cannot have a next round, or its round added nothing (QUALITY)."""
    if parent.recipe.pairs.file:
        raise CaiError(f"{path}: its pairs were given (pairs.file): nothing is answered, so there is no next round.")
    then, now = (flatten(recipe.lora.model_dump(mode="json"), "lora.") for recipe in (parent.recipe, inputs.recipe))
    if changed := [key for key in now if then.get(key) != now[key]]:
        raise CaiError(f"{path}: {changed[0]} is another one now, and DPO goes on with this adapter. Set it back.")
    may, why = rounds.verdict(rounds.of_run(parent), inputs.recipe.on_policy)
    if not may:
        raise CaiError(
            f"{path}: {why}. No further round begins: lower on_policy.min_gain, name another on_policy.metric, "
            'or switch the rule off with --set on_policy.metric=""',
            errors.QUALITY,
        )
