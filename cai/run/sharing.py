"""Slices of one step dealt to the processes of a run, and their rows brought together in order.

Owns who computes which slice, the shards and the merge: each process appends what it made to a log of its own below
`shards/` of the run folder, and when all slices are made every process has all rows, in slice order, for its own log.
One process has a shard, too, where rows are finished out of order (`cai.data.stage_loop`), for those that wait.
Whoever computes (`cai.run.loop`, `cai.data.stage_loop`) writes nothing else meanwhile. Invariants: the slices are those
of one process, so its bytes are; which process made a row leaves no trace; a row is in the log or in a shard from the
moment it was appended to either, whoever is killed, and a shard goes only when its rows stand in the log; the number of
processes may change at every start, down to one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import orjson

from cai.errors import CaiError
from cai.run.context import Context
from cai.store import records
from cai.store.jsonl import Row, encode
from cai.store.records import RecordLog
from cai.store.rows import Key
from cai.world import gather, share, world

FOLDER = "shards"


class Shared:
    """One step of a run among its processes: `mine`, `put` for what was made, then `settled`."""

    def __init__(self, context: Context, log: RecordLog, label: str, round_: int) -> None:
        self.context, self.log, self.label = context, log, f"in {label}, {round_}"
        self.folder = shards_of(context, log) / re.sub(r"[^A-Za-z0-9.]+", "-", f"{label}-{round_}")
        self.spare: dict[Key, Row] = {}
        found = share(self._left_over() if world().first else b"", self.label, context.stopped)
        for row in orjson.loads(found):
            if (key := self._key(row)) not in self.spare and not log.has(*key):
                self.spare[key] = row
        self._made: list[Row] = []
        self._shard: RecordLog | None = None
        context.progress.shares = world().size

    def _key(self, row: Row) -> Key:
        return tuple(row[name] for name in self.log.key)

    def _left_over(self) -> bytes:
        """The rows of shards that an earlier attempt left; what cannot be read is made again."""
        found: list[Row] = []
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                found += records.look(path, self.log.key)
            except CaiError as error:
                self.context.run.event("shard_unread", shard=str(path.name), why=str(error)[:200])
        return orjson.dumps(found)

    def mine(self, slices: Sequence[Sequence[Key]]) -> Iterator[int]:
        """Numbers of the slices that this process computes: every n-th of those that no shard holds whole."""
        lacking = [
            number
            for number, part in enumerate(slices)
            if not all(key in self.spare or self.log.has(*key) for key in part)
        ]
        for number in lacking[world().rank :: world().size]:
            self.context.check_stop(self.label)
            yield number

    def put(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Keep rows that this process made: on disk when this returns."""
        kept = [orjson.loads(encode(row)) for row in rows]
        if not kept:
            return
        if self._shard is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = f"{self.context.home[1]:04d}-{world().rank}.jsonl"  # never one of an earlier attempt's
            self._shard = RecordLog.open(self.folder / name, self.context.run.quarantine, key=self.log.key)
        self._shard.append(kept)
        self._made += kept

    def done(self) -> None:
        """Alone: every row stands in the log, and the shards go."""
        if self._shard is not None:
            self._shard.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self.folder.parents[:2]:
            with suppress(OSError):  # another step's shards are in it
                folder.rmdir()

    def settled(self, slices: Sequence[Sequence[Key]]) -> Iterator[list[Row]]:
        """The rows of each slice, in order, made by any process; the shards go when the caller has taken them all."""
        progress = self.context.progress
        mine = {"rows": self._made, "done": [progress.finished, progress.tokens]}
        found = [orjson.loads(part) for part in gather(orjson.dumps(mine), self.label, self.context.stopped)]
        progress.joined(*(sum(part["done"][place] for part in found) for place in (0, 1)))
        made = {self._key(row): row for part in found for row in part["rows"]}
        rows = made | {key: row for key, row in self.spare.items() if key not in made}
        place = {key: number for number, part in enumerate(slices) for key in part}
        by_slice: list[list[Row]] = [[] for _ in slices]
        for key, row in rows.items():
            if key in place:
                by_slice[place[key]].append(row)
        yield from by_slice
        if self._shard is not None:
            self._shard.close()
        gather(b"", f"{self.label}: merged", self.context.stopped)
        if world().first:  # all have closed theirs, and the first one's log holds the rows
            shutil.rmtree(self.folder, ignore_errors=True)
        gather(b"", f"{self.label}: cleared", self.context.stopped)


def begin(context: Context, log: RecordLog, label: str, round_: int = 0) -> Shared | None:
    """How this step is shared; None where one process does it, as it always did, and no shard was left of several."""
    if not world().several and not (context.home[0] / FOLDER).exists():
        return None
    return Shared(context, log, label, round_)


def agreed(number: int, doing: str) -> int:
    """The first process's number, where each would find one of its own (rows that fit into memory)."""
    return int(share(b"%d" % number, doing)) if world().several else number


def shards_of(context: Context, log: RecordLog) -> Path:
    """Where the shards of a log stand; those of another mark (`open_marked`) are others."""
    name = log.path.relative_to(context.run.path).with_suffix("")
    head = cast("Row | None", log.get("fingerprint", 0, 0))
    mark = f"-{head['of']}" if head is not None else ""
    return context.home[0] / FOLDER / f"{'.'.join(name.parts)}{mark}"


def clear(context: Context) -> None:
    """At the end of a whole run: every row stands in its log."""
    if world().first:
        shutil.rmtree(context.home[0] / FOLDER, ignore_errors=True)
