"""Constitutional AI from nothing to a trained adapter: the table of contents.

    python runner.py cai.toml --milestone m1          a new run
    python runner.py cai.toml --resume runs/<id>      go on with one
    python runner.py cai.toml --dry-run               what it would do

A run is: open the folder, collect pairs (instructions -> answers -> critiques -> revisions), write the data set, train
with DPO on the same loaded model, measure base against tuned, decide the gates, report. Each step computes what is left
from the records, so that calling them again after any kill goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

try:
    from cai import errors, world
    from cai.commands import cli, damage
    from cai.errors import CaiError
    from cai.inputs import Inputs, locate, read_inputs, runs_root
    from cai.models import embedded
    from cai.run import lines
    from cai.run.run_ids import RUN_ID
    from cai.session import session
    from cai.store.files import REMEDIES, io_error
    from cai.terminal import for_stream, last_through_hangups, printable, say
except ModuleNotFoundError as missing:
    if (missing.name or "cai").partition(".")[0] == "cai":
        raise
    print(
        f"{missing.name}: not installed for {sys.executable}. Run `make setup`, then `source .venv/bin/activate` "
        "(or call .venv/bin/python).",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

HOST_LIMITS = ("can't start new thread", "failed to map segment")  # how Python and the loader of libraries say it


def main(argv: list[str] | None = None) -> int:
    """Run one command; gives the exit code. Every fault of a user is one clear line on stderr."""
    last_through_hangups()
    began, args = time.monotonic(), None
    try:
        if not (sys.argv[1:] if argv is None else argv):  # a newcomer's first try must not start a run
            say(cli.first_screen(lines.program()))
            return errors.USAGE
        world.enter()
        args = cli.parse(argv)
        args.began = began
        if cli.commands(args) or args.dry_run:
            world.alone(" or ".join(cli.commands(args) or ["dry-run"]))
        if cli.commands(args):
            from cai import commands  # each command lives in its module and is imported only when asked for

            return commands.dispatch(args, milestone)
        return milestone(read_inputs(args), args)
    except CaiError as error:
        world.tell(for_stream(f"{printable(str(error))}\n", sys.stderr))
        return error.code
    except KeyboardInterrupt:
        return errors.SIGINT
    except Exception as error:
        line, code = outside(error)
        if line:
            print(printable(line), file=sys.stderr)
            return code
        if args is not None and (damaged := damage.told(args, error)):
            world.tell(for_stream(f"{damaged}\n", sys.stderr))
            return errors.CORRUPT
        world.tell(traceback.format_exc())
        print("This is a bug in the program; the run folder is intact and can be resumed.", file=sys.stderr)
        return errors.BUG


def outside(error: Exception) -> tuple[str, int]:
    """What machine or people did to a run, in a line with its remedy, and the exit code; no line if they did not."""
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in HOST_LIMITS):
        limits = "The memory or the threads of this machine, or of its limits (ulimit -v, -u), are used up"
        return f"{limits}: free some, then resume.", errors.IO
    place = part_of_a_run(error.filename) if isinstance(error, OSError) else ""
    if place and isinstance(error, FileNotFoundError):
        return f"{place}: is gone while the run was going: put it back and resume", errors.IO
    if place and isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        kind = "a folder, and" if isinstance(error, IsADirectoryError) else "no folder, but"
        return f"{place}: is {kind} a run has the other there: move it away, resume", errors.CORRUPT
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return str(io_error(error.filename or "runner.py", "a system call", error)), errors.IO
    return "", errors.BUG


def part_of_a_run(name: object) -> str:
    """The name, if a folder above it is a run's or was one: then somebody took it away, and the program is right."""
    path = Path(str(name or ""))
    return str(path) if any(RUN_ID.fullmatch(part) and part[:8].isdigit() for part in path.parts) else ""


def milestone(inputs: Inputs, args: argparse.Namespace) -> int:
    """The whole pipeline of one milestone, new or resumed."""
    from cai import pipeline
    from cai.data.collect import collect
    from cai.evaluate import doors
    from cai.run import budget, sharing

    recipe = inputs.recipe
    if args.dry_run:
        from cai.commands.dry_run import dry_run

        return dry_run(inputs, locate(args, args.resume) if args.resume else None)
    if inputs.pairs is not None and args.until not in ("", "pairs"):
        raise CaiError(f"runner.py: --until {args.until}: pairs.file: nothing is generated. Leave it out, or: pairs.")
    doors.check_milestone_before(inputs)
    pipeline.check_at_hand(inputs, args)
    budget.check_before(inputs, args, runs_root(inputs.source, recipe))
    announce(inputs)
    from cai.report.pages import write_report

    with session(inputs, args) as context, budget.enforced(context, inputs, write_report):
        training_pairs = []
        if inputs.pairs is not None:
            pairs = pipeline.own_pairs(context, inputs.pairs)
        else:
            pairs = collect(context, inputs.grid, inputs.given, args.until)
        if args.until in ("", "pairs"):
            pipeline.require_pairs(context, inputs, pairs)
            training_pairs = pipeline.write_dataset(context, inputs, pairs)
        if args.until == "pairs":
            pipeline.report(context, [])
            say(
                f"the data set: {lines.near(context.run.dataset)}; for other trainers: {lines.export(context.run.path)}"
            )
        if args.until:
            say(f"stopped after {args.until} as asked; go on with: {lines.resume(context.run.path)}")
            return errors.DONE
        adapter = pipeline.train(context, inputs, pairs, training_pairs)
        results = pipeline.evaluate(context, inputs, pairs, training_pairs, adapter)
        verdicts = pipeline.decide(context, results, inputs.override)
        sharing.clear(context)
        del pairs, training_pairs  # the report reads the records itself: not both at once
        pipeline.report(context, verdicts)
        return pipeline.exit_code(context, recipe, verdicts, inputs.override)


def announce(inputs: Inputs) -> None:
    """The first lines: which model this run is about, whether it is the recipe's, and what the user's files hold."""
    recipe = inputs.recipe
    if inputs.backend == "embedded":
        say(f"No GPU: {recipe.milestone} runs on the embedded {embedded.shown_name()}, not on {recipe.model.name}.")
    elif inputs.backend == "fake":
        say(f"{recipe.milestone} runs on the fake model: its text and numbers mean nothing.")
    elif inputs.backend == "cpu":
        say(f"{recipe.milestone} runs on {recipe.model.name} on the CPU, in float32.")
    else:
        say(f"{recipe.milestone} runs on {recipe.model.name} ({recipe.model.quantization}).")
    for line in inputs.told:
        say(printable(line))


if __name__ == "__main__":
    sys.exit(main())
