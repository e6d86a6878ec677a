"""Attention of whole prompts behind what they share, in Triton: packed rows of many lengths, causal, tile by tile.

The running softmax and the axes are `attention_kernels`', which decodes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai.engine.native.attention import WIDE, Step
from cai.engine.native.attention_kernels import (
    LOG2E,
    TILE_KEYS,
    _own_scales,
    _soften,
    pipeline_stages,
    pointers,
)
from cai.engine.native.cache import LayerCache
from cai.engine.native.nesting import NOWHERE, Parts

TILE_QUERIES = 64
PARTS = tl.constexpr(2)  # of a prefix at most: a head, and a case behind it
COLUMNS = tl.constexpr(8)  # of a tile


@triton.jit
def _prefill(
    q, k_cache, v_cache, k_scales, v_scales, keys, values, out, tiles, table, table_stride, head_stride, scale,
    window, kv_heads,
    G: tl.constexpr, D: tl.constexpr, BLOCK_TOKENS: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    heads, kv_head = tl.num_programs(1), head // G
    tiles += tile * COLUMNS
    row, first, length, at = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2), tl.load(tiles + 3)
    dim, own = tl.arange(0, D), first + tl.arange(0, QUERIES)
    real = own < length
    place_q = ((at + own).to(tl.int64) * heads + head)[:, None] * D + dim[None, :]
    query = tl.load(q + place_q, mask=real[:, None], other=0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    # first the parts of the prefix, of which a query sees all that its window reaches; then its own tokens, causally
    behind = tl.load(tiles + 5) + tl.load(tiles + 7)  # tokens from the part's first one to the row's own
    for part in tl.static_range(PARTS):
        shared = tl.load(tiles + 5 + 2 * part)
        base = kv_head.to(tl.int64) * head_stride + tl.load(tiles + 4 + 2 * part).to(tl.int64) * D
        for start in range(tl.maximum(behind + first + 1 - window, 0), shared, TILE):
            token = start + tl.arange(0, TILE)
            seen = token < shared
            key = tl.load(keys + base + token[None, :] * D + dim[:, None], mask=seen[None, :], other=0.0)
            visible = seen[None, :] & (token[None, :] > behind + own[:, None] - window)
            scores = tl.where(visible, tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
            value = tl.load(values + base + token[:, None] * D + dim[None, :], mask=seen[:, None], other=0.0)
            top, total, acc = _soften(scores, top, total, acc, value, token, False)
        behind -= shared
    for start in range(tl.maximum(first + 1 - window, 0), tl.minimum(length, first + QUERIES), TILE):
        token = start + tl.arange(0, TILE)
        seen = token < length
        block = tl.load(table + row * table_stride + token // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
        at_token = (block * kv_heads + kv_head) * BLOCK_TOKENS + token % BLOCK_TOKENS
        key = tl.load(k_cache + at_token[None, :] * D + dim[:, None], mask=seen[None, :], other=0).to(query.dtype)
        visible = seen[None, :] & (token[None, :] <= own[:, None]) & (token[None, :] > own[:, None] - window)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        if EIGHT:
            scores = scores * _own_scales(k_scales, at_token, seen, EIGHT)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        value = tl.load(v_cache + at_token[:, None] * D + dim[None, :], mask=seen[:, None], other=0).to(query.dtype)
        v_scale = _own_scales(v_scales, at_token, seen, EIGHT)
        top, total, acc = _soften(scores, top, total, acc, value, v_scale, EIGHT)
    tl.store(
        out + place_q, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=real[:, None]
    )


def query_tiles(lens: tuple[int, ...], parts: tuple[Parts, ...], device: torch.device) -> torch.Tensor:
    """Of each tile of queries, int32: row, first token, length, start of the row among the packed tokens; and place and
    length of both parts before it."""
    tiles, at = [], 0
    for row, (length, before) in enumerate(zip(lens, parts, strict=True)):
        places = [number for part in (*before, NOWHERE, NOWHERE)[:2] for number in part]
        tiles += [(row, first, length, at, *places) for first in range(0, length, TILE_QUERIES)]
        at += length
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def prefill_attention(
    q_TND: torch.Tensor,
    cache: LayerCache,
    step: Step,
    layer: int,
    scale: float,
    window: int = WIDE,
) -> torch.Tensor:
    tokens, heads, dim = q_TND.shape
    out = torch.empty((tokens, heads * dim), dtype=q_TND.dtype, device=q_TND.device)
    assert step.tiles is not None
    store = step.store
    _prefill[(step.tiles.shape[0], heads)](
        q_TND,
        *pointers(cache),
        store.keys[layer],
        store.values[layer],
        out,
        step.tiles,
        step.table_BW,
        step.table_BW.stride(0),
        store.keys.stride(1),
        scale * LOG2E,
        window,
        cache.keys.shape[1],
        heads // cache.keys.shape[1],
        dim,
        cache.keys.shape[2],
        TILE_QUERIES,
        TILE_KEYS,
        cache.key_scales is not None,
        num_warps=4 if dim <= 128 else 8,
        num_stages=pipeline_stages(q_TND),
    )
    return out
