"""The prefixes that prompts share: found in the store, or computed once and put there.

Owns how many tokens are kept, what gives way, and what is done where memory runs out. A prefix with a head (`nesting`)
is two parts: the head once, for all cases of the stage, and each case's own keys and values, computed behind it. The
linears follow the adapter's state, which is the caller's (see `LoadedModel.adapter`). The memory is
`cache.PrefixStore`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from cai.engine import generate
from cai.engine.memory import free_gpu_bytes
from cai.engine.native.adapters import Signature, adapter_signature
from cai.engine.native.batches import Packed, Prompt
from cai.engine.native.cache import KVShape, PrefixStore, reserve_bytes
from cai.engine.native.nesting import Nested, Part, Parts

if TYPE_CHECKING:
    from cai.engine.native.engine import NativeEngine

Key = tuple[Nested, Signature]
# Of all parts together: a stage's few-shot orders (the instructions' six are 3,000), or its head and the cases behind
# it; a stage that comes back (a retry wave) finds its prefix
SAVED_TOKENS = 8192
GROWN_BY = 256


def new_store(shape: KVShape, device: torch.device, max_len: int) -> PrefixStore:
    """As many tokens as are kept; on a small card an eighth of what is free, one short prefix at least."""
    tokens = SAVED_TOKENS
    if device.type == "cuda":
        fitting = (free_gpu_bytes(device) - reserve_bytes(device)) // 8 // shape.bytes_per_token
        tokens = min(tokens, max(fitting, min(1024, max_len)))
    return PrefixStore(shape, tokens, device)


def placed(engine: NativeEngine, wanted: Sequence[Nested], held: Collection[Part] = ()) -> list[Parts] | None:
    """The parts of each prefix, those that are missing computed, together. None: rows hold what would have to give way.

    `held`: the parts that running rows read; where there are none the store grows to what is wanted.
    """
    found = generate.unless_memory_runs_out(lambda: _placed(engine, wanted, held))
    if found is None:
        engine.memory_ran_out()
        with generate.memory_named("for the prefix of a stage"):
            found = _placed(engine, wanted, held)
    return found[0]


def _placed(engine: NativeEngine, wanted: Sequence[Nested], held: Collection[Part]) -> tuple[list[Parts] | None]:
    signature = engine.attached.signature or ()
    names = [_names(prefix, signature) for prefix in wanted]
    parts: dict[Key, Part] = {}  # none of them gives way to another
    for level in range(2):  # heads first, then what stands behind them
        if not _level(engine, dict.fromkeys(each[level] for each in names if len(each) > level), parts, held):
            if held:
                return (None,)
            _grow(engine, sum(_length(name) for name in {name for each in names for name in each}))
            return _placed(engine, wanted, held)
    return ([tuple(parts[name] for name in each) for each in names],)


def _names(prefix: Nested, signature: Signature) -> list[Key]:
    """Of its parts: all that stands up to the part's end, and where it begins."""
    starts = (0, *prefix.ends)
    return [(Nested(prefix.token_ids[:end], start), signature) for start, end in zip(starts, prefix.ends, strict=False)]


def _length(name: Key) -> int:
    return len(name[0].token_ids) - name[0].head_len


def _level(engine: NativeEngine, names: Collection[Key], parts: dict[Key, Part], held: Collection[Part]) -> bool:
    """Add the parts of these names to `parts`, behind those it has; False where store or cache has no room now."""
    new: list[Key] = []
    missing = [name for name in names if name not in engine.store.parts]
    if held and sum(engine.exact.blocks_for(_length(name)) for name in missing) > len(engine.exact.free):
        return False  # before anything gives way for it
    try:
        for name in names:
            part = engine.store.find(name)
            if part is None:
                part = engine.store.take(name, _length(name), {*held, *parts.values()})
                if part is None:
                    return False
                new.append(name)
            parts[name] = part
        while new:
            _compute(engine, new, parts)
        return True
    finally:  # what has a place and was not computed
        for name in new:
            del engine.store.parts[name]


def _compute(engine: NativeEngine, new: list[Key], parts: dict[Key, Part]) -> None:
    """The first of these parts in one pass; they leave the list. Where memory runs out over several, fewer are next."""
    cache, packed, budget = engine.exact, [], engine.scheduler.prefill_tokens  # type: ignore[var-annotated]
    for (prefix, signature), length in ((name, _length(name)) for name in new):
        need = cache.blocks_for(length)
        if packed and (length > budget or need > len(cache.free)):
            break
        before = (parts[prefix.outer, signature],) if prefix.head_len else ()
        ids = list(prefix.token_ids[prefix.head_len :])
        packed.append(Prompt(ids, cache.take(need, engine.stats.batch_size), before))
        budget -= length
    targets, tokens = [parts[name] for name in new[: len(packed)]], sum(len(prompt.ids) for prompt in packed)
    try:
        if len(packed) == 1:
            _run(engine, packed, targets)
        elif generate.unless_memory_runs_out(lambda: _run(engine, packed, targets)) is None:
            return engine.prefill_less(tokens)
    finally:
        for prompt in packed:
            cache.give_back(prompt.blocks)
    extra = engine.stats.extra
    extra["prefix_tokens_computed"] = extra.get("prefix_tokens_computed", 0) + tokens
    del new[: len(packed)]


def _run(engine: NativeEngine, packed: Packed, targets: Sequence[Part]) -> bool:
    """Keys and values of these prompts into their places of the store."""
    ends = [end - 1 for end in itertools.accumulate(len(prompt.ids) for prompt in packed)]
    engine.prefill(packed, torch.tensor(ends, device=engine.device), engine.exact)
    for part, prompt in zip(targets, packed, strict=True):
        engine.store.put(part, *engine.exact.gather(prompt.blocks, len(prompt.ids)))
    return True


def _grow(engine: NativeEngine, tokens: int) -> None:
    """A store that holds so many; nothing runs, so all parts go, and the graphs, which read them where they lay."""
    capacity = max(tokens + GROWN_BY, engine.store.capacity)
    if engine.graphs is not None:
        engine.graphs.clear()
    engine.store = PrefixStore(engine.shape, 1, engine.device)  # the old one's memory is free for the new one
    engine.store = PrefixStore(engine.shape, capacity, engine.device)


def follow_adapter(engine: NativeEngine) -> None:
    """The linears that have copies of the weights hold the adapter's factors; a CPU without them asks the modules."""
    signature = adapter_signature(engine.attached.tuned)
    if signature == engine.attached.signature:
        return
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
