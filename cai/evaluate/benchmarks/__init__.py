"""Public benchmarks on a run's adapter: HarmBench, XSTest and MT-Bench, base against tuned.

`command` serves `--benchmark LIST --resume RUN [--limit N]`; `measure` is the same within a milestone. All answers are
generated first, then a judge is loaded where a verdict is missing. Imports neither torch nor scipy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai import errors
from cai.errors import CaiError

if TYPE_CHECKING:
    from cai.data.stage import Context
    from cai.evaluate.benchmarks.loaders import Task
    from cai.evaluate.gates import Measured
    from cai.recipe.settings_benchmarks import BenchmarksSection

NAMES = ("harmbench", "xstest", "mtbench")
SEEN = 5  # answers from which on it is strange that both arms say the same


def command(args: argparse.Namespace) -> int:
    """Measure the named benchmarks on a run that has an adapter; decide its gates again and rewrite its report."""
    from cai import pipeline
    from cai.session import locate, read_inputs, say, session

    names = parse_names(args.benchmark)
    if not args.resume:
        raise CaiError("--benchmark: which run? Add --resume runs/ID (or runs/latest).")
    limit, args.limit = args.limit, 0  # rows of a benchmark here, not items of the run
    inputs = read_inputs(args)
    path = locate(args, args.resume)
    if not (path / "adapter" / "adapter_model.safetensors").is_file():
        raise CaiError(f"{path}: it has no adapter yet. Finish it: --resume {path}")
    check_files(names, inputs.recipe.benchmarks, inputs.folder)  # before --set is kept for the next resume
    with session(inputs, args) as context:
        figures = measure(context, names, inputs.folder, limit)
        say("\n".join(lines(figures)))
        pipeline.decide(context, pipeline.stored_figures(context.run.eval), inputs.override)
        pipeline.report(context, [])
    return errors.DONE


def parse_names(text: str) -> list[str]:
    """`harmbench,xstest` -> names, each known and once."""
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise CaiError(f"--benchmark: {(unknown or [text])[0]!r} is unknown. Known: {', '.join(NAMES)}.")
    return names


def measure(context: Context, names: Sequence[str], folder: Path, limit: int = 0) -> dict[str, Measured]:
    """Figures of the named benchmarks, merged into eval/benchmarks.json. `folder`: where recipe paths are resolved.

    Resumes from its records; with none missing, no model is loaded. Errors: Stopped; CaiError (files, judges).
    """
    from cai.evaluate.benchmarks.suite import measure_all

    return measure_all(context, names, folder, limit)


def require(section: BenchmarksSection, folder: Path) -> None:
    """Exit 2 where a file or judge of `benchmarks.run` cannot be had, or a file is not what it should be."""
    from cai.evaluate.benchmarks.suite import require_judge

    check_files(section.run, section, folder)
    for name in section.run:
        require_judge(name, section)


def check_files(names: Sequence[str], section: BenchmarksSection, folder: Path) -> None:
    """Exit 2 where a file of these benchmarks cannot be had or read: all of them at once, one line each."""
    from cai.evaluate.benchmarks.loaders import judge_prompts, load, refusal_prompt
    from cai.evaluate.benchmarks.sources import obtain

    readers: dict[str, Callable[[Any], Any]] = dict.fromkeys(names, load)
    if "mtbench" in names:
        readers["mtbench_prompts"] = judge_prompts
    if "xstest" in names and section.xstest_prompt:
        readers["xstest_prompt"] = refusal_prompt
    faults = []
    for name, read in readers.items():
        try:
            read(obtain(name, section, folder))
        except CaiError as error:
            if error.code != errors.USAGE:
                raise
            faults.append(str(error))
    if faults:
        raise CaiError("\n".join(faults))


def at_hand(section: BenchmarksSection, folder: Path) -> tuple[dict[str, list[Task]], list[str]]:
    """The tasks of every benchmark that needs no download, or that the milestone runs; the names of the others."""
    from cai.evaluate.benchmarks.loaders import load
    from cai.evaluate.benchmarks.sources import is_near, obtain

    near = [name for name in NAMES if is_near(name, section) or name in section.run]
    loaded = {name: load(obtain(name, section, folder)).tasks for name in near}
    return loaded, [name for name in NAMES if name not in near]


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The headline figures for the screen."""
    from cai.evaluate.benchmarks.figures import PRIMARY

    shown = [name for name in figures if name in PRIMARY or name.split(".")[1] in ("asr", "over_refusal", "score")]
    return [f"{name} {figures[name].text}, judge: {figures[name].judge}" for name in shown]
