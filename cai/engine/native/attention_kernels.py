"""Attention on the GPU in Triton while decoding: one query a row over blocks and the shared prefix.

Nothing here needs Hopper. Decode attention splits the keys of a row over programs and reads a shared prefix once for
each tile of rows that have it; the parts are joined by their log-sum-exps (base 2 throughout). Sums are fp32 and in a
fixed order, which no other row changes.
Axes as in `attention`; S parts of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai.engine.native.attention import WIDE, Step
from cai.engine.native.cache import LayerCache

LOG2E = 1.4426950408889634
NO_PLACE = tl.constexpr(1 << 30)  # behind every place of the store
TILE_KEYS = 64
TILE_OWN_KEYS = 32  # decode, own keys: 3.9 TB/s with one warp; tiles of 64 and 4 warps gave 3.5, 128 gave 3.0 (H200)


@triton.jit
def _soften(scores, top, total, acc, v, v_scales, EIGHT: tl.constexpr):
    """One tile of the running softmax (base 2): new maximum, sum, weighted values (those in 8 bits by their scales)."""
    # with m the new maximum: l = l 2^(m_old - m) + sum 2^(s - m), acc likewise with the values; a tile of which nothing
    # is seen has m = -inf, and 2^(-inf + inf) would be NaN: then 0 stands for m
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe_top[:, None])
    keep = tl.exp2(top - safe_top)
    total = total * keep + tl.sum(weights, 1)
    if EIGHT:
        weights = weights * v_scales[None, :]
    acc = acc * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _own_scales(scales, at, seen, EIGHT: tl.constexpr):
    """What stands beside the numbers of a tile's tokens in 8 bits; else nothing that is read."""
    found = seen.to(tl.float32)
    if EIGHT:
        found = tl.load(scales + at, mask=seen, other=0.0)
    return found


