"""Stop at the first signal, at once on the second; a stop can be held while files are written.

Owns the signal handlers of a run while it is open."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cai import errors
from cai.errors import Stopped


class StopSwitch:
    """Turned by the first SIGINT or SIGTERM; `switch()` is the engines' `stopped` callback.

    A thread reads the signals from a pipe, so that the switch turns even while the main thread is inside one long call
    of a native library. A run that has not ended `grace_seconds` after the notice is ended with exit 75 (RESUMABLE):
    everything committed is on disk, so this loses no more than the batch in flight. `hold()` puts that off for a save.
    """

    def __init__(self, grace_seconds: float = 3.0) -> None:
        self.grace_seconds = grace_seconds
        self.signal_number = 0
        self._held = 0
        self._turned = 0.0  # when the first signal came
        self._read_fd = self._write_fd = -1
        self._previous: dict[int, Any] = {}
        self._over = threading.Event()  # the signals were given back: nobody's process is to end any more

    def __call__(self) -> bool:
        return self.signal_number != 0

    def check(self, doing: str) -> None:
        """Raise Stopped (exit 75) if the switch was turned."""
        if self():
            name = signal.Signals(self.signal_number).name
            raise Stopped(f"stopped by {name} {doing}; everything finished is kept, resume to go on")

    def install(self) -> StopSwitch:
        """Take over SIGINT and SIGTERM of this process (main thread only); forked children get the defaults back."""
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._over.clear()
        self._previous = {n: signal.signal(n, _nothing) for n in (signal.SIGINT, signal.SIGTERM)}
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, name="stop-switch", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Give the signals back (tests); a grace period that runs ends nothing any more."""
        self._over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._previous = {}
        if self._write_fd >= 0:
            os.close(self._write_fd)  # the watching thread sees the end of the pipe and returns
            self._write_fd = -1

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within this block (a checkpoint save) the grace period does not end the process; a second signal does."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _forget(self) -> None:
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number in self._previous:
                signal.signal(number, signal.SIG_DFL)

    def _watch(self) -> None:
        while received := os.read(self._read_fd, 1):
            number = received[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self.signal_number:
                if time.monotonic() - self._turned < ONE_STOP_SECONDS:
                    continue
                os._exit(errors.SIGINT if number == signal.SIGINT else errors.SIGTERM)
            self.signal_number, self._turned = number, time.monotonic()
            threading.Thread(target=self._end_in_time, name="stop-grace", daemon=True).start()
            with suppress(OSError, ValueError):
                name = signal.Signals(number).name
                sys.stderr.write(f"\n{name}: stopping after what is in flight; again to stop at once\n")
        os.close(self._read_fd)

    def _end_in_time(self) -> None:
        deadline = time.monotonic() + self.grace_seconds
        while time.monotonic() < deadline:
            if self._over.wait(0.05):
                return
            if self._held:
                deadline = max(deadline, time.monotonic() + AFTER_HOLD_SECONDS)
        with suppress(OSError, ValueError):
            sys.stderr.write("the grace period is over: stopped, resumable\n")
            sys.stderr.flush()
        os._exit(errors.RESUMABLE)


ONE_STOP_SECONDS = 0.5  # `timeout` and `make` pass on the Ctrl-C that the terminal sent to all: still one stop
AFTER_HOLD_SECONDS = 1.0  # what a run gets to end gracefully once a save that was being waited for is done


def _nothing(number: int, frame: object) -> None:
    """Handler that only keeps the default action from happening; the wakeup pipe carries the signal."""
