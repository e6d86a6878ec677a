"""The append-only log: append, heal, look up. The only writer of records.jsonl and of every log like it.

Owns the promise "committed is forever": a row is committed once its line ends in a newline, parses and was synced.
Does not own what a row means, nor the run's lock (cai.run.folder). Beside `x.jsonl` stands `x.sum`: one line a row with
its place and hash, so together a hash of the whole prefix. It is written after the sync and never synced itself, so it
may lag behind the log (a crash) but never leads it; it tells an edit from a row, and a torn batch from damage.

Opening decides, by where the first unreadable line stands:
  at the end, torn (no newline, NULs, or bytes that were never committed): cut, kept in quarantine/, noted in `healed`
  anywhere else, or a committed byte differs from its hash: CaiError(CORRUPT) with line and byte offset
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, cast

import orjson

from cai import errors
from cai.errors import CaiError
from cai.store import clean, files
from cai.store.jsonl import encode
from cai.store.rows import Key, Lines, R, Rows
from cai.store.scan import (
    RECORD_KEY,
    Damage,
    Point,
    Row,
    Scan,
    changed,
    encode_points,
    is_torn_tail,
    key_of,
    points_of,
    read_points,
    scan,
)


def read(path: Path, key: tuple[str, ...] = RECORD_KEY) -> list[Row]:
    """The rows of a log that another process may be writing: never writes, passes over a torn tail.

    Errors: CaiError(CORRUPT) for damage that readable lines follow.
    """
    rows: Sequence[Row] = look(path, key)
    return list(rows)


def look(path: Path, key: tuple[str, ...] = RECORD_KEY) -> Sequence[R]:
    """As `read`, with the rows left on disk."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.io_error(path, "reading", error) from error
    try:
        lines = Lines(path, fd)
        if clean.rows_of(lines, fd, path.with_suffix(".sum"), key) is not None:
            return Rows(lines)
        data = files.read_all(fd)
        found = scan(data, key, keep=False)
        if found.damage and found.followed:
            raise corrupt(path, found.damage)
        lines = Lines(path, fd)
        unique(lines, found, data)
        return Rows(lines)
    except OSError as error:
        raise files.io_error(path, "reading", error) from error
    finally:
        os.close(fd)


def corrupt(path: Path, damage: Damage) -> CaiError:
    run = next((folder for folder in path.parents if (folder / "manifest.json").exists()), path.parent)
    return CaiError(
        f"{path}: line {damage.line}, byte {damage.offset}: {damage.reason}. See what a repair would drop with: "
        f"python runner.py --repair {run}",
        errors.CORRUPT,
    )


def refuse_missing(path: Path, points: Sequence[Point]) -> None:
    """CaiError(CORRUPT) for a log that is gone though its sum file says what was committed."""
    if points and not path.exists():
        sums = path.with_suffix(".sum").name
        raise CaiError(
            f"{path}: missing, but {sums} says that {points[-1].end} bytes were committed: put the file back, "
            f"or delete {sums} as well to begin again",
            errors.CORRUPT,
        )


def unique(lines: Lines, found: Scan, data: bytes) -> dict[Key, int]:
    """Rows by key in file order, noted in `lines`. An equal duplicate counts once; a different one is CORRUPT."""
    by_key: dict[Key, int] = {}
    for name, offset, line in zip(found.keys, found.offsets, found.lines, strict=True):
        size = data.index(b"\n", offset) - offset
        if name not in by_key:
            by_key[name] = lines.add(name, offset, size)
        elif lines.row(by_key[name]) != orjson.loads(data[offset : offset + size]):
            raise corrupt(lines.path, Damage(line, offset, f"a second, different row for {name}"))
    return by_key


