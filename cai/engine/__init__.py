"""Bulk generation and scoring: token ids in, finished completions out.

This package owns the one interface between the pipeline and the loaded weights. A stage submits requests and iterates
completions as they finish; it knows neither batches nor caches. Backends: `reference` (batch 1, the oracle), `static`
(length-sorted slices through `generate`), `native` (continuous batching). The interface itself imports no torch.

Invariants: every submitted request yields exactly one completion, unless the caller's `stopped()` turns true, in which
case the iterator ends early; a row's draw depends on its own seed and positions, never on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cai.store.jsonl import Row

FP8_CAPABILITY = (8, 9)  # of the first cards with 8-bit floating-point products: Ada, then Hopper
INT8_CAPABILITY = (8, 0)  # of the first cards that 8-bit integer products are made for: Ampere
Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row is drawn. `temperature` 0 is greedy; `stop` strings end the text before themselves."""

    temperature: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """What all rows of an engine may draw.

    `min_p`: tokens less than this times as likely as the best are left out (drawn rows; 0 = none).
    `no_repeat_ngram`: no sequence of this many tokens twice in one completion (0 = may repeat).
    """

    min_p: float = 0.0
    no_repeat_ngram: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `prefix_len`: how many leading tokens it shares with its stage's other prompts (0 = unknown).

    `first`: before all that wait behind the same prefix (a redraw, for which finished rows wait); never another draw.
    """

    id: int
    token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    prefix_len: int = 0
    first: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back: `text` is cut before eos or stop string; `token_ids` are all that were drawn, eos included."""

    id: int
    token_ids: tuple[int, ...]
    text: str
    finish: Finish


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Log-probabilities of `continuation_ids` (at least one) after `context_ids` (at least one) are wanted.

    `prefix_len`: how many leading tokens it shares with others (0 = unknown); the first `head_len` of these are shared
    by requests whose prefixes differ behind them, too.
    """

    id: int
    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    prefix_len: int = 0
    head_len: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """`logps`: natural-log probability of each continuation token, fp32; same length as the continuation."""

    id: int
    logps: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.logps)

    @property
    def mean(self) -> float:
        return sum(self.logps) / len(self.logps)


def never() -> bool:
    """The `stopped` callback of a caller that never stops."""
    return False


@dataclass
class EngineStats:
    """Counters that a backend keeps for events, bench and report."""

    prompt_tokens_computed: int = 0
    decode_steps: int = 0
    out_of_memory: int = 0
    batch_size: int = 0
    in_flight: int = 0  # tokens drawn for rows that are not finished
    extra: Row = field(default_factory=dict)


class Engine(Protocol):
    """Generation and scoring over the loaded weights; the adapter's state is the caller's (`LoadedModel.adapter`)."""

    name: str
    stats: EngineStats
    rules: Rules
    streams: bool  # rows join and leave while others decode: no batch waits for its last row

    def submit(self, request: Request) -> None:
        """Queue one request. Ids are unique among the requests in flight."""

    def completions(self, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        """Yield every queued request's completion as it finishes, in any order; ends early once `stopped()`."""

    def score(self, requests: Sequence[ScoreRequest], stopped: Callable[[], bool] = never) -> Iterator[Score]:
        """Yield the log-probs of each continuation, in any order. Never holds full-vocabulary logits of a batch."""

    def close(self) -> None:
        """Free every byte the engine allocated on the device. The engine can't be used afterwards."""
