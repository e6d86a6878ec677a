"""Families that run natively, against static batches of the same, at real shapes with random weights; a guard's work.

Weights are made on the card, layer by layer, and quantised to NF4 (a guard's stay bf16), so no file is written. Both
engines get the same requests (bench/shapes.py) and draw them twice: kernels are compiled and graphs captured the first
time. `guard`: rows of a Qwen3Guard of 4B, 400 template tokens and texts of 60 and 20-400, a verdict of three labels and
a refusal; in static batches two passes over the whole prompt as before, natively one row behind the shared template.

    python bench/families.py qwen3-14b --rows 96 --out families-qwen3-14b.json      (an H100: about 60 s)
    python bench/families.py olmo2-32b --rows 96 --out families-olmo2-32b.json      (about 150 s)
    python bench/families.py guard --rows 500 --out guard-4b.json                   (about 60 s)
    python bench/families.py tiny --rows 6 --scale 0.1                              (any machine: seconds)
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import SEED, STAGES, stage_requests

from cai.engine import ScoreRequest

WIDE = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-14b": (
        "Qwen3Config",
        {**WIDE, "intermediate_size": 17408, "num_hidden_layers": 40, "head_dim": 128, "vocab_size": 151936},
    ),
    "olmo2-32b": ("Olmo2Config", {**WIDE, "intermediate_size": 27648, "num_hidden_layers": 64, "vocab_size": 100352}),
    "olmo3-32b": ("Olmo3Config", {**WIDE, "intermediate_size": 27648, "num_hidden_layers": 64, "vocab_size": 100352}),
    "gemma3-27b": (
        "Gemma3TextConfig",
        {
            **{"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32},
            **{"num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024},
            "vocab_size": 262144,
        },
    ),
    "guard": (
        "Qwen3Config",
        {
            **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
        },
    ),
    "tiny": (
        "Qwen3Config",
        {
            **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2000},
        },
    ),
}


class Numbers:
    """Forced lengths need no text."""

    def decode(self, ids: Any) -> str:
        return ""


def made(name: str, device: str) -> Any:
    """The model with random weights; its projections in NF4 on a GPU, but for the guard's."""
    import torch
    import transformers

    kind, shape = SHAPES[name]
    config = getattr(transformers, kind)(**shape, max_position_embeddings=4096)
    config._attn_implementation = "sdpa"
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        shallow.layer_types = config.layer_types[:1]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(shallow).to(dtype).eval()
        body = model.model
        if getattr(config, "layer_types", None):  # rotary tables of every kind of layer
            body.rotary_emb = type(body.rotary_emb)(config)
        kind_of_layer = type(body.layers[0])
        body.layers = torch.nn.ModuleList()
        for index in range(config.num_hidden_layers):
            layer = kind_of_layer(config, index).to(dtype).eval()
            if device == "cuda" and name != "guard":
                quantise(layer)
            body.layers.append(layer)
    for holder in (model, body):
        holder.config = config
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def quantise(layer: Any) -> None:
    """Its projections in NF4, as a 4-bit load has them."""
    import bitsandbytes as bnb
    import torch

    for name, linear in list(layer.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            made = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, made.to("cuda"))


def drawn(engine: Any, rows: int, vocab: int, scale: float) -> dict[str, float]:
    """Useful tokens/s of instructions and of answers, the second time."""
    found = {}
    for stage in STAGES[:2]:
        for _ in range(2):
            requests = stage_requests(stage, rows, vocab, scale)
            began = time.monotonic()
            for request in requests:
                engine.submit(request)
            tokens = sum(len(done.token_ids) for done in engine.completions())
            found[stage.name] = round(tokens / (time.monotonic() - began), 1)
    return found


def guard_rows(count: int, vocab: int, scale: float, *, together: bool) -> list[list[ScoreRequest]]:
    """The passes over `count` exchanges: verdict, then refusal; or both in one."""
    draw = random.Random(SEED)
    ids = lambda n: tuple(draw.randrange(10, min(vocab, 40000)) for _ in range(max(2, round(n * scale))))  # noqa: E731
    template, lines = ids(400), tuple(range(1, 10))
    verdicts, refusals = [], []
    for _ in range(count):
        head = template + ids(60) + ids(draw.randrange(20, 400))
        verdicts += [(head, label) for label in (11, 12, 13)]
        refusals += [(head + lines, word) for word in (14, 15)]
    if not together:
        return [[ScoreRequest(i, h, (t,)) for i, (h, t) in enumerate(part)] for part in (verdicts, refusals)]
    mixed = [x for i in range(count) for x in (*refusals[2 * i : 2 * i + 2], *verdicts[3 * i : 3 * i + 3])]
    return [[ScoreRequest(i, head, (token,), len(template)) for i, (head, token) in enumerate(mixed)]]


def judged(engine: Any, passes: list[list[ScoreRequest]], count: int) -> dict[str, float]:
    """Exchanges a second, the second time."""
    seconds = 0.0
    for _ in range(2):
        began = time.monotonic()
        for requests in passes:
            assert len(list(engine.score(requests))) == len(requests)
        seconds = time.monotonic() - began
    return {"exchanges_per_s": round(count / seconds, 2), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--engines", nargs="+", default=["native", "static"], choices=("native", "static"))
    parser.add_argument("--out", default="families.json")
    options = parser.parse_args()
    import torch

    from cai.engine.build import make_engine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = made(options.shape, device)
    vocab, holder = model.config.vocab_size, SimpleNamespace(hf=model, tokenizer=Numbers(), device=device)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "shape": options.shape}
    for name in options.engines:
        whole = name == "static" and device == "cuda" and options.shape != "guard"
        engine = make_engine(name, holder, batch_size=options.rows if whole else 0)
        if options.shape == "guard":
            passes = guard_rows(options.rows, vocab, options.scale, together=name == "native")
            result[name] = judged(engine, passes, options.rows)
        else:
            result[name] = drawn(engine, options.rows, vocab, options.scale)
        result[name] |= {"batch": engine.stats.batch_size, "linears": engine.stats.extra.get("linears", "")}
        engine.close()
        print(json.dumps({name: result[name]}), flush=True)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
