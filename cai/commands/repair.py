"""`--repair runs/ID`: what of a damaged log can be kept, line by line; drops the rest only with `--write`.

Owns the choice of lines. What is dropped is copied to quarantine/ first, and a resume makes those rows again.
Invariants: a line whose bytes are what was committed is never dropped; without `write` no byte changes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson

from cai.data.marks import REVIEW_KEY
from cai.errors import CaiError
from cai.store import files, records
from cai.store.lock import take_lock
from cai.store.rows import Lines
from cai.store.scan import BUFFER, RECORD_KEY, SCORE_KEY, digest_of, encode_points, key_of, parse_line, points_of
from cai.store.walk import CHANGED, CUT_OFF, Walk, walking
from cai.terminal import printable, word

EVENT_KEY = ("attempt", "n")
SCORE_KEYS = (SCORE_KEY, ("arm", "item", "round"))  # of the logs under eval/
BOM = b"\xef\xbb\xbf"
SHOWN = 60  # characters of a dropped line in the table


@dataclass(frozen=True, slots=True)
class Drop:
    """One line that a repair drops: its number (from 1), where it stands, how it begins and why it goes."""

    line: int
    offset: int
    size: int
    head: bytes
    reason: str

    def __str__(self) -> str:
        text = printable(self.head.decode("utf-8", "backslashreplace"), one_line=True)
        return f"line {self.line}, byte {self.offset}, {self.size} bytes, {self.reason}: {text}"


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair of one log does: how many lines stay, and the lines that go. Their bytes are left on disk."""

    path: Path
    key: tuple[str, ...]
    stay: int
    drops: tuple[Drop, ...] = ()
    restored: int = 0  # line ends (and byte-order mark) that an editor wrote, put back as they were committed
    lost: int = 0  # committed lines of which nothing stands, before one that does: their sums go

    @property
    def mends(self) -> int:
        return len(self.drops) + self.restored + self.lost


Line = tuple[int, int, int, bytes, int]
"""Its number, where it stands without what an editor did, and in the file; itself; what an editor did to it."""


