"""Products of a decoder layer in 8 bits against bf16: time at several numbers of tokens, under load, and error.

The shapes are Qwen2.5-32B's four groups of projections; times are of 64 layers, in ms, from a CUDA graph. "rounding" is
what bringing the tokens to 8 bits takes. Errors are relative to the float64 product of the bf16 values: of random
inputs, and of inputs in which four channels stand out a hundredfold.

    python bench/products.py --out products.json              (a card with 8-bit products; half a minute)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cai.engine.native import int8
from cai.engine.native.fp8 import product, round_rows

SHAPES = ((7168, 5120), (5120, 5120), (55296, 5120), (5120, 27648))  # q/k/v, o, gate/up, down
LAYERS = 64
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 4096)
LOADED_MS = 3000  # how long the card is kept busy before a figure "under load"


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def times(weights: list[torch.Tensor], tokens: int) -> dict[str, float]:
    """ms of all layers: bf16, the 8-bit product, the rounding before it, and both ways after seconds of load."""
    inputs = [torch.randn(tokens, w.shape[1], device="cuda", dtype=torch.bfloat16) for w in weights]
    rounded = [(round_rows(x), round_rows(w)) for x, w in zip(inputs, weights, strict=True)]
    integers = [int8.round_rows(w) for w in weights]
    ways: dict[str, Callable[[], Any]] = {
        "bf16": lambda: [F.linear(x, w) for x, w in zip(inputs, weights, strict=True)],
        "fp8": lambda: [product(x, w, None) for x, w in rounded],
        "rounding": lambda: [round_rows(x) for x in inputs],
        "fp8 with rounding": lambda: [
            product(round_rows(x), w, None) for x, (_, w) in zip(inputs, rounded, strict=True)
        ],
        "int8 with rounding": lambda: [
            int8.product(int8.round_rows(x), w, None) for x, w in zip(inputs, integers, strict=True)
        ],
        "int8, down in bf16": lambda: [
            int8.product(int8.round_rows(x), w8, None) if w is not weights[-1] else F.linear(x, w)
            for x, w, w8 in zip(inputs, weights, integers, strict=True)
        ],
    }
    found = {name: milliseconds(run) for name, run in ways.items()}
    for name in ("bf16", "fp8 with rounding", "int8, down in bf16"):
        found[f"{name}, under load"] = milliseconds(ways[name], int(LOADED_MS / found[name]))
    return {name: round(ms * LAYERS, 2) for name, ms in found.items()}


def errors(weights: list[torch.Tensor]) -> dict[str, list[float]]:
    kinds = ("", ", channels stand out")
    found: dict[str, list[float]] = {way + kind: [] for kind in kinds for way in ("bf16", "fp8", "int8")}
    for whole in weights:
        w = whole[:512]
        for kind in kinds:
            x = torch.randn(64, w.shape[1], device="cuda")
            if kind:
                x[:, :4] *= 100
                x *= torch.randn_like(x).exp()
            x = x.bfloat16()
            exact = x.double() @ w.double().T
            eight = {"fp8": product(round_rows(x), round_rows(w), None)}
            eight["int8"] = int8.product(int8.round_rows(x), int8.round_rows(w), None)
            for name, made in {"bf16": F.linear(x, w), **eight}.items():
                found[name + kind].append(round(((made.double() - exact).norm() / exact.norm()).item(), 5))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="products.json")
    options = parser.parse_args()
    weights = [torch.randn(o, k, device="cuda", dtype=torch.bfloat16) * 0.02 for o, k in SHAPES]
    result: dict[str, Any] = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["ms"] = {str(tokens): times(weights, tokens) for tokens in TOKENS}
    result["error"] = errors(weights)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}, torch {result['torch']}: ms of {LAYERS} layers")
    names = list(result["ms"]["1"])
    print(f"| tokens | {' | '.join(names)} |\n{'| --- ' * (len(names) + 1)}|")
    for tokens, row in result["ms"].items():
        print(f"| {tokens} | {' | '.join(str(row[name]) for name in names)} |")
    print(f"relative errors by shape {SHAPES}:", json.dumps(result["error"]))


if __name__ == "__main__":
    main()
