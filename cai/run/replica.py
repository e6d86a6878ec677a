"""Every process but the first works in a copy of the run folder, as if it were its run; the first owns the real one.

Owns the copy. What a step reads of disk is then the same for all, and nothing is read while another process writes it.
Rows reach every copy through `cai.run.sharing`, so they hold the same rows as the run. The copy stands in TMPDIR and
goes with its process; of a process that was killed it stays there and is of no use to anybody.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from cai.run.folder import Run
from cai.run.sharing import FOLDER
from cai.store.jsonl import JsonObject
from cai.world import gather, share, world

NOT_COPIED = (
    ".lock", ".reviews.lock", ".holder.json", "status.json", "quarantine", "tracker", FOLDER, "report.*",
    "checkpoint-*", "damaged-*",
)  # fmt: skip


def lend(run: Run) -> None:
    """The first process, with its logs healed: tell the others where the run is, and wait until they have copied it."""
    if world().several:
        share(orjson.dumps([str(run.path.resolve()), run.attempt]), "opening the run")
        gather(b"", "copying the run")


@contextmanager
def borrowed(start: JsonObject) -> Iterator[tuple[Run, tuple[Path, int]]]:
    """Any other process: a run on a copy, the real folder and the attempt's number there."""
    path, attempt = orjson.loads(share(b"", "opening the run"))
    with tempfile.TemporaryDirectory(prefix=f"run-process-{world().rank}-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / Path(path).name
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        gather(b"", "copying the run")
        with Run.open(copy, **start) as run:
            yield run, (Path(path), int(attempt))
