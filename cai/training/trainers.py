"""TRL's DPOTrainer with our batches, loss, checks and checkpoints; the loop, optimiser and scheduler stay TRL's.

Imported late, after unsloth (which rewrites TRL at import). Owns DPO's batches with their reference, its loss, metrics
and the check of the first loss; what guards each step is training/guarded.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from cai import errors
from cai.errors import CaiError
from cai.training import health
from cai.training.guards import Guarded, HealthWatch, Plan, Watch, arguments
from cai.training.loss import Batch, pair_loss, sequence_logps

__all__ = ["PairTrainer", "Plan"]


class PairTrainer(Guarded, DPOTrainer):
    """DPOTrainer over `Plan.order`. Overrides: data, loss, logging, saving."""

    def __init__(self, hf: Any, tokenizer: Any, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        base = hf.get_base_model()
        own_forward = base.__dict__.get("forward")
        super().__init__(
            model=hf,
            args=DPOConfig(**arguments(plan, device), beta=plan.dpo.beta, precompute_ref_log_probs=False),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}),
            callbacks=[Watch(self), HealthWatch(self)],
        )
        self._settle(base, own_forward)
        if "ref" in hf.peft_config:  # TRL 1.15 copies a PeftModel's adapter; a resume would then load only the copy
            hf.delete_adapter("ref")

    def _collate(self, indexes: Sequence[int]) -> Batch:
        batch = super()._collate(indexes)
        refs = [self.plan.refs[i] for i in indexes]
        batch["ref_2B"] = torch.tensor(refs, dtype=torch.float64).float().T.contiguous()
        return batch

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False) -> torch.Tensor:
        logps_2B, logps_N = sequence_logps(self.model, inputs, self.plan.forward)
        loss = pair_loss(
            logps_2B,
            inputs["ref_2B"],
            logps_N,
            inputs["lengths_S"],
            beta=self.plan.dpo.beta,
            loss_type=self.plan.dpo.loss_type,
            loss_weights=self.plan.dpo.loss_weights,
        )
        self._note(loss.detach(), logps_2B.detach(), inputs["ref_2B"], inputs["lengths_S"])
        return loss

    def _note(self, loss: torch.Tensor, logps_2B: torch.Tensor, ref_2B: torch.Tensor, lengths_S: list[int]) -> None:
        """Collect metrics as device tensors; they are read once a step, in `log`."""
        self._add_loss(loss)
        rewards_2B = self.plan.dpo.beta * (logps_2B - ref_2B)
        margin_B = rewards_2B[0] - rewards_2B[1]
        pairs = len(lengths_S) // 2
        counts_2B = torch.tensor(lengths_S, dtype=torch.float32).view(2, pairs).to(logps_2B.device, non_blocking=True)
        values = {
            "rewards/chosen": rewards_2B[0],
            "rewards/rejected": rewards_2B[1],
            "rewards/margins": margin_B,
            "rewards/accuracies": (margin_B > 0).float() + 0.5 * (margin_B == 0).float(),
            "logps/chosen": logps_2B[0],
            "logps/rejected": logps_2B[1],
            "logps/chosen_token": logps_2B[0] / counts_2B[0],
            "logps/rejected_token": logps_2B[1] / counts_2B[1],
            health.FALL: (ref_2B[0] - logps_2B[0]) / counts_2B[0],
        }
        for name, value_B in values.items():
            self._metrics["train"][name].append(value_B.mean())

    def _check_first_loss(self, loss: float) -> None:
        """Before any step policy and reference are the same model, so DPO's loss is log 2 (and margins are 0)."""
        plan = self.plan
        if plan.dpo.loss_type != ("sigmoid",):
            return
        weight = (plan.dpo.loss_weights or (1.0,))[0]
        expected = weight * math.log(2)
        plan.event("first_loss", loss=loss, expected=expected, tolerance=plan.tolerance)
        if abs(loss - expected) > plan.tolerance:
            raise CaiError(
                f"the first DPO loss is {loss:.4f}, not {expected:.4f} (tolerance {plan.tolerance:.4f}): policy and "
                "reference differ before training. Remove the train folder's reference cache and checkpoints, then "
                "resume.",
                errors.QUALITY,
            )
