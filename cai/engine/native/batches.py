"""What goes to the device in one piece and what comes back: packed prompts, drawn ids in flight, score positions.

Pure bookkeeping over lists and index tensors. Doesn't own rows, blocks or the order of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cai.engine import ScoreRequest
from cai.engine.native.attention import Step
from cai.engine.native.cache import Prefix
from cai.engine.native.scheduler import Running

Packed = list[tuple[list[int], list[int]]]  # (tokens, blocks) of each row of a prefill


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


def packed_step(packed: Packed, prefix: Prefix, block_tokens: int, device: torch.device) -> Step:
    """The step of a prefill: where each token stands and where its keys and values go."""
    lens = tuple(len(ids) for ids, _ in packed)
    width = max(len(blocks) for _, blocks in packed)
    table = torch.tensor(
        [blocks + [0] * (width - len(blocks)) for _, blocks in packed], dtype=torch.int32
    )  # [B, width]
    rows_T = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    # token t of a row lies in its block t // block_tokens at t % block_tokens; the prefix only moves its position
    places_T = torch.cat([torch.arange(length) for length in lens])
    blocks_T = table[rows_T, places_T // block_tokens].to(torch.int64)
    moved = [x.to(device) for x in (places_T + len(prefix.token_ids), blocks_T, places_T % block_tokens, table)]
    lens_B = torch.tensor(lens, dtype=torch.int32, device=device)
    return Step(moved[0], moved[1], moved[2], moved[3], lens_B, prefix, prefill=True, lens=lens)


def score_places(
    scored: Sequence[ScoreRequest], packed: Packed, row_of: Sequence[int], shared: int
) -> tuple[list[int], list[int]]:
    """Places among the packed tokens whose hidden states predict the continuations, and the tokens to predict.

    `shared`: tokens of the prefix, which are not in the rows. A request may end before its row does.
    """
    places: list[int] = []
    targets: list[int] = []
    starts = [0, *itertools.accumulate(len(ids) for ids, _ in packed)]
    for request, row in zip(scored, row_of, strict=True):
        first = starts[row] + len(request.context_ids) - 1 - shared  # the hidden state before a token predicts it
        places += range(first, first + len(request.continuation_ids))
        targets += request.continuation_ids
    return places, targets
