"""`--sweep`: every combination of the values in [sweep], each a run of its own, then one table and two frontiers.

Owns the combinations, from which run each is forked, and where the page lies (`runs/sweep-<hash>/`). The runs are those
of any recipe: they are found again, forked and taken to their end by `whole_runs`, so the same line after a kill goes
on. Invariant: what is upstream of every changed key is made once; a combination that differs in training alone draws
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from cai import errors
from cai.commands.experiments import whole_runs
from cai.commands.experiments.whole_runs import Milestone
from cai.errors import CaiError
from cai.inputs import Inputs, read_inputs, runs_root
from cai.recipe.load import Recipe
from cai.recipe.settings_sweep import KEYS, OF_DATA
from cai.report import sweep
from cai.report.snapshot import read_story
from cai.run import lines, rates
from cai.run.events import read_events
from cai.run.manifest import read_manifest
from cai.terminal import duration, printable, say, usd, word

MOST_RUNS = 1000  # of one sweep: each is a whole training
Combination = tuple[tuple[str, object], ...]  # (name in [sweep], value), in the order of KEYS


def command(args: argparse.Namespace, milestone: Milestone) -> int:
    """Run what is missing of every combination, then write the page. A combination that fails is a row that says so."""
    inputs = read_inputs(whole_runs.plain(args, resume=None, fork=None))
    found = combinations(inputs.recipe)
    if args.dry_run:
        _tell(args, inputs, found)
        return errors.DONE
    base = whole_runs.first(args, milestone)
    sources: dict[Combination, Path] = {}
    runs: dict[Combination, Path] = {}
    failed: dict[Combination, str] = {}
    for place, one in enumerate(found, start=1):
        say(f"sweep: {place} of {len(found)}: {_shown(one)}")
        run = _run_of(sources.get(of_data(one), base), base, args, one)
        runs[one] = run
        try:
            whole_runs.finish(run, args, milestone)
            sources.setdefault(of_data(one), run)
        except CaiError as error:
            if error.code != errors.QUALITY:
                raise
            failed[one] = str(error).splitlines()[0]
            say(printable(f"sweep: {failed[one]}"))
    points = _points(found, runs, failed)
    page = sweep.write(runs_root(inputs.source, inputs.recipe) / f"sweep-{_name(base, found)}", points)
    for line in sweep.lines(points):
        say(printable(line))
    say(f"the table and the frontiers: {word(lines.near(page))}")
    return errors.DONE


def combinations(recipe: Recipe) -> list[Combination]:
    """Every combination of the values, those of one data set together. Error: no key has any."""
    axes = [(name, getattr(recipe.sweep, name)) for name in KEYS]
    used = [(name, values) for name, values in axes if values]
    if not used:
        raise CaiError("runner.py: --sweep: [sweep] names no value. Set some: --set 'sweep.beta=[0.05, 0.1, 0.3]'")
    if (many := math.prod(len(values) for _, values in used)) > MOST_RUNS:
        raise CaiError(f"runner.py: --sweep: [sweep] comes to {many:,} runs, at most {MOST_RUNS:,}. Take values out.")
    names = [name for name, _ in used]
    return [tuple(zip(names, values, strict=True)) for values in itertools.product(*(values for _, values in used))]


def of_data(one: Combination) -> Combination:
    """The part of a combination that changes the data."""
    return tuple((name, value) for name, value in one if name in OF_DATA)


def sets_of(one: Combination) -> list[str]:
    return [f"{KEYS[name]}={[value] if name == 'seeds' else value!r}" for name, value in one]


def _run_of(source: Path, base: Path, args: argparse.Namespace, one: Combination) -> Path:
    """The run of a combination: the recipe's own where it says the same, else a fork of `source`, found or made."""
    inputs = whole_runs.forked_inputs(source, args, sets_of(one))
    return base if whole_runs.going_on(inputs) == base else whole_runs.forked(source, args, sets_of(one))


def _points(
    found: Sequence[Combination], runs: dict[Combination, Path], failed: dict[Combination, str]
) -> list[sweep.Point]:
    """One a combination without its seed."""
    groups: dict[Combination, list[Combination]] = {}
    for one in found:
        groups.setdefault(tuple((name, value) for name, value in one if name != "seeds"), []).append(one)
    points = []
    for settings, members in groups.items():
        good = [one for one in members if one not in failed]
        stories = [read_story(runs[one]) for one in good]
        figures = tuple(map(sweep.figures_of, stories))
        names = tuple(runs[one].name for one in members)
        shown = tuple(
            (KEYS[name], f"{value:g}" if isinstance(value, float) else str(value)) for name, value in settings
        )
        why = tuple(failed[one] for one in members if one in failed)
        points.append(sweep.Point(shown, names, figures, why, any(map(sweep.stands_in, stories))))
    return points


def _name(base: Path, found: Sequence[Combination]) -> str:
    return hashlib.sha256(repr((base.name, list(found))).encode()).hexdigest()[:6]


def _shown(one: Combination) -> str:
    return ", ".join(f"{KEYS[name]} = {value}" for name, value in one)


def _tell(args: argparse.Namespace, inputs: Inputs, found: Sequence[Combination]) -> None:
    """What it would run and, where a run of this recipe has measured it, what that takes."""
    sets_of_data = {of_data(one) for one in found}
    say(f"sweep: {len(found)} runs over {len(sets_of_data)} data set(s); what no key changes is drawn once")
    for one in found:
        say(f"  {_shown(one)}")
    base = whole_runs.named(args)
    speed = _speed(base) if base is not None else None
    if speed is None:
        say("time: no whole run of this recipe has measured it, so none is given")
        return
    made = len(sets_of_data - {()})
    seconds = made * speed.generation_seconds + len(found) * (speed.training_seconds + speed.rest_seconds)
    price = inputs.recipe.budget.usd_per_hour
    money = f", {usd(seconds / 3600 * price)}" if price else ""
    say(f"time: about {duration(seconds)}{money}, at the rates of {speed.run_id}; what is finished already is not run")


def _speed(run: Path) -> rates.Speed | None:
    return rates.from_events(run.name, read_manifest(run / "manifest.json"), read_events(run / "events.jsonl"))
