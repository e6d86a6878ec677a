"""The door between milestones: whether the gates of the one before, of the same recipe, let this one start.

Owns which stored verdict counts; `gates` decides, the pipeline stores. Invariant: a verdict that failed, cannot be
read, is not what its run left, or that only advises opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cai import errors
from cai.errors import CaiError
from cai.inputs import Inputs, runs_root
from cai.recipe import load as recipes
from cai.recipe.identity import short_hash
from cai.run import digests
from cai.run.events import read_events
from cai.run.manifest import read_manifest
from cai.run.run_ids import RUN_ID
from cai.store.jsonl import Row, read_object

GATES = "eval/gates.json"
ORDER = ("m0", "m1", "m2", "m3")


def recipe_key(identity: Mapping[str, str]) -> str:
    """What "the same recipe" means for runs of one milestone: the identity without the number of rounds."""
    return short_hash({key: value for key, value in identity.items() if key != "rounds"})


def check_milestone_before(inputs: Inputs) -> None:
    """A milestone does not start after a failed gate of the one before, of the same recipe (exit 7)."""
    name = inputs.recipe.milestone
    if name not in ORDER[1:] or inputs.override:
        return
    earlier = ORDER[ORDER.index(name) - 1]
    root, key = runs_root(inputs.source, inputs.recipe), _key_as(inputs, earlier)
    found = sorted(path / GATES for path in root.glob(f"*-{earlier}-*") if RUN_ID.fullmatch(path.name))
    if key is None:
        return
    for path in reversed(found):
        if (why := _changed(path)) and _run_key(path.parents[1]) == key:
            raise _not_passed(path, f"the verdict of {earlier} {why} after the run ended", name)
        if not path.is_file():
            continue
        verdict = _stored_verdict(path)
        if verdict is None:
            if _run_key(path.parents[1]) != key:
                continue  # a run of another recipe, or one that no longer says of which: its verdict is not asked for
            raise _not_passed(path, f"the verdict of {earlier} cannot be read", name)
        if verdict["recipe"] != key:
            continue
        if not verdict["enforced"]:
            continue  # a verdict that only advises opens nothing: an enforced one before it still counts
        if not verdict["passed"] and not verdict.get("override"):
            raise _not_passed(path, f"{earlier} did not pass its gate", name)
        return


def _changed(path: Path) -> str:
    """How the verdict differs from what the last attempt of its run left; "" also where no attempt ended since."""
    sums, settled = digests.left(read_events(path.parents[1] / "events.jsonl"))
    entry = sums.get(GATES)
    return digests.fault(path.parents[1], GATES, entry) if settled and entry else ""


def _stored_verdict(path: Path) -> Row | None:
    """eval/gates.json if it is whole: what it says decides whether the next milestone starts."""
    found, kinds = read_object(path), {"recipe": str, "passed": bool, "enforced": bool}
    return found if all(isinstance(found.get(name), kind) for name, kind in kinds.items()) else None


def _run_key(run: Path) -> str | None:
    """`recipe_key` of a run by its manifest; None where that cannot be read either."""
    try:
        return recipe_key(read_manifest(run / "manifest.json").get("identity", {}))
    except CaiError:
        return None


def _not_passed(path: Path, why: str, milestone: str) -> CaiError:
    cure = 'Cure it (a resume decides again), or go on with --override-gate "why" (the reason stays in the report).'
    return CaiError(f"{path}: {why}, so {milestone} does not start. {cure}", errors.GATE)


def _key_as(inputs: Inputs, milestone: str) -> str | None:
    """`recipe_key` of these inputs had they been read for another milestone, whose overlays may change any key.

    None where the recipe has no such milestone, or none that can run.
    """
    try:
        recipe = recipes.resolve(
            inputs.source, milestone=milestone, sets=inputs.sets, embedded=inputs.backend == "embedded"
        )
    except CaiError:
        return None
    return recipe_key(replace(inputs, recipe=recipe).identity())
