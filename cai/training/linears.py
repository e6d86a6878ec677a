"""Frozen linears with LoRA, y = x W' + bias + s (x A') B', forward and backward, as few products as possible.

Linears of one input whose weights are 4-bit are a group: their weights lie one below the other and are one product,
and so are their A. LoRA is folded into the product where that saves a pass over memory: y = [x | x A'] [W | s B]', and
dx = [dy | s dy B] [W ; A], with B in blocks where the group has several. What LoRA costs is then K + R of K in place
of reading and writing y and dx once more. 16-bit weights are read where they are: one linear a group, unfolded.

Legend: T tokens, I inputs, O outputs of a group, R rank of a group (the sum), rounded up to 8 with zeros. Wide tensors
have room behind each row, and rows begin at multiples of 128 bytes. Imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from cai.engine.foreign import HfModule
from cai.engine.generate import mm_gives_fp32
from cai.training.adapter import NAME
from cai.training.frozen import Frozen

FOLD = True  # LoRA inside the product
STACK = True  # linears of one input in one product
FIRST = True  # unfolded: LoRA's part first, and the large product adds to it
UNFOLDED = ("o_proj",)  # its input and dy would have to be copied to be wide: as much as folding saves
ROW = 64  # elements


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(eq=False)
class Group:
    """Linears that are one product. `a` (R, I), and `b` (O, R) times the scale: the adapters in the compute dtype."""

    bases: list[HfModule]
    trained: list[torch.nn.Parameter]  # A and B of each
    rows: list[slice]  # of each in O
    ranks: list[slice]  # of each in R
    scale: float
    a: torch.Tensor
    b: torch.Tensor
    four_bit: bool
    fold: bool
    frozen: Frozen

    @property
    def inputs(self) -> int:
        return self.a.shape[1]

    @property
    def outputs(self) -> int:
        return self.b.shape[0]

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

    def bias(self) -> torch.Tensor | None:
        found = [base.bias for base in self.bases]
        if all(bias is None for bias in found):
            return None
        return found[0] if len(found) == 1 else torch.cat(
            [self.b.new_zeros(rows.stop - rows.start) if bias is None else bias
             for bias, rows in zip(found, self.rows, strict=True)])  # fmt: skip

    def copied(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(copy, parameter) of each factor; `b` is multiplied with the scale behind it."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for at, (rows, ranks) in enumerate(zip(self.rows, self.ranks, strict=True)):
            pairs += [(self.a[ranks], self.trained[2 * at]), (self.b[rows, ranks], self.trained[2 * at + 1])]
        return pairs

    def forward(self, wide: torch.Tensor, adapted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y, x A') of the input in the first columns of `wide`; what LoRA needs is written behind it."""
        x, inputs, outputs = wide[:, : self.inputs], self.inputs, self.outputs
        if not adapted:
            weight = self.frozen.weight(self, False)
            return _linear(x, weight[:outputs, :inputs], self.bias()), None
        if self.fold:
            xa = torch.mm(x, self.a.t(), out=wide[:, inputs : inputs + self.more])
            weight = self.frozen.weight(self, False)
            return _linear(wide[:, : inputs + self.more], weight[:outputs], self.bias()), xa.clone()
        xa = x @ self.a.t()
        if FIRST:
            y = _linear(xa, self.b, self.bias())
            return y.addmm_(x, self.frozen.weight(self, False).t()), xa
        y = _linear(x, self.frozen.weight(self, False), self.bias())
        return y.addmm_(xa, self.b.t()), xa

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
        elif FIRST and dx is None:
            return (dyb @ self.a).addmm_(dy, weight), dyb
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        return dx if self.fold else dx.addmm_(dyb, self.a), dyb

    def d_a(self, dyb: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        """dA of each linear, fp32."""
        whole = _product_fp32(dyb.t(), x)
        return [whole[ranks] for ranks in self.ranks]

    def d_b(self, dy: torch.Tensor, xa: torch.Tensor) -> list[torch.Tensor]:
        """dB of each linear, fp32: the blocks of a product of all, which is as fast as it is read."""
        whole = _product_fp32(dy.t(), xa)
        return [whole[rows, ranks] * self.scale for rows, ranks in zip(self.rows, self.ranks, strict=True)]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product's accumulators, where the card gives them."""
    if a.is_cuda and a.dtype != torch.float32 and mm_gives_fp32(a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def wide_empty(like: torch.Tensor, columns: int, more: int) -> torch.Tensor:
    """(T, columns + more or above): rows for `columns` values and `more` behind them."""
    return like.new_empty((like.shape[0], up(columns + more, ROW) if more else columns))


def input_room(groups: Sequence[Group], like: torch.Tensor) -> torch.Tensor:
    """Wide, for the input of all these groups: one after the other writes its x A' behind it."""
    return wide_empty(like, groups[0].inputs, max(group.more for group in groups))


def project(
    groups: Sequence[Group], wide: torch.Tensor, adapted: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """(outputs of each linear, x A' of each group)."""
    found = [group.forward(wide, adapted) for group in groups]
    parts = [y[:, rows] for group, (y, _) in zip(groups, found, strict=True) for rows in group.rows]
    return parts, [xa for _, xa in found]


def gradient_rooms(groups: Sequence[Group], like: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(a wide tensor for dy of each group, and the places of each linear in them)."""
    wides = [wide_empty(like, group.outputs, group.more) for group in groups]
    return wides, [wide[:, rows] for group, wide in zip(groups, wides, strict=True) for rows in group.rows]


def backproject(
    groups: Sequence[Group],
    wides: Sequence[torch.Tensor],
    x: torch.Tensor,
    xas: Sequence[torch.Tensor],
    wants_dx: bool,
    d_bs: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """(dx, [dA, dB of each linear]); the groups in reverse order, as weights are made ahead.

    `d_bs`: dB of each linear of the only group, where they are known.
    """
    dx: torch.Tensor | None = None
    trained: list[torch.Tensor] = []
    for group, wide, xa in reversed(list(zip(groups, wides, xas, strict=True))):
        dx, dyb = group.backward(wide, dx, wants_dx)
        d_b = group.d_b(wide[:, : group.outputs], xa) if d_bs is None else d_bs
        trained = interleaved(group.d_a(dyb, x), d_b) + trained
    return dx, trained


def interleaved(d_a: Sequence[torch.Tensor], d_b: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [grad for pair in zip(d_a, d_b, strict=True) for grad in pair]


def groups_of(modules: dict[str, HfModule], names: Sequence[str], like: torch.Tensor, frozen: Frozen) -> list[Group]:
    """The named linears in as few groups as may be: one where all are 4-bit and scaled alike, else one each."""
    chosen = [modules[name] for name in names]
    alike = all(_four_bit(m) for m in chosen) and len({m.scaling[NAME] for m in chosen}) == 1
    parts = [chosen] if STACK and alike else [[module] for module in chosen]
    return [_group(part, FOLD and _four_bit(part[0]) and names[0] not in UNFOLDED, like, frozen) for part in parts]


def _group(modules: list[HfModule], fold: bool, like: torch.Tensor, frozen: Frozen) -> Group:
    trained = [factor for m in modules for factor in (m.lora_A[NAME].weight, m.lora_B[NAME].weight)]
    rows = [slice(*ends) for ends in pairwise(accumulate((b.shape[0] for b in trained[1::2]), initial=0))]
    ranks = [slice(*ends) for ends in pairwise(accumulate((a.shape[0] for a in trained[::2]), initial=0))]
    rank = up(ranks[-1].stop, 8)
    a, b = like.new_zeros(rank, trained[0].shape[1]), like.new_zeros(rows[-1].stop, rank)
    bases = [m.get_base_layer() for m in modules]
    return Group(bases, trained, rows, ranks, modules[0].scaling[NAME], a, b, _four_bit(modules[0]), fold, frozen)


def _four_bit(module: HfModule) -> bool:
    return getattr(module.get_base_layer().weight, "quant_state", None) is not None


class Copies:
    """The copies of adapters that groups compute with. `refresh` is launched while the GPU has nothing else to do."""

    def __init__(self, groups: Sequence[Group]) -> None:
        pairs = [pair for group in groups for pair in group.copied()]
        dense = [pair for pair in pairs if pair[0].is_contiguous()]
        blocks = [pair for pair in pairs if not pair[0].is_contiguous()]  # apart: one of them would slow all down
        self._lists = [tuple(map(list, zip(*some, strict=True))) for some in (dense, blocks) if some]
        self._scaled = [group.b for group in groups], [group.scale for group in groups]

    def refresh(self) -> None:
        with torch.no_grad():
            for copies, parameters in self._lists:
                torch._foreach_copy_(copies, parameters)
            torch._foreach_mul_(*self._scaled)
