"""What the files of a run held when an attempt ended: their digests, in that attempt's last event ("files").

Owns which files the event covers and the comparison. The event stands in events.jsonl, whose own lines are hashed in
events.sum. Not in it, for something else covers them: `*.sum` (they cover the logs), adapters (result.json holds their
digests), checkpoints (sealed), the report's pages (report.sha256); and what decides nothing (`NOT_COVERED`). A log only
grows, so of a log the beginning is compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from cai import errors
from cai.errors import CaiError
from cai.run.lines import resume
from cai.store import files
from cai.store.jsonl import JsonObject
from cai.store.scan import changed, read_points
from cai.terminal import word

EVENT = "files"
NOT_COVERED = {  # name in the run folder -> why it needs no digest
    ".lock": "empty, only locked",
    ".reviews.lock": "empty, only locked",
    ".holder.json": "shown to people, decides nothing",
    "status.json": "shown to people, written again twice a second",
    "tracker": "a tracker's own files, decide nothing",
    "shards": "rows of several processes on their way into a log, logs of their own",
    "quarantine": "what was cut from logs, kept for people",
    "dataset/reviewed.jsonl": "the pairs less what reviews.jsonl refuses, written by each --review",
}
REPORT_SUMS = "report.sha256"  # the pages' digests, as sha256sum writes them
PICTURES = "eval/pictures.json"  # what the pages' pictures were drawn from
WRITTEN = ("dataset/", "eval/", "train/")  # folders in which this program alone writes
PART = 1 << 20
Entry = list[Any]  # bytes and sha256


def covered_elsewhere(name: str) -> str:
    """What covers this file of a run, where it is not the event; "" where it is the event."""
    parts = PurePath(name).parts
    if parts[0] in NOT_COVERED or name in NOT_COVERED:
        return "nothing"
    if name == "events.jsonl" or name.endswith(".sum"):
        return "sums"
    if parts[0].startswith(("adapter", ".adapter")):
        return "result.json"
    if any("checkpoint-" in part for part in parts):
        return "seal"
    if is_page(name) or name == REPORT_SUMS:
        return REPORT_SUMS
    return "half" if parts[-1].startswith(".") and name.endswith(".new") else ""


def is_page(name: str) -> bool:
    """Whether `--report` writes this file."""
    return name in ("report.html", "report.md", PICTURES) or name.startswith(("eval/table.", "eval/plots/"))


def names_of(run: Path) -> list[str]:
    """Every file below a run, links too."""
    found = (Path(folder, name).relative_to(run) for folder, _, names in os.walk(run) for name in names)
    return sorted(str(path) for path in found)


def digest_of(path: Path, size: int | None = None) -> str:
    """sha256 of a file, of its first `size` bytes if given."""
    found, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while part := file.read(PART if left is None else min(PART, left)):
            found.update(part)
            left = None if left is None else left - len(part)
    return found.hexdigest()


def of_run(run: Path) -> dict[str, Entry]:
    """Name -> [bytes, sha256] of every file that the event covers."""
    found = {}
    for name in names_of(run):
        path = run / name
        if not covered_elsewhere(name) and path.is_file() and not path.is_symlink():
            found[name] = [path.stat().st_size, digest_of(path)]
    return found


def left(events: Iterable[JsonObject]) -> tuple[dict[str, Entry], bool]:
    """The last such event's digests, and whether no attempt began after it (then every file must match)."""
    sums: dict[str, Entry] = {}
    attempt = newest = 0
    for event in events:
        newest = max(newest, int(event["attempt"]))
        if event.get("kind") == EVENT and isinstance(event.get("of"), dict):
            sums, attempt = event["of"], int(event["attempt"])
    whole = {name: entry for name, entry in sums.items() if _is_entry(entry) and name not in NOT_COVERED}
    return whole, attempt == newest


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int) and isinstance(entry[1], str)


def is_log(name: str) -> bool:
    """Whether the file only grows, with a sum file beside it."""
    return name in ("records.jsonl", "reviews.jsonl") or (name.startswith("eval/") and name.endswith(".jsonl"))


def fault(run: Path, name: str, entry: Entry, *, log: bool = False) -> str:
    """How a file differs from its digest, or "". A log may be longer; one that is shorter is told by its sum file."""
    path, (size, sha) = run / name, entry
    if not path.is_file() or path.is_symlink():
        return "is missing"
    have = path.stat().st_size
    if log:
        return "" if have < size or digest_of(path, size) == sha else "was changed"
    if have != size:
        return f"has {have} bytes, {size} were left"
    return "" if digest_of(path) == sha else "was changed"


