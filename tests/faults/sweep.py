"""Faults at the N-th operation on the disk of a whole run of the fake model, in forked children. No test stands here.

Owns the counting: the writes, syncs and truncations of cai.store.files, and the renames and folders of anybody. The
same run makes the same operations in the same order: nothing here depends on the clock.

One run is made and forked at every operation that is to be hit: the child works on a copy of the folder that stands in
the folder's place, meets the fault and ends, and a process that has everything imported and parsed resumes what it
left. So the way to the N-th operation is gone once, not once a fault. What was left byte for byte as by an earlier
fault is not resumed again: a sync that a kill spares leaves the same files, a disk that is full those of one that is
broken. For that the clock goes by its questions (`Ticks`), not by the machine's time.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import gc
import hashlib
import io
import os
import pickle
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

import runner
from cai.commands import verify
from cai.recipe import load, yaml_files
from cai.report import drawing, pages
from cai.run import folder as run_folder
from cai.run import progress
from cai.store import files, lock

SEAMS = ((files, "_write"), (files, "_fsync"), (files, "_fdatasync"), (files, "_ftruncate"), (files, "_replace"),
         (os, "mkdir"), (os, "rename"))  # fmt: skip
FAULTS = ("kill", "torn", "short", "ENOSPC", "EIO")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
COMPARED = ("records.jsonl", "dataset", "adapter", "adapter-sft", "eval/gates.json", "eval/guard.json")


@dataclass
class Counter:
    """Stands in for the seams: counts, and at an operation (from 1) does the fault that `choose` names, "" for none."""

    choose: Callable[[int], str] = lambda count: ""
    fault: str = ""
    count: int = 0
    seen: list[str] = field(default_factory=list)
    _asked: bool = False

    def install(self) -> None:
        for holder, name in SEAMS:
            setattr(holder, name, self.around(name, getattr(holder, name)))

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if self._asked:  # an operation of the choice itself
                return real(*args, **more)
            self.count += 1
            self.seen.append(name)
            self._asked = True
            self.fault = self.choose(self.count)
            self._asked = False
            return self.strike(name, real, args) if self.fault else real(*args, **more)

        return call

    def strike(self, name: str, real: Callable[..., Any], args: Any) -> Any:
        if self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))
        if self.fault in ("torn", "short") and name == "_write":
            written = real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if self.fault == "short":
                return written
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Branches:
    """Forks the run at the operations of `todo`: the child goes on with the fault, on a copy in the folder's place.

    The parent waits for it, moves the copy to `results`/<at>-<fault>, says so through `said` and goes on as if nothing
    had been. `room`: a byte is read from it before each branch, so that results do not pile up.
    """

    project: Path
    todo: Mapping[int, Sequence[str]]
    results: Path
    said: int
    room: int
    branch: bool = False

    def __call__(self, count: int) -> str:
        if self.branch:
            return ""
        for fault in self.todo.get(count, ()):
            os.read(self.room, 1)
            aside = self.project.with_name(self.project.name + ".aside")
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            self.project.rename(aside)
            shutil.copytree(aside, self.project, symlinks=True)
            pid = os.fork()
            if pid == 0:
                self.branch = True
                os.chdir(self.project)
                _reopen(aside, self.project)
                # a lock that was being taken is this process's from here on, as its file is
                filelock.BaseFileLock._raise_if_inherited = lambda _: None
                return fault
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for half in sorted(
                self.project.rglob(f".*.{os.getpid()}.new"), reverse=True
            ):  # named before the fork, by a process that lives
                half.rename(half.with_name(half.name.replace(f".{os.getpid()}.", f".{pid}.")))
            self.project.rename(self.results / f"{count}-{fault}")
            aside.rename(self.project)
            os.write(self.said, f"{count} {fault} {code}\n".encode())
        return ""


def _reopen(old: Path, new: Path) -> None:
    """Every open file below `old` becomes the one of the same name below `new`, at the same place, locked if it was."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(FileNotFoundError, ValueError):  # the folder's own listing; what was deleted
            relative = Path(os.readlink(f"/proc/self/fd/{fd}")).relative_to(old)
            about = Path(f"/proc/self/fdinfo/{fd}").read_text()
            flags = int(about.split("flags:")[1].split()[0], 8) & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
            again = os.open(new / relative, flags)
            os.lseek(again, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(again, fd, os.get_inheritable(fd))
            os.close(again)
            if "FLOCK" in about:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remembered(real: Callable[..., Any]) -> Callable[..., Any]:
    """A parser that reads the same text once: half of a resume was parsing of the recipe and the prompts."""
    known: dict[str, bytes] = {}

    def parse(text: str) -> Any:
        if text not in known:
            known[text] = pickle.dumps(real(text))
        return pickle.loads(known[text])

    return parse


class Ticks(datetime.datetime):
    """A clock that goes on by a millisecond whenever it is asked: the same run reads the same times."""

    asked = 0

    @classmethod
    def seconds(cls) -> float:
        Ticks.asked += 1
        return Ticks.asked / 1000

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Ticks:
        return cls.fromtimestamp(1_800_000_000 + cls.seconds(), tz)


def still() -> None:
    """Nothing that a clock decides: status.json is written when it must be, no heart beats, times are counted.

    What is not compared costs little: no picture is drawn and no page rendered. In a process of its own.
    """
    load.parse_toml, yaml_files._parse = remembered(load.parse_toml), remembered(yaml_files._parse)
    pages.page = pages.markdown = lambda content: "a page"
    drawing.inline = lambda *_, **__: "<svg></svg>"
    drawing.svg_file = drawing.pdf_file = lambda *_, **__: b"a picture"
    time.monotonic, lock.datetime = Ticks.seconds, Ticks
    for module in (run_folder, progress):
        for name in ("STATUS_SECONDS", "HEARTBEAT_SECONDS", "PLAIN_SECONDS"):
            if hasattr(module, name):
                setattr(module, name, 1e9)


def child(work: Callable[[], int], said: Path) -> int:
    """Exit code of `work` in a fork (-9: killed); what it said is in the file."""
    pid = os.fork()
    if pid == 0:
        _end(work, said)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end(work: Callable[[], int], said: Path) -> None:
    """`work` and no return: this process ends with its code."""
    fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(fd, stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    code = 1
    try:
        code = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def started(project: Path, argv: Sequence[str], counter: Counter, said: Path) -> int:
    return child(lambda: run(project, argv, counter), said)


def run(project: Path, argv: Sequence[str], counter: Counter) -> int:
    os.chdir(project)
    counter.install()
    try:
        return runner.main([str(project / "cai.toml"), *argv])
    finally:
        (project / "count").write_text(" ".join(counter.seen))


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


def measured(template: Path, argv: Sequence[str]) -> tuple[list[str], dict[str, str], str]:
    """(operations, digest, what it said) of a run that nothing hits; made twice, and equal."""
    place = template.parent / "measured"
    place.mkdir()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            still()
            warmed(template, place / "warm", argv)
            for name in ("one", "two"):
                shutil.copytree(template, place / name)
                code = started(place / name, argv, Counter(), place / name / "said")
                assert code == 0, (place / name / "said").read_text()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the run that nothing hits broke off"
    said = (place / "one" / "said").read_text()
    found = [((place / name / "count").read_text().split(), digest((place / name / "runs" / "latest").resolve()))
             for name in ("one", "two")]  # fmt: skip
    assert found[0] == found[1], "the same run must make the same operations"
    return *found[0], said


def state(place: Path) -> str:
    """sha256 of everything that stands there: names (without the number of the process), kinds, modes, bytes, links.

    What was said and how often operations were counted is not part of it.
    """
    found = hashlib.sha256()
    for path in sorted(place.rglob("*")):
        name = re.sub(r"\.\d+(\.new)?$", r".PID\1", str(path.relative_to(place)))
        if name not in ("said", "count"):
            kind = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_bytes()
            found.update(repr((name, path.lstat().st_mode, kind)).encode())
    return found.hexdigest()


def trials(template: Path, argv: Sequence[str], todo: Sequence[tuple[int, str]], whole: dict[str, str]) -> list[str]:
    """What went wrong in these trials, shared by the cores; where pytest has shared out the tests, by one."""
    workers, pids = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 2, []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            place = template.parent / f"worker-{worker}"
            wrong = ["the worker broke off"]
            try:
                place.mkdir()
                wrong = worked(template, place, argv, todo[worker::workers], whole)
            except BaseException as error:
                wrong += [repr(error)]
            finally:
                (template.parent / f"wrong-{worker}").write_text("\n".join(wrong))
                shutil.rmtree(place, ignore_errors=True)
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    texts = [(template.parent / f"wrong-{worker}").read_text() for worker in range(workers)]
    return [line for text in texts for line in text.split("\n") if line]


def worked(template: Path, place: Path, argv: Sequence[str], todo: Sequence[tuple[int, str]], whole: Any) -> list[str]:
    """One worker: a run that is forked at every operation of `todo`, and a resume of each branch as it comes."""
    still()
    warmed(template, place / "warm", argv)
    gc.freeze()  # forks share what is there by now
    faults: dict[int, list[str]] = {}
    for at, fault in todo:
        faults.setdefault(at, []).append(fault)
    project, (heard, say), (room, give) = place / "project", os.pipe(), os.pipe()
    shutil.copytree(template, project)
    os.write(give, b"." * 4)
    pid = os.fork()
    if pid == 0:
        os.close(heard)
        os.close(give)
        branches = Branches(project, faults, place, say, room)
        _end(lambda: run(project, argv, Counter(branches)), project / "said")
    os.close(say)
    wrong, done, known = [], 0, dict[str, str]()
    with open(heard) as lines:
        for line in lines:
            at, fault, code = line.split()
            text = trial(template, place / f"{at}-{fault}", argv, int(code), whole, known)
            wrong += [f"{fault} at {at}: {text}"] if text else []
            done += 1
            os.write(give, b".")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code or digest((project / "runs" / "latest").resolve()) != whole:
        wrong.append(f"the run that was forked ended with {code}: {(project / 'said').read_text()[-300:]}")
    return wrong if done == len(todo) else [*wrong, f"{done} of {len(todo)} faults were met"]


def warmed(template: Path, place: Path, argv: Sequence[str]) -> None:
    """A run and a resume in this process: what they import, compile and parse no trial has to."""
    shutil.copytree(template, place)
    before = Path.cwd()
    os.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert runner.main([str(place / "cai.toml"), *argv]) == 0
        assert runner.main([str(place / "cai.toml"), "--resume", "runs/latest"]) == 0
        verify.verify((place / "runs" / "latest").resolve())
    os.chdir(before)
    shutil.rmtree(place)


def trial(
    template: Path, place: Path, argv: Sequence[str], code: int, whole: dict[str, str], known: dict[str, str]
) -> str:
    """What went wrong with one fault, whose run ended with `code` and stands in `place`; "" for nothing.

    `known`: what stood there -> what went wrong with it, of the trials before.
    """
    said, run = place / "said", place / "runs" / "latest"
    first = said.read_text(errors="replace")
    if code == 0 or "Traceback" in first:
        wrong = f"exit {code}: {' '.join(first[-300:].split())}" if "Traceback" in first else ""
        wrong = wrong or ("" if digest(run.resolve()) == whole else "ended well with other bytes")
    elif (left := state(place)) in known:
        wrong = known[left]
    else:
        wrong = known[left] = gone_on(template, place, argv, code, whole)
    shutil.rmtree(place)
    return wrong


def gone_on(template: Path, place: Path, argv: Sequence[str], code: int, whole: dict[str, str]) -> str:
    """What went wrong when a run that ended with `code` was resumed, or begun anew."""
    said, run = place / "said", place / "runs" / "latest"
    if not run.is_symlink():  # before there was a run: begun anew
        shutil.rmtree(place)
        shutil.copytree(template, place)
        code = started(place, argv, Counter(), said)
        return "" if code == 0 and digest(run.resolve()) == whole else f"begun anew: exit {code}"
    again = resumed(place, said)
    found = digest(run.resolve())
    other = [name for name, sha in found.items() if whole.get(name) != sha]
    lost = sorted(whole.keys() - found.keys())
    text = " ".join(said.read_text(errors="replace")[-300:].split())
    return "" if again == 0 and not other and not lost else f"exit {code}, resume {again}: {other}{lost} {text}"
