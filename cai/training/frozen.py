"""The frozen weights that training reads: 16-bit ones as they are, 4-bit ones made again at each use.

NF4 on a GPU goes through the engine's own kernel (27,648 x 5,120 on an H200: 0.099 ms, bitsandbytes' 0.184). It is
compared with bitsandbytes' numbers, to the bit, before it is first used; where it differs or cannot run, and for every
other kind of 4-bit weight, bitsandbytes does the work. Imports torch.

The one buffer holds the matrix of a projection: its weight, and where LoRA is folded in (`linears`) its B behind the
weight's columns for the forward pass, or its A below their rows for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cai.engine.foreign import HfModule
from cai.engine.native.linears import Nf4, is_nf4, nf4_of

if TYPE_CHECKING:
    from cai.training.linears import Projection


class Frozen:
    """`weight(part, backward)` -> its matrix; a dequantised one is valid until the next call. `prepare` comes first."""

    def __init__(self) -> None:
        self.own: bool | None = None  # whether the own kernel gives bitsandbytes' numbers; None: not asked yet
        self._nf4: dict[HfModule, Nf4] = {}  # scales with the double quantisation undone: 1/16 byte a weight
        self._buffer: torch.Tensor | None = None

    def prepare(self, parts: Sequence[Projection]) -> None:
        """Scales, and a buffer as large as any of the parts needs: before activations, or memory is in pieces."""
        self._buffer = None
        dequantised = [part for part in parts if is_four_bit(part.base)]
        for part in dequantised:
            self._ready(part.base, part.a.dtype)
        if dequantised:
            self._buffer = dequantised[0].a.new_empty(max(part.numel for part in dequantised))

    def weight(self, part: Projection, backward: bool) -> torch.Tensor:
        if not is_four_bit(part.base):
            return part.base.weight
        assert self._buffer is not None
        matrix = part.matrix(self._buffer)
        self.write(part.base, matrix[: part.outputs, : part.inputs])
        if part.fold and backward:
            matrix[part.outputs :, : part.inputs].copy_(part.a)
        elif part.fold:
            matrix[: part.outputs, part.inputs :].copy_(part.b)
        return matrix

    def write(self, base: HfModule, out_OI: torch.Tensor) -> torch.Tensor:
        """The weight in `out_OI`, whose rows may lie apart."""
        if not self._ready(base, out_OI.dtype):
            return out_OI.copy_(_by_bitsandbytes(base))
        from cai.engine.native.nf4 import dequantise

        return dequantise(self._nf4[base], out_OI)

    def _ready(self, base: HfModule, dtype: torch.dtype) -> bool:
        """Whether the own kernel reads this weight; its scales are then at hand."""
        if self.own is False or not (base.weight.is_cuda and is_nf4(base)):
            return False
        if base not in self._nf4:
            self._nf4[base] = nf4_of(base)
            if self.own is None:
                self.own = self._agrees(base, dtype)
        return bool(self.own)

    def _agrees(self, base: HfModule, dtype: torch.dtype) -> bool:
        from triton.errors import TritonError

        from cai.engine.native.nf4 import dequantise

        expected = _by_bitsandbytes(base).to(dtype)
        rows, columns = expected.shape
        try:
            for room in (0, 64):  # rows one behind the other, and rows that lie apart
                out = torch.empty((rows, columns + room), dtype=dtype, device=expected.device)[:, :columns]
                if not torch.equal(dequantise(self._nf4[base], out), expected):
                    return False
            return True
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError):  # a card or compiler that the kernel does not know
            return False


def is_four_bit(base: HfModule) -> bool:
    return getattr(base.weight, "quant_state", None) is not None


def _by_bitsandbytes(base: HfModule) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state)
