"""Packed pairs, and causal attention over them: chosen and rejected text behind the one prompt. Imports torch.

A packed row is prompt, chosen, rejected, the next pair, without padding; the rejected positions begin behind the
prompt, and attention of the rejected text sees the prompt and itself.

On CUDA one variable-length FlashAttention call covers all sequences of a layer; elsewhere, or where that call does not
pass its own check, each sequence is a `scaled_dot_product_attention` of its own. cuDNN's attention is never used: it
plans each new sequence length anew (measured on an H200 with 32B shapes, 2 pairs a step: 0.54 s for lengths seen
before, 0.80 s for new ones).

Legend: T packed tokens, M key rows (prompts twice), N query heads, K key heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cai.training.loss import Batch
from cai.training.token_rows import PairRow

Spans = Sequence[tuple[int, int, int, int]]  # prompt start, chosen start, rejected start, end
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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


def attention_index(spans: Spans) -> Batch:
    """What the variable-length call needs. Queries are the packed row itself: prompt + chosen, then rejected.

    The rejected queries are fewer than their keys (prompt + rejected); the causal mask is aligned at the end.
    `first_T`: each token's first place among the keys; `again_P`, `second_P`: the prompts' tokens that have a second.
    """
    keys, cu_q, cu_k = [], [0], [0]
    first, again, second = [], [], []
    for start, chosen, rejected, end in spans:
        keys.append(torch.arange(start, rejected))
        cu_q.append(rejected)
        first.append(torch.arange(cu_k[-1], cu_k[-1] + rejected - start))
        cu_k.append(cu_k[-1] + rejected - start)
        if end > rejected:
            keys += [torch.arange(start, chosen), torch.arange(rejected, end)]
            cu_q.append(end)
            again.append(keys[-2])
            second.append(torch.arange(cu_k[-1], cu_k[-1] + chosen - start))
            first.append(torch.arange(cu_k[-1] + chosen - start, cu_k[-1] + chosen - start + end - rejected))
            cu_k.append(cu_k[-1] + chosen - start + end - rejected)
    lengths = [(b - a, d - c) for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)]
    return {
        "key_index_M": torch.cat(keys),
        "first_T": torch.cat(first),
        "again_P": torch.cat([*again, torch.arange(0)]),
        "second_P": torch.cat([*second, torch.arange(0)]),
        "cu_q": torch.tensor(cu_q, dtype=torch.int32),
        "cu_k": torch.tensor(cu_k, dtype=torch.int32),
        "max_lengths": [max(q for q, _ in lengths), max(k for _, k in lengths)],
    }


def attend(q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-> [T, N, D]"""
    if q_TND.is_cuda and varlen_works(q_TND.shape[1], k_TKD.shape[1], q_TND.shape[2], q_TND.dtype):
        return varlen(q_TND, k_TKD, v_TKD, batch)
    return loop(q_TND, k_TKD, v_TKD, batch["spans"])


def varlen(q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, batch: Batch) -> torch.Tensor:
    places = (batch[name] for name in ("key_index_M", "first_T", "again_P", "second_P"))
    k_MKD, v_MKD = _Keys.apply(k_TKD, v_TKD, *places)
    longest = batch["max_lengths"]
    arguments = (batch["cu_q"], batch["cu_k"], longest[0], longest[1], 0.0, True, False)
    return torch.ops.aten._flash_attention_forward(q_TND, k_MKD, v_MKD, *arguments)[0]


class _Keys(torch.autograd.Function):
    """Keys and values of all sequences. A row's gradient is read where it went, and few went twice: nothing is added up
    row by row, as `index_select` does."""

    @staticmethod
    def forward(ctx, k_TKD, v_TKD, index_M, first_T, again_P, second_P):
        ctx.save_for_backward(first_T, again_P, second_P)
        return k_TKD.index_select(0, index_M), v_TKD.index_select(0, index_M)

    @staticmethod
    def backward(ctx, *grads):
        first_T, again_P, second_P = ctx.saved_tensors
        found = []
        for grad in grads:
            whole = grad.index_select(0, first_T)
            found.append(whole.index_add_(0, again_P, grad.index_select(0, second_P)))
        return *found, None, None, None, None


def loop(q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, spans: Spans) -> torch.Tensor:
    """The definition. The rejected sequence repeats the prompt's queries, so that both masks are plain causal squares;
    what the repeated rows attend to is dropped."""
    outputs = []
    for start, chosen, rejected, end in spans:
        outputs.append(_causal(*(t[start:rejected] for t in (q_TND, k_TKD, v_TKD))))
        if end > rejected:
            second = [torch.cat([t[start:chosen], t[rejected:end]]) for t in (q_TND, k_TKD, v_TKD)]
            outputs.append(_causal(*second)[chosen - start :])
    return torch.cat(outputs)


def _causal(q_LND: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q_LND, k_LKD, v_LKD))
    with sdpa_kernel(BACKENDS):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@functools.cache
def varlen_works(heads: int, key_heads: int, width: int, dtype: torch.dtype) -> bool:
    """Once a process: value and gradients of the variable-length call against `loop` on a small packed row."""
    if dtype not in (torch.bfloat16, torch.float16) or width > 256:
        return False
    spans = [(0, 20, 61, 150), (150, 157, 190, 190), (190, 200, 330, 331)]
    generator = torch.Generator("cuda").manual_seed(0)
    draws = [
        torch.randn(331, n, width, generator=generator, device="cuda", dtype=dtype)
        for n in (heads, key_heads, key_heads)
    ]
    grad = torch.randn(331, heads, width, generator=generator, device="cuda", dtype=dtype)
    batch = {k: v.cuda() if hasattr(v, "cuda") else v for k, v in attention_index(spans).items()}
    try:
        results = []
        with torch.enable_grad():
            for one_call in (True, False):
                inputs = q, k, v = [t.clone().requires_grad_(True) for t in draws]
                out = varlen(q, k, v, batch) if one_call else loop(q, k, v, spans)
                results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
        return all(bool((a - b).norm() <= 0.02 * b.norm()) for a, b in zip(*results, strict=True))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
