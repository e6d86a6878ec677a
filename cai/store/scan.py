"""Reading the bytes of an append-only log: which lines are rows, where damage begins, what was changed since.

Owns the format on disk: lines that end in the newline byte, and the sum file's points (from, to, hash of the line).
Pure but for `read_points`; decides what is torn, but cuts and repairs nothing (cai.store.records, cai.commands.repair
do).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import orjson

from cai.store import files
from cai.store.jsonl import Row
from cai.store.rows import Key

RECORD_KEY = ("stage", "item", "round")
SUM_LINE = re.compile(rb"^(\d{1,18}) (\d{1,18}) ([0-9a-f]{16})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Damage:
    """The first line that is no record: its number (from 1), byte offset and what is wrong with it."""

    line: int
    offset: int
    reason: str


@dataclass(slots=True)
class Scan:
    """What the bytes of a log hold. `end`: offset after the last good line before `damage` (or of the whole file).

    `rows` is empty where only the places were asked for.
    """

    rows: list[Row] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)  # of each row
    offsets: list[int] = field(default_factory=list)  # byte offset of each row
    lines: list[int] = field(default_factory=list)  # line number of each row
    end: int = 0
    damage: Damage | None = None
    followed: bool = False  # a readable line stands after the damage
    all_damage: list[Damage] = field(default_factory=list)


def parse_line(line: bytes, key: tuple[str, ...]) -> Row | str:
    """The row, or the reason why the line is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "NUL bytes" if b"\0" in line else "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    missing = [name for name in key if isinstance(row.get(name, []), list | dict)]
    return f"without {', '.join(missing)}" if missing else row


def key_of(row: Row, key: tuple[str, ...]) -> Key:
    """A row's key; its words are kept once for all rows."""
    return tuple(sys.intern(value) if isinstance(value := row[part], str) else value for part in key)


def lines_of(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """(line, whole) one after another, split on the newline byte only; the last may lack its newline."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        yield data[start : end if end >= 0 else None], end >= 0
        start = end + 1 if end >= 0 else len(data)


def scan(data: bytes, key: tuple[str, ...] = RECORD_KEY, *, keep: bool = True) -> Scan:
    """Read every line. A last line without newline is torn even if it parses. `keep`: the rows, not only their keys."""
    found, offset = Scan(), 0
    for number, (line, whole) in enumerate(lines_of(data), start=1):
        row = parse_line(line, key) if whole else "cut off before its newline"
        if isinstance(row, str):
            found.all_damage.append(Damage(number, offset, row))
        else:
            if keep:
                found.rows.append(row)
            found.keys.append(key_of(row, key))
            found.offsets.append(offset)
            found.lines.append(number)
            if not found.all_damage:
                found.end = offset + len(line) + 1
        offset += len(line) + 1
    if found.all_damage:
        found.damage = found.all_damage[0]
        found.followed = bool(found.offsets) and found.offsets[-1] > found.damage.offset
    return found


class Point(NamedTuple):
    """A line of the sum file: bytes `start` to `end` of the log, one line of it, have the hash `digest`."""

    start: int
    end: int
    digest: str


def digest_of(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def points_of(data: bytes, start: int) -> Iterator[Point]:
    """A point for each line of `data`, which stands at byte `start` of the log."""
    for line in data.split(b"\n")[:-1]:
        end = start + len(line) + 1
        yield Point(start, end, digest_of(line))
        start = end


def encode_points(points: Iterable[Point]) -> bytes:
    # The leading newline closes a line that a crash tore; the reader passes over the empty one.
    return b"\n" + b"".join(b"%d %d %s\n" % (point.start, point.end, point.digest.encode()) for point in points)


def read_points(path: Path) -> list[Point]:
    """The sum file's readable lines in rising order; it is never synced, so torn or NUL lines are passed over."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.io_error(path, "reading", error) from error
    points: list[Point] = []
    last = 0
    for first, behind, digest in SUM_LINE.findall(data):
        start, end = int(first), int(behind)
        if last <= start < end:
            points.append(Point(start, end, digest.decode()))
            last = end
    return points


def foreign_lines(path: Path) -> int:
    """Lines of a sum file that are none of its own; what a crash leaves (NULs, the torn last line) counts too."""
    lines = path.read_bytes().split(b"\n")
    return sum(bool(line) and not SUM_LINE.fullmatch(line) for line in lines)


def changed(data: bytes | memoryview, points: Iterable[Point]) -> Point | None:
    """The first committed line whose bytes are no longer what was committed.

    A line that now ends elsewhere counts as changed; one that is gone with everything behind it does not (a shortened
    log is no edit, and is told apart by its length).
    """
    view, size, hash_of = memoryview(data), len(data), hashlib.blake2b
    for point in points:
        start, end, digest = point
        if end > size:
            return point if start < size else None
        if data[end - 1] != 10 or hash_of(view[start : end - 1], digest_size=8).hexdigest() != digest:
            return point
    return None


def is_torn_tail(data: bytes, found: Scan, points: list[Point]) -> bool:
    """Is the damage what a crash leaves (to be cut), and not what a disk or an editor did?"""
    assert found.damage is not None
    if points and points[-1].end <= found.damage.offset:
        return True  # behind the last committed byte: a batch that was never synced, whatever it holds
    if found.followed:
        return False
    return not data.endswith(b"\n") or not points
