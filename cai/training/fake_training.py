"""Training of the fake model: counts steps, writes what a training writes, learns nothing. No torch.

Keeps the contract that the rest of the pipeline is tested on: events, progress, graceful stops, a resume that goes on
where it stopped, an adapter folder that appears whole and is the same bytes however often it was interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from cai.errors import Stopped
from cai.store.files import write_json_atomic
from cai.training.checkpoints import publish
from cai.training.heldout import PREFIX, Heldout, entry

STATE = "fake_state.json"


def run(
    folder: Path,
    adapter: Path,
    steps: int,
    seed: int,
    *,
    name: str,
    event: Callable[..., None],
    stopped: Callable[[], bool],
    progress: Callable[[int, int], None],
    start: Path | None = None,
    heldout: Heldout | None = None,
) -> list[dict[str, float]]:
    """Every step's log entry; the loss starts at log 2 and falls by 5% a step."""
    state = folder / STATE
    done = json.loads(state.read_text())["step"] if state.exists() else 0
    for step in range(done + 1, steps + 1):
        if stopped():
            raise Stopped(f"training stopped after step {step - 1} of {steps}; resume to go on.")
        event("train_step", **_entry(step))
        if heldout and heldout.due(step, steps):
            found = heldout_entry(heldout, step)
            event("heldout", **{name.removeprefix(PREFIX): value for name, value in found.items()})
        write_json_atomic(state, {"step": step})
        progress(step, steps)
    _export(adapter, seed % 1000 + steps + (_value(start) if start else 0.0), name)
    return [_entry(step) for step in range(1, steps + 1)]


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
