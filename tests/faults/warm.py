"""A runner that has imported what takes long (unsloth, TRL: eight seconds of processor time) and forks for every run.

Run as a program it reads {folder, out, err, environment, argv} a line from stdin, and says the child's pid and then its
exit code. The child is a process of its own, with its own weights: SIGKILL and SIGTERM reach it as they reach a runner.
With TINY a small model with random weights is saved in that folder. In a run's environment NOISE makes a pair of
whatever the model writes (bench/noise.py), and CHECKED leaves out the check that an earlier run has made.
With LIGHT in the environment a small run of the fake model was made first, so what a run imports, compiles and parses
is there, and no torch: four of its seven seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Warm:
    """The parent's side: one child at a time. Has what the tests use of a Popen."""

    env: dict[str, str] = field(default_factory=dict)
    returncode: int | None = None
    pid: int = 0

    def __post_init__(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **self.env}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.server = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)  # type: ignore[call-overload]
        self._line(600)

    def _line(self, seconds: float) -> str:
        assert self.server.stdout
        if not select([self.server.stdout], [], [], max(0.0, seconds))[0]:
            raise subprocess.TimeoutExpired("warm runner", seconds)
        return self.server.stdout.readline().decode()

    def start(
        self, folder: Path, argv: list[str], err: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Warm:
        """A run in `folder`; what it says goes to `folder`/output, its stderr to `err` if that is another file."""
        assert self.server.stdin
        self.output = folder / "output"
        asked = {"folder": str(folder), "out": str(self.output), "err": str(err or self.output), "argv": argv}
        asked |= {"environment": {**os.environ, "HF_HUB_OFFLINE": "1", **self.env, **(env or {})}}
        self.server.stdin.write(json.dumps(asked).encode() + b"\n")
        self.returncode, self.pid = None, int(self._line(60))
        return self

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        if self.returncode is None and self.pid:
            self.send_signal(signal.SIGKILL)
        self.server.kill()
        self.server.wait()


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print at import is no answer
    (_light if os.environ.get("LIGHT") else _whole)()
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(answers)
            _run(asked)
        os.write(answers, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(answers, f"{code}\n".encode())


def _run(asked: dict[str, Any]) -> NoReturn:
    """What a runner does that was started with these words, in this process."""
    import runner

    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = [str(ROOT / "runner.py"), *asked["argv"]]
    changed()
    code = 1
    try:
        code = runner.main(asked["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _whole() -> None:
    import cai.models.policy

    cai.models.policy.prepare_environment()
    with cai.models.policy.quiet():
        import unsloth  # noqa: F401, I001  (first: it patches the others)
        import cai.training.trainers
    if tiny := os.environ.get("TINY"):
        sys.path.insert(0, str(ROOT / "tests"))
        from support.models import save_tiny

        save_tiny(Path(tiny))


def changed() -> None:
    """What the environment asks to be otherwise in this run."""
    if os.environ.get("NOISE"):
        sys.path.insert(0, str(ROOT / "bench"))
        import noise

        noise.accept()
    if os.environ.get("CHECKED"):  # a padded batch equals its rows alone: a quarter of the time of 30 resumes
        from cai.preflight import model_checks

        known = model_checks.Check("padded batch = alone", "ok", "checked by the run that is left alone")
        model_checks.short_checks = lambda *_: iter([known])


def _light() -> None:
    import importlib

    for name in ("cai.pipeline", "cai.data.collect", "cai.evaluate.measure", "cai.report.pages", "cai.commands.fork",
                 "cai.commands.verify", "cai.run.budget", "scipy.stats", "sklearn.metrics", "matplotlib.figure",
                 "matplotlib.backends.backend_svg", "runner"):  # fmt: skip
        importlib.import_module(name)
    from cai.report.drawn import Standing
    from cai.report.templating import environment

    nothing: Any = lambda *_: "<svg></svg>"  # noqa: E731 - two seconds of each report, and no fault test reads them
    Standing.inline = nothing  # type: ignore[method-assign]

    for name in environment().list_templates(extensions=["j2"]):
        environment().get_template(name)
    run_once()
    assert "torch" not in sys.modules, "a fake run needs no torch, and a fork of threads would be none"


def run_once() -> None:
    """A whole run of one item in this process, in a folder that goes."""
    import runner

    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        sets = [f"--set={key}" for key in ("model.backend=fake", "model.name=fake", f'runs="{folder}"')]
        assert runner.main([str(ROOT / "cai.toml"), "--milestone", "m0", *sets]) == 0


if __name__ == "__main__":
    serve()
