"""From pairs to log-probabilities and the DPO loss. Imports torch.

Legend of axes: B pairs of a micro-batch, S = 2B sequences (all chosen, then all rejected), T tokens of a padded row,
N completion tokens of the whole micro-batch, H hidden width, V vocabulary.

Owns the batch layout, the backbone call, the language-model head over completion tokens only and the loss formulas.
Reference, policy and evaluation all go through `sequence_logps`, so the same kernels compute them. Doesn't own the
optimiser, nor which adapter is active. Invariant: full-vocabulary logits exist for one chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F

from cai.engine.foreign import HfModel
from cai.engine.generate import logits_fp32
from cai.errors import CaiError
from cai.recipe.settings import LossName
from cai.training.kernels import softmax_rows
from cai.training.token_rows import PairRow

CHUNK_BYTES = 512 * 2**20  # fp32 logits of one chunk
TILE = 128  # tokens that a product of the head computes at once
Batch = dict[str, Any]  # tensors by name and axes, and the lengths of its sequences
Forward = Callable[[HfModel, Batch], torch.Tensor]


def padded_batch(rows: Sequence[PairRow], pad_id: int) -> Batch:
    """Right-padded sequences, and where each completion token is predicted. A row may lack its rejected text.

    `hidden_index_N` points into the flattened S*T hidden states, `target_N` is the token predicted there and
    `lengths_S` (a list) says how many of the N belong to each sequence.
    """
    sequences = [(r.prompt_ids, r.chosen_ids) for r in rows]
    sequences += [(r.prompt_ids, r.rejected_ids) for r in rows if r.rejected_ids]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids_ST = torch.full((len(sequences), width), pad_id)
    mask_ST = torch.zeros((len(sequences), width), dtype=torch.long)
    index, target = [], []
    for s, (prompt, completion) in enumerate(sequences):
        ids = torch.tensor([*prompt, *completion])
        input_ids_ST[s, : len(ids)] = ids
        mask_ST[s, : len(ids)] = 1
        first = s * width + len(prompt) - 1
        index.append(torch.arange(first, first + len(completion)))
        target.append(torch.tensor(completion))
    return {
        "input_ids_ST": input_ids_ST,
        "attention_mask_ST": mask_ST,
        "hidden_index_N": torch.cat(index),
        "target_N": torch.cat(target),
        "lengths_S": [len(r.chosen_ids) for r in rows] + [len(r.rejected_ids) for r in rows],
    }


def padded_forward(hf: HfModel, batch: Batch) -> torch.Tensor:
    """Last hidden states at the completion positions, through the model's own layers -> hidden_NH."""
    backbone = base_of(hf).model
    with torch.autocast("cuda", torch.bfloat16, enabled=batch["input_ids_ST"].is_cuda):
        out = backbone(input_ids=batch["input_ids_ST"], attention_mask=batch["attention_mask_ST"], use_cache=False)
    hidden_STH = out.last_hidden_state
    return hidden_STH.flatten(0, 1).index_select(0, batch["hidden_index_N"])


def base_of(hf: HfModel) -> HfModel:
    """The causal language model below PEFT's wrapper (or the model itself)."""
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf


class TokenLogps(torch.autograd.Function):
    """log p(target) of each hidden state under a frozen head, chunk by chunk.

    d log p(t) / d h = W_t - sum_v p_v W_v holds row by row, so it is computed beside the value while the chunk's logits
    are there and scaled by the incoming gradient later: no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, target_N, chunk: int):
        wants_grad = ctx.needs_input_grad[0]
        logps_N = torch.empty(hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if wants_grad else None
        for start in range(0, hidden_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            target = target_N[part]
            logits = logits_fp32(hidden_NH[part], weight_VH, bias_V)  # [chunk, V], the only one alive
            logps_N[part], probs = softmax_rows(logits, target, weight_VH.dtype if wants_grad else None)
            if slope_NH is not None and probs is not None:
                # W_t - sum_v p_v W_v, [chunk, H], the difference in the product's accumulators
                torch.addmm(weight_VH[target], probs, weight_VH, alpha=-1, out=slope_NH[part])
        if slope_NH is not None:
            ctx.save_for_backward(slope_NH)
        return logps_N

    @staticmethod
    def backward(ctx, grad_N):
        # dL/dh_n = dL/dlogp_n * slope_n; the head is frozen, so it gets no gradient
        (slope_NH,) = ctx.saved_tensors
        return (slope_NH * grad_N[:, None].to(slope_NH.dtype)), None, None, None, None


def head_of(hf: HfModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the output head; heads that scale or cap their logits are refused, not computed wrongly."""
    base = base_of(hf)
    config = base.config.get_text_config()
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise CaiError(f"model.name: this model's output head sets {key}, which training here does not support")
    head = base.get_output_embeddings()
    if not hasattr(head, "weight") or hasattr(head, "base_layer") or not head.weight.is_floating_point():
        raise CaiError("lora.target_modules: an adapted or quantised output head can't be trained here")
    return head.weight, getattr(head, "bias", None)


