"""Held-out pairs while DPO trains: when their loss is due, what is logged of it, and the weights of the best one.

Owns the log entries (`heldout/...` in the trainer's history, restored with a checkpoint) and the folders best-STEP/
beside the checkpoints. The forward pass is the trainer's. Invariant: every best step that a kept checkpoint's log names
has its weights on disk, so a resume from any of them can still export them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cai import errors
from cai.engine.foreign import HfModel
from cai.errors import CaiError
from cai.store.jsonl import JsonObject
from cai.training import checkpoints
from cai.training.health import HELDOUT as LOSS
from cai.training.token_rows import PairRow

PREFIX = "heldout/"
BEST = "best-"


@dataclass(frozen=True)
class Heldout:
    """The pairs, their reference, and each how many steps they are measured. `with_grad`: as the reference was."""

    rows: Sequence[PairRow]
    refs: Sequence[tuple[float, float]]
    every: int
    keep_best: bool
    base_name: str
    with_grad: bool = False

    def due(self, step: int, steps: int) -> bool:
        return bool(self.every) and step > 0 and (step % self.every == 0 or step == steps)


def entry(step: int, sums: Sequence[Sequence[float]], count: int) -> dict[str, float]:
    """One log entry of the sums of loss, margin (times beta) and wins over all held-out pairs."""
    loss, margin, wins = (sum(part) / count for part in zip(*sums, strict=True))
    return {"step": step, LOSS: loss, "heldout/margin": margin, "heldout/accuracy": wins, "heldout/n": count}


def log_of(history: Sequence[JsonObject]) -> list[dict[str, float]]:
    """The held-out entries of a trainer's history."""
    return [dict(found) for found in history if LOSS in found]


def measured(history: Sequence[JsonObject], step: int) -> bool:
    return any(found["step"] == step for found in log_of(history))


def best_step(history: Sequence[JsonObject], until: int | None = None) -> int | None:
    """The step of the lowest held-out loss, the earliest of equals; None where none was measured."""
    found = [e for e in log_of(history) if until is None or e["step"] <= until]
    return int(min(found, key=lambda e: (e[LOSS], e["step"]))["step"]) if found else None


def export_best(hf: HfModel, folder: Path, step: int, base_name: str) -> None:
    """The weights as they are, to best-STEP/; sealed before any checkpoint whose log names them."""
    from cai.training import adapter

    target = folder / f"{BEST}{step}"
    adapter.export(hf, target, base_name)
    checkpoints.seal(target, {"step": step})


def restore_best(hf: HfModel, folder: Path, step: int) -> None:
    """The kept weights of `step` back onto the model. Errors: CaiError(CORRUPT) where they are gone or damaged."""
    from cai.training import adapter

    kept = folder / f"{BEST}{step}"
    sealed = checkpoints.read_seal(kept)
    why = "its seal is missing" if sealed is None else checkpoints.differs(kept, sealed["files"])
    if why:
        raise CaiError(
            f"{kept}: the weights of the best held-out loss are damaged ({why}). Remove the checkpoints in {folder} to "
            'train anew, or set dpo.keep = "last".',
            errors.CORRUPT,
        )
    adapter.restore(hf, kept)


def prune(folder: Path, history: Sequence[JsonObject], checkpoint_steps: Sequence[int]) -> None:
    """Remove weights that are the best so far of no kept checkpoint."""
    wanted = {f"{BEST}{best_step(history, step)}" for step in checkpoint_steps}
    for kept in folder.glob(f"{BEST}*"):
        if kept.name not in wanted and kept.name[len(BEST) :].isdigit():
            shutil.rmtree(kept)
