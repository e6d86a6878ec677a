"""The LoRA adapter as tensors: deterministic start, dtype and value checks, export as a PEFT folder. Imports torch.

Invariants: training starts from weights that depend on the seed alone; they are fp32; what is exported is finite, has
moved, and names the real base model.
"""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from cai import errors
from cai.engine.foreign import HfModel
from cai.errors import CaiError
from cai.store.files import write_atomic
from cai.training.checkpoints import publish

NAME = "default"


def lora_parameters(hf: HfModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The trained adapter's tensors, in module order."""
    for name, parameter in hf.named_parameters():
        if f".{NAME}." in name and "lora_" in name:
            yield name, parameter


def reset(hf: HfModel, seed: int) -> None:
    """fp32, A uniform in +-1/sqrt(in) (PEFT's kaiming_uniform with a = sqrt 5), B zero; from the seed and the names.

    TRL 1.15 casts the adapter of a 4-bit model to bf16; at a learning rate of 5e-6 most weights then never move.
    """
    for name, parameter in lora_parameters(hf):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.zero_()
            continue
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)
        bound = parameter.shape[1] ** -0.5
        values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.data.copy_(values)


def restore(hf: HfModel, folder: Path) -> None:
    """An exported adapter's weights onto the model's, in fp32, bit for bit. Errors: CaiError(CORRUPT), no fit."""
    theirs = _tensors(folder)
    ours = {name.replace(f".{NAME}.", "."): parameter for name, parameter in lora_parameters(hf)}
    odd = sorted(set(theirs) ^ set(ours)) or [n for n, p in ours.items() if theirs[n].shape != p.shape]
    if odd:
        raise CaiError(
            f"{folder}: this adapter does not fit the recipe's [lora] ({odd[0]}). Remove it and its training folder.",
            errors.CORRUPT,
        )
    for name, parameter in ours.items():
        parameter.requires_grad_(True)
        parameter.data = theirs[name].float().to(parameter.device)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CaiError(f"{folder}: the adapter cannot be read: {error}. Train it anew.", errors.CORRUPT) from None


def require_fp32(hf: HfModel) -> None:
    """Every trained tensor is fp32, and only the adapter trains. Errors: CaiError(QUALITY)."""
    trained = [(name, p.dtype) for name, p in hf.named_parameters() if p.requires_grad]
    wrong = [f"{name} is {str(dtype).removeprefix('torch.')}" for name, dtype in trained if dtype != torch.float32]
    other = [name for name, _ in trained if "lora_" not in name]
    if wrong or other or not trained:
        what = wrong[0] if wrong else f"{other[0]} would train" if other else "nothing would train"
        raise CaiError(
            f"lora: adapter weights must train in fp32 and alone: {what}. Install the pinned versions (make setup).",
            errors.QUALITY,
        )


def require_sound(hf: HfModel, start: Path | None = None) -> None:
    """Before export: all tensors finite, some B not zero, some tensor not `start`'s. Errors: CaiError(QUALITY)."""
    tensors = list(lora_parameters(hf))
    broken = [name for name, p in tensors if not bool(torch.isfinite(p).all())]
    if broken:
        raise CaiError(f"adapter: {broken[0]} is not finite; nothing was exported", errors.QUALITY)
    if not any(bool(p.any()) for name, p in tensors if "lora_B" in name):
        raise CaiError("adapter: every lora_B is zero, training moved nothing; nothing was exported", errors.QUALITY)
    if start is not None:
        before = _tensors(start)
        if all(torch.equal(p.detach().cpu(), before[name.replace(f".{NAME}.", ".")]) for name, p in tensors):
            raise CaiError(f"adapter: DPO left {start.name} as it was, training moved nothing", errors.QUALITY)


def export(hf: HfModel, target: Path, base_name: str) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT writes them, published by one rename."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    beside = target.with_name(f".{target.name}.new")
    state = get_peft_model_state_dict(hf, adapter_name=NAME, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = copy.deepcopy(hf.peft_config[NAME])
    config.inference_mode, config.base_model_name_or_path = True, base_name
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_file(state, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(beside))
    except Exception as error:  # safetensors wraps what the disk said
        shutil.rmtree(beside, ignore_errors=True)
        raise CaiError(f"{target}: writing the adapter failed: {error}. Free space and resume.", errors.IO) from None
    path = beside / "adapter_config.json"
    values = {k: sorted(v) if _names(v) else v for k, v in json.loads(path.read_text()).items()}  # PEFT keeps sets
    write_atomic(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
    publish(beside, target)


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
