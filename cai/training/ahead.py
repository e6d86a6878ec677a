"""Two buffers in turn: while a product reads one, what the next product reads is written into the other. No torch.

Owns which buffer holds what, and the order between the stream of the products and the one that writes. Invariants: a
buffer is written only behind everything that was launched before it was given away again, and read only behind the end
of its writing. The host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol


class Streams(Protocol):
    """The products' stream and the writing one; a mark is a place in one of them."""

    def lend(self, buffer: Any) -> None:
        """The writing stream will use this buffer."""

    def reached(self) -> Any:
        """A mark behind everything that was launched for products so far."""

    def write(self, after: Any, run: Callable[[], None]) -> Any:
        """Launch `run` on the writing stream, behind the mark; -> the mark of its end."""

    def wait(self, mark: Any) -> None:
        """Products launched from here on begin behind the mark."""


class Turns:
    """`take(key, following)` -> the buffer that holds `key`, valid until the next call. Of one, none is made ahead."""

    def __init__(self, count: int, fill: Callable[[int, Any], None], streams: Streams) -> None:
        self._fill, self._streams = fill, streams
        self._holds: list[Hashable | None] = [None] * count
        self._written: list[Any] = [None] * count
        self._last = 0

    def forget(self) -> None:
        """What is held is no longer true."""
        self._holds = [None] * len(self._holds)

    def take(self, key: Hashable, following: Hashable | None = None) -> int:
        reached = self._streams.reached()  # all readers of what was given away before are behind it
        if key not in self._holds:
            self._write((self._last + 1) % len(self._holds), key, reached)
        at = self._holds.index(key)
        self._streams.wait(self._written[at])
        self._last, other = at, (at + 1) % len(self._holds)
        if following is not None and other != at and following not in self._holds:
            self._write(other, following, reached)
        return at

    def _write(self, at: int, key: Hashable, after: Any) -> None:
        self._holds[at] = None  # should the writing fail
        self._written[at] = self._streams.write(after, lambda: self._fill(at, key))
        self._holds[at] = key
