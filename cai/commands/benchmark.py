"""`--benchmark NAMES --resume RUN`: benchmarks on a run that has an adapter."""

from __future__ import annotations

import argparse

from cai import errors
from cai.errors import CaiError
from cai.evaluate.benchmarks.suite import check_files, lines, measure_all, parse_names
from cai.run import digests
from cai.run.events import read_events


def command(args: argparse.Namespace) -> int:
    """Measure the named benchmarks on a run that has an adapter; decide its gates again and rewrite its report."""
    from cai import pipeline
    from cai.inputs import locate, read_inputs
    from cai.models import checks
    from cai.run.lines import resume
    from cai.session import session
    from cai.terminal import say
    from cai.training.train import load_result

    names = parse_names(args.benchmark)
    if not args.resume:
        raise CaiError("--benchmark: which run? Add --resume runs/ID (or runs/latest).")
    limit, args.limit = args.limit, 0  # rows of a benchmark here, not items of the run
    inputs = read_inputs(args)
    path = locate(args, args.resume)
    if load_result(path / "train") is None:  # none, or not the bytes that were trained
        raise CaiError(f"{path}: it has no whole adapter. Finish it: {resume(path)}")
    digests.refuse_edited(path, read_events(path / "events.jsonl"), _decides, "--benchmark")
    check_files(names, inputs.recipe.benchmarks, inputs.folder)  # before --set is kept for the next resume
    with session(inputs, args) as context:
        checks.remake(context)
        figures = measure_all(context, names, inputs.folder, limit)
        say("\n".join(lines(figures)))
        pipeline.decide(context, pipeline.stored_figures(context.run.eval), inputs.override)
        pipeline.report(context, [])
    return errors.DONE


def _decides(name: str) -> bool:
    """Whether the gates are decided again by what stands in this file, and it is not made again before."""
    made = ("eval/benchmarks.json", "eval/checks.json", "eval/gates.json")
    return digests.holds_figures(name) and name not in made
