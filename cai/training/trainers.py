"""TRL's DPOTrainer with our batches, loss, checks and checkpoints; the loop, optimiser and scheduler stay TRL's.

Imported late, after unsloth (which rewrites TRL at import). Owns DPO's batches with their reference, its loss, metrics
and the check of the first loss; what guards each step is training/guarded.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from trl import DPOConfig, DPOTrainer

from cai import errors
from cai.engine.foreign import HfModel, HfTokenizer
from cai.errors import CaiError
from cai.training import health, heldout, ranks
from cai.training.callbacks import HealthWatch, MakeUp, callbacks_of
from cai.training.guards import Guarded, TrainingPlan, arguments
from cai.training.loss import Batch, pair_loss, sequence_logps, shared_lengths
from cai.training.scoring import to_device
from cai.world import world


def _with_reference(batch: Batch, refs: Sequence[tuple[float, float]]) -> Batch:
    return batch | {"ref_2B": torch.tensor(refs, dtype=torch.float64).float().T.contiguous()}


class PairTrainer(Guarded, DPOTrainer):
    """DPOTrainer over `Plan.order`. Overrides: data, loss, logging, saving."""

    def __init__(self, hf: HfModel, tokenizer: HfTokenizer, plan: TrainingPlan, device: torch.device) -> None:
        args = DPOConfig(**arguments(plan, device), beta=plan.dpo.beta, precompute_ref_log_probs=False)
        stand_in = {"prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}
        super().__init__(hf, tokenizer, plan, args, stand_in, [*callbacks_of(plan), HealthWatch, MakeUp])
        if "ref" in hf.peft_config:  # TRL 1.15 copies a PeftModel's adapter; a resume would then load only the copy
            hf.delete_adapter("ref")

    def _collate(self, indexes: Sequence[int]) -> Batch:
        plan = self.plan
        batch = _with_reference(super()._collate(indexes), [plan.refs[i] for i in indexes])
        for name, values in (("weights_B", plan.weights), ("labels_B", plan.labels)):
            if values is not None:
                batch[name] = torch.tensor([values[i] for i in indexes], dtype=torch.float32)
        return batch

    def _compute_loss(self, model: torch.nn.Module, inputs: Batch, return_outputs: bool = False) -> torch.Tensor:
        loss, logps_2B = self._loss_of(inputs)
        self._note(loss.detach(), logps_2B.detach(), inputs["ref_2B"], inputs["lengths_S"])
        return self._scaled(loss)

    def _loss_of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch that has its reference, and logps_2B."""
        dpo = self.plan.dpo
        logps_2B, logps_N = sequence_logps(self.hf, batch, self.plan.forward, dpo.ld_alpha)
        more = {name: batch.get(name) for name in ("weights_B", "labels_B", "counts_C")}
        loss = pair_loss(
            logps_2B, batch["ref_2B"], logps_N, batch["lengths_S"], beta=dpo.beta, loss_type=dpo.loss_type,
            loss_weights=dpo.loss_weights, label_smoothing=dpo.label_smoothing, **more,
        )  # fmt: skip
        return loss, logps_2B

    def _note(self, loss: torch.Tensor, logps_2B: torch.Tensor, ref_2B: torch.Tensor, lengths_S: list[int]) -> None:
        """Collect metrics as device tensors; they are read once a step, in `log`."""
        self._add_loss(loss)
        rewards_2B = self.plan.dpo.beta * (logps_2B - ref_2B)
        margin_B = rewards_2B[0] - rewards_2B[1]
        pairs, alpha = len(lengths_S) // 2, self.plan.dpo.ld_alpha
        counts_S = [n + alpha * (m - n) for n, m in zip(shared_lengths(lengths_S), lengths_S, strict=True)]
        counts_2B = torch.tensor(counts_S, dtype=torch.float32).view(2, pairs).to(logps_2B.device, non_blocking=True)
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """After a step's entry the held-out one, where due: both stand in the checkpoint that is saved next."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.watch_heldout()

    def watch_heldout(self) -> None:
        """Measure the held-out pairs where this step is due and its log has none; a stop on the way ends here."""
        held, history, step = self.plan.heldout, self.state.log_history, self.state.global_step
        if held is None or not held.due(step, self.plan.steps) or heldout.measured(history, step):
            return
        entry = self._heldout_entry(held)
        if entry is None:
            return self.stop_here()  # its checkpoint lacks the entry, and the resume begins with it
        bad = [name for name, value in entry.items() if not math.isfinite(value)]
        if bad:
            raise CaiError(f"training step {step}: {', '.join(bad)} of the held-out pairs not finite", errors.QUALITY)
        history.append(entry)
        self.plan.event("heldout", **{name.removeprefix(heldout.PREFIX): value for name, value in entry.items()})
        if held.keep_best and world().first and heldout.best_step(history) == step:
            heldout.export_best(self.hf, self.plan.folder, step, held.base_name)

    def _heldout_entry(self, held: heldout.Heldout) -> dict[str, float] | None:
        """Loss, margin and accuracy of the held-out pairs; None where a stop cuts it short (a resume makes it up)."""
        plan, size = self.plan, self.plan.micro_batch
        self.hf.train()  # as the reference was computed
        sums: dict[int, list[float]] = {}
        stopped = False
        for start in range(size * world().rank, len(held.rows), size * world().size):
            if stopped := self.state.global_step < plan.steps and plan.stopped():
                break
            rows, refs = held.rows[start : start + size], held.refs[start : start + size]
            batch = to_device(_with_reference(self._batch(rows), refs), self.accelerator.device)
            with torch.set_grad_enabled(held.with_grad):
                loss, logps_2B = self._loss_of(batch)
            scores_2B = (logps_2B - batch["ref_2B"]).detach()
            margins_B = plan.dpo.beta * (scores_2B[0] - scores_2B[1])
            wins_B = (margins_B > 0).float() + 0.5 * (margins_B == 0).float()
            sums[start] = torch.stack([loss.detach() * len(rows), margins_B.sum(), wins_B.sum()]).tolist()
        step = self.state.global_step
        found = ranks.lists_of_all(sums, stopped, f"training step {step}, held-out pairs")
        return None if found is None else heldout.entry(step, [found[start] for start in sorted(found)], len(held.rows))

    def _check_first_loss(self, loss: float) -> None:
        """Before any step policy and reference are the same model: DPO's loss is log 2, and margins are 0."""
        plan, expected = self.plan, self.plan.first_loss
        if expected is None:
            return
        plan.event("first_loss", loss=loss, expected=expected, tolerance=plan.tolerance)
        if abs(loss - expected) > plan.tolerance:
            raise CaiError(
                f"the first DPO loss is {loss:.4f}, not {expected:.4f} (tolerance {plan.tolerance:.4f}): policy and "
                "reference differ before training. Remove the train folder's reference cache and checkpoints, then "
                "resume.",
                errors.QUALITY,
            )
