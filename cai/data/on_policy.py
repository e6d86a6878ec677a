"""Which weights write a stage in a further round of a run (`on_policy.round` above 1).

Owns the run's copy of the adapter of the round before (adapter-start/) and the switch: that adapter answers, the base
judges, and critiques and revises unless the recipe says otherwise. Invariant: the adapter is the one whose hash the
recipe names, so a resume never goes on with another model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from cai import errors
from cai.errors import CaiError
from cai.run import digests
from cai.run.context import Context
from cai.run.folder import Run
from cai.store.files import fsync_folder, io_error

FOLDER = "adapter-start"
WEIGHTS = "adapter_model.safetensors"
ANSWERS = ("answers", "second_answers")
REVIEWS = ("critiques", "revisions")


def start_of(context: Context) -> Path:
    """The adapter of the round before. Errors: CaiError(CORRUPT) where it is gone or another one."""
    folder, wanted = context.run.path / FOLDER, context.recipe.on_policy
    path = folder / WEIGHTS
    if not path.is_file() or _sha(path, path.stat().st_mtime_ns) != wanted.adapter:
        raise CaiError(
            f"{folder}: is missing or not the adapter of {wanted.parent}, with which this round began. Copy "
            f"{wanted.parent}/adapter there, or begin the round again with --next-round.",
            errors.CORRUPT,
        )
    return folder


@lru_cache(maxsize=4)
def _sha(path: Path, changed: int) -> str:
    """Read once a process: an adapter may have half a gigabyte."""
    return digests.digest_of(path)


def take(source: Path, run: Run) -> None:
    """adapter-start/ of a new run, whole or not at all: the adapter in `source`."""
    target = run.path / FOLDER
    beside = target.with_name(f".{FOLDER}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(mode=0o700)
        for name in (WEIGHTS, "adapter_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, beside / name)
        beside.rename(target)
        fsync_folder(run.path)
    except OSError as error:
        raise io_error(target, "copying the adapter", error) from error


def writes(stage: str, critic: str) -> bool:
    """Whether the adapter of the round before is on while a stage runs."""
    return stage in ANSWERS or (critic == "tuned" and stage in REVIEWS)


@contextmanager
def writer(context: Context, stage: str) -> Iterator[None]:
    """Within the block the loaded model is the one that writes this stage; in round one always the base."""
    section = context.recipe.on_policy
    if section.round == 1:
        yield
        return
    model = context.model()
    model.attach(start_of(context), context.recipe.lora)
    with model.adapter(writes(stage, section.critic)):
        yield
