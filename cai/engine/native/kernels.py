"""The GPU's operations in Triton, under the names of `attention`: norms, rotary and cache write, the draw.

The two attentions are in `attention_kernels` (decode) and `prefill_kernels`, found under this module's name, too.
Sums are fp32 and in a fixed order. Nothing here needs Hopper.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai.engine.native.attention import HeadNorms, Step
from cai.engine.native.attention_kernels import decode_attention, pointers
from cai.engine.native.cache import LayerCache
from cai.engine.native.prefill_kernels import prefill_attention, query_tiles
from cai.engine.sampling import row_keys

__all__ = (
    "add_rms_norm",
    "decode_attention",
    "gelu_mul",
    "pick",
    "prefill_attention",
    "query_tiles",
    "rms_norm",
    "rope_and_store",
    "silu_mul",
)
PICK_CHUNK = 4096


@triton.jit
def _normed(h, scale, factor, ONCE: tl.constexpr):
    """h (fp32) * scale * factor, in fp32; rounded to the factor's type in between unless that is fp32."""
    normed = h * scale
    if not ONCE:
        normed = normed.to(factor.dtype).to(tl.float32)
    return normed * factor.to(tl.float32)


@triton.jit
def _rms_norm(
    x, residual, weight, y, total, eps, width, HAS_RESIDUAL: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * width + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        h = (h.to(tl.float32) + tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)).to(
            h.dtype
        )
        tl.store(total + row * width + column, h, mask=inside)
    h32 = h.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(h32 * h32) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(y + row * width + column, _normed(h32, scale, factor, ONCE).to(h.dtype), mask=inside)


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    x_TH = x_TH.contiguous()
    y = torch.empty_like(x_TH)
    block, once = triton.next_power_of_2(x_TH.shape[1]), weight_H.dtype == torch.float32
    _rms_norm[(x_TH.shape[0],)](x_TH, x_TH, weight_H, y, y, eps, x_TH.shape[1], False, once, block, num_warps=8)
    return y


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x_TH = x_TH.contiguous()
    y, total = torch.empty_like(x_TH), torch.empty_like(x_TH)
    block, once = triton.next_power_of_2(x_TH.shape[1]), weight_H.dtype == torch.float32
    _rms_norm[(x_TH.shape[0],)](
        x_TH, residual_TH, weight_H, y, total, eps, x_TH.shape[1], True, once, block, num_warps=8
    )
    return y, total


@triton.jit
def _gated_mul(gate, up, y, gate_stride, up_stride, width, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """SiLU, or GELU by tanh: both are g / (1 + exp(-z)), of z = g or of 2 sqrt(2 / pi) (g + 0.044715 g^3)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0)
    g32 = g.to(tl.float32)
    z = g32
    if TANH:
        z = 1.5957691216057308 * (g32 + 0.044715 * g32 * g32 * g32)
    gated = (g32 / (1.0 + tl.exp(-z))).to(g.dtype).to(tl.float32)
    tl.store(y + row * width + column, (gated * u.to(tl.float32)).to(g.dtype), mask=inside)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    rows, width = gate.shape
    y = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    grid = (rows, triton.cdiv(width, 2048))
    _gated_mul[grid](gate, up, y, gate.stride(0), up.stride(0), width, tanh, 2048, num_warps=4)
    return y


def gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu_mul(gate, up, tanh=True)


@triton.jit
def _rotated(
    x,
    at,
    stride,
    token_cos,
    token_sin,
    heads,
    weight,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One token's heads, rotated; before it normed each for itself (NORM 1) or all together (NORM 2)."""
    head, half = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = head < heads
    a = tl.load(x + at * stride + head * 2 * HALF + half, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at * stride + head * 2 * HALF + HALF + half, mask=inside, other=0.0).to(tl.float32)
    if NORM > 0:
        squares = tl.sum(a * a + b * b, 1)
        if NORM == 1:
            scale = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)[:, None]
            place = weight + tl.zeros_like(head) + half
        else:
            scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / (heads * 2 * HALF) + eps)
            place = weight + head * 2 * HALF + half
        first = tl.load(place, mask=inside, other=0.0)
        second = tl.load(place + HALF, mask=inside, other=0.0)
        a = _normed(a, scale, first, ONCE).to(x.dtype.element_ty).to(tl.float32)
        b = _normed(b, scale, second, ONCE).to(x.dtype.element_ty).to(tl.float32)
    return a * token_cos - b * token_sin, b * token_cos + a * token_sin


