"""Training of the fake model: counts steps, writes what a training writes, learns nothing. No torch.

Keeps the contract that the rest of the pipeline is tested on: events, progress, graceful stops, a resume that goes on
where it stopped, an adapter folder that appears whole and is the same bytes however often it was interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from cai.errors import Stopped
from cai.recipe.settings import DpoSection
from cai.store.files import write_json_atomic
from cai.store.jsonl import Row
from cai.training.checkpoints import publish
from cai.training.heldout import PREFIX, Heldout, entry
from cai.training.token_rows import PairRow, steps_of

STATE = "fake_state.json"


def run(
    folder: Path,
    adapter: Path,
    name: str,
    pairs: int,
    dpo: DpoSection,
    seed: int,
    watched: Sequence[PairRow] = (),
    *,
    event: Callable[..., None],
    stopped: Callable[[], bool],
    progress: Callable[[int, int], None],
    start: Path | None = None,
) -> Row:
    """`log`: every step's entry, the loss starts at log 2 and falls by 5% a step; `steps`; `heldout_log`."""
    effective = dpo.batch_size * dpo.gradient_accumulation
    steps = steps_of(pairs, max_steps=dpo.max_steps, epochs=dpo.epochs, effective_batch=effective)
    heldout = Heldout(watched, [], dpo.eval_steps if watched else 0, False, name)
    state = folder / STATE
    done = json.loads(state.read_text())["step"] if state.exists() else 0
    for step in range(done + 1, steps + 1):
        if stopped():
            raise Stopped(f"training stopped after step {step - 1} of {steps}; resume to go on.")
        event("train_step", **_entry(step))
        if heldout.due(step, steps):
            found = heldout_entry(heldout, step)
            event("heldout", **{name.removeprefix(PREFIX): value for name, value in found.items()})
        write_json_atomic(state, {"step": step})
        progress(step, steps)
    _export(adapter, seed % 1000 + steps + (_value(start) if start else 0.0), name)
    every = range(1, steps + 1)
    held = [heldout_entry(heldout, step) for step in every if heldout.due(step, steps)]
    return {"log": [_entry(step) for step in every], "steps": steps, "heldout_log": held}


def _entry(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": math.log(2) * 0.95 ** (step - 1),
        "grad_norm": 1.0,
        "rewards/margins": 0.05 * (step - 1),
    }


def heldout_entry(heldout: Heldout, step: int) -> dict[str, float]:
    """Held-out pairs lag ten steps behind what is trained on."""
    loss, count = _entry(max(1, step - 10))["loss"], len(heldout.rows)
    return entry(step, [[loss * count, 0.05 * step * count, count]], count)


def _value(adapter: Path) -> float:
    """The one number of a fake adapter."""
    (value,) = struct.unpack("<f", (adapter / "adapter_model.safetensors").read_bytes()[-4:])
    return float(value)


def _export(target: Path, value: float, name: str) -> None:
    """A valid safetensors file of one number, and PEFT's config for it."""
    beside = target.with_name(f".{target.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensor = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "base_model.model.fake.lora_B.weight": tensor}).encode()
    data = struct.pack("<Q", len(header)) + header + struct.pack("<f", value)
    (beside / "adapter_model.safetensors").write_bytes(data)
    write_json_atomic(beside / "adapter_config.json", {"base_model_name_or_path": name, "peft_type": "LORA", "r": 1})
    publish(beside, target)
