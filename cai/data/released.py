"""Rows that finish in any order, released in unit order; those that wait for others stand in a shard meanwhile.

Owns the order of release and what a kill leaves. The log's order depends on no timing. Invariants: a row that was taken
is on disk, in the log or in the shard, before the next ones are asked for; a row of a shard is not drawn again; the
shard goes when every row stands in the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from cai.data.stage import Stage, Unit
from cai.run import sharing
from cai.run.context import Context
from cai.store.row_types import Record


class Released:
    """One stage of a run of one process. `units`: those that have no row in the log, in the order of their release."""

    def __init__(self, context: Context, stage: Stage, units: Sequence[Unit], round_: int) -> None:
        self._units, self._front = units, 0
        self._shard = sharing.Shared(context, context.log, stage.name, round_)
        kept = {(row["stage"], row["item"], row["round"]): row for row in self._shard.spare.values()}
        found = ((unit.item, kept.get((stage.name, unit.item, unit.round))) for unit in units)
        self._held = {item: cast(Record, row) for item, row in found if row is not None}

    @property
    def missing(self) -> list[Unit]:
        """The units of which no attempt kept a row."""
        return [unit for unit in self._units[self._front :] if unit.item not in self._held]

    def take(self, rows: Sequence[Record]) -> list[Record]:
        """The rows whose turn it is, in order; the others of these are on disk when this returns."""
        self._held |= {row["item"]: row for row in rows}
        first = self._front
        while self._front < len(self._units) and self._units[self._front].item in self._held:
            self._front += 1
        ready = [self._held.pop(unit.item) for unit in self._units[first : self._front]]
        self._shard.put(row for row in rows if row["item"] in self._held)
        return ready

    def end(self) -> None:
        assert self._front == len(self._units) and not self._held
        self._shard.done()
