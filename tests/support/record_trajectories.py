"""Records trajectories.json beside it: what trainings of the tiny model gave, step by step, and the adapter's bytes.

Run as a script it overwrites the file. Do that only where the arithmetic is meant to change: the file is what "an old
recipe gives the old numbers to the last digit" is held against (tests/training/test_train_old.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parents[1])]

from support.training import TinyModel, dpo, run_train  # noqa: E402

FILE = Path(__file__).parent / "trajectories.json"
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, qwen2": {"kind": "qwen2"},
    "sigmoid, padded": {"padded": True},
    "sigmoid + sft": {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)},
    "ipo": {"loss_type": ("ipo",)},
    "hinge": {"loss_type": ("hinge",)},
    "sft arm": {"objective": "sft"},
}


def machine() -> dict[str, str]:
    """What the last bits of a sum hang on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"torch": torch.__version__, "cpu": f"{name}, {torch.backends.cpu.get_cpu_capability()}"}


def trajectory(kind: str = "llama", padded: bool = False, objective: str = "dpo", **settings: Any) -> dict[str, Any]:
    """Loss and gradient norm of each step as hex floats, and the adapter's sha256."""
    model = TinyModel(kind=kind)
    if padded:
        model.hf.config.sliding_window, model.hf.config.use_sliding_window = None, True  # the packed pass refuses it
    with tempfile.TemporaryDirectory() as folder:
        result = run_train(Path(folder), model=model, config=dpo(**settings), objective=objective)
        weights = (result.adapter / "adapter_model.safetensors").read_bytes()
    return {
        "loss": [entry["loss"].hex() for entry in result.log],
        "grad_norm": [entry["grad_norm"].hex() for entry in result.log],
        "adapter": hashlib.sha256(weights).hexdigest(),
    }


if __name__ == "__main__":
    found = {"machine": machine(), "cases": {name: trajectory(**case) for name, case in CASES.items()}}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
