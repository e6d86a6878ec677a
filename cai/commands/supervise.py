"""`python -m cai.commands.supervise RECIPE --resume runs/ID`: resume a run until it is done, through preemptions.

Owns the restarts alone: it starts `runner.py ... --resume`, looks at the exit code, and waits longer each time nothing
was gained. Restarts after 75 (stopped but resumable; not at the budget, which no waiting cures) and after SIGKILL (the
kernel's out-of-memory killer); every other code is final and becomes its own. A SIGTERM or SIGINT is passed on to the
runner, and then nothing is restarted; a terminal that closes stops neither of them.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cai import errors
from cai.commands import cli
from cai.errors import CaiError
from cai.inputs import locate
from cai.run.events import read_events
from cai.store.jsonl import Row
from cai.terminal import last_through_hangups, printable
from cai.training import checkpoints

KILLED = -signal.SIGKILL


def work_done(run: Path) -> tuple[int, int]:
    """Bytes of the logs, and training steps and derived files: a restart that raised either was no vain one."""
    logs = [run / "records.jsonl", *run.glob("eval/**/*.jsonl")]
    trainings = [run / "train", *(path for path in run.glob("train/*/") if path.is_dir())]
    steps = sum(1 + checkpoints.step_of(found[0]) for folder in trainings if (found := checkpoints.found(folder)))
    derived = len([*run.glob("train/**/*.json"), *run.glob("train/*.safetensors"), *run.glob("adapter*/*")])
    return sum(path.stat().st_size for path in logs if path.exists()), steps + derived


def _newest(run: Path) -> list[Row]:
    """The events of the newest attempt, none where there is none."""
    events = read_events(run / "events.jsonl")
    newest = max((int(event["attempt"]) for event in events), default=0)
    return [event for event in events if event["attempt"] == newest]


def code_of_first(run: Path, before: int, code: int) -> int:
    """What the first of several processes ended with: torchrun says 1, whatever the reason was.

    `before`: the newest attempt when it was started. One that came to no end was killed.
    """
    own = _newest(run)
    if code == 0 or not own or int(own[0]["attempt"]) <= before:
        return code
    ended = [int(event["code"]) for event in own if event["kind"] == "end" and isinstance(event.get("code"), int)]
    return ended[-1] if ended else KILLED


def _budget_is_used_up(run: Path) -> str:
    """What the newest attempt said if it ended at its budget: waiting would only cost more. "" otherwise."""
    own = _newest(run)
    if not any(event["kind"] == "budget_stop" for event in own):
        return ""
    return str(own[-1].get("error") or f"{run}: the budget is used up")


class Supervisor:
    """Runs `command` until its exit code is final. `wait` is for tests."""

    def __init__(
        self,
        command: Sequence[str],
        run: Path,
        *,
        first_wait: float = 1.0,
        longest_wait: float = 300.0,
        fruitless: int = 8,
        wait: Callable[[float], object] | None = None,
        several: bool = False,
    ) -> None:
        self.command, self.run = list(command), run
        self.several = several  # the command is torchrun's
        self.first_wait, self.longest_wait, self.fruitless = first_wait, longest_wait, fruitless
        self.child: subprocess.Popen[bytes] | None = None
        self.told = False  # the running child has been sent the signal
        self.stop = threading.Event()
        self.wait = wait or self.stop.wait  # ends at once when a signal comes; time.sleep would go on

    def pass_on(self, number: int, frame: object) -> None:
        """Signal handler: tell the runner, and start no other."""
        self.stop.set()
        if self.child is not None and self.child.returncode is None:
            self.told = True
            self.child.send_signal(number)

    def supervise(self) -> int:
        """Exit code of the last runner (137 for one that was killed)."""
        in_vain = 0
        while True:
            before, attempt = work_done(self.run), max((int(e["attempt"]) for e in _newest(self.run)), default=0)
            self.child = subprocess.Popen(self.command, start_new_session=True)
            if self.stop.is_set() and not self.told:  # the signal came while the runner was being started
                self.pass_on(signal.SIGTERM, None)
            code = self.child.wait()
            if self.several:
                code = code_of_first(self.run, attempt, code)
            if code not in (errors.RESUMABLE, KILLED) or self.stop.is_set():
                return code if code >= 0 else 128 - code
            if code == errors.RESUMABLE and (spent_on := _budget_is_used_up(self.run)):
                print(f"not resumed: {spent_on}", file=sys.stderr)
                return code
            gained = any(now > then for now, then in zip(work_done(self.run), before, strict=True))
            in_vain = 0 if gained else in_vain + 1
            if in_vain > self.fruitless:
                print(f"{self.run}: {in_vain} restarts gained nothing: giving up (exit {code})", file=sys.stderr)
                return code if code >= 0 else 128 - code
            pause = min(self.longest_wait, self.first_wait * 2**in_vain)
            print(f"{self.run}: exit {code}; resuming in {pause:g} s", file=sys.stderr, flush=True)
            self.wait(pause)
            if self.stop.is_set():
                return errors.RESUMABLE


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m cai.commands.supervise RECIPE --resume runs/ID ...`: every argument goes to runner.py as it is.

    `--torchrun "--standalone --nproc-per-node=2"`, as the first argument, starts it through torchrun with these.
    """
    last_through_hangups()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given, starter = _starter(given)
        args = cli.parse(given)
        if not args.resume:
            raise CaiError("python -m cai.commands.supervise RECIPE --resume runs/ID: which run? Give --resume.")
        run = locate(args, args.resume)
    except CaiError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.code
    runner = Path(__file__).resolve().parents[2] / "runner.py"
    supervisor = Supervisor([sys.executable, *starter, str(runner), *given], run, several=bool(starter))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, supervisor.pass_on)
    return supervisor.supervise()


def _starter(given: list[str]) -> tuple[list[str], list[str]]:
    """(arguments of the runner, what starts it)."""
    if not given or given[0] != "--torchrun":
        return given, []
    if len(given) < 2:
        raise CaiError('supervise: --torchrun wants torchrun\'s own arguments: --torchrun "--standalone ..."')
    return given[2:], ["-m", "torch.distributed.run", *shlex.split(given[1])]


if __name__ == "__main__":
    sys.exit(main())
