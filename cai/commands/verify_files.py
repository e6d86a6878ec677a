"""The files of a run against their digests: logs by their sum files, the rest by what the last attempt noted.

Owns the rule that nothing passes unseen: a file is compared, or named with the reason why it is not. What cannot be
compared is "skip" (a sum file that is gone or short, an attempt that was cut off), never "ok". Writes nothing.
"""

from __future__ import annotations

from pathlib import Path

from cai.commands import repair
from cai.commands.verify_dataset import Results
from cai.run import digests
from cai.run.events import read_events
from cai.store import records
from cai.store.scan import committed, foreign_lines

SHOWN = 5  # names in a line


def logs(run: Path) -> Results:
    """G1, G5, G6: each log's lines and hashes."""
    left, _ = digests.left(read_events(run / "events.jsonl"))
    for path, key in repair.logs_of(run):
        sums, name = path.with_suffix(".sum"), str(path.relative_to(run))
        found = records.walked(path, sums, key)
        if found is None:
            if end := committed(sums):
                yield "FAIL", f"{path.name}: missing, {end} bytes of it were committed"
            continue
        torn = found.damage is not None and found.is_torn_tail
        if wrong := found.damage if not torn and found.damage else found.changed:
            yield "FAIL", f"{path.name}: line {wrong.line}, byte {wrong.offset}: {wrong.reason}"
        elif not sums.is_file() and name in left and found.size < left[name][0]:
            gone = f"{left[name][0] - found.size} of the {left[name][0]} bytes that an attempt left"
            yield "FAIL", f"{path.name}: {gone} are missing, and {sums.name} is gone"
        elif gap := found.end - found.hashed:
            if (entry := left.get(name)) and (why := digests.fault(run, name, entry, log=True)):
                yield "FAIL", f"{path.name}: {why} after an attempt ended; {sums.name} has no hash of {gap} bytes"
            else:
                yield "skip", f"{path.name}: {gap} of {found.end} bytes cannot be checked: {sums.name} is gone or short"
        else:
            yield "ok", f"{path.name}: {found.count} lines, {found.end} of {found.size} bytes hashed and unchanged"
        if sums.is_file() and (odd := foreign_lines(sums)):
            yield "note", f"{sums.name}: {odd} line(s) that are no hashes are passed over"
        if torn:
            yield "note", f"{path.name}: {found.size - found.end} torn bytes at the end; the next resume cuts them"
        if found.committed > found.end:
            yield (
                "note",
                f"{path.name}: {found.committed - found.end} committed bytes are missing; a resume redoes them",
            )


def files(run: Path) -> Results:
    """Every other file: as the last attempt left it."""
    names = digests.names_of(run)
    left, settled = digests.left(read_events(run / "events.jsonl"))
    if not left:
        yield "skip", "no attempt noted the files it left: derived files are not compared"
    wrong = {name: why for name, entry in left.items() if (why := _fault(run, name, entry))}
    lost = [f"{name} {why}" for name, why in wrong.items() if settled or name == "records.jsonl"]
    if lost:
        yield "FAIL", f"{_some(lost)}; what is derived a resume makes again, else put it back from a copy"
    elif wrong:
        yield "skip", f"{_some(list(wrong))}: may be of an attempt that was cut off; the next resume notes them"
    if left and not wrong:
        yield "ok", f"{len(left)} files as the last attempt left them"
    unknown = [n for n in names if left and not digests.covered_elsewhere(n) and n not in left]
    if unknown:
        yield "note", f"not compared, no attempt left them: {_some(unknown)}"
    yield from _pages(run, [name for name in names if digests.is_page(name)])
    here = {part for name in names for part in (name, name.split("/")[0])}
    bare = [f"{name} ({why})" for name, why in digests.NOT_COVERED.items() if name in here]
    yield "note", f"not compared: {', '.join(bare)}"


def _fault(run: Path, name: str, entry: list[object]) -> str:
    """Of a log only that it is gone: what stands in it is `logs`' matter (a repair may have shortened it)."""
    if digests.is_log(name) and (run / name).is_file():
        return ""
    return digests.fault(run, name, entry)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _pages(run: Path, pages: list[str]) -> Results:
    """The report's pages against report.sha256, which is written after them and removed before."""
    if not (run / digests.REPORT_SUMS).is_file():
        if pages:
            yield "skip", f"{_some(pages)}: {digests.REPORT_SUMS} is missing; --report writes them again"
        return
    sums = digests.page_sums(run)
    wrong = [name for name, sha in sums.items() if not (run / name).is_file() or digests.digest_of(run / name) != sha]
    extra = sorted(set(pages) - set(sums))
    if wrong or extra:
        yield "FAIL", f"{_some(wrong + extra)}: not as written (or {digests.REPORT_SUMS} is); --report writes it again"
    else:
        yield "ok", f"{len(sums)} pages as they were written"
