"""Element-wise steps of a decoder layer, each one pass over memory: Triton on CUDA, plain torch elsewhere.

Shapes: x_TH with T tokens of the packed batch. All arithmetic inside is fp32, inputs and outputs keep their dtype. The
torch versions are the definition; the Triton versions are compared with them (tests run them through Triton's
interpreter, and on the GPU).
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation without Triton uses the torch versions alone
    triton = None

FORCE_TRITON = False  # tests with TRITON_INTERPRET=1


def _fused(tensor: torch.Tensor) -> bool:
    return triton is not None and (tensor.is_cuda or FORCE_TRITON)


# --- RMSNorm: y = x * r * w with r = (mean(x^2) + eps)^-1/2


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    if _fused(x_TH):
        y_TH = torch.empty_like(x_TH)
        width = x_TH.shape[1]
        _rms_kernel[(x_TH.shape[0],)](
            x_TH, weight_H, x_TH, x_TH, y_TH, width, eps, BLOCK=triton.next_power_of_2(width), BACKWARD=False,
            num_warps=8,
        )  # fmt: skip
        return y_TH
    x = x_TH.float()
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_H.float() * (x * r)).to(x_TH.dtype)


def rms_norm_backward(
    grad_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None
) -> torch.Tensor:
    """dx of `rms_norm` (the weight is frozen) plus the gradient that came along the residual, if any.

    dx = r * (w g - x r^2 mean(w g x)).
    """
    if _fused(x_TH):
        dx_TH = torch.empty_like(x_TH)
        width = x_TH.shape[1]
        _rms_kernel[(x_TH.shape[0],)](
            x_TH, weight_H, grad_TH, grad_TH if residual_TH is None else residual_TH, dx_TH, width, eps,
            BLOCK=triton.next_power_of_2(width), BACKWARD=True, HAS_RESIDUAL=residual_TH is not None, num_warps=8,
        )  # fmt: skip
        return dx_TH
    x, wg = x_TH.float(), weight_H.float() * grad_TH.float()
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    dx = r * (wg - x * r * r * (wg * x).mean(-1, keepdim=True))
    if residual_TH is not None:
        dx = dx + residual_TH.float()
    return dx.to(x_TH.dtype)


# --- SwiGLU: m = silu(g) * u


def swiglu(g_TF: torch.Tensor, u_TF: torch.Tensor) -> torch.Tensor:
    if _fused(g_TF):
        m_TF = torch.empty_like(g_TF)
        _swiglu_kernel[_grid(g_TF)](g_TF, u_TF, m_TF, g_TF, g_TF, g_TF, g_TF.numel(), BLOCK=1024, BACKWARD=False)
        return m_TF
    g = g_TF.float()
    return (g * torch.sigmoid(g) * u_TF.float()).to(g_TF.dtype)


def swiglu_backward(
    dm_TF: torch.Tensor, g_TF: torch.Tensor, u_TF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m, dg, du): the product again, for the down projection's gradient, and the gradients of both factors."""
    if _fused(g_TF):
        m_TF, dg_TF, du_TF = (torch.empty_like(g_TF) for _ in range(3))
        _swiglu_kernel[_grid(g_TF)](g_TF, u_TF, m_TF, dm_TF, dg_TF, du_TF, g_TF.numel(), BLOCK=1024, BACKWARD=True)
        return m_TF, dg_TF, du_TF
    g, u, dm = g_TF.float(), u_TF.float(), dm_TF.float()
    s = torch.sigmoid(g)
    silu = g * s
    dg = dm * u * (s + silu * (1 - s))  # silu'(g) = s + g s (1 - s)
    return (silu * u).to(g_TF.dtype), dg.to(g_TF.dtype), (dm * silu).to(g_TF.dtype)


# --- rotary embedding, halves convention (Llama, Qwen): y = x cos + rotate_half(x) sin


def rotate(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotate heads by their positions; `cos`, `sin` hold D/2 columns, fp32. The inverse is the transpose."""
    if _fused(x_TND):
        y_TND = torch.empty(x_TND.shape, dtype=x_TND.dtype, device=x_TND.device)
        tokens, heads, width = x_TND.shape
        _rope_kernel[(tokens,)](
            x_TND, cos_TD, sin_TD, y_TND, x_TND.stride(0), heads, -1.0 if inverse else 1.0,
            HEADS=triton.next_power_of_2(heads), HALF=width // 2,
        )  # fmt: skip
        return y_TND
    cos, sin = cos_TD[:, None], sin_TD[:, None] * (-1.0 if inverse else 1.0)
    a, b = x_TND.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_TND.dtype)


def _grid(tensor: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), 1024),)


if triton is not None:

    @triton.jit
    def _rms_kernel(
        x_ptr, w_ptr, g_ptr, res_ptr, y_ptr, width, eps,
        BLOCK: tl.constexpr, BACKWARD: tl.constexpr, HAS_RESIDUAL: tl.constexpr = False,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * width
        columns = tl.arange(0, BLOCK)
        mask = columns < width
        x = tl.load(x_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
        if BACKWARD:  # dx = r (w g - x r^2 mean(w g x)), as rms_norm_backward says; one program has the whole row
            wg = w * tl.load(g_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
            y = r * (wg - x * r * r * (tl.sum(wg * x, axis=0) / width))
            if HAS_RESIDUAL:
                y += tl.load(res_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        else:
            y = w * (x * r)
        tl.store(y_ptr + row + columns, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _swiglu_kernel(g_ptr, u_ptr, m_ptr, dm_ptr, dg_ptr, du_ptr, size, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-g))
        silu = g * s
        tl.store(m_ptr + at, (silu * u).to(m_ptr.dtype.element_ty), mask=mask)
        if BACKWARD:
            dm = tl.load(dm_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dg_ptr + at, (dm * u * (s + silu * (1.0 - s))).to(dg_ptr.dtype.element_ty), mask=mask)
            tl.store(du_ptr + at, (dm * silu).to(du_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _rope_kernel(
        x_ptr, cos_ptr, sin_ptr, y_ptr, token_stride, heads, sign, HEADS: tl.constexpr, HALF: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, HALF)[None, :]
        mask = (head < heads) & (column < HALF)
        cos = tl.load(cos_ptr + token * HALF + column)
        sin = tl.load(sin_ptr + token * HALF + column) * sign
        at = head * (2 * HALF) + column
        a = tl.load(x_ptr + token * token_stride + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + token * token_stride + at + HALF, mask=mask, other=0.0).to(tl.float32)
        out = y_ptr + token * heads * (2 * HALF) + at
        # (a, b) are the halves of a head: y = (a cos - b sin, b cos + a sin); `sign` -1 is the transpose
        tl.store(out, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
