"""8-bit products for drawing on cards without 8-bit floats: int8 copies of the weights, tokens rounded row by row.

A row (a token's inputs, an output's weights) is stored as round(x / s) in int8 with s = max|x| / 127; the product of
two rows is an exact integer and is scaled back by both: y = (x8 @ w8.T) * s_x * s_w + b. So a row's product depends on
no other row, to the bit. A step is max|x| / 127 for every element of a row, where e4m3's grows with the element: inputs
with channels that stand out lose more, as `down_proj`'s do, which `tuning` leaves in 16 bits.
Axes: T tokens, O outputs, K inputs, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cai.engine import INT8_CAPABILITY
from cai.engine.native import rounded
from cai.engine.native.rounded import Rounded

LARGEST = 127.0
FEWEST, MULTIPLE = 24, 8  # rows of a product, `torch._int_mm`: more than 16


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Error: a card without 8-bit integer products, or another compute type than bf16."""
    lacks = 'is older than Ampere, for which "int8" is made'
    rounded.require(device, dtype, "int8", INT8_CAPABILITY, lacks)


def padded(rows: int) -> int:
    """The number of rows that the product takes in place of these."""
    return max(FEWEST, -(-rows // MULTIPLE) * MULTIPLE)


def round_rows(x_RK: torch.Tensor) -> Rounded:
    """Each row in int8 with a scale of its own, rows of zeros behind them; a row of x is contiguous."""
    rows, width = x_RK.shape
    if not x_RK.is_cuda:
        return round_rows_eagerly(x_RK)
    values = torch.empty((padded(rows), width), dtype=torch.int8, device=x_RK.device)
    values[rows:].zero_()
    return rounded.round_into(values, x_RK, LARGEST, whole=True)


def round_rows_eagerly(x_RK: torch.Tensor) -> Rounded:
    """The same in plain torch."""
    x32_RK = x_RK.float()
    scales = x32_RK.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
    values = torch.zeros((padded(x_RK.shape[0]), x_RK.shape[1]), dtype=torch.int8, device=x_RK.device)
    values[: x_RK.shape[0]] = torch.floor(x32_RK / scales + 0.5).to(torch.int8)
    return Rounded(values, scales)


@triton.jit
def _scale_back(
    sums, x_scales, w_scales, bias, out, stride, outputs, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # one token, BLOCK of its outputs
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = output < outputs
    y = tl.load(sums + row * stride + output, mask=inside, other=0).to(tl.float32)
    y = y * tl.load(x_scales + row) * tl.load(w_scales + output, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + output, y.to(out.dtype.element_ty), mask=inside)


def product(x: Rounded, w: Rounded, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ w.T + b, bf16 (T, O). K and O are multiples of 8."""
    sums = torch._int_mm(x.values, w.values.t())  # int32 (padded T, padded O)
    tokens, outputs = x.scales.shape[0], w.scales.shape[0]
    if not sums.is_cuda:
        return scaled_back_eagerly(sums, x.scales, w.scales, bias_O)
    out_TO = torch.empty((tokens, outputs), dtype=torch.bfloat16, device=sums.device)
    bias, grid = out_TO if bias_O is None else bias_O, (tokens, triton.cdiv(outputs, 1024))
    _scale_back[grid](
        sums, x.scales, w.scales, bias, out_TO, sums.stride(0), outputs, bias_O is not None, 1024, num_warps=4
    )
    return out_TO


def scaled_back_eagerly(
    sums: torch.Tensor, x_scales: torch.Tensor, w_scales: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """The same in plain torch."""
    y_TO = sums[: len(x_scales), : len(w_scales)].float() * x_scales * w_scales[:, 0]
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(torch.bfloat16)
