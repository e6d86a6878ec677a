"""Reading the bytes of an append-only log: which lines are rows, where damage begins, what was changed since.

Owns the format on disk: lines that end in the newline byte, and the sum file's points (from, to, hash of the line).
Reads only, a line at a time; a whole pass is cai.store.walk's, cuts and repairs are cai.store.records' and
cai.commands.repair's.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import orjson

from cai.store import files
from cai.store.jsonl import Row
from cai.store.rows import Key

RECORD_KEY = ("stage", "item", "round")
SCORE_KEY = ("metric", "item", "round")  # of a log under eval/
SUM_LINE = re.compile(rb"(\d{1,18}) (\d{1,18}) ([0-9a-f]{16})")
BUFFER = 1 << 20
ODD = (list, dict)  # no value of a key


@dataclass(frozen=True, slots=True)
class Damage:
    """The first line that is no record: its number (from 1), byte offset and what is wrong with it."""

    line: int
    offset: int
    reason: str


def parse_line(line: bytes, key: tuple[str, ...]) -> Row | str:
    """The row, or the reason why the line is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "NUL bytes" if b"\0" in line else "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    missing = [name for name in key if isinstance(row.get(name, []), ODD)]
    return f"without {', '.join(missing)}" if missing else row


def key_of(row: Row, key: tuple[str, ...]) -> Key:
    """A row's key; its words are kept once for all rows."""
    return tuple([sys.intern(value) if type(value := row[part]) is str else value for part in key])


def readable(path: Path, key: tuple[str, ...] = RECORD_KEY) -> Iterator[tuple[int, int, Row]]:
    """Every row that can be read, also behind damage, with its place and size; never more than a line in memory."""
    offset = 0
    with path.open("rb", BUFFER) as file:
        for line in file:
            if line.endswith(b"\n") and not isinstance(row := parse_line(line[:-1], key), str):
                yield offset, len(line) - 1, row
            offset += len(line)


class Point(NamedTuple):
    """A line of the sum file: bytes `start` to `end` of the log, one line of it, have the hash `digest`."""

    start: int
    end: int
    digest: str


def digest_of(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def points_of(lines: Iterable[bytes], start: int = 0) -> Iterator[Point]:
    """A point for each line, the first of which stands at byte `start` of the log."""
    for line in lines:
        end = start + len(line)
        yield Point(start, end, digest_of(memoryview(line)[:-1]))
        start = end


def sum_line(point: Point) -> bytes:
    return b"%d %d %s\n" % (point.start, point.end, point.digest.encode())


def encode_points(points: Iterable[Point]) -> Iterator[bytes]:
    """The sum file's bytes, in parts that are bounded."""
    # The leading newline closes a line that a crash tore; the reader passes over the empty one.
    return files.joined(chain([b"\n"], map(sum_line, points)))


def point_of(line: bytes, last: int) -> Point | None:
    """The point that a line of the sum file is, if it stands behind byte `last` of the log."""
    found = SUM_LINE.fullmatch(line.removesuffix(b"\n"))
    if found is None or not last <= (start := int(found[1])) < (end := int(found[2])):
        return None
    return Point(start, end, found[3].decode())


def read_points(path: Path) -> Iterator[Point]:
    """The sum file's readable lines in rising order; it is never synced, so torn or NUL lines are passed over."""
    last = 0
    try:
        with path.open("rb", BUFFER) as file:
            for line in file:
                if point := point_of(line, last):
                    last = point.end
                    yield point
    except FileNotFoundError:
        return
    except OSError as error:
        raise files.io_error(path, "reading", error) from error


def committed(path: Path) -> int:
    """How far the sum file says that its log was committed."""
    return max((point.end for point in read_points(path)), default=0)


def changed(path: Path) -> bool:
    """Whether a committed line of the log is no longer what was committed.

    A line that now ends elsewhere counts as changed; one that is gone with everything behind it does not (a shortened
    log is no edit, and is told apart by its length).
    """
    size = path.stat().st_size
    with path.open("rb", BUFFER) as file:
        for start, end, digest in read_points(path.with_suffix(".sum")):
            if end > size:
                return start < size
            if file.tell() != start:
                file.seek(start)
            line = file.read(end - start)
            if not line.endswith(b"\n") or digest_of(memoryview(line)[:-1]) != digest:
                return True
    return False


def foreign_lines(path: Path) -> int:
    """Lines of a sum file that are none of its own; what a crash leaves (NULs, the torn last line) counts too."""
    with path.open("rb", BUFFER) as file:
        return sum(line != b"\n" and not SUM_LINE.fullmatch(line.removesuffix(b"\n")) for line in file)