def logs_of(run: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Every append-only log of a run with its key; also one that is gone while its sum file stands."""
    logs = [(run / "records.jsonl", RECORD_KEY), (run / "events.jsonl", EVENT_KEY), (run / "reviews.jsonl", REVIEW_KEY)]
    scores = sorted({p.with_suffix(".jsonl") for kind in ("sum", "jsonl") for p in (run / "eval").rglob(f"*.{kind}")})
    logs += [(path, _score_key(path)) for path in scores]
    return [(path, key) for path, key in logs if path.exists() or path.with_suffix(".sum").exists()]


def _score_key(path: Path) -> tuple[str, ...]:
    """The key that the log's first readable line has."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                for key in SCORE_KEYS:
                    if not isinstance(parse_line(line, key), str):
                        return key
    return SCORE_KEYS[0]


def plan(path: Path, key: tuple[str, ...] = RECORD_KEY) -> RepairPlan:
    """Sort the lines of a log into kept and dropped. Reads only, and never holds more than a line.

    A row never holds a raw CR, so CR LF line ends and a byte-order mark are an editor's and go without loss.
    """
    drops: list[Drop] = []
    stay = restored = 0
    with (
        path.open("rb") as file,
        walking(Lines(path, file.fileno()), file.fileno(), path.with_suffix(".sum"), key) as found,
    ):
        (bad, lost), by_key = edited(path, found), found.by_key
        for place, (number, offset, raw, data, mended) in enumerate(lines_of(path)):
            restored += mended
            if reason := _fault(data, found, place < len(bad) and bad[place] == 1):
                drops.append(Drop(number, offset, len(data), data[:SHOWN], reason))
            else:
                name = key_of(orjson.loads(data), key)
                by_key[name] = found.lines.add(name, raw, len(data) - 1)
                stay += 1
    return RepairPlan(path, key, stay, tuple(drops), restored, lost)


def lines_of(path: Path) -> Iterator[Line]:
    offset = raw = 0
    with path.open("rb", BUFFER) as file:
        for number, line in enumerate(file, start=1):
            data, cut = line, 0
            if raw == 0 and line.startswith(BOM):
                data, cut = line[len(BOM) :], len(BOM)
            if data.endswith(b"\r\n"):
                data = data[:-2] + b"\n"
            if data:
                yield number, offset, raw + cut, data, bool(cut) + (len(data) + cut < len(line))
            offset, raw = offset + len(data), raw + len(line)


def _fault(data: bytes, found: Walk, edited: bool) -> str:
    """Why a line cannot stay; "" where it can."""
    row = parse_line(data[:-1], found.key) if data.endswith(b"\n") else CUT_OFF  # a torn tail may be long
    if isinstance(row, str):
        return row
    if edited:
        return CHANGED
    before = found.by_key.get(key_of(row, found.key))
    if before is None:
        return ""
    return "repeats an earlier row" if found.lines.row(before) == row else "a second, different row for its key"


def edited(path: Path, found: Walk) -> tuple[bytearray, int]:
    """1 for each line that does not stand as committed, in order, and how many are gone before one that does.

    Lines that no point covers stand as they are; of sums without lines at the end a log is opened anyway.

    An edit moves the lines behind it, so points and lines are aligned by their hashes, in order, as a diff aligns.
    """
    whole = (data for _, _, _, data, _ in lines_of(path) if data.endswith(b"\n"))
    digests = array("Q", (int(digest_of(memoryview(line)[:-1]), 16) for line in whole))
    count = len(digests)
    bad, order = bytearray(count), array("L", sorted(range(count), key=digests.__getitem__))
    next_line, covered = 0, 0  # the first line not judged yet, how far points reach without a gap
    waiting = lost = 0  # how many points in a row found no line
    for point in found.points():
        at = _place(int(point.digest, 16), next_line, digests, order)
        if at == count:
            waiting += 1
        else:
            if waiting or point.start == covered:  # what lies in between is an edit, or was put there
                bad[next_line:at] = bytes([1]) * (at - next_line)
            lost += max(waiting - (at - next_line), 0)
            next_line, waiting = at + 1, 0
        covered = point.end
    if waiting:
        bad[next_line:] = bytes([1]) * (len(bad) - next_line)
    return bad, lost


def _place(digest: int, least: int, digests: array[int], order: array[int]) -> int:
    """The first line from `least` on that has it, or how many lines there are. `order`: of the lines by digest."""
    count = len(digests)
    if least < count and digests[least] == digest:  # nearly all of them
        return least
    at = bisect_left(order, (digest, least), key=lambda line: (digests[line], line))
    return order[at] if at < count and digests[order[at]] == digest else count


def repair(run: Path, write: bool = False, say: Callable[[str], None] = print) -> int:
    """Show what a repair of every log of `run` drops; with `write`, do it. Gives the number of lines it changes.

    Errors: CaiError(LOCKED) while a runner has the run, CaiError(CORRUPT) for a log that is gone, CaiError(IO).
    """
    lock = take_lock(run) if write else None
    try:
        logs = logs_of(run)
        plans = [plan(path, key) for path, key in logs if path.exists()]
        for each in plans:
            again = f", {each.restored} line ends of an editor are put back" if each.restored else ""
            gone = f", {each.lost} of those committed are gone" if each.lost else ""
            say(f"{each.path}: {each.stay} lines stay, {len(each.drops)} go{gone}{again}")
            for drop in each.drops:
                say(f"  {drop}")
            if write and each.mends:
                _apply(each, run / "quarantine")
        for path, _ in logs:
            records.refuse_missing(path)
    except OSError as error:
        raise files.io_error(run, "repairing", error) from error
    finally:
        if lock is not None:
            lock.release()
    total = sum(each.mends for each in plans)
    if total and not write:
        say(f"nothing was changed; mend these {total} lines with: python runner.py --repair {word(run)} --write")
    elif total:
        say(f"mended {total} lines (what was dropped: {word(run / 'quarantine')}); resume to make dropped rows again")
    else:
        say("nothing to repair")
    return total


def _apply(each: RepairPlan, quarantine: Path) -> None:
    """Copy what goes to quarantine/, write the new sums, then the new log.

    A kill in between leaves the old log under the new sums: still corrupt, and a second repair drops the same lines.
    """
    gone = {drop.line for drop in each.drops}
    for number, offset, _, data, _ in lines_of(each.path):
        if number in gone:
            files.quarantine(quarantine, each.path.name, offset, partial(tuple, [data]))
    files.write_atomic(each.path.with_suffix(".sum"), encode_points(points_of(_kept(each.path, gone))))
    files.write_atomic(each.path, files.joined(_kept(each.path, gone)))


def _kept(path: Path, gone: Container[int]) -> Iterator[bytes]:
    return (data for number, _, _, data, _ in lines_of(path) if number not in gone)


def check_repairable(run: Path) -> None:
    """CaiError(USAGE) if `run` holds no log at all."""
    if not logs_of(run):
        raise CaiError(f"{run}: holds no records.jsonl to repair")
