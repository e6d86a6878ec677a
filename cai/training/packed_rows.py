"""How pairs stand in one packed row: prompt, chosen, rejected, the next pair, without padding.

The rejected positions begin behind the prompt, and attention of the rejected text sees the prompt and itself.
Imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cai.training.attention import attention_index
from cai.training.loss import Batch
from cai.training.token_rows import PairRow


def packed_batch(rows: Sequence[PairRow]) -> Batch:
    """One row of tokens. `spans`: (prompt start, chosen start, rejected start, end) of each pair, host integers.

    The last token of a completion predicts nothing and is left out. `hidden_index_N`, `target_N`, `lengths_S` as in
    `padded_batch`: all chosen completions, then all rejected.
    """
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    index: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for row in rows:
        start, prompt = len(ids), len(row.prompt_ids)
        chosen, rejected = row.chosen_ids[:-1], row.rejected_ids[:-1]
        ids += [*row.prompt_ids, *chosen, *rejected]
        positions += [*range(prompt + len(chosen)), *range(prompt, prompt + len(rejected))]
        cut = start + prompt + len(chosen)
        spans.append((start, start + prompt, cut, cut + len(rejected)))
        index[0].append(torch.arange(start + prompt - 1, cut))
        if row.rejected_ids:
            index[1].append(torch.cat([torch.tensor([start + prompt - 1]), torch.arange(cut, cut + len(rejected))]))
    completions = [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows]
    return {
        "ids_T": torch.tensor(ids),
        "positions_T": torch.tensor(positions),
        "spans": spans,
        **attention_index(spans),
        "hidden_index_N": torch.cat(index[0] + index[1]),
        "target_N": torch.tensor([id for completion in completions for id in completion]),
        "lengths_S": [len(completion) for completion in completions],
    }
