"""The input files of a run, each read once: path, bytes and hash; and whether the user's instructions only grew.

Owns where the bytes of an input come from: the file, or on a resume the run's own copy of a file that is gone. Whoever
hashes, parses or copies an input takes these bytes. Doesn't own what the files mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError
from cai.recipe.intake import instructionfile, pairfile
from cai.recipe.intake.instructionfile import Intake
from cai.store.jsonl import JsonObject
from cai.store.reading import MOST_BYTES, MOST_WRITTEN_BYTES, Missing, read_once

NAME = "instructions.file"
PAIRS = pairfile.KEY


@dataclass(frozen=True)
class InputFile:
    """`path`: where it was read; `sha`: 16 hex of `data`; `note`: what is to be said about it, "" for nothing."""

    path: Path
    data: bytes
    note: str = ""

    @property
    def sha(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:16]


def read_all(paths: Mapping[str, Path], run: Path | None = None, said: Collection[str] = ()) -> dict[str, InputFile]:
    """Every file by its name in the run folder. `run`: on a resume, where copies are, for files that are gone.

    `said`: keys that --set names now; a file that is asked for now and missing is a fault, no copy stands in for it.
    """
    return {name: _one(name, path, run, said) for name, path in paths.items()}


def _one(name: str, path: Path, run: Path | None, said: Collection[str]) -> InputFile:
    key = {"constitution.yaml": "constitution", NAME: NAME, PAIRS: PAIRS}.get(name, "prompts")
    where = f"{path}: {key}"
    most = MOST_BYTES if name in (NAME, PAIRS) else MOST_WRITTEN_BYTES
    try:
        return InputFile(path, read_once(path, where=where, most=most))
    except Missing:
        copy = run / name if run else path
        if key in said or not copy.is_file() or copy == path:
            raise
        note = f"{name}: {path} is gone; this run goes on with its own copy"
        return InputFile(copy, read_once(copy, where=f"{copy}: {key}", most=most), note)


def grown_from(run: Path, manifest: JsonObject, now: Intake, *, key: str, pool: str) -> InputFile | None:
    """The run's own copy of its instructions if the file as it is now holds all of them, in their order, and more.

    Rows are known by their text, so lines that came in between change none. None if it is no such growth, or if the
    copy is not what the manifest says.
    """
    before = run / NAME
    try:
        copy = InputFile(before, read_once(before, where=f"{before}: {NAME}"))
        if manifest.get("files", {}).get(NAME) != copy.sha:
            return None
        then = instructionfile.read(copy.data, str(before), key=key, pool=pool)
    except CaiError:
        return None
    rest = ((row.text, row.pool) for row in now.requests)
    return copy if all((row.text, row.pool) in rest for row in then.requests) else None
