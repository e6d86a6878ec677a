"""Scores of given continuations on the native engine: rows prefilled like prompts, the shared prefix computed once.

Owns how many requests go into one prefill, what is tried when memory runs out, and how far draws are rounded. The head
sees continuation positions only, in chunks, so full-vocabulary logits of a batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from cai.engine import Score, ScoreRequest, generate
from cai.engine.generate import HEAD_CHUNK_BYTES
from cai.engine.native import prefixes
from cai.engine.native.batches import Packed, Prompt, score_places
from cai.engine.native.cache import KVCache
from cai.engine.native.nesting import Nested, Parts, by_prefix, length_of
from cai.errors import RESUMABLE, CaiError

if TYPE_CHECKING:
    from cai.engine.native.engine import NativeEngine


Placed = tuple[ScoreRequest, Parts]  # a request and what stands before it


def score(engine: NativeEngine, requests: Sequence[ScoreRequest], stopped: Callable[[], bool]) -> Iterator[Score]:
    assert engine.scheduler.idle, "scoring while rows are being drawn"
    for request in requests:
        engine.require(
            len(request.context_ids) + len(request.continuation_ids), f"score request {request.id}", engine.exact
        )
    with torch.no_grad():
        prefixes.follow_adapter(engine)
    for groups in _together(engine, by_prefix(requests)):
        if stopped():
            return
        with torch.no_grad():
            parts = prefixes.placed(engine, [prefix for prefix, _ in groups])
        assert parts is not None  # nothing runs that could hold the store
        waiting = [(request, before) for (_, group), before in zip(groups, parts, strict=True) for request in group]
        while waiting and not stopped():
            scores = _some(engine, waiting)
            del waiting[: len(scores)]
            yield from scores


def _together(
    engine: NativeEngine, groups: Iterable[tuple[Nested, list[ScoreRequest]]]
) -> Iterator[list[tuple[Nested, list[ScoreRequest]]]]:
    """Groups whose rows fill a prefill and whose prefixes fit the store; on a CPU each alone, since bytes hang on the
    rows beside a row."""
    chosen: list[tuple[Nested, list[ScoreRequest]]] = []
    parts: dict[Nested, int] = {}
    tokens = 0
    for prefix, group in groups:
        new = {prefix.outer: prefix.head_len, prefix: len(prefix.token_ids) - prefix.head_len}
        full = tokens >= engine.scheduler.prefill_tokens or sum((parts | new).values()) > engine.store.capacity
        if chosen and (full or not engine.scheduler.several):
            yield chosen
            chosen, parts, tokens = [], {}, 0
        chosen.append((prefix, group))
        parts |= new
        tokens += sum(len(request.context_ids) - len(prefix.token_ids) for request in group)
    if chosen:
        yield chosen


def _some(engine: NativeEngine, waiting: list[Placed]) -> list[Score]:
    """Score the first requests that fit into one prefill; none of them where memory ran out."""
    packed, row_of = _packed(engine, waiting)
    scored = [request for request, _ in waiting[: len(row_of)]]
    try:
        scores = generate.unless_memory_runs_out(lambda: _scores(engine, scored, packed, row_of))
    finally:
        for prompt in packed:
            engine.exact.give_back(prompt.blocks)
    if scores is not None:
        return scores
    if len(packed) == 1:
        raise CaiError("engine: a single row does not fit in memory while scoring. Use a larger card.", RESUMABLE)
    engine.prefill_less(sum(len(prompt.ids) for prompt in packed))
    return []


def _packed(engine: NativeEngine, waiting: list[Placed]) -> tuple[Packed, list[int]]:
    """Rows of one prefill in their blocks, and the row of each request that is in it."""
    packed: Packed = []
    row_of: list[int] = []
    budget, cache = engine.scheduler.prefill_tokens, engine.exact
    for request, parts in waiting:
        ids = [*request.context_ids, *request.continuation_ids][length_of(parts) : -1]
        # "Yes" and "No" after one question are the same row, and so is what another's row begins with
        if not packed or parts != packed[-1].parts or ids != packed[-1].ids[: len(ids)]:
            need = cache.blocks_for(len(ids))
            full = len(packed) == engine.stats.batch_size
            if packed and (full or len(ids) > budget or need > len(cache.free)):
                break
            packed.append(Prompt(ids, cache.take(need, len(packed)), parts))
            budget -= len(ids)
        row_of.append(len(packed) - 1)
    return packed, row_of


@torch.no_grad()
def _scores(engine: NativeEngine, scored: list[ScoreRequest], packed: Packed, row_of: list[int]) -> list[Score]:
    wanted, targets = (torch.tensor(x, device=engine.device) for x in score_places(scored, packed, row_of))
    hidden_TH = engine.prefill(packed, wanted, engine.exact)
    return list(generate.split_scores(scored, generate.head_logps(engine.decoder.head, hidden_TH, targets).tolist()))


@torch.no_grad()
def divergence(engine: NativeEngine, token_ids: Sequence[int]) -> tuple[float, float]:
    """What rounding changes while drawing: (mean KL of the exact distribution from the drawn one, nats a token; share
    of tokens whose most likely successor is the same)."""
    prefixes.follow_adapter(engine)
    wanted = torch.arange(len(token_ids), device=engine.device)
    exact_TH = _hidden(engine, token_ids, wanted, engine.exact)
    with engine.shared.draws():
        drawn_TH = _hidden(engine, token_ids, wanted, engine.cache)
    nats, same = 0.0, 0
    step = max(1, HEAD_CHUNK_BYTES // (8 * engine.decoder.config.vocab_size))
    for at in range(0, len(token_ids), step):
        p_CV, q_CV = (engine.decoder.logits(h[at : at + step]).float().log_softmax(-1) for h in (exact_TH, drawn_TH))
        nats += (p_CV.exp() * (p_CV - q_CV)).sum().item()
        same += int((p_CV.argmax(-1) == q_CV.argmax(-1)).sum())
    return nats / len(token_ids), same / len(token_ids)


def _hidden(engine: NativeEngine, token_ids: Sequence[int], wanted: torch.Tensor, cache: KVCache) -> torch.Tensor:
    blocks = cache.take(cache.blocks_for(len(token_ids)), engine.stats.batch_size)
    try:
        return engine.prefill([Prompt(list(token_ids), blocks)], wanted, cache)
    finally:
        cache.give_back(blocks)
