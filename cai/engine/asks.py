"""Scoring of given continuations, asked for by name: what shares a prefix is computed together, equal asks once.

Owns the order in which asks reach the engine and how texts are cut to a limit; what is asked, and how scores combine,
is the caller's (relevance of principles, comparisons, CSI, CRI, the judge).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cai.engine import Engine, Score, ScoreRequest, never
from cai.engine.tokenizers import Tokenizer
from cai.errors import Stopped

Format = Literal["base", "chat"]

Name = tuple[Any, ...]


@dataclass(frozen=True)
class Ask:
    """`name` is the caller's; equal (context, continuation) pairs are scored once.

    `shared`: how many leading tokens of the context other asks begin with too; the engine computes them once.
    """

    name: Name
    context: tuple[int, ...]
    continuation: tuple[int, ...]
    shared: int = 0


@dataclass(frozen=True)
class Scorer:
    """An engine with what turns text into its tokens. `limit`: every text is cut to this many tokens."""

    engine: Engine
    tokenizer: Tokenizer
    format: Format
    limit: int = 160
    batch: int = 64
    share_contexts: bool = False  # whether contexts of a few hundred tokens pay as shared prefixes: on a CPU they do
    stopped: Callable[[], bool] = never

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def cut(self, text: str) -> str:
        """The text, no longer than the limit: whole tokens, decoded again."""
        ids = self.encode(text.strip())
        return text.strip() if len(ids) <= self.limit else self.tokenizer.decode(ids[: self.limit]).rstrip("\ufffd")

    def continuation(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that follows a cue on the same line: its leading space belongs to the first word."""
        return tuple(self.encode(" " + text.strip())[: self.limit]) if text.strip() else ()

    def context(self, *parts: str) -> tuple[int, ...]:
        """Cues (even places, whole) and texts (odd places, cut to the limit), joined as tokens."""
        ids: list[int] = []
        for place, part in enumerate(parts):
            ids += self.continuation(part) if place % 2 else tuple(self.encode(part))
        return tuple(ids)


def score(scorer: Scorer, asks: Iterable[Ask]) -> dict[Name, Score]:
    """Every ask's log-probs, in slices of `batch`: what shares a prefix together, then longest first.

    Errors: Stopped when `scorer.stopped()` turned true; nothing of an unfinished slice is kept.
    """
    listed = [ask for ask in asks if ask.context and ask.continuation]
    unique = {(ask.context, ask.continuation): index for index, ask in enumerate(listed)}
    shared = {pair: listed[index].shared for pair, index in unique.items()}
    groups: dict[tuple[int, ...], int] = {}  # prefix -> its place, in the order of first use
    for pair, length in shared.items():
        groups.setdefault(pair[0][:length], len(groups))

    def place(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Any, ...]:
        return groups[pair[0][: shared[pair]]], -len(pair[0]) - len(pair[1]), pair[0], unique[pair]

    order = sorted(unique, key=place)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Score] = {}
    for start in range(0, len(order), scorer.batch):
        part = order[start : start + scorer.batch]
        requests = [ScoreRequest(i, *pair, prefix_len=shared[pair]) for i, pair in enumerate(part)]
        scores = list(scorer.engine.score(requests, scorer.stopped))
        if len(scores) < len(requests):
            raise Stopped("stopped while scoring; resume the run to go on")
        found.update((part[s.id], s) for s in scores)
    return {ask.name: found[ask.context, ask.continuation] for ask in listed}
