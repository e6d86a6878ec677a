"""One training from rows to a finished trainer, over as many attempts as memory makes necessary.

Owns the shape of the effective batch and its out-of-memory ladder, what a checkpoint belongs to (identity), the
reference's place in an attempt and what a failed attempt means. Torch is imported inside functions.
"""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cai import errors
from cai.engine.model import Model
from cai.errors import CaiError, Stopped
from cai.recipe.settings import DpoSection, HealthSection, LoraSection
from cai.store.jsonl import JsonObject, Row
from cai.training import checkpoints, ranks, reference_logps
from cai.training.heldout import Heldout
from cai.training.scoring import to_device
from cai.training.token_rows import PairRow, first_loss, label_probabilities, pair_weights, rows_sha, schedule, steps_of
from cai.world import world

if TYPE_CHECKING:
    from cai.training.sft_trainer import RevisionTrainer
    from cai.training.trainers import PairTrainer

Objective = Literal["dpo", "sft"]  # pairs against a reference, or the likelihood of the revisions
PINNED = ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes", "accelerate")
BATCH_KEYS = {"batch_size", "gradient_accumulation"}


@dataclass(frozen=True)
class BatchShape:
    """How one attempt cuts the effective batch. `micro_batch` x `accumulation` stays the same down the ladder."""

    micro_batch: int
    accumulation: int
    checkpointing: bool

    def smaller(self) -> BatchShape | None:
        """The next rung: half the micro-batch (or its largest divisor below), then checkpointing, then none."""
        if self.micro_batch > 1:
            return self.cut(next(n for n in range(self.micro_batch // 2, 0, -1) if self.effective % n == 0))
        return None if self.checkpointing else BatchShape(1, self.accumulation, True)

    @property
    def effective(self) -> int:
        return self.micro_batch * self.accumulation

    def cut(self, micro_batch: int) -> BatchShape:
        """The same effective batch in micro-batches of this size."""
        return replace(self, micro_batch=micro_batch, accumulation=self.effective // micro_batch)


def versions() -> dict[str, str]:
    """Installed versions of what decides the arithmetic."""
    found = {}
    for name in PINNED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@dataclass
class Job:
    """One training from rows to a finished trainer, over as many attempts as memory makes necessary."""

    model: Model
    rows: list[PairRow]
    lora: LoraSection
    dpo: DpoSection
    folder: Path
    seed: int
    event: Callable[..., None]
    stopped: Callable[[], bool]
    progress: Callable[[int, int], None]
    objective: Objective = "dpo"
    health: HealthSection = field(default_factory=HealthSection)
    start: Path | None = None  # the adapter that training goes on with; None: a fresh one
    heldout: Sequence[PairRow] = ()
    heldout_refs: list[reference_logps.Logps] = field(default_factory=list)

    def __post_init__(self) -> None:
        from cai.training.forward import layout_for

        self.home = ranks.one_folder(self.folder)  # where the checkpoints are
        self.layout = layout_for(self.model)
        self.event("layout", name=self.layout.name, why=self.layout.why)
        self.effective = self.dpo.batch_size * self.dpo.gradient_accumulation
        self.steps = steps_of(
            len(self.rows), max_steps=self.dpo.max_steps, epochs=self.dpo.epochs, effective_batch=self.effective
        )
        self.order = schedule(self.rows, steps=self.steps, effective_batch=self.effective, seed=self.seed)
        self.weights, self.labels = pair_weights(self.rows, self.dpo), label_probabilities(self.rows, self.dpo)
        settings = {k: v for k, v in self.dpo.deciding().items() if k not in BATCH_KEYS}
        self.identity = {
            "rows": rows_sha(self.rows),
            "model": self.model.name,
            "revision": str(self.model.facts.get("revision", "")),
            "quantization": str(self.model.facts.get("quantization", "")),
            "lora": reference_logps.key_of(**self.lora.model_dump(mode="json")),
            self.objective: settings,
            "effective_batch": self.effective,
            "seed": self.seed,
            "versions": versions(),
        }
        self.first_loss = first_loss(self.dpo, self.weights, self.order[: self.effective])
        if self.start is not None:
            self.identity["start"] = checkpoints.file_sha(self.start / "adapter_model.safetensors")
        if self.weights is not None or self.labels is not None:
            self.identity["margins"] = reference_logps.key_of(margins=[row.margin for row in self.rows])

    def run(self) -> tuple[PairTrainer | RevisionTrainer, BatchShape, int]:
        """Attempts until one ends: (trainer, shape that worked, step resumed from)."""
        found = self._newest()
        resumed_from = found[1]["step"] if found else 0
        shape = self._first_shape(found[1] if found else None)
        while True:
            trainer, out_of_memory = self._attempt(shape, found)
            if trainer is not None:
                return trainer, shape, resumed_from
            shape = self._next_shape(shape, out_of_memory)  # outside the except block: its traceback pins tensors
            found = self._newest()

    def _newest(self) -> tuple[Path, Row] | None:
        """The newest sound checkpoint: found by the first process, loaded by all."""
        found = checkpoints.newest(self.folder, self.event) if world().first else None
        told = ranks.of_first({"name": found[0].name, "seal": found[1]} if found else {}, "the newest checkpoint")
        return (self.home / told["name"], told["seal"]) if told else None

    def _first_shape(self, sealed: JsonObject | None) -> BatchShape:
        """The recipe's shape, or the one that the checkpoint was trained with; enough of them for all processes."""
        dpo, mode = self.dpo, self.dpo.gradient_checkpointing
        shape = BatchShape(dpo.batch_size, dpo.gradient_accumulation, mode == "on")
        if sealed:
            shape = BatchShape(sealed["micro_batch"], sealed["accumulation"], sealed["gradient_checkpointing"])
        elif mode == "auto":
            from cai.training.fit import choose_shape

            chosen = choose_shape(self.model, self.layout, self.rows, self.order, shape, self.event)
            shape = ranks.agreed_shape(chosen)
        return ranks.spread(shape)

    def _next_shape(self, shape: BatchShape, why: str) -> BatchShape:
        clear_memory()
        smaller = shape.smaller()
        if smaller is None:
            raise CaiError(
                f"out of memory in training with one pair a micro-batch and gradient checkpointing ({why}). "
                "Lower dpo.max_length or lora.rank, or rent a larger card.",
            )
        self.event("out_of_memory", phase="training", why=why, micro_batch=smaller.micro_batch,
                   accumulation=smaller.accumulation, gradient_checkpointing=smaller.checkpointing)  # fmt: skip
        return smaller

    def _attempt(
        self, shape: BatchShape, found: tuple[Path, Row] | None
    ) -> tuple[PairTrainer | RevisionTrainer | None, str]:
        """(trainer, "") when training ended, (None, why) when memory ran out."""
        import torch

        from cai.training import adapter

        try:
            trainer = self._prepared(shape, found)
            trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
            adapter.require_fp32(self.model.hf)
            return trainer, ""
        except torch.OutOfMemoryError as error:
            why = str(error).splitlines()[0][:200]
        except pickle.UnpicklingError as error:
            raise CaiError(
                f"{found[0] if found else self.folder}: a file of this checkpoint holds code, not tensors, and was not "
                f"loaded ({str(error).splitlines()[0][:120]}). Remove that folder and resume.",
                errors.CORRUPT,
            ) from None
        return None, why

    def _prepared(self, shape: BatchShape, found: tuple[Path, Row] | None) -> PairTrainer | RevisionTrainer:
        """The trainer of this attempt, before its first step."""
        from cai.training import adapter, forward  # torch from here on
        from cai.training.guards import TrainingPlan

        hf = self.model.hf
        self._begin()
        forward.set_checkpointing(hf, self.layout, shape.checkpointing)
        refs = self._references(shape, self.rows, self.order) if self.objective == "dpo" else []
        if found:
            checkpoints.check_identity(found[0], found[1], self.identity)
            self.event("resume", checkpoint=found[0].name)
        cut = self.order, [row.tokens for row in self.rows], shape.micro_batch, shape.accumulation
        plan = TrainingPlan(
            rows=self.rows, refs=refs, order=self.order, steps=self.steps, micro_batch=shape.micro_batch,
            accumulation=shape.accumulation, checkpointing=shape.checkpointing and not self.layout.own_checkpointing,
            dpo=self.dpo, seed=self.seed, folder=self.folder, forward=self.layout.forward,
            collate=self.layout.collate, event=self.event, stopped=self.stopped, progress=self.progress,
            health=self.health, weights=self.weights, labels=self.labels, heldout=self._heldout(shape),
            first_loss=self.first_loss, dealt=ranks.Dealt.of(*cut) if world().several else None,
            tolerance=first_loss_tolerance(self.dpo, refs, self.order[: self.effective if refs else 0], str(hf.dtype)),
            seal_facts={"identity": self.identity, "micro_batch": shape.micro_batch,
                        "accumulation": shape.accumulation, "gradient_checkpointing": shape.checkpointing,
                        **({"processes": world().size} if world().several else {})},
        )  # fmt: skip
        kind: type[PairTrainer | RevisionTrainer]
        if self.objective == "sft":
            from cai.training.sft_trainer import RevisionTrainer as kind
        else:
            from cai.training.trainers import PairTrainer as kind
        trainer = kind(hf, self.model.hf_tokenizer, plan, self.model.device)
        self._begin()  # TRL's constructor casts the adapter of a 4-bit model to bf16
        adapter.require_fp32(hf)
        return trainer

    def _begin(self) -> None:
        """The adapter as it stands before the first step, and as the reference is computed with."""
        from cai.training import adapter

        if self.start is None:
            adapter.reset(self.model.hf, self.seed)
        else:
            adapter.restore(self.model.hf, self.start)

    def _heldout(self, shape: BatchShape) -> Heldout | None:
        if not self.heldout or not (self.dpo.eval_steps or self.start):
            return None
        every = range(len(self.heldout))
        self.heldout_refs = self._references(shape, self.heldout, every, reference_logps.HELDOUT)
        return Heldout(
            self.heldout, self.heldout_refs, self.dpo.eval_steps, self.dpo.keep == "best", self.model.name,
            self.layout.reference_with_grad,
        )  # fmt: skip

    def _references(
        self, shape: BatchShape, rows: Sequence[PairRow], order: Sequence[int], name: str = reference_logps.NAME
    ) -> list[reference_logps.Logps]:
        """From the cache, or computed with the adapter as it begins, in this attempt's micro-batches."""
        more = {} if rows is self.rows else {"heldout": rows_sha(rows)}
        key = reference_logps.key_of(identity=self.identity, order=list(order), micro_batch=shape.micro_batch,
                               layout=self.layout.name, checkpointing=shape.checkpointing, **more)  # fmt: skip
        refs = reference_logps.cached(self.home, key, name)
        if refs is not None:
            return refs
        began = time.monotonic()
        self.model.hf.train()
        refs = reference_logps.compute(order, len(rows), shape.micro_batch, partial(self._score, rows), self.stopped)
        if refs is None:
            raise Stopped("training stopped while the reference was computed; resume to go on.")
        reference_logps.store(self.folder, key, refs, set(order), name)
        self.event("reference", pairs=len(set(order)), seconds=time.monotonic() - began)
        return refs

    def _score(self, rows: Sequence[PairRow], group: Sequence[int]) -> list[reference_logps.Logps]:
        import torch

        from cai.training.loss import sequence_logps

        batch = to_device(self.layout.collate([rows[i] for i in group]), self.model.device)
        with self.model.adapter(True), torch.set_grad_enabled(self.layout.reference_with_grad):
            sums = sequence_logps(self.model.hf, batch, self.layout.forward, self.dpo.ld_alpha)[0].detach()
        return [(chosen, rejected) for chosen, rejected in sums.T.tolist()]


def first_loss_tolerance(
    dpo: DpoSection, refs: Sequence[reference_logps.Logps], first: Sequence[int], dtype: str
) -> float:
    """The recipe's, or more where long completions make rounding larger: slope x relative step x mean |sum|.

    At equal models sigmoid falls by beta/2 a nat; of the others none falls faster than 2 / (1 - 2 label_smoothing)
    times that.
    """
    step = 2.0**-20 if "float32" in dtype else 2.0**-12
    size = sum(abs(refs[i][0]) + abs(refs[i][1]) for i in first) / max(1, len(first))
    steeper = 1.0 if dpo.loss_type == ("sigmoid",) else 2.0 * len(dpo.loss_type) / (1.0 - 2.0 * dpo.label_smoothing)
    return max(dpo.first_loss_tolerance, 0.5 * dpo.beta * steeper * step * size)


def clear_memory() -> None:
    """What nobody holds any more goes back to the card, where there is one."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
