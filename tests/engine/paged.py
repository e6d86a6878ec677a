"""A GPU's engine without one: keys and values in small blocks, steps one ahead, rows read by their table alone.

The operations are plain torch. What a row reads comes from the device's table (`Step.shared`, block numbers), so that a
wrong column, a part that was moved and a block that two rows hold are seen in the drawn text.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from test_engine import Letters, tiny

from cai.engine.native import attention
from cai.engine.native.attention import WIDE
from cai.engine.native.cache import KVCache, PrefixStore
from cai.engine.native.engine import NativeEngine
from cai.engine.native.nesting import Part
from cai.engine.native.scheduler import Scheduler
from cai.engine.native.state import RowState

BLOCK = 8


def keys_of(cache, step, row, length, parts, layer):
    """(keys, values) (M, tokens, D) of a row: the parts before it, then its own blocks."""
    blocks = step.table_BW[row, : -(-length // BLOCK)].long()
    own = [x[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for x in (cache.keys, cache.values)]
    before = [step.store.read(layer, part) for part in parts]
    return [torch.cat([*(pair[i] for pair in before), own[i]], 1) for i in range(2)]


def attend(q_TND, keys, values, scale):
    """The last T places ask; causal."""
    groups, count, total = q_TND.shape[1] // keys.shape[0], q_TND.shape[0], keys.shape[1]
    seen = torch.arange(total) <= torch.arange(total - count, total)[:, None]
    k, v = (x.repeat_interleave(groups, 0)[None] for x in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(q_TND.transpose(0, 1)[None], k, v, seen, scale=scale)
    return out[0].transpose(0, 1).flatten(1)


def decode_attention(q_BND, cache, step, layer, scale, window=WIDE):
    rows = []
    for row, (start, shared) in enumerate(step.shared.tolist()):
        parts = [Part(start, shared)] if shared else []
        rows.append(
            attend(q_BND[row : row + 1], *keys_of(cache, step, row, int(step.lens_B[row]), parts, layer), scale)
        )
    return torch.cat(rows)


def prefill_attention(q_TND, cache, step, layer, scale, window=WIDE):
    rows, at = [], 0
    for row, (length, parts) in enumerate(zip(step.lens, step.parts, strict=True)):
        rows.append(attend(q_TND[at : at + length], *keys_of(cache, step, row, length, parts, layer), scale))
        at += length
    return torch.cat(rows)


def rope_and_store(q, k, v, shape, cos, sin, step, cache, norms=None):
    heads, kv_heads, dim = shape
    turned = attention.turns(cos, sin, step, q.dtype)
    cache.keys[step.blocks_T, :, step.offsets_T] = attention.rotate(k.unflatten(-1, (kv_heads, dim)), *turned)
    cache.values[step.blocks_T, :, step.offsets_T] = v.unflatten(-1, (kv_heads, dim))
    return attention.rotate(q.unflatten(-1, (heads, dim)), *turned)


OPS = SimpleNamespace(
    **{name: getattr(attention, name) for name in ("rms_norm", "add_rms_norm", "silu_mul", "gelu_mul")},
    decode_attention=decode_attention,
    prefill_attention=prefill_attention,
    rope_and_store=rope_and_store,
    query_tiles=lambda lens, parts, device: None,
)


class Buckets:
    """In place of graphs: steps of four rows and more, some of them empty."""

    def __init__(self, engine):
        self.engine, self.cleared = engine, 0

    def bucket(self, rows):
        return min(-(-rows // 4) * 4, self.engine.stats.batch_size)

    def run(self, rows):
        return self.engine.decode_on_device(self.bucket(rows))

    def clear(self):
        self.cleared += 1

    def forget(self, gone):
        pass


def paged(model=None, *, rows=6, blocks=60, store=400, prefill=64, apart=0, lone=False):
    """An engine that believes in a GPU. `apart`: blocks of an exact cache of its own (0: the same cache)."""
    engine = NativeEngine(model or tiny(), Letters(), batch_size=rows)
    engine.gpu, engine.graphs, engine.ops, engine.decoder.ops = True, Buckets(engine), OPS, OPS
    engine.cache = KVCache(engine.shape, blocks, BLOCK, engine.device)
    engine.exact = KVCache(engine.shape, apart, BLOCK, engine.device) if apart else engine.cache
    engine.store = PrefixStore(engine.shape, store, engine.device)
    engine.state = RowState(rows, engine.cache.blocks_for(engine.max_len) + 1, engine.max_len, engine.device)
    engine.scheduler = Scheduler(engine.cache, rows, prefill, lone, several=True)
    return engine


def whole(engine):
    """Nothing leaked: all blocks are there, each once, and no two parts of the store overlap."""
    for cache in {id(engine.cache): engine.cache, id(engine.exact): engine.exact}.values():
        assert sorted(cache.free) == list(range(1, cache.blocks + 1))
    end = 0
    for start, length in sorted(engine.store.parts.values()):
        assert start >= end
        end = start + length
    assert end <= engine.store.capacity