def sequence_logps(
    hf: HfModel, batch: Batch, forward: Forward = padded_forward, ld_alpha: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of completion log-probabilities, natural log, fp32 -> (logps_2B as [2, B], logps_N of every token).

    `ld_alpha`: what tokens beyond the length that both completions have count in a sum (LD-DPO, Liu et al. 2024).
    """
    weight_VH, bias_V = head_of(hf)
    hidden_NH = forward(hf, batch).to(weight_VH.dtype)
    chunk = max(16, CHUNK_BYTES // (4 * weight_VH.shape[0]))
    chunk -= chunk % TILE if chunk > TILE else 0
    logps_N = TokenLogps.apply(hidden_NH, weight_VH, bias_V, batch["target_N"], chunk)
    parts = logps_N.split(batch["lengths_S"])
    if ld_alpha == 1.0:
        sums_S = torch.stack([part.sum() for part in parts])
    else:
        cuts = shared_lengths(batch["lengths_S"])
        sums_S = torch.stack([p[:n].sum() + ld_alpha * p[n:].sum() for p, n in zip(parts, cuts, strict=True)])
    return sums_S.view(2, -1), logps_N


def shared_lengths(lengths_S: Sequence[int]) -> list[int]:
    """For each sequence the tokens that both completions of its pair have."""
    pairs = len(lengths_S) // 2
    return [min(a, b) for a, b in zip(lengths_S[:pairs], lengths_S[pairs:], strict=True)] * 2


def pair_loss(
    logps_2B: torch.Tensor,
    ref_2B: torch.Tensor,
    logps_N: torch.Tensor,
    lengths_S: Sequence[int],
    *,
    beta: float,
    loss_type: Sequence[str],
    loss_weights: Sequence[float],
    label_smoothing: float = 0.0,
    weights_B: torch.Tensor | None = None,
    labels_B: torch.Tensor | None = None,
    counts_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean loss of the micro-batch, TRL 1.15's formulas (trl/trainer/dpo_trainer.py, `_compute_loss`).

    `weights_B`: what each pair counts. `labels_B`: the probability that the chosen text is the better one; the loss is
    then expected over both orders (Mitchell 2023, cDPO; Bai et al. 2022, section 4.1). `sft` is the mean NLL of the
    chosen tokens and has no other order; `counts_C`: what each of them counts.
    """
    scores_2B = logps_2B - ref_2B
    total = logps_2B.new_zeros(())
    for name, weight in zip(loss_type, loss_weights or [1.0] * len(loss_type), strict=True):
        if name == "sft":
            value = chosen_nll(logps_N, lengths_S, weights_B, counts_C)
        else:
            value_B = order_loss(name, scores_2B, lengths_S, beta, label_smoothing)
            if labels_B is not None:
                pairs = len(lengths_S) // 2
                swapped = [*lengths_S[pairs:], *lengths_S[:pairs]]
                other_B = order_loss(name, scores_2B.flip(0), swapped, beta, label_smoothing)
                value_B = labels_B * value_B + (1 - labels_B) * other_B
            value = (value_B if weights_B is None else weights_B * value_B).mean()
        total = total + weight * value
    return total


def order_loss(
    name: str, scores_2B: torch.Tensor, lengths_S: Sequence[int], beta: float, smoothing: float
) -> torch.Tensor:
    """Loss of each pair, the first row of `scores_2B` (policy - reference, summed) taken as the better one -> [B].

    With x = beta * (chosen - rejected) and means over the tokens of each text where it says so:
    sigmoid: -log sigmoid(x), Rafailov et al. 2023, eq. 7 · sigmoid_norm: the same of the means, Lambert et al. 2024
    (Tulu 3) · robust: sigmoid with a known share of wrong labels taken out, Chowdhury et al. 2024 ·
    hinge: max(0, 1 - x) · ipo: (difference of means - 1 / (2 beta))^2, Azar et al. 2023 ·
    apo_zero, apo_down: D'Oosterlinck et al. 2024, eq. 7 and 8.
    """
    chosen_B, rejected_B = scores_2B
    delta_B = chosen_B - rejected_B
    if name == "sigmoid":
        return -F.logsigmoid(beta * delta_B)
    if name == "hinge":
        return torch.relu(1 - beta * delta_B)
    if name in ("ipo", "sigmoid_norm"):
        means_2B = scores_2B / torch.tensor(lengths_S, device=scores_2B.device).view(2, -1)
        if name == "ipo":
            return (means_2B[0] - means_2B[1] - 1 / (2 * beta)) ** 2
        return -F.logsigmoid(beta * (means_2B[0] - means_2B[1]))
    if name == "robust":
        right_B = -(1 - smoothing) * F.logsigmoid(beta * delta_B)
        return (right_B + smoothing * F.logsigmoid(-beta * delta_B)) / (1 - 2 * smoothing)
    if name == "apo_zero":
        return 1 - torch.sigmoid(beta * chosen_B) + torch.sigmoid(beta * rejected_B)
    if name == "apo_down":
        return torch.sigmoid(beta * chosen_B) + 1 - torch.sigmoid(beta * delta_B)
    raise CaiError(f"dpo.loss_type: {name}: unknown. Known: {', '.join(get_args(LossName))}.")


def chosen_nll(
    logps_N: torch.Tensor,
    lengths_S: Sequence[int],
    weights_B: torch.Tensor | None,
    counts_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Minus the mean log-probability of the chosen texts' C tokens, each counted as `counts_C` says (None: once)."""
    lengths_B = list(lengths_S[: len(lengths_S) // 2])
    chosen = logps_N[: sum(lengths_B)]
    if weights_B is None and counts_C is None:
        return -chosen.mean()
    counted = chosen if counts_C is None else chosen * counts_C
    total = sum(lengths_B) if counts_C is None else counts_C.sum()
    sums_B = torch.stack([part.sum() for part in counted.split(lengths_B)])
    return -(sums_B if weights_B is None else weights_B * sums_B).sum() / total
