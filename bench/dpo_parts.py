"""The packed DPO step taken apart: seconds a pair with each part of cai/training switched on and off, in one process.

A model made on the card (bench/families.py), one micro-batch of made pairs, forward and backward through the packed
pass; the baseline is measured first and again last, since clocks drift. Beside the times: how far log-probabilities
and gradients lie from the baseline's, and the peak. Then the kernels of one baseline step and one of the fastest.

    python bench/dpo_parts.py made:qwen2-32b/16 --out dpo-parts.json               (a GPU: about a minute)
    python bench/dpo_parts.py made:qwen2-32b/64 --cap-gb 80 --only all --out dpo-parts-64.json
    python bench/dpo_parts.py made:tiny-llama31/2 --small                          (a CPU: every line, no figure)
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from dpo_kernels import kernel_times  # noqa: E402
from dpo_models import SEED, cap, made_model, make_rows  # noqa: E402

RANK, ALPHA = 32, 64
SWITCHES = {  # the module constant behind each
    "first": "linears.FIRST",
    "stack": "linears.STACK",
    "fold": "linears.FOLD",
    "ahead": "frozen.AHEAD",
    "head": "kernels.HEAD",
    "gather": "attention.GATHER",
    "factors": "factor_kernel.FACTORS",
}
ALL = tuple(SWITCHES)
VARIANTS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    **{f"{name} alone": (name,) for name in ALL if name != "factors"},
    "stack + fold": ("stack", "fold"),
    "stack + factors": ("stack", "factors"),  # which takes gate and up as one
    **{f"all but {name}": tuple(n for n in ALL if n != name) for name in ALL},
    "all": ALL,
}


def switch(on: tuple[str, ...]) -> None:
    for name, place in SWITCHES.items():
        module, _, constant = place.partition(".")
        setattr(importlib.import_module(f"cai.training.{module}"), constant, name in on)


class Step:
    """One micro-batch, forward and backward, through a packed pass of the present switches."""

    def __init__(self, model: Any, batch: Any) -> None:
        from cai.training.packed import PackedForward

        self.model, self.batch, self.forward = model, batch, PackedForward()

    def __call__(self) -> Any:
        import torch

        from cai.training.loss import sequence_logps

        sums_2B, _ = sequence_logps(self.model.hf, self.batch, self.forward)
        (sums_2B[0] - sums_2B[1]).mean().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return sums_2B.detach()

    def gradients(self) -> Any:
        """Of the step that was run last, on the host; they are dropped here."""
        import torch

        from cai.training import adapter

        found = [p.grad.flatten() for _, p in adapter.lora_parameters(self.model.hf)]
        flat = torch.cat(found).cpu()
        self.model.hf.zero_grad(set_to_none=True)
        return flat


def measure(model: Any, batch: Any, on: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    import torch

    switch(on)
    gc.collect()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, times = Step(model, batch), []
    began = time.monotonic()
    sums, grads = step(), step.gradients()
    first = time.monotonic() - began
    for _ in range(options.repeats + 1):  # the one more warms up
        began = time.monotonic()
        step()
        times.append(time.monotonic() - began)
        model.hf.zero_grad(set_to_none=True)
    return {
        "on": list(on),
        "seconds_a_pair": statistics.median(times[1:]) / options.pairs,
        "least": min(times[1:]) / options.pairs,
        "first_step": first,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "sums": sums.flatten().tolist(),
        "grads": grads,
    }


def distances(row: dict[str, Any], base: dict[str, Any]) -> None:
    """Largest difference of a sum of log-probabilities, in nats; of the gradient, as a share."""
    grads, other = row["grads"], base["grads"]
    row["nats"] = max(abs(a - b) for a, b in zip(row["sums"], base["sums"], strict=True))
    row["gradient"] = float((grads - other).norm() / other.norm())


def prepared(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model in LoRA mode, its B not zero; the micro-batch on its device)"""
    import torch
    from families import quantise

    from cai.recipe.settings import LoraSection
    from cai.training import adapter
    from cai.training.attention import packed_batch
    from cai.training.packed import refusal
    from cai.training.scoring import to_device

    model = made_model(options.model)
    if model.device.type == "cpu":
        for layer in model.hf.model.layers:
            quantise(layer, "cpu")
    model.to_lora(LoraSection(rank=RANK, alpha=ALPHA), SEED)
    model.mode("train")
    cap(options.cap_gb)
    if why := refusal(model.hf):
        raise SystemExit(f"{options.model}: no packed pass ({why})")
    torch.manual_seed(SEED)
    for name, parameter in adapter.lora_parameters(model.hf):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.002)
    rows = make_rows(options.pairs, options.tokens, options.prompt)
    return model, to_device(packed_batch(rows), model.device)


def profiled(model: Any, batch: Any, on: tuple[str, ...], title: str) -> None:
    """The 20 kernels of one step that take most time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    switch(on)
    step = Step(model, batch)
    step()
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        step()
    model.hf.zero_grad(set_to_none=True)
    time_of = lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total  # noqa: E731
    events = sorted(record.key_averages(), key=time_of, reverse=True)
    print(f"\n{title}: {sum(map(time_of, events)) / 1000:.1f} ms of kernels")
    print("| ms | calls | kernel |\n| --- | --- | --- |")
    for event in events[:20]:
        print(f"| {time_of(event) / 1000:.2f} | {event.count} | {event.key[:90]} |")


def show(rows: dict[str, dict[str, Any]]) -> None:
    base = rows["baseline"]["seconds_a_pair"]
    print("| variant | s a pair | of baseline | least | first step s | peak GiB | nats | gradient |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, r in rows.items():
        share = r["seconds_a_pair"] / base
        print(
            f"| {name} | {r['seconds_a_pair']:.4f} | {share:.3f} | {r['least']:.4f} | {r['first_step']:.1f} | "
            f"{r['peak_reserved_gib']:.1f} | {r['nats']:.4f} | {r['gradient']:.1e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="made:SHAPE/LAYERS")
    parser.add_argument("--tokens", type=int, default=1160)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cap-gb", type=float, default=0.0)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="beside the baseline")
    parser.add_argument("--small", action="store_true", help="short pairs, one repeat: for no figure")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.small:
        options.tokens, options.prompt, options.pairs, options.repeats = 48, 8, 2, 1
    import torch

    model, batch = prepared(options)
    rows: dict[str, dict[str, Any]] = {}
    machine = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    for name in ["baseline", *(n for n in options.only if n != "baseline"), "baseline again"]:
        try:
            row = measure(model, batch, VARIANTS[name.removesuffix(" again")], options)
        except Exception as error:  # a variant that fails does not cost the others
            model.hf.zero_grad(set_to_none=True)
            print(f"{name}: failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        distances(row, rows.get("baseline", row))
        if name != "baseline":
            del row["grads"]
        rows[name] = row
        print(f"{name}: {row['seconds_a_pair']:.4f} s a pair", flush=True)
    rows["baseline"].pop("grads")
    show(rows)
    found: dict[str, Any] = {
        "machine": machine,
        "torch": torch.__version__,
        "model": options.model,
        "tokens": len(batch["ids_T"]),
    }
    found |= {"pairs": options.pairs, "variants": rows, "kernels": {}}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.no_profile:
        return
    fastest = min(rows, key=lambda name: rows[name]["seconds_a_pair"])
    for name in dict.fromkeys(["baseline", fastest]):
        profiled(model, batch, tuple(rows[name]["on"]), f"{name}, {machine}")
    found["kernels"] = kernel_times(model, len(batch["ids_T"]))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
