"""Single kernels of the packed DPO step, for bench/dpo_parts.py: tiles of the factor kernel, products with LoRA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

TILES = ((64, 16, 4, 4), (64, 16, 4, 3), (64, 32, 4, 3), (128, 16, 8, 3), (128, 32, 8, 3), (128, 32, 8, 2))
RANK = 32


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    import torch

    cuda = torch.cuda.is_available()
    for _ in range(2):
        run()
    if cuda:
        torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(repeats if cuda else 1):
        run()
    if cuda:
        torch.cuda.synchronize()
    return (time.monotonic() - began) * 1000 / (repeats if cuda else 1)


def factor_times(tokens: int, width: int, device: Any, dtype: Any) -> dict[str, float]:
    """SwiGLU's backward pass with the three products behind it, apart and in one kernel by tile."""
    import torch

    from cai.training import factor_kernel as own
    from cai.training.kernels import swiglu_backward

    gu, dgu = (torch.randn(tokens, 2 * width, device=device, dtype=dtype) for _ in range(2))
    dm, few = (
        torch.randn(tokens, width, device=device, dtype=dtype),
        torch.randn(tokens, 96, device=device, dtype=dtype),
    )
    g, u, dg, du = gu[:, :width], gu[:, width:], dgu[:, :width], dgu[:, width:]
    a, b, c = few[:, :RANK], few[:, RANK : 2 * RANK], few[:, 2 * RANK :]

    def apart() -> None:
        m = swiglu_backward(dm, g, u, dg, du)
        torch.mm(a.t(), m)
        torch.mm(dgu.t(), few[:, RANK:])

    found, was = {"apart": milliseconds(apart)}, own.TILE
    for tile in TILES:
        own.TILE = tile
        try:
            found[str(tile)] = milliseconds(lambda: own.swiglu_factors(dm, g, u, dg, du, a, b, c))
        except Exception as error:  # too much shared memory: no figure
            print(f"{tile}: {type(error).__name__}: {str(error)[:160]}")
    own.TILE = was
    return found


def product_times(tokens: int, inputs: int, outputs: int, device: Any, dtype: Any) -> dict[str, float]:
    """y = x W' of a group of two with LoRA: apart, LoRA's part first, folded; and dx = dy W so."""
    import torch

    more, half = 2 * RANK, outputs // 2
    wide, weight = (torch.randn(n, inputs + more, device=device, dtype=dtype) for n in (tokens, outputs + more))
    x, w = wide[:, :inputs].contiguous(), weight[:outputs, :inputs].contiguous()
    xa, b = wide[:, inputs:].contiguous(), weight[:outputs, inputs:].contiguous()
    dy = torch.randn(tokens, outputs + more, device=device, dtype=dtype)
    plain, dyb, a = dy[:, :outputs].contiguous(), dy[:, outputs:].contiguous(), weight[outputs:, :inputs].contiguous()
    return {
        "y without LoRA": milliseconds(lambda: x @ w.t()),
        "y, two products": milliseconds(lambda: (x @ w[:half].t(), x @ w[half:].t())),
        "y, apart": milliseconds(lambda: (x @ w.t()).addmm_(xa, b.t())),
        "y, LoRA first": milliseconds(lambda: (xa @ b.t()).addmm_(x, w.t())),
        "y, folded": milliseconds(lambda: wide @ weight[:outputs].t()),
        "dx without LoRA": milliseconds(lambda: plain @ w),
        "dx, two products": milliseconds(lambda: (plain[:, :half] @ w[:half]).addmm_(plain[:, half:], w[half:])),
        "dx, apart": milliseconds(lambda: (plain @ w).addmm_(dyb, a)),
        "dx, LoRA first": milliseconds(lambda: (dyb @ a).addmm_(plain, w)),
        "dx, folded": milliseconds(lambda: dy @ weight[:, :inputs]),
    }


def dequantise_times(model: Any, dtype: Any) -> dict[str, float]:
    """The first gate's weight, rows one behind the other and apart."""
    import torch

    from cai.training.frozen import Frozen

    base = model.hf.get_base_model().model.layers[0].mlp.gate_proj.get_base_layer()
    weights, (rows, columns) = Frozen(), (base.out_features, base.in_features)
    outs = {
        f"{columns + room} a row": torch.empty(rows, columns + room, device=model.device, dtype=dtype)
        for room in (0, 64)
    }
    return {name: milliseconds(lambda o=out: weights.write(base, o[:, :columns])) for name, out in outs.items()}  # type: ignore[misc]


def kernel_times(model: Any, tokens: int) -> dict[str, dict[str, float]]:
    config = model.hf.config
    dtype, hidden, width = (
        model.hf.get_base_model().model.embed_tokens.weight.dtype,
        config.hidden_size,
        config.intermediate_size,
    )
    found = {
        "SwiGLU's backward pass and factors": factor_times(tokens, width, model.device, dtype),
        "gate and up": product_times(tokens, hidden, 2 * width, model.device, dtype),
        "down (its R doubled)": product_times(tokens, width, hidden, model.device, dtype),
        "dequantised gate": dequantise_times(model, dtype),
    }
    for title, times in found.items():
        print(f"{title}, ms: " + " · ".join(f"{name} {ms:.3f}" for name, ms in times.items()), flush=True)
    return found
