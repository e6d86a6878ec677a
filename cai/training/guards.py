"""What both trainers guard on top of TRL's: order, finite steps, graceful stops, sealed checkpoints. Imports torch.

Owns `TrainingPlan` (what one attempt needs beside the model), the trainers' base class and the arguments they share;
the loop, optimiser and scheduler stay TRL's, the losses are the subclasses'. Imported late, after unsloth (it rewrites
TRL at import). Invariants: a step with a non-finite loss or gradient is never applied; a stop is seen between
micro-batches and leaves a sealed checkpoint of the last whole step; a checkpoint is sealed before older ones go.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from cai import errors
from cai.engine.foreign import HfModel, HfTokenizer
from cai.errors import CaiError, Stopped
from cai.recipe.settings import DpoSection, HealthSection
from cai.store.jsonl import Row
from cai.training import checkpoints, heldout, ranks
from cai.training.loss import Batch, Forward
from cai.training.token_rows import PairRow, token_counts
from cai.world import world


@dataclass
class TrainingPlan:
    """Everything one attempt at training needs beside the model. `order`: row indexes, steps x effective batch.

    `refs`: the reference's log-probs of each row; empty where the loss has no reference. `weights`, `labels`: what each
    row counts, and how sure its order is; None where the recipe asks for neither.
    """

    rows: Sequence[PairRow]
    refs: Sequence[tuple[float, float]]
    order: Sequence[int]
    steps: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    dpo: DpoSection
    seed: int
    folder: Path
    seal_facts: Row
    forward: Forward
    collate: Callable[[Sequence[PairRow]], Batch]
    event: Callable[..., None]
    stopped: Callable[[], bool]
    progress: Callable[[int, int], None]
    health: HealthSection = field(default_factory=HealthSection)
    tolerance: float = 0.01
    log: list[dict[str, float]] = field(default_factory=list)
    first_loss: float | None = None  # what it must be, where that is known
    weights: Sequence[float] | None = None
    labels: Sequence[float] | None = None
    heldout: heldout.Heldout | None = None
    dealt: ranks.Dealt | None = None  # the micro-batches of this process, where there are several


class Guarded(Trainer):
    """Base of a TRL trainer over `Plan.order`; batches come ready from `Plan.collate`. A subclass has the loss."""

    section = "dpo"  # of the recipe, for messages
    plan: TrainingPlan
    _metrics: dict[str, Any]  # TRL's, collected for the next log entry
    _loss_sum: torch.Tensor | None = None
    _no_room = ""  # why this process has no memory left, where there are several

    def __init__(
        self,
        hf: HfModel,
        tokenizer: HfTokenizer,
        plan: TrainingPlan,
        args: TrainingArguments,
        stand_in: dict[str, Any],
        watching: Sequence[Callable[[Any], TrainerCallback]],
        **options: Any,
    ) -> None:
        """`stand_in`: rows for TRL in place of ours. Its patch of the model and its printing callbacks go again."""
        self.plan = plan
        base = hf.get_base_model()
        own_forward = base.__dict__.get("forward")
        super().__init__(
            model=cast(Any, hf),
            args=args,
            processing_class=cast(Any, tokenizer),
            train_dataset=Dataset.from_dict(stand_in),
            callbacks=[kind(self) for kind in watching],
            **options,
        )
        if own_forward is not None:  # generation uses this very object afterwards
            base.forward = own_forward
        else:
            base.__dict__.pop("forward", None)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = False

    @property
    def hf(self) -> HfModel:
        """The PeftModel that is trained, without what accelerate put around it."""
        return cast(HfModel, self.model)

    def _prepare_dataset(self, dataset: Dataset, *_args: object, **_kwargs: object) -> Dataset:
        return dataset  # the rows are token ids already; what TRL was handed is a stand-in

    def get_train_dataloader(self) -> DataLoader:
        data: Any = self.plan.order
        how: dict[str, Any] = {"batch_size": self.plan.micro_batch, "collate_fn": self._collate}
        if self.plan.dealt is not None:
            data, how = self.plan.dealt.micro_batches, {"batch_size": 1, "collate_fn": self._own}
        return self.accelerator.prepare(DataLoader(data, shuffle=False, **how))

    def _own(self, micro_batches: Sequence[Sequence[int]]) -> Batch:
        return self._collate(micro_batches[0]) if micro_batches[0] else {}

    def _collate(self, indexes: Sequence[int]) -> Batch:
        return self._batch([self.plan.rows[i] for i in indexes])

    def _batch(self, rows: Sequence[PairRow]) -> Batch:
        """The layout of these rows, with what each chosen token counts where that is not once."""
        batch, weight = self.plan.collate(rows), self.plan.dpo.end_weight
        if weight != 1.0:
            batch["counts_C"] = torch.tensor([count for row in rows for count in token_counts(row, weight)])
        return batch

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Of several processes one that has no micro-batch, or no memory, goes on to the step's end, as the others."""
        if self.plan.dealt is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if inputs and not self._no_room:
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                self._no_room = str(error).splitlines()[0][:200]
        return torch.zeros((), device=self.accelerator.device)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """A micro-batch's loss such that the sum over all processes is what one process would have."""
        dealt = self.plan.dealt
        return loss if dealt is None else loss * (dealt.each_step / self.plan.accumulation)

    def _add_loss(self, loss: torch.Tensor) -> None:
        """Keep the step's loss on the device; it is read once, in `_check_step`."""
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if self.plan.dealt is not None:
            self._join_step()
        norm = super()._clip_grad_norm(model)
        self._check_step(norm)
        return norm

    def _join_step(self) -> None:
        """Gradients and loss of all processes; they end here together where the memory of one has ended."""
        step = f"training step {self.state.global_step + 1}"
        ranks.no_room_anywhere(self._no_room, f"{step}, whether memory lasts")
        ranks.add_gradients(self.hf.parameters(), step)
        if self._loss_sum is None:  # no micro-batch of this step is this process's
            self._loss_sum = torch.zeros((), device=self.accelerator.device)
        total = self._loss_sum.float().reshape(1).clone()
        ranks.add_up(total, step)
        self._loss_sum = total[0]

    def _check_step(self, norm: torch.Tensor) -> None:
        """Before the optimiser moves anything: loss and gradient are finite, and the first loss is what it must be."""
        accumulated = max(1, self.plan.accumulation)
        loss, norm_value = torch.stack([self._loss_sum.float() / accumulated, norm.float()]).tolist()  # type: ignore[union-attr]
        self._loss_sum = None
        step = self.state.global_step
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            raise CaiError(
                f"training step {step + 1}: loss {loss}, gradient norm {norm_value}: not finite, so the step was not "
                f"applied. The last checkpoint in {self.plan.folder} is intact; lower {self.section}.learning_rate and "
                "resume.",
                errors.QUALITY,
            )
        if step == 0:
            self._check_first_loss(loss)

    def _check_first_loss(self, loss: float) -> None:
        """Where it is known what the first loss must be, another one ends the training."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One event a step: TRL's averages, read from the device at once."""
        metrics, self._metrics["train"] = dict(self._metrics["train"]), type(self._metrics["train"])(list)
        means = {name: torch.stack(values).mean() for name, values in metrics.items() if values}
        if self.plan.dealt is not None and "loss" in logs:
            sums = {name: (float(mean) * len(metrics[name]), len(metrics[name])) for name, mean in means.items()}
            own = {"loss": (logs["loss"], int(world().first))}  # a sum, not a mean
            logs |= ranks.means_of_all(own | sums, f"training step {self.state.global_step}, what it showed")
        elif means:
            logs |= dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        if "loss" in logs:
            entry = {"step": self.state.global_step, **{k: float(v) for k, v in logs.items()}}
            bad = sorted(k for k, v in entry.items() if not math.isfinite(v))
            if bad:
                raise CaiError(f"training step {entry['step']}: {', '.join(bad)} not finite", errors.QUALITY)
            self.plan.log.append(entry)
            self.plan.event("train_step", **entry)
        self.state.log_history.append({**logs, "step": self.state.global_step})

    def floating_point_ops(self, inputs: object) -> int:
        return 0  # transformers' estimate reads keys that these batches don't have

    def create_model_card(self, *_args: object, **_kwargs: object) -> None:
        """No card in a checkpoint: the report describes the run."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """A stop switch does not cut a save short: its grace period waits (`StopSwitch.hold`)."""
        if not world().first:
            return  # all hold the same weights and moments
        with getattr(self.plan.stopped, "hold", nullcontext)():
            self._save_and_seal(model, trial)

    def _save_and_seal(self, model: torch.nn.Module, trial: object) -> None:
        """Save as transformers does, then seal; only then remove older checkpoints."""
        folder = self.plan.folder / f"{checkpoints.PREFIX}{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            for name in ("training_args.bin", "README.md"):  # a pickle that nothing reads, a card the report replaces
                (folder / name).unlink(missing_ok=True)
            checkpoints.seal(folder, {"step": self.state.global_step, **self.plan.seal_facts})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each library wraps a full disk its own way, tokenizers in a bare Exception
            shutil.rmtree(folder, ignore_errors=True)  # set aside, it would hold its space for ever
            if isinstance(error, CaiError):
                raise
            why = (str(error) or type(error).__name__).splitlines()[0][:160]
            raise CaiError(
                f"{folder}: saving the checkpoint failed: {why}. "
                "Free space and resume; the checkpoint before it is intact.",
                errors.IO,
            ) from None
        checkpoints.prune(folder.parent)
        steps = [checkpoints.step_of(kept) for kept in checkpoints.found(folder.parent)]
        heldout.prune(folder.parent, self.state.log_history, steps)
        self.plan.event("checkpoint", step=self.state.global_step)

    def stop_here(self) -> None:
        """A graceful stop: leave a sealed checkpoint of the last whole step, then end."""
        step = self.state.global_step
        folder = self.plan.folder / f"{checkpoints.PREFIX}{step}"
        if step and world().first and checkpoints.fault(folder):
            self._save_checkpoint(cast(torch.nn.Module, self.model), None)
        raise Stopped(f"training stopped after step {step} of {self.plan.steps}; resume to go on.")


def arguments(plan: TrainingPlan, device: torch.device) -> dict[str, Any]:
    """What TRL's configs share; every default that writes, reports or filters is named here."""
    dpo, cuda = plan.dpo, device.type == "cuda"
    return dict(
        output_dir=str(plan.folder),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation if plan.dealt is None else plan.dealt.each_step,
        max_steps=plan.steps,
        learning_rate=dpo.learning_rate,
        lr_scheduler_type=dpo.scheduler,
        warmup_steps=math.ceil(dpo.warmup_ratio * plan.steps) if plan.steps > 1 else 0,
        weight_decay=0.0,
        max_grad_norm=dpo.max_grad_norm,
        optim="adamw_torch_fused",
        max_length=dpo.max_length,  # the rows are cut already
        bf16=cuda,
        fp16=False,
        use_cpu=not cuda,
        gradient_checkpointing=plan.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.checkpointing else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter turns a NaN loss into an average and trains on
        save_strategy="no" if dpo.save_minutes else "steps",  # by time: callbacks.ClockSave
        save_steps=dpo.save_steps,
        save_total_limit=None,  # pruned after the seal, in _save_checkpoint
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        seed=plan.seed % 2**32,
        data_seed=plan.seed % 2**32,
    )
