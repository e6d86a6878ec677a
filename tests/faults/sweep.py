"""Faults at the N-th operation on the disk of a whole run of the fake model, in forked children. No test stands here.

Owns the counting: the writes, syncs and truncations of cai.store.files, and the renames and folders of anybody. A trial
is a fork of a process that has everything imported, so that a run takes tenths of a second. The same run makes the same
operations in the same order: nothing here depends on the clock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runner
from cai.commands import verify
from cai.report import drawing
from cai.run import folder as run_folder
from cai.run import progress
from cai.store import files

SEAMS = ((files, "_write"), (files, "_fsync"), (files, "_fdatasync"), (files, "_ftruncate"), (files, "_replace"),
         (os, "mkdir"), (os, "rename"))  # fmt: skip
FAULTS = ("kill", "torn", "short", "ENOSPC", "EIO")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
COMPARED = ("records.jsonl", "dataset", "adapter", "adapter-sft", "eval/gates.json", "eval/guard.json")


@dataclass
class Counter:
    """Stands in for the seams: counts, and at operation `at` (from 1) does `fault`."""

    at: int = 0
    fault: str = ""
    count: int = 0
    seen: list[str] = field(default_factory=list)

    def install(self) -> None:
        for holder, name in SEAMS:
            setattr(holder, name, self.around(name, getattr(holder, name)))

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self.count += 1
            self.seen.append(name)
            return self.strike(name, real, args) if self.count == self.at else real(*args, **more)

        return call

    def strike(self, name: str, real: Callable[..., Any], args: Any) -> Any:
        if self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))
        if self.fault in ("torn", "short") and name == "_write":
            written = real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if self.fault == "short":
                return written
        os.kill(os.getpid(), signal.SIGKILL)


def still() -> None:
    """Nothing that a clock decides: status.json is written when it must be, and no heart beats. No picture is drawn."""
    drawing.inline = lambda *_, **__: "<svg></svg>"
    drawing.svg_file = drawing.pdf_file = lambda *_, **__: b"a picture"
    for module in (run_folder, progress):
        for name in ("STATUS_SECONDS", "HEARTBEAT_SECONDS", "PLAIN_SECONDS"):
            if hasattr(module, name):
                setattr(module, name, 1e9)


def child(work: Callable[[], int], said: Path) -> int:
    """Exit code of `work` in a fork (-9: killed); what it said is in the file."""
    pid = os.fork()
    if pid == 0:
        fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(fd, stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        code = 1
        try:
            still()
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def started(project: Path, argv: Sequence[str], counter: Counter, said: Path) -> int:
    def work() -> int:
        os.chdir(project)
        counter.install()
        try:
            return runner.main([str(project / "cai.toml"), *argv])
        finally:
            (said.parent / "count").write_text(" ".join(counter.seen))

    return child(work, said)


def resumed(project: Path, said: Path) -> int:
    def work() -> int:
        os.chdir(project)
        code = runner.main([str(project / "cai.toml"), "--resume", "runs/latest"])
        if code == 0:
            bad = [check for check in verify.verify((project / "runs" / "latest").resolve()) if check.verdict == "FAIL"]
            print(*bad, sep="\n")
            return 99 if bad else 0
        return code

    return child(work, said)


def digest(run: Path) -> dict[str, str]:
    found = {}
    for name in COMPARED:
        top = run / name
        for path in [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file()):
            found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def trials(template: Path, argv: Sequence[str], todo: Sequence[tuple[int, str]], whole: dict[str, str]) -> list[str]:
    """What went wrong in these trials, shared by as many workers as there are cores."""
    workers, pids = os.cpu_count() or 2, []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            place, wrong = template.parent / f"worker-{worker}", ["the worker broke off"]
            try:
                found = [trial(template, place, argv, at, fault, whole) for at, fault in todo[worker::workers]]
                wrong = [text for text in found if text]
            finally:
                (template.parent / f"wrong-{worker}").write_text("\n".join(wrong))
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    texts = [(template.parent / f"wrong-{worker}").read_text() for worker in range(workers)]
    return [line for text in texts for line in text.split("\n") if line]


def trial(template: Path, place: Path, argv: Sequence[str], at: int, fault: str, whole: dict[str, str]) -> str:
    """What went wrong with one fault, or ""."""
    shutil.copytree(template, place)
    said, run = place / "said", place / "runs" / "latest"
    code = started(place, argv, Counter(at, fault), said)
    first = said.read_text(errors="replace")
    if code == 0 or "Traceback" in first:
        wrong = f"exit {code}: {' '.join(first[-300:].split())}" if "Traceback" in first else ""
        wrong = wrong or ("" if digest(run.resolve()) == whole else "ended well with other bytes")
    elif not run.is_symlink():  # before there was a run: begun anew
        code = started(place, argv, Counter(), said)
        wrong = "" if code == 0 and digest(run.resolve()) == whole else f"begun anew: exit {code}"
    else:
        again = resumed(place, said)
        other = [name for name, sha in digest(run.resolve()).items() if whole.get(name) != sha]
        lost = sorted(whole.keys() - digest(run.resolve()).keys())
        text = " ".join(said.read_text(errors="replace")[-300:].split())
        wrong = "" if again == 0 and not other and not lost else f"exit {code}, resume {again}: {other}{lost} {text}"
    shutil.rmtree(place)
    return f"{fault} at {at}: {wrong}" if wrong else ""
