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


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_TH: torch.Tensor | None = None
) -> torch.Tensor:
    y_TH = torch.empty_like(x_TH) if out_TH is None else out_TH
    if _fused(x_TH):
        width = x_TH.shape[1]
        _rms_kernel[(x_TH.shape[0],)](
            x_TH, weight_H, x_TH, x_TH, y_TH, width, y_TH.stride(0), eps, BLOCK=triton.next_power_of_2(width),
            BACKWARD=False, num_warps=8,
        )  # fmt: skip
        return y_TH
    x = x_TH.float()
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y_TH.copy_(weight_H.float() * (x * r))


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
            x_TH, weight_H, grad_TH, grad_TH if residual_TH is None else residual_TH, dx_TH, width, width, eps,
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


def swiglu(g_TF: torch.Tensor, u_TF: torch.Tensor, out_TF: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of all three may lie apart, those of g and u alike."""
    m_TF = torch.empty_like(g_TF, memory_format=torch.contiguous_format) if out_TF is None else out_TF
    if _fused(g_TF):
        rows, width = g_TF.shape
        _swiglu_kernel[(rows, triton.cdiv(width, 1024))](
            g_TF, u_TF, m_TF, g_TF, g_TF, g_TF, width, g_TF.stride(0), m_TF.stride(0), 0, 0, BLOCK=1024, BACKWARD=False
        )
        return m_TF
    g = g_TF.float()
    return m_TF.copy_(g * torch.sigmoid(g) * u_TF.float())


def swiglu_backward(
    dm_TF: torch.Tensor, g_TF: torch.Tensor, u_TF: torch.Tensor, dg_TF: torch.Tensor, du_TF: torch.Tensor
) -> torch.Tensor:
    """m, the product again, for the down projection's gradient; the gradients of both factors into `dg`, `du`.

    Rows may lie apart, those of g and u alike, and those of dg and du.
    """
    m_TF = torch.empty_like(dm_TF)
    if _fused(g_TF):
        rows, width = g_TF.shape
        _swiglu_kernel[(rows, triton.cdiv(width, 1024))](
            g_TF, u_TF, m_TF, dm_TF, dg_TF, du_TF, width, g_TF.stride(0), m_TF.stride(0), dm_TF.stride(0),
            dg_TF.stride(0), BLOCK=1024, BACKWARD=True,
        )  # fmt: skip
        return m_TF
    g, u, dm = g_TF.float(), u_TF.float(), dm_TF.float()
    s = torch.sigmoid(g)
    silu = g * s
    dg_TF.copy_(dm * u * (s + silu * (1 - s)))  # silu'(g) = s + g s (1 - s)
    du_TF.copy_(dm * silu)
    return m_TF.copy_(silu * u)


# --- softmax: log p(target) = l_t - log sum exp l, and all p


def softmax_rows(
    logits_CV: torch.Tensor, target_C: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) of each row of fp32 logits, and p in `dtype` (None: not asked for). The logits are used up."""
    if _fused(logits_CV):
        rows, width = logits_CV.shape
        logps_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
        probs_CV = logits_CV if dtype is None else torch.empty(logits_CV.shape, dtype=dtype, device=logits_CV.device)
        _softmax_kernel[(rows,)](
            logits_CV, target_C, logps_C, probs_CV, width, BLOCK=min(8192, triton.next_power_of_2(width)),
            PROBS=dtype is not None, num_warps=8,
        )  # fmt: skip
        return logps_C, None if dtype is None else probs_CV
    logsum_C = torch.logsumexp(logits_CV, dim=-1)
    logps_C = logits_CV.gather(1, target_C[:, None]).squeeze(1) - logsum_C
    return logps_C, None if dtype is None else logits_CV.sub_(logsum_C[:, None]).exp_().to(dtype)


# --- rotary embedding, halves convention (Llama, Qwen): y = x cos + rotate_half(x) sin


def rotate(
    x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, out_TND: torch.Tensor | None = None,
    *, inverse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rotate heads by their positions; `cos`, `sin` hold D/2 columns, fp32. The inverse is the transpose.

    The tokens of `x` and of the output may lie apart, the heads of a token one behind the other.
    """
    y_TND = torch.empty(x_TND.shape, dtype=x_TND.dtype, device=x_TND.device) if out_TND is None else out_TND
    if _fused(x_TND):
        tokens, heads, width = x_TND.shape
        _rope_kernel[(tokens,)](
            x_TND, cos_TD, sin_TD, y_TND, x_TND.stride(0), y_TND.stride(0), heads, -1.0 if inverse else 1.0,
            HEADS=triton.next_power_of_2(heads), HALF=width // 2,
        )  # fmt: skip
        return y_TND
    cos, sin = cos_TD[:, None], sin_TD[:, None] * (-1.0 if inverse else 1.0)
    a, b = x_TND.float().chunk(2, dim=-1)
    return y_TND.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))


if triton is not None:

    @triton.jit
    def _rms_kernel(
        x_ptr, w_ptr, g_ptr, res_ptr, y_ptr, width, y_stride, eps,
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
        y_row = tl.program_id(0).to(tl.int64) * y_stride
        tl.store(y_ptr + y_row + columns, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _swiglu_kernel(
        g_ptr, u_ptr, m_ptr, dm_ptr, dg_ptr, du_ptr, width, stride, m_stride, dm_stride, d_stride,
        BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < width
        g = tl.load(g_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-g))
        silu = g * s
        tl.store(m_ptr + row * m_stride + column, (silu * u).to(m_ptr.dtype.element_ty), mask=mask)
        if BACKWARD:
            dm = tl.load(dm_ptr + row * dm_stride + column, mask=mask, other=0.0).to(tl.float32)
            dg = dm * u * (s + silu * (1.0 - s))
            tl.store(dg_ptr + row * d_stride + column, dg.to(dg_ptr.dtype.element_ty), mask=mask)
            tl.store(du_ptr + row * d_stride + column, (dm * silu).to(du_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _softmax_kernel(
        l_ptr, target_ptr, logp_ptr, p_ptr, width, BLOCK: tl.constexpr, PROBS: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], -1e30, tl.float32)  # of each lane, and the sum of its exp(l - top)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            mask = start + columns < width
            x = tl.load(l_ptr + row * width + start + columns, mask=mask, other=-1e30)
            higher = tl.maximum(top, x)
            total = total * tl.exp(top - higher) + tl.where(mask, tl.exp(x - higher), 0.0)
            top = higher
        highest = tl.max(top, axis=0)
        logsum = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
        chosen = tl.load(l_ptr + row * width + tl.load(target_ptr + row))
        tl.store(logp_ptr + row, chosen - logsum)
        if PROBS:
            for start in range(0, width, BLOCK):
                mask = start + columns < width
                x = tl.load(l_ptr + row * width + start + columns, mask=mask, other=-1e30)
                tl.store(
                    p_ptr + row * width + start + columns, tl.exp(x - logsum).to(p_ptr.dtype.element_ty), mask=mask
                )

    @triton.jit
    def _rope_kernel(
        x_ptr, cos_ptr, sin_ptr, y_ptr, token_stride, out_stride, heads, sign,
        HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, HALF)[None, :]
        mask = (head < heads) & (column < HALF)
        cos = tl.load(cos_ptr + token * HALF + column)
        sin = tl.load(sin_ptr + token * HALF + column) * sign
        at = head * (2 * HALF) + column
        a = tl.load(x_ptr + token * token_stride + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + token * token_stride + at + HALF, mask=mask, other=0.0).to(tl.float32)
        out = y_ptr + token * out_stride + at
        # (a, b) are the halves of a head: y = (a cos - b sin, b cos + a sin); `sign` -1 is the transpose
        tl.store(out, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
