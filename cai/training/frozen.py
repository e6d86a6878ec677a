"""The frozen weights that training reads: 16-bit ones as they are, 4-bit ones made again at each use.

NF4 on a GPU goes through the engine's own kernel (27,648 x 5,120 on an H200: 0.099 ms, bitsandbytes' 0.184). It is
compared with bitsandbytes' numbers, to the bit, before it is first used; where it differs or cannot run, and for every
other kind of 4-bit weight, bitsandbytes does the work. On a GPU the weight of the next product is written on a second
stream while the present one runs (`ahead`). Imports torch.

A buffer holds the matrix of a group of linears, one weight below the other, and where LoRA is folded in (`linears`) its
B behind the weights' columns for the forward pass, or its A below their rows for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from cai.engine.foreign import HfModule
from cai.engine.native.linears import Nf4, is_nf4, nf4_of
from cai.training.ahead import Streams, Turns

if TYPE_CHECKING:
    from cai.training.linears import Group

AHEAD = True  # the next weight on a second stream


class Frozen:
    """`weight(group, backward)` -> its matrix, valid until the next call; `begin` comes before each pass."""

    def __init__(self) -> None:
        self.own: bool | None = None  # whether the own kernel gives bitsandbytes' numbers; None: not asked yet
        self._nf4: dict[HfModule, Nf4] = {}  # scales with the double quantisation undone: 1/16 byte a weight
        self._order: list[Group] = []
        self._buffers: list[torch.Tensor] = []
        self._turns: Turns | None = None

    def begin(self, groups: Sequence[Group]) -> None:
        """The groups in the order of a forward pass. Adapters may have changed: what buffers hold is forgotten."""
        order = [group for group in groups if group.four_bit]
        if order and order != self._order:
            self._prepare(order)
        if self._turns is not None:
            self._turns.forget()

    def _prepare(self, order: list[Group]) -> None:
        self._order, self._turns, self._buffers = order, None, []
        self._place = {group: at for at, group in enumerate(order)}
        like, size = order[0].a, max(group.numel for group in order)
        for group in order:
            for base in group.bases:
                self._ready(base, like.dtype)
        streams, count = self._streams(like)
        self._buffers = [torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(count)]
        for buffer in self._buffers:
            streams.lend(buffer)
        self._turns = Turns(len(self._buffers), self._fill, streams)

    def _streams(self, like: torch.Tensor) -> tuple[Streams, int]:
        """The streams and how many buffers they need."""
        return (CudaStreams(), 2) if AHEAD and like.is_cuda and self.own else (OneStream(), 1)

    def weight(self, group: Group, backward: bool) -> torch.Tensor:
        if not group.four_bit:
            return group.bases[0].weight
        assert self._turns is not None
        after = self._place[group] + (-1 if backward else 1)
        following = (self._order[after], backward) if 0 <= after < len(self._order) else None
        return group.matrix(self._buffers[self._turns.take((group, backward), following)])

    def _fill(self, at: int, key: tuple[Group, bool]) -> None:
        group, backward = key
        matrix = group.matrix(self._buffers[at])
        for base, rows in zip(group.bases, group.rows, strict=True):
            self.write(base, matrix[rows, : group.inputs])
        if group.fold and backward:
            matrix[group.outputs :, : group.inputs].copy_(group.a)
        elif group.fold:
            matrix[: group.outputs, group.inputs :].copy_(group.b)

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


class OneStream:
    """What is launched first is done first."""

    def lend(self, buffer: torch.Tensor) -> None:
        pass

    def reached(self) -> None:
        pass

    def write(self, after: None, run: Callable[[], None]) -> None:
        run()

    def wait(self, mark: None) -> None:
        pass


class CudaStreams:
    """Marks are events; the products' stream is the current one of the call."""

    def __init__(self) -> None:
        self._side = torch.cuda.Stream()

    def lend(self, buffer: torch.Tensor) -> None:
        buffer.record_stream(self._side)  # freed, it is not given to others while it is still written

    def reached(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def write(self, after: torch.cuda.Event, run: Callable[[], None]) -> torch.cuda.Event:
        self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            run()
            return self.reached()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(mark)


def _by_bitsandbytes(base: HfModule) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state)
