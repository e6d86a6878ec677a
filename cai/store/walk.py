"""The one way through a log: a single pass, line by line, with its sum file side by side; never its bytes in memory.

Owns what opening, reading, repairing and verifying learn of a log: its rows' keys and places, where damage begins,
which committed line was changed, how far the hashes reach. Reads only, and decides nothing (cai.store.records and
cai.commands.repair do).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cai.store import files
from cai.store.rows import Key, Lines
from cai.store.scan import BUFFER, Damage, Point, digest_of, key_of, parse_line, point_of, sum_line

CHANGED = "changed after it was committed"
CUT_OFF = "cut off before its newline"


class Walk:
    """What one pass found. `end`: bytes of good lines before the damage (or of the whole log); only those are rows.

    `by_key` has a number in `lines` for each key, its first row; rows that repeat a key stand in `repeats`.
    """

    def __init__(self, lines: Lines, log: BinaryIO, sums: BinaryIO, key: tuple[str, ...], late: bool) -> None:
        self.lines, self.key = lines, key
        self.by_key: dict[Key, int] = {}
        self.repeats: list[tuple[int, int, int]] = []  # line, offset and size without the newline
        self.count = self.end = 0  # lines and bytes that are good
        self.size = 0  # of the whole log, as far as it was read
        self.covered = self.hashed = 0  # the end of the last line with a hash, and bytes of all that have one
        self.committed = 0  # how far the sum file says that the log was committed
        self.damage: Damage | None = None
        self.changed: Damage | None = None  # the first committed line before the damage whose bytes are others now
        self.followed = False  # a readable line stands after the damage
        self.torn = False  # the last line has no newline
        self.late = bytearray()  # with `late`: the sum file's lines for the rows behind `covered`
        self._keep_late = late
        self._log, self._sums = log, sums
        self._said = self._next()

    @property
    def whole(self) -> bool:
        """Nothing is odd, and every byte has its hash."""
        return (
            not (self.damage or self.changed or self.repeats) and self.end == self.size == self.hashed == self.committed
        )

    @property
    def is_torn_tail(self) -> bool:
        """Is the damage what a crash leaves (to be cut), and not what a disk or an editor did?"""
        assert self.damage is not None
        if self.committed and self.committed <= self.damage.offset:
            return True  # behind the last committed byte: a batch that was never synced, whatever it holds
        return not self.followed and (self.torn or not self.committed)

    def _next(self) -> bytes:
        """The sum file's next line that is none of an append's empty ones; b"" at its end."""
        while (said := self._sums.readline()) == b"\n":
            pass
        return said

    def finish(self) -> Walk:
        """The whole way, also past what is odd."""
        for line in self._log:
            self.size += len(line)
            row = parse_line(line[:-1], self.key) if line.endswith(b"\n") else CUT_OFF  # a torn tail may be long
            if isinstance(row, str):
                self.damage = Damage(self.count + 1, self.end, row)
                self._pass_damage(line)
                break
            self._take(line, key_of(row, self.key))
        for _ in self.points():  # hashes of bytes that are gone, or damaged
            pass
        return self

    def points(self) -> Iterator[Point]:
        """What the sum file says of the lines that were not passed yet."""
        while self._said:
            if point := self._point():
                self.committed = point.end
                yield point
            self._said = self._next()

    def _take(self, line: bytes, name: Key) -> None:
        """A readable line: its hash, where there is one to compare or to keep, and its key."""
        end = self.end + len(line)
        mine = Point(self.end, end, digest_of(memoryview(line)[:-1]) if self._said or self._keep_late else "")
        summed = sum_line(mine)
        self.late += summed if self._keep_late else b""
        while self._said:
            point = mine if self._said == summed else self._point()
            if point is not None and point.start >= end:
                break  # a gap: nothing is said of this line
            self._said = self._next()
            self.committed = point.end if point is not None else self.committed
            if point == mine:
                self.covered, self.hashed = end, self.hashed + len(line)
                self.late.clear()
                break
            if point is not None and self.changed is None:
                self.changed = Damage(self.count + 1, point.start, CHANGED)
        self.count += 1
        if name in self.by_key:
            self.repeats.append((self.count, self.end, len(line) - 1))
        else:
            self.by_key[name] = self.lines.add(name, self.end, len(line) - 1)
        self.end = end

    def _point(self) -> Point | None:
        return point_of(self._said, self.committed)

    def _pass_damage(self, line: bytes) -> None:
        """Whether a readable line follows and how the log ends; a line that is still being written is its end."""
        self.torn = not line.endswith(b"\n")
        while not self.torn and (line := self._log.readline()):
            self.size += len(line)
            self.torn = not line.endswith(b"\n")
            self.followed |= not self.torn and not isinstance(parse_line(line[:-1], self.key), str)


@contextmanager
def walking(
    lines: Lines, fd: int, sum_path: Path | None, key: tuple[str, ...], *, late: bool = False
) -> Iterator[Walk]:
    """A pass that begins at the log's first byte, noted in `lines`; without `sum_path` no hash is compared.

    Errors: CaiError(IO) for a sum file that cannot be read (one that is not there has no hashes), OSError of the log.
    """
    with _opened(sum_path) as sums, open(os.dup(fd), "rb", BUFFER) as log:
        log.seek(0)
        yield Walk(lines, log, sums, key, late)


def _opened(sum_path: Path | None) -> BinaryIO:
    if sum_path is None:
        return io.BytesIO()
    try:
        return sum_path.open("rb", BUFFER)
    except FileNotFoundError:
        return io.BytesIO()
    except OSError as error:
        raise files.io_error(sum_path, "reading", error) from error


def walk(lines: Lines, fd: int, sum_path: Path | None, key: tuple[str, ...], *, late: bool = False) -> Walk:
    """The whole way of `walking`."""
    with walking(lines, fd, sum_path, key, late=late) as found:
        return found.finish()
