"""SwiGLU's backward pass with the gradients of the LoRA factors that touch it, each tensor of width F read once.

With m = silu(g) u, and dg, du its gradients: dA of `down` is (s dy B)' m, dB of `gate` and `up` are dg' (x A') and
du' (x A'). Apart they write m and read m, dg and du once more: four passes over [T, F]. Here the tile of m, dg and du
that was just computed goes into the three products, summed over tokens in fp32; m is never written. Imports torch.

Legend: T tokens, F feed-forward width, R rank.
"""

from __future__ import annotations

import torch

from cai.training import kernels
from cai.training.kernels import swiglu_backward

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

FACTORS = True
TILE = (64, 16, 4, 4)  # columns, rows, warps, stages: 130 registers a thread on Hopper, three programs a processor
SPLIT = 4  # over how many programs the tokens go
MOST = 64  # R: above, the sums do not stay in registers


def serves(rank: int) -> bool:
    return FACTORS and rank <= MOST


def swiglu_factors(
    dm_TF: torch.Tensor, g_TF: torch.Tensor, u_TF: torch.Tensor, dg_TF: torch.Tensor, du_TF: torch.Tensor,
    dyb_TR: torch.Tensor, gate_TR: torch.Tensor, up_TR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dg and du into their places, whose rows may lie apart; -> dyb' m (R, F), dg' gate and du' up (F, R), in fp32."""
    if not kernels._fused(g_TF):
        m_TF = swiglu_backward(dm_TF, g_TF, u_TF, dg_TF, du_TF)
        return (dyb_TR.t() @ m_TF).float(), (dg_TF.t() @ gate_TR).float(), (du_TF.t() @ up_TR).float()
    (tokens, width), rank = g_TF.shape, dyb_TR.shape[1]
    columns, rows, warps, stages = TILE
    parts = torch.empty((SPLIT, 3, width * rank), dtype=torch.float32, device=g_TF.device)
    _kernel[(triton.cdiv(width, columns), SPLIT)](
        dm_TF, g_TF, u_TF, dg_TF, du_TF, dyb_TR, gate_TR, up_TR, parts, tokens, width, rank,
        triton.cdiv(triton.cdiv(tokens, SPLIT), rows), dm_TF.stride(0), g_TF.stride(0), dg_TF.stride(0),
        dyb_TR.stride(0), gate_TR.stride(0), up_TR.stride(0), COLUMNS=columns, ROWS=rows,
        RANK=max(16, triton.next_power_of_2(rank)), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    a, gate, up = parts.sum(0)
    return a.view(rank, width), gate.view(width, rank), up.view(width, rank)


if triton is not None:

    @triton.jit
    def _kernel(
        dm_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, dyb_ptr, gate_ptr, up_ptr, parts_ptr, tokens, width, rank, steps,
        dm_stride, stride, d_stride, dyb_stride, gate_stride, up_stride,
        COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        factor = tl.arange(0, RANK)
        acc_a = tl.zeros([RANK, COLUMNS], tl.float32)
        acc_g = tl.zeros([RANK, COLUMNS], tl.float32)
        acc_u = tl.zeros([RANK, COLUMNS], tl.float32)
        first = tl.program_id(1) * steps * ROWS
        for step in range(steps):
            token = first + step * ROWS + tl.arange(0, ROWS)
            row = token.to(tl.int64)[:, None]
            keep = (token < tokens)[:, None] & (column < width)[None, :]
            few = (token < tokens)[:, None] & (factor < rank)[None, :]
            g = tl.load(g_ptr + row * stride + column[None, :], mask=keep, other=0.0).to(tl.float32)
            u = tl.load(u_ptr + row * stride + column[None, :], mask=keep, other=0.0).to(tl.float32)
            dm = tl.load(dm_ptr + row * dm_stride + column[None, :], mask=keep, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp(-g))
            silu = g * s
            m = (silu * u).to(dg_ptr.dtype.element_ty)
            dg = (dm * u * (s + silu * (1.0 - s))).to(dg_ptr.dtype.element_ty)
            du = (dm * silu).to(dg_ptr.dtype.element_ty)
            tl.store(dg_ptr + row * d_stride + column[None, :], dg, mask=keep)
            tl.store(du_ptr + row * d_stride + column[None, :], du, mask=keep)
            dyb = tl.load(dyb_ptr + row * dyb_stride + factor[None, :], mask=few, other=0.0)
            gate = tl.load(gate_ptr + row * gate_stride + factor[None, :], mask=few, other=0.0)
            up = tl.load(up_ptr + row * up_stride + factor[None, :], mask=few, other=0.0)
            acc_a = tl.dot(tl.trans(dyb), m, acc_a, input_precision="ieee")
            acc_g = tl.dot(tl.trans(gate), dg, acc_g, input_precision="ieee")
            acc_u = tl.dot(tl.trans(up), du, acc_u, input_precision="ieee")
        keep = (factor < rank)[:, None] & (column < width)[None, :]
        out = parts_ptr + tl.program_id(1).to(tl.int64) * 3 * width * rank
        tl.store(out + factor[:, None] * width + column[None, :], acc_a, mask=keep)
        flipped = column[None, :] * rank + factor[:, None]
        tl.store(out + width * rank + flipped, acc_g, mask=keep)
        tl.store(out + 2 * width * rank + flipped, acc_u, mask=keep)
