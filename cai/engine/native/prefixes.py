"""The shared prefix of a stage's prompts: put in place as it is, from the saved parts, or computed once.

Owns how many tokens are saved and what gives way where memory runs out. A prefix with a head (`nesting`) is saved in
two parts: the head once, for all cases of the stage, and each case's own keys and values, computed behind it. It and
the linears follow the adapter's state, which is the caller's (see `LoadedModel.adapter`). The buffers are
`cache.Prefix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cai.engine import generate
from cai.engine.native.adapters import Signature, adapter_signature
from cai.engine.native.cache import Prefix
from cai.engine.native.nesting import Nested

if TYPE_CHECKING:
    from cai.engine.native.engine import NativeEngine

Key = tuple[Nested, Signature]
# Of all saved parts together, and what the reserve counts: the six few-shot rotations of the instructions (3,000), or a
# stage's head and the cases behind it; a stage that comes back (a retry wave) finds its prefix
SAVED_TOKENS = 8192


def use_prefix(engine: NativeEngine, prefix: Nested) -> None:
    """Make the shared prefix current, under the adapter that is on."""
    signature = adapter_signature(engine.attached.tuned)
    if signature != engine.attached.signature:
        follow_adapter(engine, signature)
    key = (prefix, signature)
    if engine.current == key:
        return
    if generate.unless_memory_runs_out(lambda: _put(engine, prefix, signature)) is None:
        engine.memory_ran_out()
        with generate.memory_named("for the prefix of a stage"):
            _put(engine, prefix, signature)
    engine.current = key


def _put(engine: NativeEngine, prefix: Nested, signature: Signature) -> bool:
    """Put part behind part, those that are not saved computed behind what is in place."""
    engine.current = None
    if len(prefix.token_ids) > engine.prefix.capacity:
        engine.prefix = Prefix.empty(engine.shape, min(engine.max_len, len(prefix.token_ids) + 256), engine.device)
        if engine.graphs is not None:
            engine.graphs.clear()
    engine.prefix.set((), None, None)
    start = 0
    for end in prefix.ends:
        key = (Nested(prefix.token_ids[:end], start), signature)
        part = engine.saved.pop(key, None)
        if part is None:
            _make_room(engine, end - start)
            part = _computed(engine, prefix.token_ids[start:end])
        if end - start <= SAVED_TOKENS:
            engine.saved[key] = part
        engine.prefix.set(prefix.token_ids[:end], *part)
        start = end
    return True


def _make_room(engine: NativeEngine, tokens: int) -> None:
    """What was used longest ago gives way; a head was used with each of its cases."""
    held = {key: keys.shape[2] for key, (keys, _) in engine.saved.items()}
    for key in list(held):
        if sum(held.values()) + tokens <= SAVED_TOKENS:
            return
        del held[key], engine.saved[key]


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
    """Keys and values of these tokens behind the prefix that is in place."""
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
