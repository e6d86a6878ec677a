"""The frozen weights that training reads: 16-bit ones as they are, 4-bit ones made again at each use.

NF4 on a GPU goes through the engine's own kernel into one buffer (27,648 x 5,120 on an H200: 0.099 ms, bitsandbytes'
0.184). It is compared with bitsandbytes' numbers, to the bit, before it is first used; where it differs or cannot run,
and for every other kind of 4-bit weight, bitsandbytes does the work. Imports torch.
"""

from __future__ import annotations

import torch

from cai.engine.foreign import HfModule
from cai.engine.native.linears import Nf4, is_nf4, nf4_of


class Frozen:
    """`weight(base, dtype)` -> weight_OI; a dequantised one is valid until the next call."""

    def __init__(self) -> None:
        self.own: bool | None = None  # whether the own kernel gives bitsandbytes' numbers; None: not asked yet
        self._nf4: dict[HfModule, Nf4] = {}  # scales with the double quantisation undone: 1/16 byte a weight
        self._buffer: torch.Tensor | None = None

    def weight(self, base: HfModule, dtype: torch.dtype) -> torch.Tensor:
        if getattr(base.weight, "quant_state", None) is None:
            return base.weight
        if self.own is False or not (base.weight.is_cuda and is_nf4(base)):
            return _by_bitsandbytes(base)
        if self.own is None:
            self.own = self._agrees(base, dtype)
            return self.weight(base, dtype)
        return self._dequantised(base, dtype)

    def _dequantised(self, base: HfModule, dtype: torch.dtype) -> torch.Tensor:
        from cai.engine.native.nf4 import dequantise

        if base not in self._nf4:
            self._nf4[base] = nf4_of(base)
        rows, columns = self._nf4[base].shape
        if self._buffer is None or self._buffer.numel() < rows * columns or self._buffer.dtype != dtype:
            self._buffer = torch.empty(rows * columns, dtype=dtype, device=base.weight.device)
        return dequantise(self._nf4[base], self._buffer[: rows * columns].view(rows, columns))

    def _agrees(self, base: HfModule, dtype: torch.dtype) -> bool:
        from triton.errors import TritonError

        try:
            return torch.equal(self._dequantised(base, dtype), _by_bitsandbytes(base).to(dtype))
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError):  # a card or compiler that the kernel does not know
            return False


def _by_bitsandbytes(base: HfModule) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state)
