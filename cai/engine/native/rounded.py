"""The frame that the 8-bit products share: rows stored in 8 bits with a scale each, and the card that they need.

A row (a token's inputs, an output's weights) is stored as x / s with s = max|x| / the type's largest value. Owns the
rows' form and the kernel that rounds them; the type, its product and its error are `int8`'s and `fp8`'s.
Axes: K inputs, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cai.errors import CaiError


@dataclass(slots=True)
class Rounded:
    """Rows in 8 bits (at least R, K) and their scales, fp32 (R, 1)."""

    values: torch.Tensor
    scales: torch.Tensor


def require(device: torch.device, dtype: torch.dtype, name: str, capability: tuple[int, int], lacks: str) -> None:
    """Error: a card below `capability` (`lacks`: what is said of it), or another compute type than bf16."""
    if torch.cuda.get_device_capability(device) < capability:
        raise CaiError(f'engine.linears: {torch.cuda.get_device_name(device)} {lacks}. Use "auto".')
    if dtype != torch.bfloat16:
        raise CaiError(f'engine.linears: "{name}" gives bfloat16, and the model computes in {dtype}. Use "auto".')


@triton.jit
def _round_rows(
    x, values, scales, stride, width, LARGEST: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):  # one row
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(h), 0), 1e-30) / LARGEST
    steps = h / scale
    if WHOLE:
        steps = tl.floor(steps + 0.5)
    tl.store(values + row * width + column, steps.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def round_into(values: torch.Tensor, x_RK: torch.Tensor, largest: float, whole: bool) -> Rounded:
    """Each row of x into `values`, whose largest value is `largest`; `whole`: to integers. A row of x is contiguous."""
    rows, width = x_RK.shape
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x_RK.device)
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 8192 else 16
    _round_rows[(rows,)](x_RK, values, scales, x_RK.stride(0), width, largest, whole, block, num_warps=warps)
    return Rounded(values, scales)
