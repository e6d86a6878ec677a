"""A thread that asks for a sign of life while the main thread is busy, so that every second of a run is counted.

Owns the thread and the lock that keeps its events and the main thread's apart; what a sign of life is, the run decides.
A kill leaves at most the time between two beats uncounted, also while a model loads or a file is taken in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from cai.errors import CaiError


class Heart:
    """Calls `beat` every `seconds` from `start` to `stop`; ends by itself when a beat cannot be written."""

    def __init__(self, beat: Callable[[], None], seconds: float) -> None:
        self.beat, self.seconds = beat, seconds
        self.lock = threading.RLock()
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._go, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _go(self) -> None:
        with suppress(CaiError, OSError, AssertionError):  # the main thread meets the same fault and tells it
            while not self._ended.wait(self.seconds):
                self.beat()
