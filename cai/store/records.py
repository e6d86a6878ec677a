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
from functools import partial
from pathlib import Path
from typing import Generic, cast

import orjson

from cai import errors
from cai.errors import CaiError
from cai.store import files
from cai.store.jsonl import Row, encode
from cai.store.rows import Key, Lines, R, Rows
from cai.store.scan import RECORD_KEY, Damage, committed, encode_points, key_of, points_of, read_points, sum_line
from cai.store.walk import Walk, walk
from cai.terminal import word


def read(path: Path, key: tuple[str, ...] = RECORD_KEY) -> list[Row]:
    """The rows of a log that another process may be writing: never writes, passes over a torn tail.

    Errors: CaiError(CORRUPT) for damage that readable lines follow.
    """
    rows: Sequence[Row] = look(path, key)
    return list(rows)


def look(path: Path, key: tuple[str, ...] = RECORD_KEY) -> Sequence[R]:
    """As `read`, with the rows left on disk."""
    found = walked(path, None, key)
    return [] if found is None else rows_of(found)


def rows_of(found: Walk) -> Rows[R]:
    """The rows before a torn tail. Errors: CaiError(CORRUPT) for damage that rows follow, a second, different row."""
    if found.damage and found.followed:
        raise corrupt(found.lines.path, found.damage)
    refuse_different(found)
    return Rows(found.lines)


def walked(path: Path, sum_path: Path | None, key: tuple[str, ...] = RECORD_KEY) -> Walk | None:
    """A whole pass over a log that another process may be writing, compared with `sum_path` if given; None of no log.

    Errors: CaiError(IO).
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.io_error(path, "reading", error) from error
    try:
        return walk(Lines(path, fd), fd, sum_path, key)
    except OSError as error:
        raise files.io_error(path, "reading", error) from error
    finally:
        os.close(fd)


def corrupt(path: Path, damage: Damage) -> CaiError:
    run = next((folder for folder in path.parents if (folder / "manifest.json").exists()), path.parent)
    return CaiError(
        f"{path}: line {damage.line}, byte {damage.offset}: {damage.reason}. See what a repair would drop with: "
        f"python runner.py --repair {word(run)}",
        errors.CORRUPT,
    )


def refuse_missing(path: Path) -> None:
    """CaiError(CORRUPT) for a log that is gone though its sum file says what was committed."""
    if not path.exists() and (end := committed(path.with_suffix(".sum"))):
        sums = path.with_suffix(".sum").name
        raise CaiError(
            f"{path}: missing, but {sums} says that {end} bytes were committed: put the file back, "
            f"or delete {sums} as well to begin again",
            errors.CORRUPT,
        )


def refuse_different(found: Walk) -> None:
    """CaiError(CORRUPT) for a row that repeats a key with another value; an equal one counts once."""
    for number, offset, size in found.repeats:
        row = found.lines.read(offset, size, number)
        name = key_of(row, found.key)
        if found.lines.row(found.by_key[name]) != row:
            raise corrupt(found.lines.path, Damage(number, offset, f"a second, different row for {name}"))


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
            refuse_missing(path)
        log: RecordLog[R] = cls(path, key, durable)
        try:
            if new and durable:  # a row that is synced is lost with its file's name
                files.fsync_folder(path.parent)
            found = walk(log._lines, log._fd, log.sum_path, key, late=True)
            if not (found.whole or new):
                unsure(path)
            log._take(found, quarantine)
        except OSError as error:
            log.close()
            raise files.io_error(path, "opening", error) from error
        except BaseException:
            log.close()
            raise
        return log

    def _take(self, found: Walk, quarantine: Path) -> None:
        """What the pass found becomes the log: damage is refused, a torn tail is cut, the sum file catches up."""
        if found.damage and not found.is_torn_tail:
            raise corrupt(self.path, found.damage)
        if found.changed:
            raise corrupt(self.path, found.changed)
        refuse_different(found)
        self._by_key, self._size = found.by_key, found.end
        for name, number in self._by_key.items():
            self._by_stage.setdefault(name[0], array("L")).append(number)
        lost = max(0, found.committed - found.end)
        if found.size > found.end or lost:
            self._cut(found, lost, quarantine)
        if not found.covered or lost:  # begun afresh where it leads the log's end (the log was cut)
            kept = (point for point in read_points(self.sum_path) if point.end <= found.end)
            files.write_atomic(self.sum_path, encode_points(kept), durable=False)
        self._sum_fd = files.open_append(self.sum_path)
        self._summed = found.covered
        self._sum(found.late)

    def _cut(self, found: Walk, lost: int, quarantine: Path) -> None:
        """Move the torn tail to quarantine/, then shorten the file. A crash in between repeats the same cut."""
        kept_at, size = None, found.size - found.end
        if size:
            tail = partial(files.parts_of, self._fd, found.end, found.size)
            kept_at = files.quarantine(quarantine, self.path.name, found.end, tail)
        files._ftruncate(self._fd, found.end)
        files._fsync(self._fd)
        self.healed = {
            "file": self.path.name,
            "offset": found.end,
            "cut_bytes": size,
            "committed_bytes_missing": lost,  # > 0: someone shortened the file; the rows are made again
            "reason": found.damage.reason if found.damage else "shorter than its sum file says",
            "quarantine": kept_at.name if kept_at else None,
        }

    def _sum(self, sums: bytes | bytearray) -> None:
        """Add the hashes of the log's newest lines; what could not be written is hashed at the next open."""
        if sums:
            with suppress(OSError):  # the sum file may lag: losing a point weakens detection, never the log
                if files._write(self._sum_fd, b"\n" + sums) == len(sums) + 1:
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
                    f"start a fork with: python runner.py RECIPE --fork {word(self.path.parent)}",
                    errors.CORRUPT,
                )
        if lines:
            start = self._size
            self._commit(lines)
            for name, line in zip(fresh, lines, strict=True):
                number = self._by_key[name] = self._lines.add(name, start, len(line) - 1)
                self._by_stage.setdefault(name[0], array("L")).append(number)
                start += len(line)

    def _commit(self, lines: Sequence[bytes]) -> None:
        self._refuse_if_replaced()
        data = b"".join(lines)
        try:
            files.write_all(self._fd, data)
            if self.durable:
                files._fdatasync(self._fd)
        except OSError as error:
            self._roll_back()
            self._broken = "an earlier append failed; resume the run to append again"
            raise files.io_error(self.path, "appending", error) from error
        start, self._size = self._size, self._size + len(data)
        if start == self._summed:
            self._sum(b"".join(map(sum_line, points_of(lines, start))))

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
