"""Pairs scored with the adapter on and off, through training's own forward pass.

The one place for implicit rewards: training's held-out figure and the evaluation both come here. Torch is imported
inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai.engine import never
from cai.engine.model import Model
from cai.errors import Stopped
from cai.store.row_types import TrainingPair
from cai.training.token_rows import PairRow, tokenize_pairs

if TYPE_CHECKING:
    import torch

    from cai.recipe.prompts import Prompt
    from cai.training.loss import Batch


@dataclass(frozen=True)
class PairLogps:
    """One pair under the adapter (chosen, rejected) and without it (ref_...): sums in nats, and completion tokens."""

    item: int
    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def margin(self) -> float:
        """Implicit reward margin over beta: above 0 the adapter moved towards the chosen text."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def pair_rows(model: Model, pairs: Sequence[TrainingPair], prompt: Prompt, max_length: int) -> list[PairRow]:
    """Pairs as `pair_logps` wants them: token ids under the policy prompt."""
    found = tokenize_pairs(pairs, prompt, format=model.format, tokenizer=model.tokenizer, max_length=max_length)
    return found.rows


def pair_logps(
    model: Model,
    rows: Sequence[PairRow],
    *,
    reference: bool = True,
    stopped: Callable[[], bool] = never,
) -> list[PairLogps]:
    """Log-probability sums of every pair with the adapter on and off, by training's own forward pass.

    Without an adapter both are the base model's; without `reference` those of the base are NaN, at half the time.
    Restores the module's mode. Errors: Stopped.
    """
    import torch

    from cai.training.forward import layout_for
    from cai.training.loss import sequence_logps

    hf, layout = model.hf, layout_for(model)
    was_training = hf.training
    hf.eval()
    results = []
    try:
        for place, row in enumerate(rows):
            if stopped():
                raise Stopped(f"scoring stopped after {place} of {len(rows)} pairs; resume to go on.")
            batch = to_device(layout.collate([row]), model.device)
            sums = []
            for on in (True, False) if reference else (True,):
                with model.adapter(on), torch.no_grad():
                    sums += sequence_logps(hf, batch, layout.forward)[0].T.tolist()[0]
            sums += [] if reference else [math.nan, math.nan]
            tokens = {"chosen_tokens": len(row.chosen_ids), "rejected_tokens": len(row.rejected_ids)}
            results.append(PairLogps(row.item, *sums, **tokens))
    finally:
        hf.train(was_training)
    return results


def preference(scores: Sequence[PairLogps], beta: float) -> dict[str, float]:
    """Mean sigmoid loss, margin (times beta) and accuracy (ties 0.5) over pairs: EVALUATION.md's DPO health."""
    if not scores:
        return {}
    margins = [beta * score.margin for score in scores]
    losses = [math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins]
    wins = sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins)
    drop = [(s.chosen - s.ref_chosen) / s.chosen_tokens for s in scores]
    n = len(scores)
    return {
        "n": n,
        "loss": sum(losses) / n,
        "margin": sum(margins) / n,
        "accuracy": wins / n,
        "chosen_logp_change_a_token": sum(drop) / n,
    }


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    return {k: v.to(device, non_blocking=True) if hasattr(v, "to") else v for k, v in batch.items()}
