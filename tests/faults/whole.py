"""Whole runs in child processes, for tests that kill, starve or confuse them. No test stands here.

A run that asks for nothing special of its process is forked from one that has imported everything (`warm`): the same
program in a process of its own, four of seven seconds cheaper. `alone=True` starts an interpreter.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import orjson
from warm import Warm

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = (
    "model.backend=fake", "model.name=fake", "evaluation.critic_items=4", "evaluation.fresh_items=2",
    "evaluation.neutral_passages=4", "evaluation.kl_passages=2", "evaluation.likelihood_items=2",
    "evaluation.judge_items=2",
)  # fmt: skip
COMPARED = ("records.jsonl", "dataset", "adapter")


@dataclass
class Done:
    """How a child ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        return self.out + self.err


@dataclass
class Project:
    """A recipe folder; `sets` are its --set keys. `run` is the newest run."""

    folder: Path
    sets: tuple[str, ...] = FAKE
    env: dict[str, str] = field(default_factory=dict)
    recipe: str = "cai.toml"

    @property
    def run(self) -> Path:
        return (self.folder / "runs" / "latest").resolve()

    def command(self, *argv: str, sets: tuple[str, ...] = ()) -> list[str]:
        own = () if "--resume" in argv else self.sets  # a resumed run keeps the keys it was started with
        keys = [word for key in (*own, *sets) for word in ("--set", key)]
        return [sys.executable, str(ROOT / "runner.py"), str(self.folder / self.recipe), *keys, *argv]

    def start(self, *argv: str, sets: tuple[str, ...] = (), **options: object) -> subprocess.Popen[str]:
        """A runner of its own session, so that no signal of the test's terminal reaches it."""
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **self.env}
        return subprocess.Popen(
            self.command(*argv, sets=sets), cwd=self.folder, text=True, env=environment, **{**defaults, **options}
        )  # type: ignore[call-overload]

    def go(
        self, *argv: str, sets: tuple[str, ...] = (), timeout: float = 300, alone: bool = False, **options: object
    ) -> Done:
        """Start a runner and wait for its end."""
        began = time.monotonic()
        if not (alone or options or self.env):
            return self._forked(argv, sets, timeout)
        process = self.start(*argv, sets=sets, **options)
        out, err = process.communicate(timeout=timeout)
        return Done(process.returncode, out or "", err or "", time.monotonic() - began)

    def fork(self, *argv: str, sets: tuple[str, ...] = ()) -> Warm:
        """A runner that was forked: to wait for, or to kill. What it says goes to `output` and `errors`."""
        err = self.folder / "errors"
        for path in (self.folder / "output", err):
            path.unlink(missing_ok=True)
        return light().start(self.folder, self.command(*argv, sets=sets)[2:], err)

    def _forked(self, argv: tuple[str, ...], sets: tuple[str, ...], timeout: float) -> Done:
        began, err, process = time.monotonic(), self.folder / "errors", self.fork(*argv, sets=sets)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            raise
        said = [path.read_text(errors="replace") for path in (self.folder / "output", err)]
        return Done(code, said[0], said[1], time.monotonic() - began)

    def resume(self, *argv: str, **options: object) -> Done:
        return self.go("--resume", "runs/latest", *argv, **options)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def light() -> Warm:
    server = Warm({"LIGHT": "1"})
    atexit.register(server.close)
    return server


def digest(run: Path, names: tuple[str, ...] = COMPARED) -> dict[str, str]:
    """sha256 of what must not depend on how often a run was killed."""
    found = {}
    for name in names:
        top = run / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file():
                found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def wait_for(process: subprocess.Popen[str], ready: object, seconds: float = 60) -> None:
    """Until `ready()` is true or the process has ended."""
    deadline = time.monotonic() + seconds
    while not ready() and process.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < deadline, "the run did not come this far"
        time.sleep(0.01)


def events(run: Path, kind: str) -> list[dict[str, object]]:
    rows = [orjson.loads(line) for line in (run / "events.jsonl").read_bytes().split(b"\n")[:-1]]
    return [row for row in rows if row["kind"] == kind]
