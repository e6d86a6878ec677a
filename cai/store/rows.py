"""Rows of a log that stay on disk: where each line stands is in memory, a row is read when it is asked for.

Owns what keeps a run's memory small: 5,000 items are 60,000 rows. Decides nothing about a line (cai.store.scan does).
"""

from __future__ import annotations

import os
import weakref
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import eq
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, overload

import orjson

from cai import errors
from cai.errors import CaiError
from cai.store import files
from cai.store.jsonl import Row

Key = tuple[Any, ...]  # texts and numbers, as many as the log has key fields
R = TypeVar("R", bound=Mapping[str, object])  # the kind of a log's rows


class Lines:
    """The lines of one open file: `fd` is duplicated, so rows can be read after the log is closed or replaced.

    A log that is not there has no `fd` and no lines.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.path = path
        self.keys: list[Key] = []
        self._starts, self._sizes = array("Q"), array("L")
        self._fd = -1 if fd is None else os.dup(fd)
        if fd is not None:
            weakref.finalize(self, os.close, self._fd)

    def add(self, key: Key, start: int, size: int) -> int:
        """Note a whole line; gives its number. `size`: bytes without the newline."""
        self.keys.append(key)
        self._starts.append(start)
        self._sizes.append(size)
        return len(self.keys) - 1

    def row(self, number: int) -> Row:
        """Errors: CaiError(IO), and CaiError(CORRUPT) for a line that was whole and is no JSON any more."""
        return self.read(self._starts[number], self._sizes[number], number + 1)

    def read(self, start: int, size: int, line: int) -> Row:
        """The row of `size` bytes at `start`; `line`: its number, from 1. Errors: as `row`."""
        try:
            return orjson.loads(os.pread(self._fd, size, start))
        except OSError as error:
            raise files.io_error(self.path, "reading", error) from error
        except orjson.JSONDecodeError:
            where = f"{self.path}: line {line}, byte {start}"
            raise CaiError(
                f"{where}: changed while the run was going; resume to check the log", errors.CORRUPT
            ) from None


def of_stages(rows: Iterable[R], stages: Collection[str]) -> Iterator[R]:
    """The rows of these stages, in order; of a log only those are read."""
    if isinstance(rows, Rows):
        return (rows[place] for place, key in enumerate(rows.each_key()) if key[0] in stages)
    return (row for row in rows if row["stage"] in stages)


def keys_of(rows: Sequence[Mapping[str, object]]) -> Iterator[Key]:
    """(stage, item, round) of each record; of a log none is read."""
    if isinstance(rows, Rows):
        return rows.each_key()
    return ((row["stage"], row["item"], row["round"]) for row in rows)


class Rows(Sequence[R], Generic[R]):
    """Rows of `lines` by number (all of them without `numbers`), each read when it is asked for."""

    def __init__(self, lines: Lines, numbers: Sequence[int] | None = None) -> None:
        self.lines = lines
        self.numbers = range(len(lines.keys)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> R: ...

    @overload
    def __getitem__(self, place: slice) -> list[R]: ...

    def __getitem__(self, place: int | slice) -> R | list[R]:
        if isinstance(place, slice):
            return [cast(R, self.lines.row(number)) for number in self.numbers[place]]
        return cast(R, self.lines.row(self.numbers[place]))

    def __iter__(self) -> Iterator[R]:
        return (cast(R, self.lines.row(number)) for number in self.numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def each_key(self) -> Iterator[Key]:
        """The rows' keys, without reading them."""
        return (self.lines.keys[number] for number in self.numbers)


class Latest(Mapping[Key, R], Generic[R]):
    """Part of a row's key -> the last row that has it."""

    def __init__(self, rows: Rows[R], parts: int) -> None:
        self._lines = rows.lines
        self._numbers = {key[:parts]: number for key, number in zip(rows.each_key(), rows.numbers, strict=True)}

    def __getitem__(self, key: Key) -> R:
        return cast(R, self._lines.row(self._numbers[key]))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class ByItem(Mapping[int, Mapping[str, Row]]):
    """item -> metric -> row, over a mapping of (metric, item); an item's rows are read when it is asked for."""

    def __init__(self, rows: Mapping[Key, Row]) -> None:
        self._rows = rows
        self._metrics: dict[int, list[str]] = {}
        for metric, item in rows:
            self._metrics.setdefault(item, []).append(metric)

    def __getitem__(self, item: int) -> Mapping[str, Row]:
        return {metric: self._rows[metric, item] for metric in self._metrics[item]}

    def __iter__(self) -> Iterator[int]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)