class RecordLog(Generic[R]):
    """One open log. `rows` and look-ups show committed rows only, read from disk each time: none is kept in memory."""

    def __init__(self, path: Path, key: tuple[str, ...], durable: bool) -> None:
        self.path, self.key, self.durable = path, key, durable
        self.sum_path = path.with_suffix(".sum")
        self.healed: Row | None = None  # what opening cut, for the event log
        self._by_key: dict[Key, int] = {}
        self._by_stage: dict[object, array[int]] = {}
        self._size = self._summed = 0
        self._broken = ""
        self._fd = files.open_append(path)
        self._lines = Lines(path, self._fd)
        self._sum_fd = -1

    @classmethod
    def open(
        cls,
        path: Path,
        quarantine: Path,
        *,
        key: tuple[str, ...] = RECORD_KEY,
        durable: bool = True,
        unsure: Callable[[Path], None] = lambda path: None,
    ) -> RecordLog[R]:
        """Open for appending; heals a torn tail. The caller holds the run's lock.

        `unsure`: asked before anything is changed where the sum file does not vouch for every byte; it may refuse.

        Errors: CaiError(CORRUPT) for damage before the tail, a changed committed byte, a missing log, a different
        duplicate; CaiError(IO).
        """
        new = not path.exists()
        if new:
            refuse_missing(path, read_points(path.with_suffix(".sum")))
        log: RecordLog[R] = cls(path, key, durable)
        try:
            if new and durable:  # a row that is synced is lost with its file's name
                files.fsync_folder(path.parent)
            if not log._load_clean():
                if not new:
                    unsure(path)
                log._load(path.read_bytes(), read_points(log.sum_path), quarantine)
        except OSError as error:
            log.close()
            raise files.io_error(path, "opening", error) from error
        except BaseException:
            log.close()
            raise
        return log

    def _load_clean(self) -> bool:
        """Whether the log is whole and wholly covered; then it is open, without its bytes ever being in memory."""
        found = clean.rows_of(self._lines, self._fd, self.sum_path, self.key)
        if found is None or not found[1] or found[1] != found[2]:
            self._lines = Lines(self.path, self._fd)
            return False
        self._by_key, self._size, self._summed = found
        for name, number in self._by_key.items():
            self._by_stage.setdefault(name[0], array("L")).append(number)
        self._sum_fd = files.open_append(self.sum_path)
        return True

    def _load(self, data: bytes, points: list[Point], quarantine: Path) -> None:
        found = scan(data, self.key, keep=False)
        if found.damage and not is_torn_tail(data, found, points):
            raise corrupt(self.path, found.damage)
        if bad := changed(memoryview(data)[: found.end], points):
            line = data.count(b"\n", 0, bad.start) + 1
            raise corrupt(self.path, Damage(line, bad.start, "changed after it was committed"))
        kept = [point for point in points if point.end <= found.end]
        if found.damage:  # nothing beyond the tail counts
            count = len([offset for offset in found.offsets if offset < found.end])
            del found.keys[count:], found.offsets[count:], found.lines[count:]
        self._by_key = unique(self._lines, found, data)
        for name, number in self._by_key.items():
            self._by_stage.setdefault(name[0], array("L")).append(number)
        self._size = found.end
        lost = max(0, points[-1].end - found.end) if points else 0
        if len(data) > found.end or lost:
            self._cut(data[found.end :], found, lost, quarantine)
        self._open_sums(points, kept, data)

    def _cut(self, tail: bytes, found: Scan, lost: int, quarantine: Path) -> None:
        """Move the torn tail to quarantine/, then shorten the file. A crash in between repeats the same cut."""
        kept_at = files.quarantine_bytes(quarantine, self.path.name, found.end, tail) if tail else None
        files._ftruncate(self._fd, found.end)
        files._fsync(self._fd)
        self.healed = {
            "file": self.path.name,
            "offset": found.end,
            "cut_bytes": len(tail),
            "committed_bytes_missing": lost,  # > 0: someone shortened the file; the rows are made again
            "reason": found.damage.reason if found.damage else "shorter than its sum file says",
            "quarantine": kept_at.name if kept_at else None,
        }

    def _open_sums(self, points: list[Point], kept: list[Point], data: bytes) -> None:
        """Continue the sum file; begin it afresh when it leads the log's end (the log was cut)."""
        if not kept or len(kept) < len(points):
            files.write_atomic(self.sum_path, encode_points(kept), durable=False)
        self._sum_fd = files.open_append(self.sum_path)
        self._summed = kept[-1].end if kept else 0
        self._sum(data[self._summed : self._size])

    def _sum(self, data: bytes) -> None:
        """Add the hashes of `data`, the log's newest lines; what could not be written is hashed at the next open."""
        start = self._size - len(data)
        if data and start == self._summed:
            lines = encode_points(points_of(data, start))
            with suppress(OSError):  # the sum file may lag: losing a point weakens detection, never the log
                if files._write(self._sum_fd, lines) == len(lines):
                    self._summed = self._size

    @property
    def notice(self) -> str:
        """One line about what opening healed, or ""."""
        if self.healed is None:
            return ""
        cut, missing = self.healed["cut_bytes"], self.healed["committed_bytes_missing"]
        parts = [f"{cut} torn bytes cut from its end (kept in quarantine/)"] if cut else []
        parts += [f"{missing} bytes that had been committed are gone; their rows are made again"] if missing else []
        return f"{self.path.name}: {'; '.join(parts)}"

    def append(self, rows: Sequence[R]) -> None:
        """Commit `rows` with one write and one sync. Rows that stand already are skipped if equal.

        Errors: CaiError(CORRUPT) for a different row under a known key (nothing is written), CaiError(QUALITY) for a
        non-finite number, CaiError(IO) after which the log is back at its last good offset and refuses to append.
        """
        if self._broken:
            raise CaiError(f"{self.path}: {self._broken}", errors.IO)
        fresh: dict[Key, R] = {}
        lines: list[bytes] = []
        for row in rows:
            line = encode(row)
            stored = orjson.loads(line)  # what a resume will read, so both runs see the same value
            name = key_of(stored, self.key)
            known = self.get(*name) if name in self._by_key else fresh.get(name)
            if known is None:
                fresh[name] = stored
                lines.append(line)
            elif known != stored:
                raise CaiError(
                    f"{self.path}: {name} was made again with another result: "
                    f"{', '.join(differing(known, stored))} differ. The inputs or the machine changed; "
                    f"start a fork with: python runner.py RECIPE --fork {self.path.parent}",
                    errors.CORRUPT,
                )
        if lines:
            start = self._size
            self._commit(b"".join(lines))
            for name, line in zip(fresh, lines, strict=True):
                number = self._by_key[name] = self._lines.add(name, start, len(line) - 1)
                self._by_stage.setdefault(name[0], array("L")).append(number)
                start += len(line)

    def _commit(self, data: bytes) -> None:
        self._refuse_if_replaced()
        try:
            files.write_all(self._fd, data)
            if self.durable:
                files._fdatasync(self._fd)
        except OSError as error:
            self._roll_back()
            self._broken = "an earlier append failed; resume the run to append again"
            raise files.io_error(self.path, "appending", error) from error
        self._size += len(data)
        self._sum(data)

    def _roll_back(self) -> None:
        """Back to the last good offset. A failed sync is not retried: only the next open decides what is on disk."""
        with suppress(OSError):
            files._ftruncate(self._fd, self._size)
        with suppress(OSError):
            files._fdatasync(self._fd)

    def _refuse_if_replaced(self) -> None:
        try:
            mine, there = os.fstat(self._fd), os.stat(self.path, follow_symlinks=False)
        except OSError as error:
            self._broken = "the log was deleted while the run was going; put it back and resume"
            raise CaiError(f"{self.path}: {self._broken}", errors.IO) from error
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            self._broken = "the log was replaced while the run was going; put the old file back and resume"
        elif mine.st_size != self._size:
            self._broken = f"another program changed the log: {mine.st_size} bytes, expected {self._size}; resume"
        if self._broken:
            raise CaiError(f"{self.path}: {self._broken}", errors.IO)

    def get(self, *key: object) -> R | None:
        """The row under `key`; the round may be left out and is then 0."""
        number = self._by_key.get(key if len(key) == len(self.key) else (*key, 0))
        return None if number is None else cast(R, self._lines.row(number))

    def has(self, *key: object) -> bool:
        """Whether a row stands under `key`, without reading it."""
        return (key if len(key) == len(self.key) else (*key, 0)) in self._by_key

    @property
    def rows(self) -> Rows[R]:
        """All rows in file order."""
        return Rows(self._lines)

    def by_stage(self, stage: object) -> Rows[R]:
        """Rows whose first key field is `stage`, in file order."""
        return Rows(self._lines, self._by_stage.get(stage, array("L")))

    def close(self) -> None:
        for fd in (self._fd, self._sum_fd):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        self._fd = self._sum_fd = -1
        self._broken = self._broken or "the log is closed"

    def __enter__(self) -> RecordLog[R]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Names of the fields in which two rows differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
