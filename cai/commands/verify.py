"""`--verify runs/ID`: every promise that can be checked on a run folder, finished, broken or going. Writes nothing.

Owns the checks and their table; each check stands alone and reports all it finds. A check that cannot be made says so
("skip"), it never passes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson
from filelock import FileLock, Timeout

from cai.commands import verify_files, verify_training
from cai.data import chain
from cai.data.sampled import KIND as SAMPLED
from cai.recipe.intake import pairfile
from cai.run.events import read_events, spent
from cai.run.manifest import edited, read_manifest
from cai.store.jsonl import Row
from cai.store.lock import holder
from cai.store.rows import Key
from cai.store.scan import scan
from cai.terminal import printable

Verdict = Literal["ok", "FAIL", "note", "skip"]
ROW_FIELDS = (
    ("v", int), ("stage", str), ("item", int), ("round", int), ("principle", str | None), ("text", str),
    ("status", str), ("reason", str | None), ("finish", str | None), ("tokens", int), ("seed", int),
    ("prompt_sha", str),
)  # fmt: skip
EXAMPLE_KEYS = ("instruction", "initial_answer", "principle", "critique", "revised_answer", "preference_pair")
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


Results = Iterator[tuple[str, str]]


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
        elif hashlib.sha256(path.read_bytes()).hexdigest()[:16] != sha:
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


def _rows(run: Path) -> list[Row]:
    path = run / "records.jsonl"
    return scan(path.read_bytes()).rows if path.exists() else []


def _once(run: Path) -> Results:
    """G3."""
    rows = _rows(run)
    first: dict[Key, Row] = {}
    twice, equal = [], 0
    for row in rows:
        key = (row["stage"], row["item"], row["round"])
        if (known := first.setdefault(key, row)) is not row:
            equal += known == row
            twice += [key] if known != row else []
    if twice:
        yield "FAIL", f"{len(twice)} keys stand more than once, first {twice[0]}"
    if equal:
        yield "note", f"{equal} rows stand twice, equal: a resume counts them once, --repair drops the second"
    by_status = Counter(row.get("status") for row in rows)
    wrong = [row for row in rows if row.get("status") not in ("ok", "rejected", "error")]
    bare = [row for row in rows if row.get("status") != "ok" and not row.get("reason")]
    if wrong or bare:
        yield "FAIL", f"{len(wrong)} rows without a known status, {len(bare)} rejected without a reason"
    if not twice and not wrong and not bare:
        yield (
            "ok",
            f"{len(rows)} rows: " + ", ".join(f"{count} {status}" for status, count in sorted(by_status.items())),
        )


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
    rows, accepted = _rows(run), set()
    for row in rows:
        if row.get("status") == "ok":
            accepted.add((row["stage"], row["item"], 0 if row["stage"] == "instructions" else row["round"]))
    orphans = [row for row in rows if any(needed not in accepted for needed in _inputs_of(row))]
    if orphans:
        first = orphans[0]
        where = f"{first['stage']} item {first['item']} round {first['round']}"
        yield "FAIL", f"{len(orphans)} rows without the row they were made from, first {where}"
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


def _dataset(run: Path) -> Results:
    """G11 and the user's format: every example whole, its pair made of it, its texts those of the records."""
    path = run / "dataset" / "examples.jsonl"
    trained = (run / "train" / "result.json").exists()
    if not path.exists():
        yield ("FAIL", "examples.jsonl is missing; a resume writes it again") if trained else ("skip", "no dataset yet")
        return
    texts: dict[str, set[str]] = {}
    for row in _rows(run):
        texts.setdefault(row["stage"], set()).add(row["text"])
    texts |= _own_texts(run)
    examples, faults = _objects(path)
    for number, example in enumerate(examples, start=1):
        if why := _example_fault(example, texts):
            faults.append(f"line {number}: {why}")
    for split in ("train", "heldout"):
        pairs, wrong = _objects(run / "dataset" / "pairs" / f"{split}.jsonl")
        faults += wrong
        for number, pair in enumerate(pairs, start=1):
            if not _of_records(pair, texts):
                faults.append(f"{split}.jsonl line {number}: not a pair of the records' texts")
    if faults:
        yield "FAIL", f"{len(faults)} faults, first: {faults[0]}; a resume writes the data set again"
    else:
        yield "ok", f"{len(examples)} examples"


def _of_records(pair: Row, texts: dict[str, set[str]]) -> bool:
    """A revision and an answer, or, of a sampled pair, an answer and the second one in either order."""
    sides = [pair.get("chosen"), pair.get("rejected")]
    if pair.get("kind") == SAMPLED:
        answers = texts.get("answers", set()) | texts.get("second_answers", set())
        return all(side in answers for side in sides)
    return sides[0] in texts.get("revisions", ()) and sides[1] in texts["answers"]


def _own_texts(run: Path) -> dict[str, set[str]]:
    """The texts of a run on pairs of the user's own, from its copy of their file; {} of any other run."""
    if not (run / pairfile.KEY).is_file():
        return {}
    rows = pairfile.read((run / pairfile.KEY).read_bytes(), str(run / pairfile.KEY)).rows
    found = {"answers": {row.rejected for row in rows}, "revisions": {row.chosen for row in rows}}
    return found | {"critiques": {""}}


def _objects(path: Path) -> tuple[list[Row], list[str]]:
    """The JSON objects of a derived file, and what is wrong with it as a file of JSON lines."""
    if not path.is_file():
        return [], [f"{path.name} is missing"]
    *lines, last = path.read_bytes().split(b"\n")
    faults = [f"{path.name}: its last line is cut"] if last else []
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            faults.append(f"{path.name} line {number}: not a JSON object")
    return objects, faults


def _example_fault(example: Row, texts: dict[str, set[str]]) -> str:
    """Why an example is not what the records say, or ""."""
    if missing := [key for key in EXAMPLE_KEYS if key not in example]:
        return f"lacks {', '.join(missing)}"
    pair = {"chosen": example["revised_answer"], "rejected": example["initial_answer"]}
    if {key: example["preference_pair"].get(key) for key in pair} != pair:
        return "the pair is not revised against initial answer"
    if example.get("kind") == SAMPLED:
        whole = _of_records({**example["preference_pair"], "kind": SAMPLED}, texts)
        return "" if whole else "its answers are not in the records"
    stages = {"answers": "initial_answer", "critiques": "critique", "revisions": "revised_answer"}
    other = [field for stage, field in stages.items() if example[field] not in texts.get(stage, ())]
    return f"its {other[0]} is not in the records" if other else ""


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
        for name, value in secrets.items()
        if value in path.read_bytes()
    ]
    if leaks:
        yield "FAIL", f"secrets of the environment stand in the run: {', '.join(leaks[:5])}"
    else:
        yield "ok", f"none of {len(secrets)} secrets of the environment stands in a file"


CHECKS: tuple[tuple[str, Callable[[Path], Results]], ...] = (
    ("manifest", _manifest),
    ("inputs as hashed", _inputs),
    ("folder private, no links", _folder),
    ("G1 G5 G6 committed bytes", verify_files.logs),
    ("G3 exactly once", _once),
    ("row format", _fields),
    ("chain complete", _chain),
    ("G7 one writer", _lock),
    ("G11 dataset", _dataset),
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
