"""Training: preference pairs in, a LoRA adapter out, with TRL's DPOTrainer on the model that is already loaded.

`train()` is the table of contents: rows, reference, attempts (down an out-of-memory ladder), export. `pair_logps()`
scores pairs with the adapter on and off; evaluation uses it too. Doesn't own the loss (training/loss.py), the loop
(TRL, training/trainer.py) or the run folder. Importing this module imports no torch.

Invariants: killed at any moment, a resume gives the adapter of the run that was left alone (byte-identical on CPU); the
effective batch never changes; a non-finite step is never applied; `adapter/` appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from pydantic import TypeAdapter

from cai import errors
from cai.engine import memory, never
from cai.engine.model import Model
from cai.errors import CaiError
from cai.recipe.settings import DpoSection, HealthSection, LoraSection
from cai.store.files import write_json_atomic
from cai.store.jsonl import Row
from cai.store.row_types import TrainingPair
from cai.training import checkpoints, fake_training, heldout
from cai.training import health as signs
from cai.training.job import BatchShape, Job, Objective, clear_memory
from cai.training.scoring import PairLogps, pair_logps, pair_rows, preference
from cai.training.token_rows import PairRow, PairRows, ignore, revisions_only, tokenize_pairs
from cai.world import gather

if TYPE_CHECKING:
    from transformers import TrainerState

    from cai.recipe.prompts import Prompt
    from cai.training.sft_trainer import RevisionTrainer
    from cai.training.trainers import PairTrainer

__all__ = ["PairLogps", "TrainResult", "load_result", "pair_logps", "pair_rows", "preference", "train"]


WATCHED = HealthSection()


@dataclass(frozen=True)
class TrainResult:
    """What training left. `log`: one dict an optimizer step: loss, grad_norm, learning_rate, rewards, log-probs.

    `heldout`: of the finished adapter against what DPO began from; `heldout_log`: the same while training, each
    `dpo.eval_steps`. `kept_step`: the step whose weights the adapter is, 0 where they are the last one's.
    `expected_first_loss`: None where it hangs on the texts.
    """

    adapter: Path
    steps: int
    pairs: int
    first_loss: float
    last_loss: float
    log: list[dict[str, float]] = field(repr=False)
    micro_batch: int = 1
    accumulation: int = 1
    gradient_checkpointing: bool = False
    truncated: int = 0
    flagged: int = 0
    too_long: tuple[int, ...] = ()
    heldout: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    resumed_from: int = 0
    peak_gib: float = 0.0
    heldout_log: list[dict[str, float]] = field(default_factory=list, repr=False)
    kept_step: int = 0
    expected_first_loss: float | None = math.log(2)


def train(
    model: Model,
    pairs: Sequence[TrainingPair],
    heldout_pairs: Sequence[TrainingPair],
    lora: LoraSection,
    dpo: DpoSection,
    folder: Path,
    *,
    prompt: Prompt,
    seed: int = 0,
    event: Callable[..., None] = ignore,
    stopped: Callable[[], bool] = never,
    progress: Callable[[int, int], None] = ignore,
    adapter: Path | None = None,
    objective: Objective = "dpo",
    health: HealthSection = WATCHED,
    start: Path | None = None,
) -> TrainResult:
    """Train until the recipe's steps are done; resumes from the newest sound checkpoint in `folder`.

    `prompt`: the loaded prompts/policy.yaml. `adapter`: where the PEFT folder goes, by default beside `folder`.
    `objective`: "sft" reads the chosen texts only, with TRL's SFTTrainer. The adapter is on the model afterwards.
    `health`: what is watched of DPO, and which signs end it. `start`: the SFT stage's adapter folder, where
    `dpo.start = "sft"`: DPO trains those very weights on, with what they are now as the reference.
    `heldout_pairs`: scored at the end, and each `dpo.eval_steps` on the way.
    Errors: Stopped (75) after a graceful stop; CaiError QUALITY (6) for a wrong first loss, a non-finite step, a sign
    in `health.stop`, no pair; DRIFT (3), CORRUPT (5) for checkpoints of other settings, or hostile ones; IO (74).
    """
    began, adapter = time.monotonic(), adapter or folder.parent / "adapter"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_halves(adapter)
    _check_start(dpo, lora, start)
    tokenized = _tokenized(model, pairs, prompt, dpo, objective, health, event)
    watched = _heldout_rows(model, heldout_pairs, prompt, dpo)
    model.to_lora(lora, seed)
    job = None
    if model.backend == "fake":
        learnt = fake_training.run(folder, adapter, model.name, len(tokenized.rows), dpo, seed, watched, event=event,
                                   stopped=stopped, progress=progress, start=start)  # fmt: skip
    else:
        job = Job(model, tokenized.rows, lora, dpo, folder, seed, event, stopped, progress, objective, health, start,
                  watched)  # fmt: skip
        model.mode("train")
        memory.begin_phase()
        learnt = _learnt(job, adapter, *job.run())
    model.attached = adapter
    losses = [entry["loss"] for entry in learnt["log"]]
    result = TrainResult(
        adapter=adapter, pairs=len(tokenized.rows), first_loss=losses[0], last_loss=losses[-1],
        truncated=tokenized.truncated, flagged=tokenized.flagged, too_long=tuple(tokenized.too_long),
        heldout=_heldout(model, watched, dpo, job.heldout_refs if job and start else None),
        seconds=time.monotonic() - began, **learnt,
    )  # fmt: skip
    relative = os.path.relpath(adapter, folder)  # the run folder may be moved
    content = {**asdict(result), "adapter": relative, "files": checkpoints.sums_of(adapter)}
    write_json_atomic(folder / "result.json", {**content, "seal": _seal(content)})
    event("trained", **{k: v for k, v in asdict(result).items() if k not in ("log", "heldout_log", "adapter")})
    return result


def _tokenized(
    model: Model,
    pairs: Sequence[TrainingPair],
    prompt: Prompt,
    dpo: DpoSection,
    objective: Objective,
    health: HealthSection,
    event: Callable[..., None],
) -> PairRows:
    """The rows to train on; what was cut or left out is an event."""
    tokenized = tokenize_pairs(pairs, prompt, format=model.format, tokenizer=model.tokenizer, max_length=dpo.max_length)
    if not tokenized.rows:
        raise CaiError("no pair to train on: every prompt fills dpo.max_length; raise it", errors.QUALITY)
    if objective == "sft":
        tokenized = revisions_only(tokenized)
    if tokenized.too_long or tokenized.truncated or tokenized.flagged:
        event("pairs_cut", truncated=tokenized.truncated, too_long=tokenized.too_long, flagged=tokenized.flagged)
    if objective == "dpo" and (sign := signs.truncation(tokenized.truncated / len(tokenized.rows), health)):
        event("health", step=0, sign=sign.name, value=sign.value, text=sign.text)
        if sign.name in health.stop:
            raise CaiError(f"training: {sign.text}. health.stop names it, so nothing was trained.", errors.QUALITY)
    return tokenized


def _check_start(dpo: DpoSection, lora: LoraSection, start: Path | None) -> None:
    if (dpo.start != "base") != (start is not None):
        said = "no adapter was handed to training" if start is None else f"training was handed {start}"
        raise CaiError(f'dpo.start = "{dpo.start}", but {said}')
    if start is not None and lora.dropout:
        why = f'must be 0 with dpo.start = "{dpo.start}": dropout would make the reference another model'
        raise CaiError(f"lora.dropout: {why}")


def _heldout_rows(model: Model, pairs: Sequence[TrainingPair], prompt: Prompt, dpo: DpoSection) -> list[PairRow]:
    rows = pair_rows(model, pairs, prompt, dpo.max_length) if pairs else []
    if dpo.keep == "best" and not rows:
        raise CaiError('dpo.keep = "best": there is no held-out pair to choose by. Set heldout.items, or keep = "last"')
    return rows


def load_result(folder: Path) -> TrainResult | None:
    """The result of a training that finished, or None; needs no torch, so a resume with nothing left starts at once.

    None too where the adapter is gone or not what was exported, or the result not what was written: both are made again
    from the last checkpoint. The adapter's bytes are read (a second a gigabyte): a damaged one must not be measured.
    """
    try:
        value = orjson.loads((folder / "result.json").read_bytes())
        if value.pop("seal", None) not in (None, _seal(value)):
            return None
        sums = value.pop("files", {})
        value["adapter"] = Path(os.path.normpath(folder / value["adapter"]))
        value["too_long"] = tuple(value["too_long"])
        result = TypeAdapter(TrainResult).validate_python(value)
        why = checkpoints.differs(result.adapter, sums)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # missing, or not what train() wrote
        return None
    return result if not why and (result.adapter / "adapter_model.safetensors").is_file() else None


def _seal(content: Row) -> str:
    """sha256 of what result.json holds beside it: the report prints these numbers."""
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _remove_halves(adapter: Path) -> None:
    """A kill between two renames of `publish` can leave the old adapter under its hidden name: put it back."""
    old = adapter.with_name(f".{adapter.name}.old")
    if old.exists() and not adapter.exists():
        old.rename(adapter)


def _learnt(
    job: Job, adapter: Path, trainer: PairTrainer | RevisionTrainer, shape: BatchShape, resumed_from: int
) -> Row:
    """The measured part of the result; what training held is freed, the adapter exported."""
    import torch

    from cai.training import adapter as tensors

    model, history = job.model, trainer.state.log_history
    learnt: Row = {
        "log": [entry for entry in history if "loss" in entry],
        "steps": trainer.state.global_step,
        "micro_batch": shape.micro_batch,
        "accumulation": shape.accumulation,
        "gradient_checkpointing": shape.checkpointing,
        "resumed_from": resumed_from,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else 0.0,
        "heldout_log": heldout.log_of(history),
        "kept_step": _kept_step(job, trainer.state),
        "expected_first_loss": job.first_loss,
    }
    _leave_training(model, trainer)
    if learnt["kept_step"]:
        gather(b"", "the best weights")  # the first process has written them
        heldout.restore_best(model.hf, job.home, learnt["kept_step"])
    tensors.require_sound(model.hf, job.start)
    tensors.export(model.hf, adapter, model.name)
    return learnt


def _kept_step(job: Job, state: TrainerState) -> int:
    """The step of the best held-out loss, or 0 where the weights stay the last ones."""
    best = heldout.best_step(state.log_history) if job.dpo.keep == "best" and job.objective == "dpo" else None
    if best is None or best == state.global_step:
        return 0
    job.event("best_kept", step=best, of=state.global_step)
    return best


def _leave_training(model: Model, trainer: PairTrainer | RevisionTrainer) -> None:
    """Free optimiser and gradients; generation gets the model back in eval mode."""
    from cai.training import forward

    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    model.hf.zero_grad(set_to_none=True)
    forward.set_checkpointing(model.hf, forward.layout_for(model), False)
    model.mode("generate")
    clear_memory()


def _heldout(
    model: Model, rows: Sequence[PairRow], dpo: DpoSection, refs: Sequence[tuple[float, float]] | None
) -> dict[str, float]:
    """Against the base (adapter off), or against `refs`, the reference of a training that began from an adapter."""
    if not rows or model.backend == "fake":
        return {}
    scores = pair_logps(model, rows)
    if refs is not None:
        scores = [replace(s, ref_chosen=c, ref_rejected=r) for s, (c, r) in zip(scores, refs, strict=True)]
    return preference(scores, dpo.beta)
