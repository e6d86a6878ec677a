"""bitsandbytes' NF4 weights in Triton: dequantise in one pass, or multiply without ever writing them out.

Format (bitsandbytes 0.50): weight (O, K) flat, two 4-bit codes a byte, the even element in the high half; blocks of 64
consecutive elements share one scale; value = table[code] * scale. K must be a multiple of 64.
`dequantise` gives bitsandbytes' own numbers (fp32 product, rounded once). `fused_linears` reads the codes once for up
to 128 tokens: the high and the low halves are the even and the odd columns of K, so one product becomes two dots; K is
split over programs and the parts are added in fp32 in a fixed order. Codes become values by byte permutes, four codes
at a time: on an H100 that took 0.11 ms where table look-ups through L1 took 0.26 (27,648 x 5,120, 16 tokens).
Axes: T tokens, O outputs, K inputs, S parts of K.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton import knobs

if TYPE_CHECKING:
    from cai.engine.native.linears import Nf4

BLOCK_BYTES = 2048
PROGRAMS_PER_SM = 6
# (tokens of a tile, outputs of a tile, warps) by number of tokens. Of 50 tried on an H100 these or near these were the
# fastest; compiled for an A100, every code is decoded once (with 128 x 64 and 4 warps, four times).
TILES = ((16, 128, 4), (32, 64, 4), (64, 64, 4), (128, 128, 8))
# bitsandbytes' `get_4bit_type("nf4")`
NF4: tuple[float, ...] = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _permutes() -> str:
    """PTX: four bytes of codes ($8) to the fp32 bits of their high codes ($0-$3) and of their low codes ($4-$7).

    Byte plane p of the table is 16 bytes. A permute picks four of eight by three bits of each code, from the lower and
    from the upper half of the plane; a third one chooses between them by the fourth bit. Then planes become words.
    """
    raw = [struct.pack("<f", value) for value in NF4]
    lines = ["{", ".reg .b32 c, s, t, l, u, p0, p1, p2, p3, a, b, e, f;"]
    for half in range(2):  # two bytes = four codes at a time
        lines.append("mov.b32 c, $8;" if half == 0 else "shr.u32 c, $8, 16;")
        lines += ["and.b32 s, c, 0x7777;", "shr.u32 t, c, 1;", "and.b32 t, t, 0x4444;", "or.b32 t, t, 0x3210;"]
        for plane in range(4):
            words = struct.unpack("<4I", bytes(value[plane] for value in raw))
            lines.append(f"prmt.b32 l, {words[0]}, {words[1]}, s;")
            lines.append(f"prmt.b32 u, {words[2]}, {words[3]}, s;")
            lines.append(f"prmt.b32 p{plane}, l, u, t;")
        lines += ["prmt.b32 a, p0, p1, 0x5140;", "prmt.b32 b, p0, p1, 0x7362;"]
        lines += ["prmt.b32 e, p2, p3, 0x5140;", "prmt.b32 f, p2, p3, 0x7362;"]
        first = 2 * half
        lines += [f"prmt.b32 ${4 + first}, a, e, 0x5410;", f"prmt.b32 ${first}, a, e, 0x7632;"]
        lines += [f"prmt.b32 ${5 + first}, b, f, 0x5410;", f"prmt.b32 ${1 + first}, b, f, 0x7632;"]
    return "\n".join([*lines, "}"])


PERMUTES = tl.constexpr(_permutes())
REGISTERS = tl.constexpr("=&r," * 8 + "r")


@triton.jit
def _values(packed, table, PERMUTE: tl.constexpr):
    """fp32 values of the high and of the low codes of each byte."""
    if PERMUTE:
        even, odd = tl.inline_asm_elementwise(
            PERMUTES, REGISTERS, [packed], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
        )
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
    else:  # Triton's interpreter knows no assembler
        byte = packed.to(tl.int32)
        return tl.load(table + (byte >> 4)), tl.load(table + (byte & 15))


@triton.jit
def _dequantise(codes, absmax, table, out, BYTES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    byte = tl.load(codes + at).to(tl.int32)
    scale = tl.load(absmax + at // 32)
    even = (tl.load(table + (byte >> 4)) * scale).to(out.dtype.element_ty)
    odd = (tl.load(table + (byte & 15)) * scale).to(out.dtype.element_ty)
    first = tl.program_id(0).to(tl.int64) * BYTES * 2
    tl.store(out + first + tl.arange(0, BYTES * 2), tl.interleave(even, odd))


@triton.jit
def _dequantise_apart(
    codes, absmax, table, out, BYTES: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, PERMUTE: tl.constexpr
):
    """Rows of `WIDTH` that lie `STRIDE` apart; by blocks of 64, which lie in one row each."""
    block = tl.program_id(0) * (BYTES // 32) + tl.arange(0, BYTES // 32)
    byte = tl.arange(0, 32)
    even, odd = _values(tl.load(codes + block.to(tl.int64)[:, None] * 32 + byte[None, :]), table, PERMUTE)
    scale = tl.load(absmax + block)[:, None]
    values = tl.interleave((even * scale).to(out.dtype.element_ty), (odd * scale).to(out.dtype.element_ty))
    place = (block // (WIDTH // 64)).to(tl.int64) * STRIDE + block % (WIDTH // 64) * 64
    tl.store(out + place[:, None] + tl.arange(0, 64)[None, :], values)


def dequantise(weight: Nf4, out_OK: torch.Tensor) -> torch.Tensor:
    """Write the weight into `out_OK` (bf16, fp16 or fp32; rows may lie apart)."""
    size = weight.codes.numel()
    block = BLOCK_BYTES
    while size % block:
        block //= 2  # K is a multiple of 64, so a block of 32 bytes always divides
    tensors = weight.codes, weight.absmax, weight.table, out_OK
    if out_OK.is_contiguous():
        _dequantise[(size // block,)](*tensors, block, num_warps=4)
    else:
        apart = weight.shape[1], out_OK.stride(0)
        _dequantise_apart[(size // block,)](*tensors, block, *apart, not knobs.runtime.interpret, num_warps=8)
    return out_OK


@triton.jit
def _fused(
    x,
    codes,
    absmax,
    table,
    bias,
    out,
    tokens,
    outputs,
    stride,
    half_k,
    steps,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    BIAS: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """`x` is (2, T, K/2): even columns, odd columns. One step is one block of 64 elements = 32 bytes of each output.

    Weights are the left operand, which tensor cores take from registers.
    """
    tile_o, tile_t, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tile_t * TILE_T + tl.arange(0, TILE_T)
    output = tile_o * TILE_O + tl.arange(0, TILE_O)
    byte = tl.arange(0, 32)
    real_t, real_o = token < tokens, output < outputs
    place_x = token[None, :] * half_k + byte[:, None]
    place_w = output[:, None].to(tl.int64) * half_k + byte[None, :]
    place_s = output.to(tl.int64) * (half_k // 32)
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    first = split * steps
    for step in range(first, tl.minimum(first + steps, half_k // 32)):
        packed = tl.load(codes + place_w + step * 32, mask=real_o[:, None], other=0)
        scale = tl.load(absmax + place_s + step, mask=real_o, other=0.0)[:, None]
        x_even = tl.load(x + place_x + step * 32, mask=real_t[None, :], other=0.0)
        x_odd = tl.load(x + tokens * half_k + place_x + step * 32, mask=real_t[None, :], other=0.0)
        even, odd = _values(packed, table, PERMUTE)
        acc = tl.dot((even * scale).to(x_even.dtype), x_even, acc, input_precision="ieee")
        acc = tl.dot((odd * scale).to(x_even.dtype), x_odd, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + output, mask=real_o, other=0.0).to(tl.float32)[:, None]
    at = (split * tokens + token)[None, :].to(tl.int64) * stride + output[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real_t[None, :] & real_o[:, None])


@triton.jit
def _add_parts(parts, bias, out, size, stride, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of S parts (S, T * O), in order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * size + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % stride, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def fused_linears(x_TK: torch.Tensor, weights: Sequence[Nf4], bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ W.T + b (T, sum of O) of weights with one input; the bias is theirs, concatenated."""
    tokens, k = x_TK.shape
    halves = x_TK.view(tokens, k // 2, 2).permute(2, 0, 1).contiguous()
    tile_t, tile_o, warps = next((tile for tile in TILES if tokens <= tile[0]), TILES[-1])
    outputs = [weight.shape[0] for weight in weights]
    tiles = sum(triton.cdiv(count, tile_o) for count in outputs) * triton.cdiv(tokens, tile_t)
    split = max(1, min(32, _programs(x_TK) // tiles, k // 256))
    steps = triton.cdiv(k // 64, split)
    split = triton.cdiv(k // 64, steps)
    total = sum(outputs)
    out_TO = torch.empty((tokens, total), dtype=x_TK.dtype, device=x_TK.device)
    parts = out_TO[None]
    if split > 1:
        parts = torch.empty((split, tokens, total), dtype=torch.float32, device=x_TK.device)
    at = 0
    for weight, count in zip(weights, outputs, strict=True):
        _fused[(triton.cdiv(count, tile_o), triton.cdiv(tokens, tile_t), split)](
            halves,
            weight.codes,
            weight.absmax,
            weight.table,
            parts if bias_O is None else bias_O[at:],
            parts[:, :, at:],
            tokens,
            count,
            total,
            k // 2,
            steps,
            tile_t,
            tile_o,
            bias_O is not None and split == 1,
            not knobs.runtime.interpret,
            num_warps=warps,
            num_stages=3,
        )
        at += count
    if split > 1:
        bias = parts if bias_O is None else bias_O
        grid = (triton.cdiv(tokens * total, 1024),)
        _add_parts[grid](parts, bias, out_TO, tokens * total, total, split, bias_O is not None, 1024, num_warps=4)
    return out_TO


def _programs(x: torch.Tensor) -> int:
    """How many programs keep the card busy."""
    return PROGRAMS_PER_SM * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1)
