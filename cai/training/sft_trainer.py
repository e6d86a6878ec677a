"""TRL's SFTTrainer on prompt -> revision, with the batches, checks and checkpoints of DPO. Imports torch.

Imported late, after unsloth. Owns the loss: minus the mean log-probability of the revisions' tokens, over the whole
effective batch (so the micro-batch does not change it); prompts count nothing, end
tokens what `sft.end_weight` says. TRL 1.15 computes it with a Triton kernel, which no CPU has; `sequence_logps` is what
DPO, its reference and the evaluation go through, too.
"""

from __future__ import annotations

import torch
from trl import SFTConfig, SFTTrainer

from cai.engine.foreign import HfModel, HfTokenizer
from cai.training.callbacks import callbacks_of
from cai.training.guards import Guarded, TrainingPlan, arguments
from cai.training.loss import Batch, sequence_logps
from cai.training.token_rows import token_counts


class RevisionTrainer(Guarded, SFTTrainer):
    """SFTTrainer over `Plan.order`. Overrides: data, loss, logging, saving."""

    section = "sft"

    def __init__(self, hf: HfModel, tokenizer: HfTokenizer, plan: TrainingPlan, device: torch.device) -> None:
        stand_in = {"prompt": ["x"], "completion": ["y"], "input_ids": [[0, 1]], "labels": [[-100, 1]]}
        args = SFTConfig(**arguments(plan, device), completion_only_loss=True, packing=False, padding_free=False)
        # without a collator TRL sets the pad token of tokenizer and model, which others use
        super().__init__(hf, tokenizer, plan, args, stand_in, callbacks_of(plan), data_collator=plan.collate)

    def compute_loss(
        self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> torch.Tensor:
        _, logps_N = sequence_logps(self.hf, inputs, self.plan.forward)
        if "counts_C" in inputs:
            logps_N = logps_N * inputs["counts_C"]
        # transformers divides by the micro-batches of the step
        loss = -logps_N.sum() * (self.plan.accumulation / self._tokens_of_step())
        self._add_loss(loss.detach())
        return self._scaled(loss)

    def _tokens_of_step(self) -> float:
        """Revision tokens of the effective batch that is being trained on, end tokens by their weight."""
        plan, size = self.plan, self.plan.micro_batch * self.plan.accumulation
        start = self.state.global_step * size
        return sum(sum(token_counts(plan.rows[i], plan.dpo.end_weight)) for i in plan.order[start : start + size])
