"""Attention of whole prompts behind a shared prefix, in Triton: packed rows of many lengths, causal, tile by tile.

The running softmax and the axes are `attention_kernels`', which decodes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai.engine.native.attention import WIDE, Step
from cai.engine.native.attention_kernels import LOG2E, TILE_KEYS, _soften, pipeline_stages

TILE_QUERIES = 64


@triton.jit
def _prefill(
    q,
    k_cache,
    v_cache,
    keys,
    values,
    out,
    tiles,
    table,
    prefix_length,
    table_stride,
    head_stride,
    scale,
    window,
    kv_heads,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    heads, kv_head = tl.num_programs(1), head // G
    row, first = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    length, at = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    dim, own = tl.arange(0, D), first + tl.arange(0, QUERIES)
    real = own < length
    place_q = ((at + own).to(tl.int64) * heads + head)[:, None] * D + dim[None, :]
    query = tl.load(q + place_q, mask=real[:, None], other=0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    base = kv_head.to(tl.int64) * head_stride
    shared = tl.load(prefix_length)
    # first the shared prefix, of which a query sees all that its window reaches; then the row's own tokens, causally
    for start in range(tl.maximum(shared + first + 1 - window, 0), shared, TILE):
        token = start + tl.arange(0, TILE)
        seen = token < shared
        key = tl.load(keys + base + token[None, :] * D + dim[:, None], mask=seen[None, :], other=0.0)
        visible = seen[None, :] & (token[None, :] > shared + own[:, None] - window)
        scores = tl.where(visible, tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
        value = tl.load(values + base + token[:, None] * D + dim[None, :], mask=seen[:, None], other=0.0)
        top, total, acc = _soften(scores, top, total, acc, value)
    for start in range(tl.maximum(first + 1 - window, 0), tl.minimum(length, first + QUERIES), TILE):
        token = start + tl.arange(0, TILE)
        seen = token < length
        block = tl.load(table + row * table_stride + token // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
        place = ((block * kv_heads + kv_head) * BLOCK_TOKENS + token % BLOCK_TOKENS) * D
        key = tl.load(k_cache + place[None, :] + dim[:, None], mask=seen[None, :], other=0.0)
        visible = seen[None, :] & (token[None, :] <= own[:, None]) & (token[None, :] > own[:, None] - window)
        scores = tl.where(visible, tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
        value = tl.load(v_cache + place[:, None] + dim[None, :], mask=seen[:, None], other=0.0)
        top, total, acc = _soften(scores, top, total, acc, value)
    tl.store(
        out + place_q, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=real[:, None]
    )


def query_tiles(lens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(row, first token, length, start of the row among the packed tokens) of each tile of queries, int32."""
    tiles, at = [], 0
    for row, length in enumerate(lens):
        tiles += [(row, first, length, at) for first in range(0, length, TILE_QUERIES)]
        at += length
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def prefill_attention(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: Step,
    layer: int,
    scale: float,
    window: int = WIDE,
) -> torch.Tensor:
    tokens, heads, dim = q_TND.shape
    out = torch.empty((tokens, heads * dim), dtype=q_TND.dtype, device=q_TND.device)
    assert step.tiles is not None
    prefix = step.prefix
    _prefill[(step.tiles.shape[0], heads)](
        q_TND,
        k_cache,
        v_cache,
        prefix.keys[layer],
        prefix.values[layer],
        out,
        step.tiles,
        step.table_BW,
        prefix.length,
        step.table_BW.stride(0),
        prefix.keys.stride(1),
        scale * LOG2E,
        window,
        k_cache.shape[1],
        heads // k_cache.shape[1],
        dim,
        k_cache.shape[2],
        TILE_QUERIES,
        TILE_KEYS,
        num_warps=4 if dim <= 128 else 8,
        num_stages=pipeline_stages(q_TND),
    )
    return out
