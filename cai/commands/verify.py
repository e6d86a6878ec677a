"""`--verify runs/ID`: every promise that can be checked on a run folder, finished, broken or going. Writes nothing.

Owns the checks and their table; each check stands alone and reports all it finds. A check that cannot be made says so
("skip"), it never passes.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from cai.commands import verify_dataset, verify_files, verify_training
from cai.commands.verify_dataset import Results
from cai.data import chain
from cai.run.digests import digest_of
from cai.run.events import read_events, spent
from cai.run.manifest import edited, read_manifest
from cai.store.jsonl import Row
from cai.store.lock import holder
from cai.store.rows import Key, Lines
from cai.store.scan import RECORD_KEY, key_of, readable
from cai.terminal import printable

Verdict = Literal["ok", "FAIL", "note", "skip"]
ROW_FIELDS = (
    ("v", int), ("stage", str), ("item", int), ("round", int), ("principle", str | None), ("text", str),
    ("status", str), ("reason", str | None), ("finish", str | None), ("tokens", int), ("seed", int),
    ("prompt_sha", str),
)  # fmt: skip
PART = 1 << 20
SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """One line of the table: the promise, what was found."""

    promise: str
    verdict: Verdict
    found: str


def verify(run: Path) -> list[VerifyResult]:
    """All checks of a run folder, in the order of the table."""
    checks: list[VerifyResult] = []
    for promise, look in CHECKS:
        try:
            results = list(look(run))
        except Exception as error:  # what lies in a broken run is not known beforehand; the other checks go on
            results = [("FAIL", f"{type(error).__name__}: {error}")]
        checks += [VerifyResult(promise, verdict, found) for verdict, found in results]  # type: ignore[arg-type]
    return checks


def _manifest(run: Path) -> Results:
    manifest = read_manifest(run / "manifest.json")
    if parts := edited(manifest):
        yield "FAIL", f"{', '.join(parts)}: edited since the program wrote it; put it back from a copy"
    elif "sums" not in manifest:
        yield "skip", "of a run from before its parts had sums; the next resume that changes it adds them"
    else:
        yield "ok", f"schema {manifest['schema']}, {len(manifest.get('identity', {}))} inputs hashed"


def _inputs(run: Path) -> Results:
    """The copies of prompts, constitution and instructions are what the run was made from."""
    known = read_manifest(run / "manifest.json").get("files", {})
    wrong = []
    for name, sha in known.items():
        path = run / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif digest_of(path)[:16] != sha:
            wrong.append(f"{name} was changed")
    if wrong:
        yield "FAIL", f"{', '.join(wrong)}; a resume with the recipe they came from copies them again"
    else:
        yield "ok", f"{len(known)} copies as they were hashed"


def _folder(run: Path) -> Results:
    mode = stat.S_IMODE(run.stat().st_mode)
    yield ("FAIL", f"mode {mode:o}: chmod 700 {run}") if mode & 0o077 else ("ok", "only the owner may look")
    links = [path for path in run.rglob("*") if path.is_symlink()]
    if links:
        yield "FAIL", f"symbolic links: {', '.join(str(path.relative_to(run)) for path in links[:5])}"


def _rows(run: Path) -> Iterator[Row]:
    """Every row that can be read, one after another: no check holds them all."""
    path = run / "records.jsonl"
    return (row for _, _, row in readable(path)) if path.exists() else iter(())


def _once(run: Path) -> Results:
    """G3."""
    by_status: Counter[object] = Counter()
    twice, equal, wrong, bare = list[Key](), 0, 0, 0
    for row, before in _with_earlier(run / "records.jsonl"):
        if before is not None:
            equal += before == row
            twice += [key_of(row, RECORD_KEY)] if before != row else []
        by_status[status := row.get("status")] += 1
        wrong += status not in ("ok", "rejected", "error")
        bare += status != "ok" and not row.get("reason")
    if twice:
        yield "FAIL", f"{len(twice)} keys stand more than once, first {twice[0]}"
    if equal:
        yield "note", f"{equal} rows stand twice, equal: a resume counts them once, --repair drops the second"
    if wrong or bare:
        yield "FAIL", f"{wrong} rows without a known status, {bare} rejected without a reason"
    if not twice and not wrong and not bare:
        said = ", ".join(f"{count} {status}" for status, count in sorted(by_status.items()))
        yield "ok", f"{by_status.total()} rows: {said}"


def _with_earlier(path: Path) -> Iterator[tuple[Row, Row | None]]:
    """Each row and the first one of its key, where that is another line; what was read is left on disk."""
    if not path.exists():
        return
    with path.open("rb") as file:
        lines, by_key = Lines(path, file.fileno()), dict[Key, int]()
    for offset, size, row in readable(path):
        key = key_of(row, RECORD_KEY)
        before = by_key.get(key)
        if before is None:
            by_key[key] = lines.add(key, offset, size)
        yield row, None if before is None else lines.row(before)


def _fields(run: Path) -> Results:
    faults = Counter(
        name
        for row in _rows(run)
        for name, kind in ROW_FIELDS
        if name not in row or not isinstance(row[name], kind) or isinstance(row[name], bool)
    )
    if faults:
        yield "FAIL", "fields missing or of another type: " + ", ".join(f"{n} ({c} rows)" for n, c in faults.items())
    else:
        yield "ok", f"every row has the {len(ROW_FIELDS)} fields of its version"


def _chain(run: Path) -> Results:
    """Every row's input stands too (its order is not asked: a repair puts rows that were made again at the end)."""
    accepted = {(row["stage"], row["item"], chain.round_of(row)) for row in _rows(run) if row.get("status") == "ok"}
    first, orphans = "", 0
    for row in _rows(run):
        if any(needed not in accepted for needed in _inputs_of(row)):
            first, orphans = first or f"{row['stage']} item {row['item']} round {row['round']}", orphans + 1
    if orphans:
        yield "FAIL", f"{orphans} rows without the row they were made from, first {first}"
    else:
        yield "ok", "every answer, critique and revision has its input"