@triton.jit
def _store(first, second, cache, scales, place, at, inside, HALF: tl.constexpr, EIGHT: tl.constexpr):
    """Both halves of each head into the cache; in 8 bits as round(x / s) with s = max|x| / 127, kept beside it."""
    if EIGHT:
        first, second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))[:, None]
        scale = tl.maximum(largest, 1e-30) / 127.0
        tl.store(scales + at, scale, mask=inside)
        first, second = tl.floor(first / scale + 0.5), tl.floor(second / scale + 0.5)
    tl.store(cache + place, first.to(cache.dtype.element_ty), mask=inside)
    tl.store(cache + place + HALF, second.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _rope_and_store(
    q,
    k,
    v,
    out,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    cos,
    sin,
    positions,
    blocks,
    offsets,
    q_stride,
    k_stride,
    v_stride,
    heads,
    kv_heads,
    q_weight,
    k_weight,
    eps,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ONCE: tl.constexpr,
    EIGHT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + token)
    token_cos = tl.load(cos + position * HALF + half)
    token_sin = tl.load(sin + position * HALF + half)
    head = tl.arange(0, HEADS)[:, None]
    first, second = _rotated(q, token, q_stride, token_cos, token_sin, heads, q_weight, eps, HEADS, HALF, NORM, ONCE)
    target = out + token * heads * 2 * HALF + head * 2 * HALF + half
    tl.store(target, first.to(out.dtype.element_ty), mask=head < heads)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=head < heads)
    kv_head = tl.arange(0, KV_HEADS)[:, None]
    at = tl.load(blocks + token) * kv_heads * BLOCK_TOKENS + kv_head * BLOCK_TOKENS + tl.load(offsets + token)
    place = at * 2 * HALF + half
    first, second = _rotated(
        k, token, k_stride, token_cos, token_sin, kv_heads, k_weight, eps, KV_HEADS, HALF, NORM, ONCE
    )
    _store(first, second, k_cache, k_scales, place, at, kv_head < kv_heads, HALF, EIGHT)
    source = v + token * v_stride + kv_head * 2 * HALF + half
    first = tl.load(source, mask=kv_head < kv_heads, other=0.0)
    second = tl.load(source + HALF, mask=kv_head < kv_heads, other=0.0)
    _store(first, second, v_cache, v_scales, place, at, kv_head < kv_heads, HALF, EIGHT)


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shape: tuple[int, int, int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    step: Step,
    cache: LayerCache,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    heads, kv_heads, dim = shape
    q_weight, k_weight, eps = norms or (q, k, 0.0)
    norm = 0 if norms is None else 1 if q_weight.numel() == dim else 2
    out = torch.empty((q.shape[0], heads, dim), dtype=q.dtype, device=q.device)
    _rope_and_store[(q.shape[0],)](
        q,
        k,
        v,
        out,
        *pointers(cache),
        cos,
        sin,
        step.positions_T,
        step.blocks_T,
        step.offsets_T,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        heads,
        kv_heads,
        q_weight,
        k_weight,
        eps,
        cache.keys.shape[2],
        triton.next_power_of_2(heads),
        triton.next_power_of_2(kv_heads),
        dim // 2,
        norm,
        q_weight.dtype == torch.float32,
        cache.key_scales is not None,
        num_warps=4,
    )
    return out


@triton.jit
def _pick_chunk(logits, temperatures, key0, key1, best, best_at, stride, vocab, chunks, BLOCK: tl.constexpr):
    """The largest logit + T * noise of one chunk; the noise as in `sampling.hash_BV` and `gumbel_of_bits`."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    x = (token.to(tl.uint32) * 2654435761) ^ tl.load(key0 + row).to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 2146121005
    x = x ^ (x >> 15)
    x = x + tl.load(key1 + row).to(tl.uint32, bitcast=True)
    x = x * 2221713035
    x = x ^ (x >> 16)
    v = (x & 0x7FFFFFFF).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    v = tl.minimum(v, 0.999999940395)
    exponential = tl.where(v < 1e-3, v + v * v * 0.5 + v * v * v * 0.333333343, -tl.log(1.0 - v))
    noise = -tl.log(exponential) * tl.load(temperatures + row)
    score = tl.load(logits + row * stride + token, mask=inside, other=0.0).to(tl.float32) + noise
    score = tl.where(inside, score, float("-inf"))
    tl.store(best + row * chunks + chunk, tl.max(score, 0))
    tl.store(best_at + row * chunks + chunk, chunk * BLOCK + tl.argmax(score, 0))


@triton.jit
def _pick_best(best, best_at, drawn, chunks, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0), tl.arange(0, BLOCK)
    score = tl.load(best + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    tl.store(drawn + row, tl.load(best_at + row * chunks + tl.argmax(score, 0)).to(tl.int64))


def pick(
    logits_BV: torch.Tensor, temperatures_B: torch.Tensor, seeds_B: torch.Tensor, positions_B: torch.Tensor
) -> torch.Tensor:
    """`sampling.pick` in one pass over the logits."""
    rows, vocab = logits_BV.shape
    key0_B, key1_B = row_keys(seeds_B, positions_B)
    chunks = triton.cdiv(vocab, PICK_CHUNK)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=logits_BV.device)
    best_at = torch.empty((rows, chunks), dtype=torch.int32, device=logits_BV.device)
    drawn = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    _pick_chunk[(rows, chunks)](
        logits_BV,
        temperatures_B,
        key0_B,
        key1_B,
        best,
        best_at,
        logits_BV.stride(0),
        vocab,
        chunks,
        PICK_CHUNK,
        num_warps=8,
    )
    _pick_best[(rows,)](best, best_at, drawn, chunks, triton.next_power_of_2(chunks), num_warps=1)
    return drawn
