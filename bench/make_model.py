"""Write a random-weight checkpoint with a real model's exact shapes, quantised to NF4, for speed and memory work.

Random weights cost what real ones cost. Each layer is drawn, quantised (NF4, double quantisation, blocks of 64) and
written; nothing but one layer is held at a time, so 32B shapes need 20 GB of disk and little memory. The folder loads
like any pre-quantised model: `model.name = "<folder>"`.

    python bench/make_model.py 32b /dev/shm/random-32b          (a GPU: 30 s)
    python bench/make_model.py tiny /tmp/random-tiny            (any machine: seconds)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "32b": {"hidden": 5120, "ffn": 27648, "layers": 64, "heads": 40, "kv_heads": 8, "vocab": 152064},
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},  # Llama Guard 3's
    "7b": {"hidden": 3584, "ffn": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocab": 152064},
    "small": {"hidden": 1024, "ffn": 4096, "layers": 8, "heads": 8, "kv_heads": 2, "vocab": 50048},
    "tiny": {"hidden": 128, "ffn": 256, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 50048},
}
SHARD_BYTES = 4 * 2**30


def config(shape: dict[str, int], quantization: str) -> dict[str, Any]:
    """Qwen2.5's config.json for these shapes."""
    values: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocab"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if quantization == "nf4":
        values["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
        }
    return values


class Shards:
    """safetensors files of about 4 GB and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pending, self.size = folder, {}, 0
        self.where: dict[str, int] = {}
        self.count = self.total = 0

    def add(self, tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            self.pending[name] = tensor.contiguous().cpu()
            self.size += tensor.numel() * tensor.element_size()
        if self.size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        from safetensors.torch import save_file

        if not self.pending:
            return
        self.count += 1
        save_file(self.pending, self.folder / f"part-{self.count}.safetensors", metadata={"format": "pt"})
        self.where |= dict.fromkeys(self.pending, self.count)
        self.total += self.size
        self.pending, self.size = {}, 0

    def close(self) -> None:
        self.flush()
        names = {n: f"model-{n:05d}-of-{self.count:05d}.safetensors" for n in range(1, self.count + 1)}
        for number, name in names.items():
            (self.folder / f"part-{number}.safetensors").rename(self.folder / name)
        index = {"metadata": {"total_size": self.total}, "weight_map": {k: names[n] for k, n in self.where.items()}}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))


def linear(name: str, rows: int, columns: int, quantization: str, draw: Any) -> dict[str, Any]:
    """One projection's tensors as bitsandbytes serialises them (or plain bf16)."""
    weight = draw(rows, columns)
    if quantization != "nf4":
        return {f"{name}.weight": weight}
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {f"{name}.weight": packed} | {f"{name}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}


def layer(index: int, shape: dict[str, int], quantization: str, draw: Any) -> dict[str, Any]:
    import torch

    hidden, width = shape["hidden"], shape["hidden"] // shape["heads"]
    kv = shape["kv_heads"] * width
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (shape["ffn"], hidden),
        "mlp.up_proj": (shape["ffn"], hidden),
        "mlp.down_proj": (hidden, shape["ffn"]),
    }
    prefix, tensors = f"model.layers.{index}.", {}
    for name, (rows, columns) in sizes.items():
        tensors |= linear(prefix + name, rows, columns, quantization, draw)
        if name[-6:] in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}{name}.bias"] = draw(1, rows)[0]
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def write(shape: dict[str, int], folder: Path, *, quantization: str = "nf4", tokenizer: Path | None = None) -> float:
    """Make the checkpoint; returns its size in GB. The folder appears under its name when it is whole."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int) -> Any:
        values = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        return values.mul_(0.02)

    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shards = Shards(beside)
    shards.add({"model.embed_tokens.weight": draw(shape["vocab"], shape["hidden"])})
    for index in range(shape["layers"]):
        shards.add(layer(index, shape, quantization, draw))
    shards.add({"model.norm.weight": torch.ones(shape["hidden"], dtype=torch.bfloat16)})
    shards.add({"lm_head.weight": draw(shape["vocab"], shape["hidden"])})
    shards.close()
    (beside / "config.json").write_text(json.dumps(config(shape, quantization), indent=2))
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    (beside / "generation_config.json").write_text(json.dumps(generation))
    for path in (tokenizer or embedded_tokenizer()).iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, beside / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return shards.total / 1e9


def embedded_tokenizer() -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cai.models import embedded

    return embedded.folder()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantization", choices=("nf4", "bf16"), default="nf4")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer files (default: the embedded model's)")
    options = parser.parse_args()
    began = time.monotonic()
    size = write(SHAPES[options.shape], options.folder, quantization=options.quantization, tokenizer=options.tokenizer)
    print(
        f"{options.folder}: {options.shape} {options.quantization}, {size:.2f} GB in {time.monotonic() - began:.1f} s"
    )


if __name__ == "__main__":
    main()