def _inputs_of(row: Row) -> list[tuple[str, int, int]]:
    stage = chain.named(row["stage"])
    return [(name, row["item"], round_) for name, round_ in stage.needs(row["round"])] if stage else []


def _attempts(run: Path) -> Results:
    """G12: time and cost are sums over attempts."""
    total = spent(read_events(run / "events.jsonl"))
    yield "ok", f"{total['attempts']:.0f} attempts, {total['seconds']:.0f} s, ${total['usd']:.2f}"


def _lock(run: Path) -> Results:
    """G7. Taken and given back at once; the run's files stay as they are."""
    lock = FileLock(run / ".lock", mode=0o600)
    if not (run / ".lock").exists():
        yield "skip", "never locked"
        return
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield "note", f"held by {holder(run)}"
        return
    except OSError as error:
        yield "skip", f"the lock cannot be taken here: {error.strerror}"
        return
    lock.release()
    yield "ok", "free: no runner works on it"


def _leftovers(run: Path) -> Results:
    names = [str(path.relative_to(run)) for path in run.rglob(".*.new")]
    yield (
        ("note", f"half-written files of a killed writer, a resume removes them: {', '.join(names[:5])}")
        if names
        else ("ok", "none")
    )
    kept = list((run / "quarantine").glob("*"))
    if kept:
        yield "note", f"quarantine holds {len(kept)} pieces of cut logs, {sum(p.stat().st_size for p in kept)} bytes"


def _secrets(run: Path) -> Results:
    """No value of a secret in this environment stands in a file of the run."""
    secrets = {
        name: value.encode()
        for name, value in os.environ.items()
        if any(word in name.upper() for word in SECRET_NAMES) and len(value) >= 12
    }
    leaks = [
        f"{name} in {path.relative_to(run)}"
        for path in run.rglob("*")
        if secrets and path.is_file() and not path.is_symlink()
        for name in _found_in(path, secrets)
    ]
    if leaks:
        yield "FAIL", f"secrets of the environment stand in the run: {', '.join(leaks[:5])}"
    else:
        yield "ok", f"none of {len(secrets)} secrets of the environment stands in a file"


def _found_in(path: Path, secrets: dict[str, bytes]) -> list[str]:
    """Names of the secrets whose value stands in the file, which is read in parts that overlap."""
    found, most, before = set[str](), max(map(len, secrets.values())), b""
    with path.open("rb") as file:
        while part := file.read(PART):
            before = before[-most:] + part
            found |= {name for name, value in secrets.items() if value in before}
    return [name for name in secrets if name in found]


CHECKS: tuple[tuple[str, Callable[[Path], Results]], ...] = (
    ("manifest", _manifest),
    ("inputs as hashed", _inputs),
    ("folder private, no links", _folder),
    ("G1 G5 G6 committed bytes", verify_files.logs),
    ("G3 exactly once", _once),
    ("row format", _fields),
    ("chain complete", _chain),
    ("G7 one writer", _lock),
    ("G11 dataset", verify_dataset.dataset),
    ("checkpoints sealed", verify_training.sealed),
    ("adapter sound", verify_training.adapters),
    ("G11 files as they were left", verify_files.files),
    ("G11 no half files", _leftovers),
    ("G12 time and cost", _attempts),
    ("no secret", _secrets),
)


def table(checks: list[VerifyResult]) -> list[str]:
    """The checks as lines; promise, verdict, finding."""
    wide = max(len(check.promise) for check in checks)
    return [f"{check.promise:<{wide}}  {check.verdict:<4}  {printable(check.found, one_line=True)}" for check in checks]


def sound(checks: list[VerifyResult]) -> bool:
    return all(check.verdict != "FAIL" for check in checks)
