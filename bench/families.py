"""Families that run natively, against static batches of the same, at real shapes with random weights; a guard's work.

Weights are made on the card, layer by layer, and quantised to NF4 (a guard's stay bf16), so no file is written. Both
engines get the same requests (bench/shapes.py). Natively they are drawn twice, since kernels are compiled and graphs
captured the first time; static batches draw a few short rows first. `guard`: a Qwen3Guard of 4B on `--rows` exchanges
(a pair has two), 400 template tokens and texts of 60 and 20-400, a verdict of three labels and a refusal; in static
batches two passes over the whole prompt as before, natively one row behind the shared template, 64 rows at a time.
`--layers`: fewer of them, where a ratio is asked: both engines' time goes with their number, but for the head and, of
a native step, the host's part, which weighs more then: the ratio of fewer layers is the lower one.

    python bench/families.py qwen3-14b --rows 96 --layers 20 --out families-qwen3-14b.json
    python bench/families.py guard --rows 2000 --out guard-4b.json
    python bench/families.py tiny --rows 6 --scale 0.1                              (any machine: seconds)
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import SEED, STAGES, stage_requests

from cai.engine import ScoreRequest

WIDE = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}
TINY = {  # for dry runs on any machine; its vocabulary holds the ids that the benches draw
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 41000},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
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
    "qwen2-32b": ("Qwen2Config", {**WIDE, "intermediate_size": 27648, "num_hidden_layers": 64, "vocab_size": 152064}),
    "llama31-32b": (  # the same sizes: what differs is Llama 3.1's own, its rotary embedding and no biases
        "LlamaConfig",
        {**WIDE, "intermediate_size": 27648, "num_hidden_layers": 64, "vocab_size": 152064, "rope_parameters": LLAMA3},
    ),
    "tiny": ("Qwen3Config", {**TINY, "head_dim": 32}),
    "tiny-olmo2": ("Olmo2Config", TINY),
    "tiny-guard": ("Qwen3Config", {**TINY, "head_dim": 32, "tie_word_embeddings": True}),
    "tiny-llama31": ("LlamaConfig", {**TINY, "rope_parameters": LLAMA3}),
    "judge-13b": (  # HarmBench's classifier
        "LlamaConfig",
        {
            **{"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
            **{"num_key_value_heads": 40, "vocab_size": 32000},
        },
    ),
    "tiny-judge": ("LlamaConfig", {**TINY, "num_key_value_heads": 4}),
}


GUARDS = ("guard", "tiny-guard", "judge-13b", "tiny-judge")  # in bf16, asked about exchanges


class Numbers:
    """Forced lengths need no text."""

    def decode(self, ids: Any) -> str:
        return ""


def made(name: str, device: str, layers: int = 0) -> Any:
    """The model with random weights (`layers` of them, 0: all); its projections in NF4 on a GPU, but for a guard's."""
    import torch
    import transformers

    kind, shape = SHAPES[name]
    shape = {**shape, "num_hidden_layers": min(layers or 10**9, shape["num_hidden_layers"])}
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
            if device == "cuda" and name not in GUARDS:
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
                linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            made.bias = linear.bias
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, made.to("cuda"))


def cap(gigabytes: float) -> None:
    """This process takes at most so many 10^9 bytes of the card (0: all of it)."""
    import torch

    if gigabytes and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def drawn(engine: Any, rows: int, vocab: int, scale: float, stages: Sequence[str]) -> dict[str, float]:
    """Useful tokens/s of each stage and of all, when everything is compiled."""
    found, total, seconds = {}, 0, 0.0
    if engine.name == "static":
        for request in stage_requests(STAGES[0], 8, vocab, min(scale, 0.1)):
            engine.submit(request)
        assert len(list(engine.completions())) == 8
    for stage in (stage for stage in STAGES if stage.name in stages):
        for _ in range(1 if engine.name == "static" else 2):
            began = time.monotonic()
            for request in stage_requests(stage, rows, vocab, scale):
                engine.submit(request)
            tokens = sum(len(done.token_ids) for done in engine.completions())
            spent = time.monotonic() - began
        found[stage.name] = round(tokens / spent, 1)
        total, seconds = total + tokens, seconds + spent
    return found | {"all": round(total / seconds, 1), "tokens": total, "seconds": round(seconds, 1)}


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
    """Exchanges a second, when everything is compiled."""
    for requests in passes:
        few = requests[: min(len(requests), 160 if engine.name == "static" else len(requests))]
        assert len(list(engine.score(few))) == len(few)
    began = time.monotonic()
    for requests in passes:
        assert len(list(engine.score(requests))) == len(requests)
    seconds = time.monotonic() - began
    return {"exchanges_per_s": round(count / seconds, 2), "seconds": round(seconds, 2)}


def measured(name: str, options: argparse.Namespace, holder: Any) -> dict[str, Any]:
    """One engine over the requests of the shape."""
    import torch

    from cai.engine.build import make_engine

    guard, vocab, cuda = options.shape in GUARDS, holder.hf.config.vocab_size, holder.device == "cuda"
    rows = 64 if guard and name == "native" and cuda else 0  # as `models/auxiliary.py` asks for
    if name == "static" and cuda and not guard:
        rows = options.rows
    began = time.monotonic()
    engine = make_engine(name, holder, batch_size=rows)
    set_up = round(time.monotonic() - began, 1)
    if guard:
        passes = guard_rows(options.rows, vocab, options.scale, together=name == "native")
        result: dict[str, Any] = judged(engine, passes, options.rows)
    else:
        result = drawn(engine, options.rows, vocab, options.scale, options.stages)
    result |= {"batch": engine.stats.batch_size, "linears": engine.stats.extra.get("linears", "")}
    result |= {"set_up_s": set_up, "out_of_memory": engine.stats.out_of_memory}
    if cuda:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    engine.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has (0: all)")
    parser.add_argument("--stages", nargs="+", default=["instructions", "answers"])
    parser.add_argument("--cap-gb", type=float, default=0.0, help="of the card's memory, 0 for all of it")
    parser.add_argument("--engines", nargs="+", default=["native", "static"], choices=("native", "static"))
    parser.add_argument("--out", default="families.json")
    options = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cap(options.cap_gb)
    model = made(options.shape, device, options.layers)
    holder = SimpleNamespace(hf=model, tokenizer=Numbers(), device=device)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "shape": options.shape}
    result |= {"layers": [model.config.num_hidden_layers, SHAPES[options.shape][1]["num_hidden_layers"]]}
    result |= {"rows": options.rows, "scale": options.scale, "cap_gb": options.cap_gb}
    for name in options.engines:
        result[name] = measured(name, options, holder)
        print(json.dumps({name: result[name]}), flush=True)
        if "native" in result and "static" in result:
            key = "exchanges_per_s" if options.shape in GUARDS else "all"
            result["native_over_static"] = round(result["native"][key] / result["static"][key], 2)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.shape}: native / static {result.get('native_over_static')}, layers {result['layers']}")


if __name__ == "__main__":
    main()
