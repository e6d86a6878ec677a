"""The terminal and the signals: what a person sees, and how a person (or a spot market) stops a run.

Owns `printable` (model text must not steer a terminal), streams that outlive their terminal, and the stop switch. Does
not know what is being run. Invariants: no control in model text reaches a terminal as one; no dead terminal ends a run;
the first SIGINT or SIGTERM asks for a stop, the second ends the process at once, SIGHUP does nothing.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from cai import errors
from cai.errors import Stopped

# C0 without tab and newline, DEL, C1, bidi marks and embeddings and isolates, line and paragraph separator,
# zero-width and byte-order marks, language tags (invisible text), lone surrogates.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str, *, one_line: bool = False) -> str:
    """`text` with every control character spelled out (`\\x1b`, `\\u202e`), so that a terminal or log shows it inert.

    Tabs and newlines stay, unless `one_line`: then they are spelled out too, so one row cannot pose as two.
    """
    shown = UNSAFE.sub(_spell, text)
    return shown.replace("\n", "\\n").replace("\t", "\\t") if one_line else shown


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


AFTER_HOLD_SECONDS = 1.0  # what a run gets to end gracefully once a save that was being waited for is done


class LastingStream(io.TextIOBase):
    """A text stream that swallows the death of its terminal or pipe: from then on it writes to nowhere."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner
        self.dead = False

    def write(self, text: str) -> int:
        if not self.dead:
            try:
                self._inner.write(text)
                if "\n" in text or "\r" in text:
                    self._inner.flush()
            except (OSError, ValueError):  # EPIPE (| head), EIO (terminal closed), ENOSPC (redirected), closed file
                self._bury()
        return len(text)

    def flush(self) -> None:
        if not self.dead:
            try:
                self._inner.flush()
            except (OSError, ValueError):
                self._bury()

    def _bury(self) -> None:
        """Point the descriptor at /dev/null, so that libraries' own writes and the exit's flush succeed as well."""
        self.dead = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._inner.fileno())
            os.close(nowhere)

    def isatty(self) -> bool:
        try:
            return not self.dead and self._inner.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        return self._inner.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._inner.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._inner.errors

    @property
    def buffer(self) -> Any:
        return getattr(self._inner, "buffer", None)


def last_through_hangups() -> None:
    """Make stdout and stderr outlive their terminal, and never fail on a character they cannot encode."""
    _open_descriptors()
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed when the program was started
            stream = os.fdopen(fd, "w", encoding="utf-8", closefd=False)
        if isinstance(stream, LastingStream):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, LastingStream(stream))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _open_descriptors() -> None:
    """Point descriptors that were closed at the start (`2>&-`) at /dev/null: a log opened next would be stderr."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number, which is this one


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
        self._read_fd = self._write_fd = -1
        self._previous: dict[int, Any] = {}

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
        self._previous = {n: signal.signal(n, _nothing) for n in (signal.SIGINT, signal.SIGTERM)}
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, name="stop-switch", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Give the signals back (tests)."""
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
                os._exit(errors.SIGINT if number == signal.SIGINT else errors.SIGTERM)
            self.signal_number = number
            threading.Thread(target=self._end_in_time, name="stop-grace", daemon=True).start()
            with suppress(OSError, ValueError):
                name = signal.Signals(number).name
                sys.stderr.write(f"\n{name}: stopping after what is in flight; again to stop at once\n")
        os.close(self._read_fd)

    def _end_in_time(self) -> None:
        deadline = time.monotonic() + self.grace_seconds
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if self._held:
                deadline = max(deadline, time.monotonic() + AFTER_HOLD_SECONDS)
        with suppress(OSError, ValueError):
            sys.stderr.write("the grace period is over: stopped, resumable\n")
            sys.stderr.flush()
        os._exit(errors.RESUMABLE)


def _nothing(number: int, frame: object) -> None:
    """Handler that only keeps the default action from happening; the wakeup pipe carries the signal."""