@triton.jit
def _decode_own(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,
    lens,
    part_o,
    part_l,
    table_stride,
    rows,
    scale,
    window,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    EIGHT: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    heads = kv_heads * G
    length = tl.load(lens + row)
    start = tl.maximum(length - window, 0)
    part = (
        tl.cdiv(tl.cdiv(length - start, SPLITS), TILE) * TILE
    )  # keys a split: whole tiles, so that the order is fixed
    low = start + split * part
    high = tl.minimum(length, low + part)
    group, dim = tl.arange(0, GROUP), tl.arange(0, D)
    head = kv_head * G + group
    query = tl.load(q + (row * heads + head)[:, None] * D + dim[None, :], mask=(group < G)[:, None], other=0.0)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, D], tl.float32)
    for tile in range(low, high, TILE):
        token = tile + tl.arange(0, TILE)
        seen = token < high
        block = tl.load(table + row * table_stride + token // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
        at_token = (block * kv_heads + kv_head) * BLOCK_TOKENS + token % BLOCK_TOKENS
        key = tl.load(k_cache + at_token[None, :] * D + dim[:, None], mask=seen[None, :], other=0).to(query.dtype)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        if EIGHT:
            scores = scores * _own_scales(k_scales, at_token, seen, EIGHT)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        value = tl.load(v_cache + at_token[:, None] * D + dim[None, :], mask=seen[:, None], other=0).to(query.dtype)
        v_scale = _own_scales(v_scales, at_token, seen, EIGHT)
        top, total, acc = _soften(scores, top, total, acc, value, v_scale, EIGHT)
    at = (split * rows + row) * heads + head
    safe_total = tl.where(total > 0, total, 1.0)
    tl.store(part_o + at[:, None] * D + dim[None, :], acc / safe_total[:, None], mask=(group < G)[:, None])
    # log2 of the sum of exponentials: what the join weighs a part by; -inf for one that saw nothing
    log_sum = tl.where(total > 0, top + tl.log2(safe_total), float("-inf"))
    tl.store(part_l + at, log_sum, mask=group < G)


@triton.jit
def _decode_prefix(
    q,
    keys,
    values,
    shared,
    lens,
    part_o,
    part_l,
    shared_stride,
    head_stride,
    rows,
    scale,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * G
    flat = tile * QUERIES + tl.arange(0, QUERIES)
    row, head = flat // G, kv_head * G + flat % G
    real, dim = row < rows, tl.arange(0, D)
    own_length = tl.load(lens + row, mask=real, other=0)
    # place and length of each row's prefix; a tile goes through those of its rows, one after another
    start_of = tl.load(shared + row * shared_stride, mask=real, other=0)
    length_of = tl.load(shared + row * shared_stride + 1, mask=real, other=0)
    start_of = tl.where(length_of > 0, start_of, NO_PLACE)
    query = tl.load(q + (row * heads + head)[:, None] * D + dim[None, :], mask=real[:, None], other=0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    place = tl.min(start_of, 0)
    while place < NO_PLACE:
        mine = start_of == place
        length = tl.max(tl.where(mine, length_of, 0), 0)
        part = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
        first = length + own_length - window  # that the query sees
        low = tl.maximum(split * part, tl.min(tl.where(mine, first, length), 0))
        high = tl.minimum(length, split * part + part)
        base = kv_head.to(tl.int64) * head_stride + place.to(tl.int64) * D
        for start in range(low, high, TILE):
            token = start + tl.arange(0, TILE)
            seen = token < high
            key = tl.load(keys + base + token[None, :] * D + dim[:, None], mask=seen[None, :], other=0.0)
            visible = seen[None, :] & mine[:, None] & (token[None, :] >= first[:, None])
            scores = tl.where(visible, tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
            value = tl.load(values + base + token[:, None] * D + dim[None, :], mask=seen[:, None], other=0.0)
            top, total, acc = _soften(scores, top, total, acc, value, own_length, False)
        place = tl.min(tl.where(start_of > place, start_of, NO_PLACE), 0)
    at = ((FIRST + split) * rows + row) * heads + head
    safe_total = tl.where(total > 0, total, 1.0)
    tl.store(part_o + at[:, None] * D + dim[None, :], acc / safe_total[:, None], mask=real[:, None])
    tl.store(part_l + at, tl.where(total > 0, top + tl.log2(safe_total), float("-inf")), mask=real)


@triton.jit
def _join(part_o, part_l, out, count, D: tl.constexpr, PARTS: tl.constexpr):
    """Weighted mean of the parts of one (row, head), by log-sum-exp; the row's own part is never empty."""
    at, dim = tl.program_id(0), tl.arange(0, D)
    top = tl.load(part_l + at)
    for part in tl.static_range(1, PARTS):
        top = tl.maximum(top, tl.load(part_l + part * count + at))
    acc = tl.zeros([D], tl.float32)
    total = 0.0
    for part in tl.static_range(PARTS):
        weight = tl.exp2(tl.load(part_l + part * count + at) - top)
        acc += weight * tl.load(part_o + (part * count + at) * D + dim)
        total += weight
    tl.store(out + at * D + dim, (acc / total).to(out.dtype.element_ty))


def pipeline_stages(q: torch.Tensor) -> int:
    """Of loops over tiles of 64 keys: three where a key takes at most 256 bytes (88 KiB of shared memory), else one.

    An RTX 4090 and an L40S give a program 99 KiB, an A100 163; keys of 512 bytes in three stages would take 168.
    """
    return 3 if q.shape[-1] * q.element_size() <= 256 else 1


def splits_for(rows: int) -> tuple[int, int]:
    """(own, prefix) key splits that fill a card of about 100 multiprocessors."""
    if rows <= 8:
        return 8, 8
    if rows <= 64:
        return 4, 4
    return (2, 2) if rows <= 128 else (1, 1)


def pointers(cache: LayerCache) -> tuple[torch.Tensor, ...]:
    """Keys, values and their scales; where there are none the numbers stand for them, unread."""
    keys, values = cache.keys, cache.values
    if cache.key_scales is None or cache.value_scales is None:
        return keys, values, keys, values
    return keys, values, cache.key_scales, cache.value_scales


def decode_attention(
    q_BND: torch.Tensor,
    cache: LayerCache,
    step: Step,
    layer: int,
    scale: float,
    window: int = WIDE,
) -> torch.Tensor:
    rows, heads, dim = q_BND.shape
    kv_heads, block_tokens = cache.keys.shape[1], cache.keys.shape[2]
    group = heads // kv_heads
    own, shared = splits_for(rows)
    part_o = torch.empty((own + shared, rows, heads, dim), dtype=torch.float32, device=q_BND.device)
    part_l = torch.empty((own + shared, rows, heads), dtype=torch.float32, device=q_BND.device)
    _decode_own[(rows, kv_heads, own)](
        q_BND,
        *pointers(cache),
        step.table_BW,
        step.lens_B,
        part_o,
        part_l,
        step.table_BW.stride(0),
        rows,
        scale * LOG2E,
        window,
        group,
        max(16, triton.next_power_of_2(group)),
        dim,
        block_tokens,
        TILE_OWN_KEYS,
        own,
        cache.key_scales is not None,
        num_warps=1,
        num_stages=max(2, pipeline_stages(q_BND)),
    )
    _attend_prefix(q_BND, step, layer, scale, window, (part_o, part_l), (kv_heads, own, shared))
    out = torch.empty((rows, heads * dim), dtype=q_BND.dtype, device=q_BND.device)
    _join[(rows * heads,)](part_o, part_l, out, rows * heads, dim, own + shared, num_warps=1)
    return out


def _attend_prefix(
    q_BND: torch.Tensor,
    step: Step,
    layer: int,
    scale: float,
    window: int,
    parts: tuple[torch.Tensor, torch.Tensor],
    splits: tuple[int, int, int],
) -> None:
    """The part of the keys that rows share, into `parts` behind the rows' own. `splits`: key heads, own, shared."""
    rows, heads, dim = q_BND.shape
    kv_heads, own, shared = splits
    group = heads // kv_heads
    queries = 64
    assert step.shared is not None
    _decode_prefix[(triton.cdiv(rows * group, queries), kv_heads, shared)](
        q_BND,
        step.store.keys[layer],
        step.store.values[layer],
        step.shared,
        step.lens_B,
        *parts,
        step.shared.stride(0),
        step.store.keys.stride(1),
        rows,
        scale * LOG2E,
        window,
        group,
        dim,
        queries,
        TILE_KEYS,
        shared,
        own,
        num_warps=4 if dim <= 128 else 8,
        num_stages=pipeline_stages(q_BND),
    )
