"""What training left in a run: checkpoints as they were sealed, adapters whole, finite and trained. Writes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import orjson

from cai.commands.tensors import safetensors_fp32
from cai.commands.verify_dataset import Results
from cai.training import checkpoints


def sealed(run: Path) -> Results:
    folders = [run / "train", *sorted(path for path in (run / "train").glob("[fs]*/") if path.is_dir())]
    found = [checkpoint for folder in folders for checkpoint in checkpoints.found(folder)]
    if not found:
        yield "skip", "no checkpoint"
    for folder in found:
        fault = checkpoints.fault(folder)
        name = folder.relative_to(run / "train")
        yield ("FAIL", f"{name}: {fault}") if fault else ("ok", f"{name}: every file as it was sealed")


def adapters(run: Path) -> Results:
    """Finite, and not the adapter that training began with (all of lora_B zero)."""
    found = sorted(run.glob("adapter*/adapter_model.safetensors"))
    if not found and not (run / "train" / "result.json").exists():
        yield "skip", "no adapter yet"
    for path in sorted((run / "train").glob("**/result.json")):
        try:
            result = orjson.loads(path.read_bytes())
            folder = Path(os.path.normpath(path.parent / result["adapter"]))
        except (ValueError, KeyError, TypeError):
            yield "FAIL", f"{path.relative_to(run)}: not whole; a resume writes it again"
            continue
        why = checkpoints.differs(folder, result.get("files", {}))
        if not why and not (folder / "adapter_model.safetensors").is_file():
            why = "adapter_model.safetensors is missing"
        if why:
            yield "FAIL", f"{folder.name}: {why}; remove that folder, and a resume exports it again"
    for path in found:
        name = path.parent.name
        for verdict, text in _tensors(path):
            yield verdict, text if name == "adapter" else f"{name}: {text}"


def _tensors(path: Path) -> Results:
    try:
        tensors = safetensors_fp32(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        yield "FAIL", f"{path.name}: no whole safetensors file; remove its folder, and a resume exports it again"
        return
    if not tensors:
        yield "skip", "holds no tensor (fake model)"
        return
    bad = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    moved = [name for name, value in tensors.items() if "lora_B" in name and np.any(value)]
    if bad:
        yield "FAIL", f"{len(bad)} tensors hold NaN or infinity, first {bad[0]}"
    elif not moved:
        yield "FAIL", "every lora_B is zero: nothing was trained"
    else:
        yield "ok", f"{len(tensors)} tensors, all finite, {len(moved)} lora_B not zero"
