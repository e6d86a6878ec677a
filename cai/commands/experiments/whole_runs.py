"""The runs that an experiment rests on: found among those that stand, else made, forked, and taken to their end.

Owns which run a recipe goes on with: the newest whose identity is the recipe's, so that a command which was killed is
simply given again. Doesn't own the pipeline: `milestone` is runner.py's, handed in. A failed gate ends no experiment.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cai import errors
from cai.commands import fork as forking
from cai.commands.probe import free
from cai.errors import CaiError
from cai.inputs import Inputs, in_run, locate, read_inputs, runs_root
from cai.recipe import load as recipes
from cai.report.snapshot import recipe_of
from cai.run.events import read_events
from cai.run.folder import Run
from cai.run.lines import near
from cai.run.manifest import read_manifest
from cai.run.run_ids import refuse_pipes, run_folders
from cai.session import create_run, start_facts
from cai.store.jsonl import JsonObject
from cai.terminal import say
from cai.training.train import load_result

Milestone = Callable[[Inputs, argparse.Namespace], int]
FORKED_FROM = "forked_from"  # in the manifest, from before the first row: whose answers it shares


def plain(args: argparse.Namespace, **changed: object) -> argparse.Namespace:
    """The arguments of a run alone, without the experiment's own flags; `--limit` counts prompts there, not items.

    Its time begins now: what another run of this process took is not this one's.
    """
    found = copy.copy(args)
    found.began = time.monotonic()
    cleared = {"against": None, "attribute": None, "without": None, "inverse": None, "dry_run": False, "limit": 0}
    cleared |= {"next_round": None, "sweep": False}
    for name, value in {**cleared, **changed}.items():
        setattr(found, name, value)
    return found


def going_on_with(run: Path, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a run that goes on by its own copy of the recipe."""
    return plain(args, recipe=run / "recipe.toml", resume=str(run), milestone="", set=[], fork=None)


def finished(run: Path) -> bool:
    """Whether it was trained, measured and decided, and its adapter is whole."""
    return (run / "eval" / "gates.json").is_file() and load_result(run / "train") is not None


def finish(run: Path, args: argparse.Namespace, milestone: Milestone) -> None:
    """Take a run to its end by its own copy of the recipe. Errors: CaiError of the step that failed."""
    if finished(run):
        return
    own = going_on_with(run, args)
    code = milestone(read_inputs(own), own)
    free()  # before the next run loads its own
    if code not in (errors.DONE, errors.GATE):
        raise CaiError(f"{run}: ended with exit code {code}; see above", code)


def inputs_of(run: Path, args: argparse.Namespace) -> Inputs:
    """A run's recipe, constitution and prompts as it holds them."""
    return read_inputs(going_on_with(run, args))


def manifests(root: Path) -> Iterator[tuple[Path, JsonObject]]:
    """Every run below `root` that can be read, newest first."""
    for path in reversed(run_folders(root)):
        with suppress(CaiError):
            refuse_pipes(path)
            manifest = read_manifest(path / "manifest.json")
            yield path, manifest


def going_on(inputs: Inputs, forked_from: str | None = None) -> Path | None:
    """The newest run that this recipe goes on with: same data, same training. `forked_from`: only forks of that run."""
    recipe = inputs.recipe
    counts = {"items": recipe.items, "heldout_items": recipe.heldout.items}
    for path, manifest in manifests(runs_root(inputs.source, recipe)):
        same = manifest.get("identity") == inputs.identity() and manifest.get("milestone") == recipe.milestone
        same = same and all(manifest.get(name) == count for name, count in counts.items())
        same = same and manifest.get(FORKED_FROM) == forked_from and _trains_alike(path, manifest, inputs)
        if same:
            return path
    return None


def _trains_alike(path: Path, manifest: JsonObject, inputs: Inputs) -> bool:
    """Its training is, or where it has not begun would be, the recipe's."""
    if "training_identity" in manifest:
        return bool(manifest["training_identity"] == inputs.identity(training=True))
    try:
        held, ours = recipe_of(path), inputs.recipe
    except CaiError:
        return False
    return (held.dpo, held.lora, held.hygiene) == (ours.dpo, ours.lora, ours.hygiene)


def first(args: argparse.Namespace, milestone: Milestone) -> Path:
    """The run to start from: the one that --resume names, else the recipe's newest, else a new one; at its end."""
    run = named(args)
    if run is None:
        own = plain(args, resume=None, fork=None)
        with create_run(read_inputs(own), own) as made:
            run = made.path
    finish(run, args, milestone)
    return run


def named(args: argparse.Namespace) -> Path | None:
    """The run that --resume names, or that the recipe goes on with; None: it is not there yet."""
    if args.resume:
        return locate(args, args.resume)
    return going_on(read_inputs(plain(args, resume=None, fork=None)))


def forked_inputs(source: Path, args: argparse.Namespace, sets: list[str]) -> Inputs:
    """The inputs of a fork of `source` in which these keys differ."""
    if in_run(recipes.read(args.recipe)):
        raise CaiError(f"{args.recipe}: is a run's copy of a recipe, and a fork needs the recipe. Name cai.toml.")
    return read_inputs(_forking(source, args, sets))


def _forking(source: Path, args: argparse.Namespace, sets: list[str]) -> argparse.Namespace:
    return plain(args, fork=str(source), resume=None, milestone="", set=[*args.set, *sets])


def forked(source: Path, args: argparse.Namespace, sets: list[str]) -> Path:
    """The fork of a finished run with these keys: found, or made; with every record that the change leaves alone."""
    inputs, asked = forked_inputs(source, args, sets), _forking(source, args, sets)
    path = going_on(inputs, source.name)
    if path is not None and any(event.get("kind") == "forked" for event in read_events(path / "events.jsonl")):
        return path
    with Run.open(path, **start_facts(inputs, asked)) if path else create_run(inputs, asked) as run:
        run.update_manifest(**{FORKED_FROM: source.name})
        forking.fill(forking.plan_of(source, inputs), run)
    say(f"forked {source.name} into {near(run.path)}: the records that nothing changed are shared")
    return run.path
