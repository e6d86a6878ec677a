"""`--repair runs/ID`: what of a damaged log can be kept, line by line; drops the rest only with `--write`.

Owns the choice of lines. What is dropped is copied to quarantine/ first, and a resume makes those rows again.
Invariants: a line whose bytes are what was committed is never dropped; without `write` no byte changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cai import errors
from cai.errors import CaiError
from cai.store import clean, files, records
from cai.store.jsonl import Row
from cai.store.lock import take_lock
from cai.store.rows import Key, Lines
from cai.store.scan import RECORD_KEY, Point, encode_points, parse_line, points_of, read_points
from cai.terminal import printable

EVENT_KEY = ("attempt", "n")
SCORE_KEYS = (("metric", "item", "round"), ("arm", "item", "round"))  # of the logs under eval/
REVIEW_KEY = ("rater", "key")
BOM = b"\xef\xbb\xbf"
SHOWN = 60  # characters of a dropped line in the table


@dataclass(frozen=True, slots=True)
class Drop:
    """One line that a repair drops: its number (from 1), where it stands and why."""

    line: int
    offset: int
    data: bytes
    reason: str

    def __str__(self) -> str:
        text = printable(self.data[:SHOWN].decode("utf-8", "backslashreplace"), one_line=True)
        return f"line {self.line}, byte {self.offset}, {len(self.data)} bytes, {self.reason}: {text}"


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair of one log does: the bytes that stay and the lines that go."""

    path: Path
    key: tuple[str, ...]
    kept: bytes
    drops: tuple[Drop, ...]
    whole: int = 0  # lines of a log that needs no repair; then `kept` is empty, for nothing is written
    restored: int = 0  # line ends (and byte-order mark) that an editor wrote, put back as they were committed


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
    """Sort the lines of a log into kept and dropped. Reads only.

    A row never holds a raw CR, so CR LF line ends and a byte-order mark are an editor's and go without loss.
    """
    with path.open("rb") as file:
        found = clean.rows_of(Lines(path, file.fileno()), file.fileno(), path.with_suffix(".sum"), key)
    if found is not None and found[1] == found[2]:
        return RepairPlan(path, key, b"", (), whole=len(found[0]))
    read = path.read_bytes()
    data = read.removeprefix(BOM).replace(b"\r\n", b"\n")
    restored = read.count(b"\r\n") + read.startswith(BOM)
    whole = unchanged(data, read_points(path.with_suffix(".sum")))
    kept: list[bytes] = []
    drops: list[Drop] = []
    seen: dict[Key, Row] = {}
    offset = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        raw = data[offset : offset + len(line) + 1]
        if raw:
            reason = _fault(raw, offset, key, whole, seen)
            if reason:
                drops.append(Drop(number, offset, raw, reason))
            else:
                kept.append(raw)
        offset += len(line) + 1
    return RepairPlan(path, key, b"".join(kept), tuple(drops), restored=restored)


def _fault(raw: bytes, offset: int, key: tuple[str, ...], whole: Callable[[int], bool], seen: dict[Key, Row]) -> str:
    """Why the line cannot stay, or ""."""
    if not raw.endswith(b"\n"):
        return "cut off before its newline"
    row = parse_line(raw[:-1], key)
    if isinstance(row, str):
        return row
    if not whole(offset):
        return "changed after it was committed"
    name = tuple(row[part] for part in key)
    if name in seen:
        return "repeats an earlier row" if seen[name] == row else "a second, different row for its key"
    seen[name] = row
    return ""


def unchanged(data: bytes, points: list[Point]) -> Callable[[int], bool]:
    """A test of line starts: does this line stand as it was committed? Lines that no point covers do.

    An edit moves the lines behind it, so points and lines are aligned by their hashes, in order, as a diff aligns.
    """
    lines = list(points_of(data, 0))
    places: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        places.setdefault(line.digest, []).append(index)
    bad: set[int] = set()
    next_line = covered = 0  # the first line not judged yet, and how far the points reach without a gap
    waiting = False  # a point found no line
    for point in points:
        here = places.get(point.digest, [])
        at = bisect_left(here, next_line)
        if at == len(here):
            waiting = True
        else:
            if waiting or point.start == covered:  # what lies in between is an edit, or was put there
                bad.update(line.start for line in lines[next_line : here[at]])
            next_line, waiting = here[at] + 1, False
        covered = point.end
    if waiting:
        bad.update(line.start for line in lines[next_line:])
    return lambda start: start not in bad


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
            say(f"{each.path}: {each.whole or each.kept.count(bytes([10]))} lines stay, {len(each.drops)} go{again}")
            for drop in each.drops:
                say(f"  {drop}")
            if write and (each.drops or each.restored):
                _apply(each, run / "quarantine")
        for path, _ in logs:
            records.refuse_missing(path, read_points(path.with_suffix(".sum")))
    except OSError as error:
        raise files.io_error(run, "repairing", error) from error
    finally:
        if lock is not None:
            lock.release()
    total = sum(len(each.drops) + each.restored for each in plans)
    if total and not write:
        say(f"nothing was changed; mend these {total} lines with: python runner.py --repair {run} --write")
    elif total:
        say(f"mended {total} lines (what was dropped is in {run / 'quarantine'}); resume to make dropped rows again")
    else:
        say("nothing to repair")
    return total


def _apply(each: RepairPlan, quarantine: Path) -> None:
    """Copy what goes to quarantine/, write the new sums, then the new log.

    A kill in between leaves the old log under the new sums: still corrupt, and a second repair drops the same lines.
    """
    for drop in each.drops:
        files.quarantine_bytes(quarantine, each.path.name, drop.offset, drop.data)
    files.write_atomic(each.path.with_suffix(".sum"), encode_points(points_of(each.kept, 0)))
    files.write_atomic(each.path, each.kept)


def check_repairable(run: Path) -> None:
    """CaiError(USAGE) if `run` holds no log at all."""
    if not logs_of(run):
        raise CaiError(f"{run}: holds no records.jsonl to repair", errors.USAGE)
