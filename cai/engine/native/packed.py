"""Copies of fp32 weights in oneDNN's layout: a CPU's products of few rows, and of many.

Owns the copy, its bound and the product. Doesn't own which groups have one (`linears`, `decoder`). Invariant: a model
whose copies would pass MOST_COPIED, or a torch without these products, computes by its own modules.
Measured on two busy cores of an EPYC (processor ms, of (3072, 576) thirty times; of the head, (49152, 576)):

| rows | 1 | 4 | 10 | 16 | 32 | 256 |
| --- | --- | --- | --- | --- | --- | --- |
| (W x^T)^T, from 32 rows the module | 16 | 32 | 52 | 55 | 72 | 401 |
| packed | 18 | 24 | 37 | 46 | 65 | 421 |
| head, (W x^T)^T | 8.5 | 11 | 37 | 34 | 52 | |
| head, packed | 7.0 | 10 | 16 | 21 | 31 | |

Axes: T tokens, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cai.engine.foreign import HfModule
from cai.engine.memory import MOST_COPIED

ROWS_HINT = 1024  # oneDNN chooses the layout for so many rows; of 1, 16, 64 and 1,024 no worse at any number of rows
AGREES_WITHIN = 1e-4  # of the product by torch, relative to its largest


@dataclass(slots=True)
class PackedLinear:
    """Linears with one input, concatenated by output."""

    weight: torch.Tensor  # opaque
    bias: torch.Tensor | None

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self.weight, self.bias, "none", [], "")
        return made


def packed(modules: Sequence[HfModule]) -> PackedLinear | None:
    """The copy of plain fp32 linears; None where one is another, or where this torch has no such products."""
    if not all(
        type(m) is torch.nn.Linear and m.weight.dtype == torch.float32 and not m.weight.is_cuda for m in modules
    ):
        return None
    with torch.no_grad():
        weight_OK = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
        bias = None
        if any(m.bias is not None for m in modules):
            bias = torch.cat([m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in modules])
        x_TK = torch.sin(torch.arange(2 * weight_OK.shape[1]).float()).view(2, -1)
        try:
            made = PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight_OK, ROWS_HINT), bias)
            found = made(x_TK)
        except (AttributeError, NotImplementedError, RuntimeError):  # another build of torch, another processor
            return None
        wanted = F.linear(x_TK, weight_OK, bias)
        return made if float((found - wanted).abs().max()) <= AGREES_WITHIN * float(wanted.abs().max()) else None


def fits(modules: Sequence[HfModule]) -> bool:
    """Whether copies of all these together stay within the bound."""
    return sum(m.weight.numel() * m.weight.element_size() for m in modules) <= MOST_COPIED
