"""What goes to the device in one piece and what comes back: packed prompts, drawn ids in flight, score positions.

Pure bookkeeping over lists and index tensors. Doesn't own rows, blocks or the order of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cai.engine import ScoreRequest
from cai.engine.native.attention import Step
from cai.engine.native.cache import PrefixStore
from cai.engine.native.nesting import Parts, length_of
from cai.engine.native.scheduler import Running


class Prompt(NamedTuple):
    """A row of a prefill: its own tokens, the blocks that take their keys and values, the parts that stand before."""

    ids: list[int]
    blocks: list[int]
    parts: Parts = ()


Packed = list[Prompt]


@dataclass(slots=True)
class Flight:
    """A launched step: drawn ids on their way to the host, the rows they belong to and where each one's id stands."""

    rows: list[Running]
    places: list[int]
    ids: torch.Tensor
    landed: torch.cuda.Event | None = None

    @classmethod
    def of(cls, rows: list[Running], places: list[int], drawn: torch.Tensor) -> Flight:
        """Start the copy to the host; on a CPU there is none to wait for."""
        if not drawn.is_cuda:
            return cls(rows, places, drawn)
        host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        landed = torch.cuda.Event()
        landed.record()
        return cls(rows, places, host, landed)

    def tokens(self) -> list[int]:
        if self.landed is not None:
            self.landed.synchronize()
        return self.ids.tolist()


def packed_step(packed: Packed, store: PrefixStore, block_tokens: int, device: torch.device) -> Step:
    """The step of a prefill: where each token stands and where its keys and values go."""
    lens = tuple(len(prompt.ids) for prompt in packed)
    width = max(len(prompt.blocks) for prompt in packed)
    tables = [prompt.blocks + [0] * (width - len(prompt.blocks)) for prompt in packed]
    table = torch.tensor(tables, dtype=torch.int32)  # [B, width]
    before_B = torch.tensor([length_of(prompt.parts) for prompt in packed])
    rows_T = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    # token t of a row lies in its block t // block_tokens at t % block_tokens; the prefix only moves its position
    places_T = torch.cat([torch.arange(length) for length in lens])
    blocks_T = table[rows_T, places_T // block_tokens].to(torch.int64)
    moved = [x.to(device) for x in (places_T + before_B[rows_T], blocks_T, places_T % block_tokens, table)]
    lens_B = torch.tensor(lens, dtype=torch.int32, device=device)
    parts = tuple(prompt.parts for prompt in packed)
    return Step(moved[0], moved[1], moved[2], moved[3], lens_B, store, prefill=True, lens=lens, parts=parts)


def score_places(scored: Sequence[ScoreRequest], packed: Packed, row_of: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places among the packed tokens whose hidden states predict the continuations, and the tokens to predict.

    A request may end before its row does.
    """
    places: list[int] = []
    targets: list[int] = []
    starts = [0, *itertools.accumulate(len(prompt.ids) for prompt in packed)]
    for request, row in zip(scored, row_of, strict=True):
        own = len(request.context_ids) - length_of(packed[row].parts)
        first = starts[row] + own - 1  # the hidden state before a token predicts it
        places += range(first, first + len(request.continuation_ids))
        targets += request.continuation_ids
    return places, targets
