"""8-bit products for drawing: e4m3 copies of the weights, tokens rounded row by row, bf16 out.

A row (a token's inputs, an output's weights) is stored as x / s in e4m3 with s = max|x| / 448, so the product of two
rows is scaled back by both: y = (x8 @ w8.T) * s_x * s_w + b, accumulated in fp32. Each side is rounded to 3 bits of
mantissa. Needs a card with 8-bit floating-point tensor cores (Ada, Hopper and later).
Axes: T tokens, O outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton import knobs

from cai.engine import FP8_CAPABILITY
from cai.errors import CaiError

ROWWISE = F.ScalingType.RowWise


@dataclass(slots=True)
class Rounded:
    """Rows in e4m3 (R, K) and their scales, fp32 (R, 1)."""

    values: torch.Tensor
    scales: torch.Tensor


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Error: a card without 8-bit floating-point products, or another compute type than bf16."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        card = torch.cuda.get_device_name(device)
        raise CaiError(f'engine.linears: {card} has no 8-bit floating-point products ("fp8"). Use "auto".')
    if dtype != torch.bfloat16:
        raise CaiError(f'engine.linears: "fp8" gives bfloat16, and the model computes in {dtype}. Use "auto".')


@triton.jit
def _round_rows(x, values, scales, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(h), 0), 1e-30) / 448.0
    tl.store(values + row * width + column, (h / scale).to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def round_rows(x_RK: torch.Tensor) -> Rounded:
    """Each row in e4m3 with a scale of its own; a row of x is contiguous."""
    rows, width = x_RK.shape
    # Triton's interpreter rounds 31.9 to 16 (it loses the carry into the exponent) and knows no NaN: torch does it.
    kept = torch.float32 if knobs.runtime.interpret else torch.float8_e4m3fn
    values = torch.empty((rows, width), dtype=kept, device=x_RK.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x_RK.device)
    block = triton.next_power_of_2(width)
    _round_rows[(rows,)](x_RK, values, scales, x_RK.stride(0), width, block, num_warps=4 if block <= 8192 else 16)
    return Rounded(values.to(torch.float8_e4m3fn), scales)


def product(x: Rounded, w: Rounded, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ w.T + b, bf16 (T, O). K and O are multiples of 16.

    The tensor cores' fast accumulation: its own error is 0.2-0.6% beside the 3.7% of the rounding, and without it
    4,096 tokens took 240 ms in place of 208 (H100, 64 layers of Qwen2.5-32B).
    """
    return F.scaled_mm(
        x.values, w.values.t(), x.scales, ROWWISE, w.scales.t(), ROWWISE, bias=bias_O, use_fast_accum=True
    )