def edited(
    run: Path, events: Iterable[JsonObject], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """Name -> how it differs, of the written files that are not as the last attempt left them; none while one goes on.

    A log is no such file: its sum file tells of it.
    """
    sums, settled = left(events)
    names = [name for name in sums if settled and name.startswith(WRITTEN) and not is_log(name) and wanted(name)]
    return {name: why for name in names if (why := fault(run, name, sums[name]))}


def as_edited(run: Path, events: Iterable[JsonObject]) -> dict[str, str]:
    """Name -> sha256 now, of the edited files that are there."""
    paths = {name: run / name for name in edited(run, events)}
    return {name: digest_of(path) for name, path in paths.items() if path.is_file() and not path.is_symlink()}


def holds_figures(name: str) -> bool:
    """Whether a report's figures and verdicts are read from this file."""
    return name.startswith("eval/") and name.endswith(".json") and name.count("/") == 1 and name != PICTURES


def told(odd: Mapping[str, str]) -> str:
    """One line for a person that looks at what these files say; "" where there is none."""
    if not odd:
        return ""
    names = ", ".join(f"{name} {why}" for name, why in list(odd.items())[:3]) + (" and more" if len(odd) > 3 else "")
    return f"since the run ended {names}: what is shown may not be the run's. A resume (--resume) writes it again"


def refuse_edited(run: Path, events: Iterable[JsonObject], wanted: Callable[[str], bool], command: str) -> None:
    """Where figures decide something. Errors: CaiError(CORRUPT), one line."""
    for name, why in edited(run, events, wanted).items():
        raise CaiError(
            f"{command}: {run / name}: {why} since the run ended, and its figures decide here. "
            f"Write it again first: {resume(run)}",
            errors.CORRUPT,
        )


def unmended(before: Mapping[str, Entry], at_start: Mapping[str, str], now: Mapping[str, Entry]) -> dict[str, Entry]:
    """`now` as an attempt notes it: a file that was edited before it began, and that it left so, keeps its old digest.

    `at_start`: name -> sha256 of such a file when the attempt began. Otherwise every attempt would make edits good.
    """
    kept = {name: before[name] for name, sha in at_start.items() if name in now and now[name][1] == sha}
    return {**now, **kept}


def gaps(path: Path, size: int) -> int:
    """Bytes among the first `size` of a log that its sum file has no hash of."""
    return size - sum(max(0, min(point.end, size) - point.start) for point in read_points(path.with_suffix(".sum")))


def check_log(run: Path, path: Path, sums: Mapping[str, Entry]) -> None:
    """Before a log is opened whose sum file is gone or short: compared with the digest of the attempt before.

    Errors: CaiError(CORRUPT). A sum file that is whole decides by itself (a repair writes log and sums anew).
    """
    name = str(path.relative_to(run))
    entry = sums.get(name)
    if entry is None or not path.is_file() or path.stat().st_size < entry[0] or not gaps(path, int(entry[0])):
        return
    if changed(path):
        return  # the sum file tells line and byte, and what a repair can do
    if why := fault(run, name, entry, log=True):
        beside = path.with_suffix(".sum").name
        raise CaiError(
            f"{path}: {why} after an attempt ended, and {beside} no longer says where: put both files back from a "
            f"copy, or begin again with: python runner.py RECIPE --fork {word(run)}",
            errors.CORRUPT,
        )


def page_sums(run: Path) -> dict[str, str]:
    """Name -> sha256, as report.sha256 says; a line that is none of its form counts as a page that is not there."""
    try:
        lines = (run / REPORT_SUMS).read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: sha for sha, _, name in (line.partition("  ") for line in lines)}


def drop_page_sums(run: Path) -> None:
    """Before pages are written: sums that do not hold any more are worse than none."""
    try:
        (run / REPORT_SUMS).unlink(missing_ok=True)
    except OSError as error:
        raise files.io_error(run / REPORT_SUMS, "removing", error) from error


def write_page_sums(run: Path) -> None:
    """report.sha256 of the pages that stand, in sha256sum's own form (`sha256sum -c report.sha256`)."""
    pages = [name for name in names_of(run) if is_page(name) and not Path(name).name.startswith(".")]
    files.write_atomic(run / REPORT_SUMS, "".join(f"{digest_of(run / name)}  {name}\n" for name in pages).encode())
