"""Adapted linears, y = x W' + bias + s (x A') B', forward and backward.

Where W is 4-bit and dequantised at each use, LoRA is folded into the product: y = [x | x A'] [W | s B]' and
dx = [dy | s dy B] [W ; A], K + R columns in place of K, so that y and dx are not read and written once more. 16-bit
weights are read where they are, and LoRA is a product of its own.

Legend: T tokens, I inputs, O outputs, R rank, rounded up to 8 with zeros. Wide tensors have room for R columns behind
each row where LoRA is folded in, and rows begin at multiples of 128 bytes. Imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cai.engine.foreign import HfModule
from cai.engine.generate import mm_gives_fp32
from cai.training.adapter import NAME
from cai.training.frozen import Frozen, is_four_bit

UNFOLDED = ("o_proj",)  # its input and dy would have to be copied to be wide: as much as folding saves
ROW = 64  # elements


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Projection:
    """One adapted linear. `a` (R, I), and `b` (O, R) times the scale: the adapter in the compute dtype."""

    base: HfModule
    trained: list[torch.nn.Parameter]  # A and B
    scale: float
    a: torch.Tensor
    b: torch.Tensor
    fold: bool
    frozen: Frozen

    @property
    def inputs(self) -> int:
        return self.a.shape[1]

    @property
    def outputs(self) -> int:
        return self.b.shape[0]

    @property
    def rank(self) -> int:
        """As it is trained."""
        return self.trained[0].shape[0]

    @property
    def more(self) -> int:
        """Columns behind x and behind dy that LoRA takes."""
        return self.b.shape[1] if self.fold else 0

    @property
    def numel(self) -> int:
        return (self.outputs + self.more) * self._stride

    @property
    def _stride(self) -> int:
        return up(self.inputs + self.more, ROW) if self.fold else self.inputs

    def matrix(self, buffer: torch.Tensor) -> torch.Tensor:
        """[W | s B] and below it A, in a buffer: (O + R, I + R), or W alone where LoRA is not folded."""
        whole = buffer[: self.numel].view(self.outputs + self.more, self._stride)
        return whole[:, : self.inputs + self.more]

    def forward(self, wide: torch.Tensor, adapted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y, x A') of the input in the first columns of `wide`; what LoRA needs is written behind it."""
        x, inputs, outputs, bias = wide[:, : self.inputs], self.inputs, self.outputs, self.base.bias
        if not adapted:
            return _linear(x, self.frozen.weight(self, False)[:outputs, :inputs], bias), None
        if self.fold:
            xa = torch.mm(x, self.a.t(), out=wide[:, inputs : inputs + self.more])
            weight = self.frozen.weight(self, False)
            return _linear(wide[:, : inputs + self.more], weight[:outputs], bias), xa.clone()
        xa = x @ self.a.t()  # LoRA's part first, and the large product adds to it
        return _linear(xa, self.b, bias).addmm_(x, self.frozen.weight(self, False).t()), xa

    def backward(
        self, wide: torch.Tensor, dx: torch.Tensor | None, wants_dx: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(dx added to the given one, s dy B) of the gradient in the first columns of `wide`."""
        # y = x W' + b + x A' (s B)'  =>  dx = dy W + (s dy B) A,  dA = (s dy B)' x,  dB = s dy' (x A');  W is frozen
        outputs = self.outputs
        dy = wide[:, :outputs]
        dyb = torch.mm(dy, self.b, out=wide[:, outputs : outputs + self.more]) if self.fold else dy @ self.b
        if not wants_dx:
            return dx, dyb
        weight = self.frozen.weight(self, True)
        if self.fold:
            dy, weight = wide[:, : outputs + self.more], weight[:, : self.inputs]
            return dy @ weight if dx is None else dx.addmm_(dy, weight), dyb
        if dx is None:
            return (dyb @ self.a).addmm_(dy, weight), dyb
        return dx.addmm_(dy, weight).addmm_(dyb, self.a), dyb

    def d_a(self, dyb: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _product_fp32(dyb.t(), x)[: self.rank]

    def d_b(self, dy: torch.Tensor, xa: torch.Tensor) -> torch.Tensor:
        return _product_fp32(dy.t(), xa)[:, : self.rank] * self.scale


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product's accumulators, where the card gives them."""
    if a.is_cuda and a.dtype != torch.float32 and mm_gives_fp32(a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def wide_empty(like: torch.Tensor, columns: int, parts: Sequence[Projection]) -> torch.Tensor:
    """(T, columns or more): rows of `columns` values, and behind them room for what any of the parts needs."""
    more = max(part.more for part in parts)
    return like.new_empty((like.shape[0], up(columns + more, ROW) if more else columns))


def gradient_rooms(parts: Sequence[Projection], like: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(a wide tensor for dy of each part, and its place in it)."""
    wides = [wide_empty(like, part.outputs, parts) for part in parts]
    return wides, [wide[:, : part.outputs] for part, wide in zip(parts, wides, strict=True)]


def backproject(
    parts: Sequence[Projection], wides: Sequence[torch.Tensor], x: torch.Tensor, xas: Sequence[torch.Tensor],
    wants_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
    """(dx, [dA, dB of each part]) of the parts of one input, the last first."""
    dx: torch.Tensor | None = None
    trained: list[torch.Tensor] = []
    for part, wide, xa in reversed(list(zip(parts, wides, xas, strict=True))):
        dx, dyb = part.backward(wide, dx, wants_dx)
        d_b = part.d_b(wide[:, : part.outputs], xa)
        trained = [part.d_a(dyb, x), d_b, *trained]
    return dx, trained


def projection(module: HfModule, name: str, like: torch.Tensor, frozen: Frozen) -> Projection:
    trained = [module.lora_A[NAME].weight, module.lora_B[NAME].weight]
    (rank, inputs), outputs, base = trained[0].shape, trained[1].shape[0], module.get_base_layer()
    a, b = like.new_zeros(up(rank, 8), inputs), like.new_zeros(outputs, up(rank, 8))
    fold = is_four_bit(base) and name not in UNFOLDED
    return Projection(base, trained, module.scaling[NAME], a, b, fold, frozen)


class Copies:
    """The copies of adapters that projections compute with. `refresh` is two launches, not two a factor."""

    def __init__(self, parts: Sequence[Projection]) -> None:
        self._copies = [place for part in parts for place in (part.a[: part.rank], part.b[:, : part.rank])]
        self._trained: list[torch.Tensor] = [parameter for part in parts for parameter in part.trained]
        self._scaled = [part.b for part in parts], [part.scale for part in parts]

    def refresh(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._trained)
            torch._foreach_mul_(*self._scaled)
