"""Scores of given continuations on the native engine: rows prefilled like prompts, the shared prefix computed once.

Owns how many requests go into one prefill, what is tried when memory runs out, and how far draws are rounded. The head
sees continuation positions only, in chunks, so full-vocabulary logits of a batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from cai.engine import Score, ScoreRequest, generate
from cai.engine.generate import HEAD_CHUNK_BYTES
from cai.engine.native.batches import Packed, score_places
from cai.engine.native.nesting import by_prefix
from cai.errors import RESUMABLE, CaiError

if TYPE_CHECKING:
    from cai.engine.native.engine import NativeEngine


def score(engine: NativeEngine, requests: Sequence[ScoreRequest], stopped: Callable[[], bool]) -> Iterator[Score]:
    assert engine.scheduler.idle, "scoring while rows are being drawn"
    for request in requests:
        engine.require(len(request.context_ids) + len(request.continuation_ids), f"score request {request.id}")
    for prefix, group in by_prefix(requests):
        if stopped():
            return
        with torch.no_grad():
            engine.use_prefix(*prefix)
        while group and not stopped():
            scores = _some(engine, group, len(prefix.token_ids))
            del group[: len(scores)]
            yield from scores


def _some(engine: NativeEngine, group: list[ScoreRequest], shared: int) -> list[Score]:
    """Score the first requests of the group that fit into one prefill; none of them where memory ran out."""
    packed, row_of = _packed(engine, group, shared)
    try:
        scores = generate.unless_memory_runs_out(lambda: _scores(engine, group[: len(row_of)], packed, row_of))
    finally:
        for _, blocks in packed:
            engine.cache.give_back(blocks)
    if scores is not None:
        return scores
    if len(packed) == 1:
        raise CaiError("engine: a single row does not fit in memory while scoring. Use a larger card.", RESUMABLE)
    engine.prefill_less(sum(len(ids) for ids, _ in packed))
    return []


def _packed(engine: NativeEngine, group: list[ScoreRequest], shared: int) -> tuple[Packed, list[int]]:
    """Rows of one prefill in their blocks, and the row of each request that is in it."""
    packed: Packed = []
    row_of: list[int] = []
    budget, cache = engine.scheduler.prefill_tokens, engine.cache
    for request in group:
        ids = [*request.context_ids, *request.continuation_ids][shared:-1]
        # "Yes" and "No" after one question are the same row, and so is what another's row begins with
        if not packed or ids != packed[-1][0][: len(ids)]:
            need = cache.blocks_for(len(ids))
            full = len(packed) == engine.stats.batch_size
            if packed and (full or len(ids) > budget or need > len(cache.free)):
                break
            packed.append((ids, cache.take(need, len(packed))))
            budget -= len(ids)
        row_of.append(len(packed) - 1)
    return packed, row_of


@torch.no_grad()
def _scores(engine: NativeEngine, scored: list[ScoreRequest], packed: Packed, row_of: list[int]) -> list[Score]:
    shared = len(engine.prefix.token_ids)
    wanted, targets = (torch.tensor(x, device=engine.device) for x in score_places(scored, packed, row_of, shared))
    hidden_TH = engine.prefill(packed, engine.prefix, wanted)
    return list(generate.split_scores(scored, generate.head_logps(engine.decoder.head, hidden_TH, targets).tolist()))


@torch.no_grad()
def divergence(engine: NativeEngine, token_ids: Sequence[int]) -> tuple[float, float]:
    """What rounding changes while drawing: (mean KL of the exact distribution from the drawn one, nats a token; share
    of tokens whose most likely successor is the same)."""
    engine.use_prefix(())
    wanted = torch.arange(len(token_ids), device=engine.device)
    packed = [(list(token_ids), engine.cache.take(engine.cache.blocks_for(len(token_ids)), engine.stats.batch_size))]
    try:
        exact_TH = engine.prefill(packed, engine.prefix, wanted)
        with engine.shared.draws():
            drawn_TH = engine.prefill(packed, engine.prefix, wanted)
    finally:
        engine.cache.give_back(packed[0][1])
    nats, same = 0.0, 0
    step = max(1, HEAD_CHUNK_BYTES // (8 * engine.decoder.config.vocab_size))
    for at in range(0, len(token_ids), step):
        p_CV, q_CV = (engine.decoder.logits(h[at : at + step]).float().log_softmax(-1) for h in (exact_TH, drawn_TH))
        nats += (p_CV.exp() * (p_CV - q_CV)).sum().item()
        same += int((p_CV.argmax(-1) == q_CV.argmax(-1)).sum())
    return nats / len(token_ids), same / len(token_ids)
