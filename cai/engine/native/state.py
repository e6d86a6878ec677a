"""The rows' state on the device: one small int32 table that the host rewrites when membership changes.

Owns the columns (own length, draws, temperature bits, seed halves, place and length of the prefix, block table), the
drawn ids, and the copy to the device. A decode step reads and advances them there, so that steps follow one another
without the host.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from cai.engine.native.attention import Step
from cai.engine.native.cache import TRASH, PrefixStore
from cai.engine.native.nesting import Parts
from cai.engine.native.scheduler import Running
from cai.engine.sampling import signed64

LENGTH, DRAWS, TEMPERATURE, SEED_LOW, SEED_HIGH, START, SHARED, COLUMNS = range(8)


class RowState:
    """`rows` slots; a slot whose length is 0 is empty: it computes into the trash block and nobody reads it."""

    def __init__(self, rows: int, blocks_per_row: int, max_len: int, device: torch.device) -> None:
        self.device = device
        self.host = np.zeros((rows, COLUMNS + blocks_per_row), dtype=np.int32)
        self.table = torch.zeros(self.host.shape, dtype=torch.int32, device=device)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.history = torch.zeros((rows, max_len), dtype=torch.int32, device=device)  # all drawn ids, in order

    def write(self, active: Iterable[Running]) -> None:
        """Bring the device's table to the host's view of the active rows."""
        self.host[:] = 0
        for running in active:
            sampling, row = running.row.request.sampling, self.host[running.slot]
            row[:] = TRASH
            row[LENGTH], row[DRAWS] = running.tokens, running.launched
            row[TEMPERATURE : TEMPERATURE + 1].view(np.float32)[0] = sampling.temperature
            row[SEED_LOW:START].view(np.int64)[0] = signed64(running.row.request.seed)
            row[START:COLUMNS] = running.part
            row[COLUMNS : COLUMNS + len(running.blocks)] = running.blocks
        fresh = torch.from_numpy(self.host.copy())  # pinned memory is kept until the transfer is done
        self.table.copy_(fresh.pin_memory() if self.device.type == "cuda" else fresh, non_blocking=True)

    def move(self, pairs: list[tuple[int, int]]) -> None:
        """Drawn ids follow rows that changed slots."""
        source, target = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        self.ids[target] = self.ids[source]
        self.history[target] = self.history[source]

    def recall(self, admitted: Iterable[Running]) -> None:
        """What rows that come back after a preemption had drawn."""
        for running in admitted:
            if drawn := running.row.ids:
                self.history[running.slot, : len(drawn)] = torch.tensor(drawn, dtype=torch.int32, device=self.device)

    def sampling(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Temperatures, seeds and draw numbers of the first rows."""
        part = self.table[:rows]
        low, high = part[:, SEED_LOW].to(torch.int64) & 0xFFFFFFFF, part[:, SEED_HIGH].to(torch.int64)
        return part[:, TEMPERATURE].contiguous().view(torch.float32), (high << 32) | low, part[:, DRAWS]

    def decode_step(
        self, rows: int, block_tokens: int, store: PrefixStore, longest: int, parts: tuple[Parts, ...]
    ) -> Step:
        """The step that feeds each row its last drawn token. A CPU is told the parts, a GPU reads the table."""
        lengths, table = self.table[:rows, LENGTH].to(torch.int64), self.table[:rows, COLUMNS:]
        blocks = table.gather(1, (lengths // block_tokens)[:, None])[:, 0].to(torch.int64)
        offsets, positions = lengths % block_tokens, lengths + self.table[:rows, SHARED]
        lens_B = (lengths + 1).to(torch.int32)
        shared = self.table[:rows, START:COLUMNS]
        where = (positions, blocks, offsets, table, lens_B)
        return Step(*where, store, prefill=False, longest=longest, parts=parts, shared=shared)

    def advance(self, rows: int, drawn: torch.Tensor) -> None:
        """After a step: the drawn ids are fed next; empty slots stay empty."""
        self.ids[:rows] = drawn
        part = self.table[:rows]
        self.history[:rows].scatter_(1, part[:, DRAWS : DRAWS + 1].to(torch.int64), drawn[:, None].to(torch.int32))
        part[:, :TEMPERATURE] += (part[:, :1] > 0).to(torch.int32)
