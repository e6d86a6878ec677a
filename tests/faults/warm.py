"""A runner that has imported what takes long (unsloth, TRL: eight seconds of processor time) and forks for every run.

Run as a program it reads [folder, output file, *arguments] a line from stdin, and says the child's pid and then its
exit code. The child is a process of its own, with its own weights: SIGKILL and SIGTERM reach it as they reach a runner.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from select import select

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

    def start(self, folder: Path, argv: list[str]) -> Warm:
        assert self.server.stdin
        self.output = folder / "output"
        self.server.stdin.write(json.dumps([str(folder), str(self.output), *argv]).encode() + b"\n")
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
    import cai.models.policy
    import runner

    cai.models.policy.prepare_environment()
    with cai.models.policy.quiet():
        import unsloth  # noqa: F401, I001  (first: it patches the others)
        import cai.training.trainers

    if os.environ.get("NOISE"):
        sys.path.insert(0, str(ROOT / "bench"))
        import noise

        noise.accept()
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        folder, output, *argv = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(folder)
            os.close(answers)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(written, 1)
            os.dup2(written, 2)
            sys.argv = ["runner.py", *argv]
            code = runner.main(argv)
            sys.stdout.flush()
            os._exit(code)
        os.write(answers, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(answers, f"{code}\n".encode())


if __name__ == "__main__":
    serve()
