"""Measured steps decide the shape of the micro-batch and gradient checkpointing. Imports torch.

Owns two questions, answered by running them: does the largest micro-batch fit without recomputation, and how many
pairs fit at once? More pairs share one dequantisation of the weights and hide the launches of the host (H200, 32B
shapes, 1,160 tokens a pair: 0.27 s a pair at two, 0.24 at four). The effective batch and the order of the pairs never
change. On a CPU the recipe's shape stands.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cai.engine.model import Model
from cai.training.forward import Layout, set_checkpointing
from cai.training.loss import sequence_logps
from cai.training.scoring import to_device
from cai.training.token_rows import PairRow

if TYPE_CHECKING:
    from cai.training.job import BatchShape

HEADROOM = 0.06  # share of the card left free: allocator fragments and what the first optimiser step adds
ENOUGH_TOKENS = 6000  # a micro-batch of this many keeps the GPU busy; more only takes memory


def choose_shape(
    model: Model,
    layout: Layout,
    rows: Sequence[PairRow],
    order: Sequence[int],
    shape: BatchShape,
    event: Callable[..., None],
) -> BatchShape:
    """`shape` with checkpointing off where that fits, and then with as many pairs a micro-batch as fit."""
    if model.device.type != "cuda":
        return replace(shape, checkpointing=False)
    set_checkpointing(model.hf, layout, False)
    moments = sum(8 * p.numel() for p in model.hf.parameters() if p.requires_grad)  # two in fp32
    room = memory_limit() * (1 - HEADROOM) - moments

    def peak(micro_batch: int) -> int | None:
        largest = largest_chunk(rows, order, micro_batch)
        found = peak_of_step(model, layout, [rows[i] for i in largest])
        event(
            "training_probe", pairs=micro_batch, tokens=sum(rows[i].tokens for i in largest),
            peak_gib=None if found is None else round(found / 2**30, 2), room_gib=round(room / 2**30, 2),
        )  # fmt: skip
        return found

    base = _clear()
    first = peak(shape.micro_batch)
    if first is None or first > room:
        return replace(shape, checkpointing=True)
    size = tokens_of(rows, order, shape.micro_batch)
    for micro_batch in larger(shape.effective, shape.micro_batch):
        tokens = tokens_of(rows, order, micro_batch)
        if tokens > ENOUGH_TOKENS or base + (first - base) * tokens / size > room:
            continue
        _clear()
        measured = peak(micro_batch)
        if measured is not None and measured <= room:
            return replace(shape.cut(micro_batch), checkpointing=False)
    return replace(shape, checkpointing=False)


def larger(effective: int, micro_batch: int) -> list[int]:
    """Micro-batches above the given one that divide the effective batch, largest first."""
    return [n for n in range(effective, micro_batch, -1) if effective % n == 0]


def largest_chunk(rows: Sequence[PairRow], order: Sequence[int], micro_batch: int) -> Sequence[int]:
    """The micro-batch with most tokens of the whole training."""
    chunks = (order[i : i + micro_batch] for i in range(0, len(order), micro_batch))
    return max(chunks, key=lambda chunk: sum(rows[i].tokens for i in chunk))


def tokens_of(rows: Sequence[PairRow], order: Sequence[int], micro_batch: int) -> int:
    return sum(rows[i].tokens for i in largest_chunk(rows, order, micro_batch))


def memory_limit() -> int:
    """Bytes this process may use: the card, or the share that was set for it."""
    _, total = torch.cuda.mem_get_info()
    try:
        return int(total * torch.cuda.get_per_process_memory_fraction())
    except (AttributeError, RuntimeError):
        return total


def peak_of_step(model: Model, layout: Layout, rows: Sequence[PairRow]) -> int | None:
    """Peak bytes of forward and backward over these rows, or None when memory ran out."""
    batch = to_device(layout.collate(rows), model.device)
    torch.cuda.reset_peak_memory_stats()
    model.hf.train()
    try:
        sums_2B, _ = sequence_logps(model.hf, batch, layout.forward)
        (sums_2B[0] - sums_2B[1]).mean().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError:
        peak = None
    model.hf.zero_grad(set_to_none=True)
    return peak


def _clear() -> int:
    """Give cached memory back to the card; what is still allocated, in bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
