"""Scoring of given continuations, asked for by name: what shares a prefix is computed together, equal asks once.

Owns the order in which asks reach the engine and how texts are cut to a limit; what is asked, and how scores combine,
is the caller's (relevance of principles, comparisons, CSI, CRI, the judge).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    `head`: how many of these all asks of the stage begin with, whatever case they are about; computed once a stage.
    """

    name: Name
    context: tuple[int, ...]
    continuation: tuple[int, ...]
    shared: int = 0
    head: int = 0


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


def common(first: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with. By halves: two prompts share hundreds, one by one took a tenth of a fake run."""
    low, high = 0, min(len(first), len(other))  # the first `low` are equal, not more than `high`
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def score(scorer: Scorer, asks: Iterable[Ask]) -> dict[Name, Score]:
    """Every ask's log-probs, in slices of `batch`: what shares a prefix together, then longest first.

    Errors: Stopped when `scorer.stopped()` turned true; nothing of an unfinished slice is kept.
    """
    listed = [ask for ask in asks if ask.context and ask.continuation]
    number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # pair -> its own; a context is hashed but once
    numbers = [number.setdefault((ask.context, ask.continuation), len(number)) for ask in listed]
    pairs, last = list(number), dict(zip(numbers, range(len(listed)), strict=True))
    groups: dict[tuple[int, ...], int] = {}  # prefix -> its place, in the order of first use
    shared = [listed[last[n]].shared for n in range(len(pairs))]
    heads = [listed[last[n]].head for n in range(len(pairs))]
    group = [groups.setdefault(pair[0][:length], len(groups)) for pair, length in zip(pairs, shared, strict=True)]

    def place(n: int) -> tuple[Any, ...]:
        context, continuation = pairs[n]
        return group[n], -len(context) - len(continuation), context, last[n]

    order = sorted(range(len(pairs)), key=place)
    found: dict[int, Score] = {}
    for start in range(0, len(order), scorer.batch):
        part = order[start : start + scorer.batch]
        requests = [ScoreRequest(i, *pairs[n], shared[n], heads[n]) for i, n in enumerate(part)]
        scores = list(scorer.engine.score(requests, scorer.stopped))
        if len(scores) < len(requests):
            raise Stopped("stopped while scoring; resume the run to go on")
        found.update((part[s.id], s) for s in scores)
    return {ask.name: found[n] for ask, n in zip(listed, numbers, strict=True)}
