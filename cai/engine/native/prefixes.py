"""The shared prefix of a stage's prompts: put in place as it is, from the saved ones, or computed once.

Owns how many are saved and what gives way where memory runs out. It and the linears follow the adapter's state, which
is the caller's (see `LoadedModel.adapter`). The buffers are `cache.Prefix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cai.engine import generate
from cai.engine.native.adapters import adapter_signature
from cai.engine.native.cache import Prefix

if TYPE_CHECKING:
    from cai.engine.native.adapters import Signature
    from cai.engine.native.engine import NativeEngine

SAVED = 8  # six few-shot rotations of the instructions; a stage that comes back (a retry wave) finds its prefix
EXPECTED_TOKENS = 1024  # of a saved prefix, for the reserve


def use_prefix(engine: NativeEngine, token_ids: tuple[int, ...]) -> None:
    """Make the shared prefix current, under the adapter that is on."""
    signature = adapter_signature(engine.attached.tuned)
    if signature != engine.attached.signature:
        follow_adapter(engine, signature)
    key = (token_ids, signature)
    if engine.current == key:
        return
    if token_ids and key not in engine.saved:
        while len(engine.saved) >= SAVED:
            engine.saved.pop(next(iter(engine.saved)))
        computed = generate.unless_memory_runs_out(lambda: _computed(engine, token_ids))
        if computed is None:
            engine.memory_ran_out()
            with generate.memory_named("for the prefix of a stage"):
                computed = _computed(engine, token_ids)
        engine.saved[key] = computed
    engine.prefix.set(token_ids, *engine.saved.get(key, (None, None)))
    engine.current = key


def follow_adapter(engine: NativeEngine, signature: Signature) -> None:
    """The linears that have copies of the weights hold the adapter's factors; a CPU without them asks the modules."""
    if not engine.gpu and all(group.packed is None for group in engine.groups):
        engine.attached.signature = signature
        return
    gone = generate.unless_memory_runs_out(lambda: engine.attached.follow(signature, engine.groups))
    if gone is None:
        engine.attached.forget()
        engine.memory_ran_out()
        with generate.memory_named("for the adapter's factors"):
            gone = engine.attached.follow(signature, engine.groups)
    if engine.graphs is not None:
        engine.graphs.forget(gone)


def _computed(engine: NativeEngine, token_ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefix's keys and values, over a place large enough for them."""
    engine.current = None
    if len(token_ids) > engine.prefix.capacity:
        engine.prefix = Prefix.empty(engine.shape, min(engine.max_len, len(token_ids) + 256), engine.device)
        if engine.graphs is not None:
            engine.graphs.clear()
    engine.prefix.set((), None, None)
    blocks = engine.cache.take(engine.cache.blocks_for(len(token_ids)), engine.stats.batch_size)
    last = torch.tensor([len(token_ids) - 1], device=engine.device)
    try:
        engine.prefill([(list(token_ids), blocks)], engine.prefix, last)
        computed = engine.cache.gather(blocks, len(token_ids))
    finally:
        engine.cache.give_back(blocks)
    extra = engine.stats.extra
    extra["prefix_tokens_computed"] = extra.get("prefix_tokens_computed", 0) + len(token_ids)
    return computed
