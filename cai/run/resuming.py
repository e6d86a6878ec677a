"""What a resume may change of a run, decided before the run is opened; a run that is refused stays as it was.

Owns the refusals (another milestone, drifted inputs) and the one change of a trained run that is taken: more items.
Then the training and what was trained are set aside, for they are of fewer pairs; everything that was generated stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cai import errors
from cai.errors import CaiError
from cai.run.folder import Run, check_identity
from cai.run.lines import program
from cai.store import files
from cai.store.jsonl import JsonObject

MORE = ("items", "heldout.items")
ASIDE = "train", "adapter", "adapter-sft", "adapter-from-base"  # and adapter-seed-*; train/, which tells of it, first


def check(manifest: JsonObject, data: Mapping[str, str], training: Mapping[str, str], path: Path, asked: str) -> None:
    """Errors: CaiError(DRIFT), key by key. `data`, `training`: the two identities as the recipe has them now."""
    check_identity(manifest.get("identity", {}), data, str(path), asked)
    then = manifest.get("training_identity")
    if then is not None and not more_items(then, training):
        check_identity(then, training, str(path), asked)


def check_milestone(manifest: JsonObject, path: Path, milestone: str, asked: str) -> None:
    """Errors: CaiError(DRIFT) where a run is to be resumed as a run of another milestone."""
    of = str(manifest.get("milestone") or milestone)
    if milestone and milestone != of:
        raise CaiError(
            f"{path}: is a run of {of}, not of {milestone}. Go on with it: leave out --milestone.\n"
            f"  or reuse what is unchanged in a new run of {milestone}: {program()} {asked} --fork {path}",
            errors.DRIFT,
        )


def more_items(then: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether all that changed for a trained run is that there are more items, held-out ones included."""
    changed = [name for name in then.keys() | now.keys() if then.get(name) != now.get(name)]
    return bool(changed) and all(name in MORE and _grew(then.get(name), now.get(name)) for name in changed)


def _grew(then: str | None, now: str | None) -> bool:
    return then is not None and now is not None and then.isdigit() and now.isdigit() and int(now) > int(then)


def train_anew(run: Run) -> Path:
    """Set aside what was trained on fewer items. A kill in between: the next resume sets aside what is left."""
    target = run.quarantine / f"trained-{run.attempt}"
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = [*ASIDE, *sorted(path.name for path in run.path.glob("adapter-seed-*"))]
        for name in names:
            with suppress(FileNotFoundError):
                (run.path / name).rename(target / name)
        files.fsync_folder(target)
        files.fsync_folder(run.path)
    except OSError as error:
        raise files.io_error(target, "setting aside the training", error) from error
    run.manifest = {name: value for name, value in run.manifest.items() if name != "training_identity"}
    run.update_manifest()
    run.event("trained_anew", kept=str(target.relative_to(run.path)))
    return target
