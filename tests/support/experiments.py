"""What the tests of experiments share: a project's folder, and a run as a kill leaves it."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.runs import ROOT


def lay_out(folder: Path) -> None:
    """What a recipe names: cai.toml, constitution.yaml, prompts/."""
    for name in ("cai.toml", "constitution.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "prompts", folder / "prompts")


def kill_in(log: Path, run: Path, data: bytes) -> None:
    """The log holds these bytes and no sums, and the attempt that wrote them has no end: no digest of what it left."""
    log.write_bytes(data)
    log.with_suffix(".sum").unlink()
    forget_end(run)


def forget_end(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(line for line in lines if b'"kind":"files"' not in line))
    (run / "events.sum").unlink()
