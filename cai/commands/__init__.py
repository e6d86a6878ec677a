"""The commands beside a run, by flag. Each lives in its own module as `command(args) -> exit code`.

Owns only the table and the three short commands over a run's log (verify, repair, fork).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from cai import errors
from cai.commands import cli
from cai.inputs import Inputs, kept_sets, locate, read_inputs
from cai.run import budget, lines
from cai.run.manifest import read_manifest
from cai.session import create_run
from cai.terminal import printable, say

MODULES = {name: f"cai.commands.{name}" for name in cli.COMMANDS}  # verify, repair and fork begin here
EXPERIMENTS = ("against", "attribute", "inverse", "next_round", "sweep")  # they take whole runs to their end

ACT_ON_A_RUN = ("review", "chat", "export", "fork", "report")  # and do not name the run by themselves


def dispatch(args: argparse.Namespace, milestone: Callable[[Inputs, argparse.Namespace], int]) -> int:
    """Run the one command that was asked for. `milestone`: runner.py's whole pipeline of one run."""
    own = {"verify": _verify, "repair": _repair, "fork": _fork}
    name = cli.commands(args)[0]
    if name in ACT_ON_A_RUN:
        _tell_latest(args, getattr(args, name))
    if name in EXPERIMENTS:
        return importlib.import_module(f"cai.commands.experiments.{name}").command(args, milestone)
    return own[name](args) if name in own else importlib.import_module(MODULES[name]).command(args)


def _tell_latest(args: argparse.Namespace, named: str) -> None:
    """`runs/latest` may be another run than one thinks: which it is, on stderr, for a pipe may wait for the answer."""
    if Path(named).name == "latest":
        run = locate(args, named)
        facts = read_manifest(run / "manifest.json")
        begun = printable(f"{facts.get('milestone', 'a run')} of {str(facts.get('created', '?'))[:16]}", one_line=True)
        print(f"{named}: {lines.near(run)} ({begun})", file=sys.stderr)


def _verify(args: argparse.Namespace) -> int:
    """Print the table of promises; exit 5 if one is broken. Writes nothing."""
    from cai.commands import verify as verifying

    checks = verifying.verify(locate(args, args.verify))
    say("\n".join(verifying.table(checks)))
    return errors.DONE if verifying.sound(checks) else errors.CORRUPT


def _repair(args: argparse.Namespace) -> int:
    """Show what a repair drops; with --write, drop it. Exit 5 while something is left to drop."""
    from cai.commands import repair as repairing

    path = locate(args, args.repair)
    repairing.check_repairable(path)
    found = repairing.repair(path, write=args.write, say=say)
    return errors.CORRUPT if found and not args.write else errors.DONE


def _fork(args: argparse.Namespace) -> int:
    """A new run with the unchanged records of an old one; with --dry-run only what would stay and its cost."""
    from cai.commands import fork as forking

    path, inputs = locate(args, args.fork), read_inputs(args)
    plan = forking.plan_of(path, inputs)
    stands = forking.standing(plan)
    whole = budget.estimate(
        inputs.recipe, inputs.backend, path.parent, inputs.limit_tokens, inputs.once_tokens, stands
    ).line
    say("\n".join(forking.describe(plan, inputs.recipe.budget.usd_per_hour, whole)))
    if held := kept_sets(inputs.sets, args.set):
        say(f"  as that run was begun: {' '.join(held)} (give it again with another value to change it)")
    if inputs.pairs is not None:
        say("  the pairs are those of pairs.file: nothing is generated")
    if args.dry_run:
        return errors.DONE
    with create_run(inputs, args) as run:
        forking.fill(plan, run)
    say(f"forked into {lines.near(run.path)}; go on with: {lines.resume(run.path)}")
    return errors.DONE
