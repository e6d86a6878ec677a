"""One row while it is drawn: its tokens so far, and whether eos, a stop string or the limit ends it.

Owns the stop rules that all backends share, so that a row ends at the same token on each of them. Doesn't own the
device, the batch or the draw. Invariant: `Row.feed` is called once a token, in order, and never after it has returned
a finish; text is decoded from the row's own tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cai.engine import Completion, Finish, Request

UNDECIDED = "\ufffd"  # what a piece of a character decodes to


class TokenDecoder(Protocol):
    """What the engine needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(slots=True)
class Pieces:
    """Text of single tokens, decoded once each: a cheap test of which tokens could end a stop string."""

    tokenizer: TokenDecoder
    text_of: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, token: int) -> str:
        piece = self.text_of.get(token)
        if piece is None:
            piece = self.text_of[token] = self.tokenizer.decode([token])
        return piece


@dataclass(slots=True)
class Row:
    """A request and what was drawn for it. `done` is set by the token that ends it."""

    request: Request
    pieces: Pieces
    ids: list[int] = field(default_factory=list)
    done: Finish | None = None
    tail: int = 0

    def __post_init__(self) -> None:
        stops = self.request.sampling.stop
        self.tail = max((len(stop.encode()) for stop in stops), default=0) + 4  # a token holds at least one byte

    def feed(self, token: int) -> Finish | None:
        """Take the next drawn token; the finish if it ends the row."""
        sampling = self.request.sampling
        self.ids.append(token)
        if token in sampling.eos_ids:
            self.done = "eos"
        elif sampling.stop and self._may_stop(token) and self._cut() is not None:
            self.done = "stop"
        elif len(self.ids) >= sampling.max_new_tokens:
            self.done = "length"
        return self.done

    def completion(self) -> Completion:
        assert self.done is not None
        text = self._cut() if self.done == "stop" else self._text()
        return Completion(self.request.id, tuple(self.ids), text or "", self.done)

    def _text(self) -> str:
        ids = self.ids[:-1] if self.done == "eos" else self.ids
        return self.pieces.tokenizer.decode(ids) if ids else ""

    def _may_stop(self, token: int) -> bool:
        """False only where no stop string can end inside this token's text."""
        piece, stops = self.pieces[token], self.request.sampling.stop
        if piece and UNDECIDED not in piece and not any(s[-1] in piece or s[-1].isspace() for s in stops):
            return False
        text = self.pieces.tokenizer.decode(self.ids[-self.tail :])
        return any(stop in text for stop in stops)

    def _cut(self) -> str | None:
        """The text before the earliest stop string; None where there is none."""
        text = self.pieces.tokenizer.decode(self.ids)
        found = [at for stop in self.request.sampling.stop if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else None
