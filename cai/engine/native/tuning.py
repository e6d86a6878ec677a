"""Which way the linears are computed on this card with this memory: measured in seconds at the start, said with reason.

Owns the choice for each number of tokens and the bf16 copies. What was measured is kept for the next start (`timings`).
A kernel that this card cannot run, or whose product is not the dequantised one's, is never chosen. The recipe may force
the way: "bnb" (modules as loaded), "bf16" (copies), "fused" (the NF4 kernels, nothing copied), "auto" (the fastest),
"fp8" (8-bit copies for drawing; scores and prefixes by the fastest of the others).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from triton.errors import TritonError

from cai.engine.memory import free_gpu_bytes
from cai.engine.native import timings
from cai.engine.native.cache import reserve_bytes
from cai.engine.native.graphs import capture, once
from cai.engine.native.linears import Group, Shared, Way, base_layer, is_nf4
from cai.errors import RESUMABLE, CaiError

TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 4096)  # numbers of tokens that are measured
KV_SHARE = 0.75  # of the memory left by weights goes to the KV cache first when copies do not fit whole
KV_BYTES_WANTED = 40 << 30  # copies may not push the cache below this
KV_BYTES_NEEDED = 4 << 30  # 8-bit copies leave at least this
FUSED_TOKENS = 512  # above it the weights would be decoded again and again
AGREE_WITHIN = 1e-2  # relative; both round their weights to bf16 alike and differ by the order of sums
FP8_AGREES_WITHIN = 0.1  # 0.038 was seen on random inputs


def choose(decoder: Any, linears: str) -> str:
    """Set up the ways that `linears` allows, measure them, put the fastest in place, and say why it is."""
    groups = [group for layer in decoder.layers for group in layer.linears.groups]
    other = next((module for group in groups for module in group.modules if not is_nf4(module)), None)
    if linears == "bnb" or other is not None:
        kind = type(base_layer(other or groups[0].modules[0])).__name__
        if linears == "fp8":
            text = f"and not all projections are that (a {kind}, or other blocks)"
            raise CaiError(f'engine.linears: "fp8" is made of NF4 weights in blocks of 64, {text}. Use "auto".')
        return f"linears: the loaded modules ({kind}) as they are"
    shared = Shared(rounding=linears == "fp8")
    for group in groups:
        group.unpack(shared, decoder.dtype)
    copied = 0 if linears in ("fused", "fp8") else copy_layers(decoder, must=linears == "bf16")
    if copied < len(decoder.layers):
        shared.buffer = torch.empty(max(group.numel for group in groups), dtype=decoder.dtype, device=decoder.device)
    if linears == "fp8":
        round_layers(decoder, groups)
    facts = timings.facts(decoder, copied, linears)
    known = timings.recall(facts, TOKENS)
    times = known or measure(decoder, copied, linears)
    if not known and not any(map(math.isnan, itertools.chain(*times.values()))):
        timings.remember(facts, times, TOKENS)
    ways = fastest({way: row for way, row in times.items() if way != "fp8"})

    def way_for(tokens: int) -> Way:
        if shared.drawing and shared.rounding:  # whatever the number of rows: a row's text does not depend on it
            return "fp8"
        return ways[min(bisect.bisect_left(TOKENS, tokens), len(TOKENS) - 1)]

    shared.choose = way_for
    seen = " (measured at an earlier start)" if known else ""
    drawn = "drawing: fp8 (8-bit products); the rest: " if linears == "fp8" else ""
    return drawn + reason(ways, times, f"{copied}/{len(decoder.layers)}") + seen


def fastest(times: Mapping[Way, Sequence[float]]) -> list[Way]:
    """The way for each of TOKENS: the loaded modules where no other could be timed."""
    ways: list[Way] = []
    for i in range(len(TOKENS)):
        timed = {way: row[i] for way, row in times.items() if math.isfinite(row[i])}
        ways.append(min(timed, key=lambda way: timed[way]) if timed else "module")
    return ways


def copy_layers(decoder: Any, must: bool) -> int:
    """Copy as many layers to bf16 as leave room for the KV cache; the number copied."""
    per_layer = sum(group.numel for group in decoder.layers[0].linears.groups) * decoder.dtype.itemsize
    room = free_gpu_bytes(decoder.device) - reserve_bytes(decoder.device)
    if must and room < per_layer * len(decoder.layers) * 1.05:
        need = per_layer * len(decoder.layers) / 2**30
        raise CaiError(f'engine.linears: "bf16" needs {need:.0f} GiB, {room / 2**30:.0f} are free. Use "auto".')
    budget = room if must else room - min(KV_BYTES_WANTED, int(KV_SHARE * room))
    copied = min(len(decoder.layers), int(budget // per_layer))
    for layer in decoder.layers[:copied]:
        for group in layer.linears.groups:
            rows = sum(base_layer(module).out_features for module in group.modules)
            out = torch.empty(
                rows, base_layer(group.modules[0]).in_features, dtype=decoder.dtype, device=decoder.device
            )
            group.copy = group.dequantised(out)
    return copied


def round_layers(decoder: Any, groups: Sequence[Group]) -> None:
    """8-bit copies of all linears beside the NF4 weights."""
    from cai.engine.native import fp8

    fp8.require(decoder.device, decoder.dtype)
    need = sum(group.numel for group in groups)
    room = free_gpu_bytes(decoder.device) - reserve_bytes(decoder.device) - KV_BYTES_NEEDED
    if room < need:
        text = f"{need / 2**30:.1f} GiB for 8-bit copies, {max(0, room) / 2**30:.1f} are free beside the KV cache"
        raise CaiError(f'engine.linears: "fp8" needs {text}. Use "auto".')
    first = groups[:4]
    try:
        for group in groups:
            group.fp8 = fp8.round_rows(group.dequantised())
        right = all(agrees(first, _inputs(first, tokens, decoder), "fp8", FP8_AGREES_WITHIN) for tokens in (1, 16, 512))
        for group in first:  # as many tokens as a prefill has: that it runs
            group.base(_inputs([group], TOKENS[-1], decoder)[base_layer(group.modules[0]).in_features], "fp8")
    except torch.OutOfMemoryError:
        raise CaiError('engine.linears: "fp8": out of memory over its copies. Use "auto".', RESUMABLE) from None
    except (RuntimeError, TritonError) as error:  # widths or a card that the product does not take
        raise CaiError(f'engine.linears: "fp8" cannot run here ({str(error).splitlines()[0]}). Use "auto".') from None
    if not right:
        raise CaiError('engine.linears: "fp8" gives wrong products on this card. Use "auto".')


def measure(decoder: Any, copied: int, linears: str) -> dict[Way, list[float]]:
    """Milliseconds of all layers' linears at each of TOKENS, by way, from two layers."""
    layers = decoder.layers
    plain = [g for layer in (layers[-1], layers[copied if copied < len(layers) else 0]) for g in layer.linears.groups]
    ways: list[Way] = ["fused", "dequant"] if copied < len(layers) else ["fused", "bf16"]
    if linears in ("auto", "fp8"):
        ways.append("module")
    if linears == "fp8":
        ways.append("fp8")
    times: dict[Way, list[float]] = {}
    for way in ways:
        times[way] = [_measure_way(plain, way, tokens, decoder) * len(layers) / 2 for tokens in TOKENS]
    return times


def _measure_way(groups: list[Group], way: Way, tokens: int, decoder: Any) -> float:
    """Milliseconds for the groups once; infinite for what this card cannot run."""
    if way == "fused" and tokens > FUSED_TOKENS:
        return float("inf")
    inputs = _inputs(groups, tokens, decoder)
    previous = groups[0].shared.choose
    groups[0].shared.choose = lambda count: way
    try:
        if way == "fused" and not agrees(groups, inputs, way, AGREE_WITHIN):
            return float("inf")
        return milliseconds(lambda: [g(inputs[base_layer(g.modules[0]).in_features]) for g in groups])
    except torch.OutOfMemoryError:  # not kept for the next start, which may find more memory
        return float("nan")
    except TritonError:  # a compiler that does not know the card
        return float("inf")
    finally:
        groups[0].shared.choose = previous


def _inputs(groups: Sequence[Group], tokens: int, decoder: Any) -> dict[int, torch.Tensor]:
    """Random inputs by width."""
    widths = {base_layer(group.modules[0]).in_features for group in groups}
    return {width: torch.randn(tokens, width, device=decoder.device).to(decoder.dtype) for width in widths}


def agrees(groups: Sequence[Group], inputs: Mapping[int, torch.Tensor], way: Way, within: float) -> bool:
    """The product is the dequantised weights', up to a share `within` of it."""
    for group in groups:
        x_TK = inputs[base_layer(group.modules[0]).in_features]
        made, plain = (torch.cat(group.base(x_TK, each), -1).float() for each in (way, "dequant"))
        if not (made - plain).norm() <= within * plain.norm():
            return False
    return True


def milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median time on the device, captured in a graph as a decode step is: launched one by one, a few rows would be
    timed at what the host takes (on an H200, 16 tokens through the NF4 kernels 59 ms instead of what they need)."""
    with torch.no_grad():
        once(run)
        graph, _ = capture(run)
    spans = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in spans)[repeats // 2]


def reason(ways: Sequence[Way], times: Mapping[Way, Sequence[float]], copied: str) -> str:
    """One line: what was chosen for how many rows, and the milliseconds that decided."""
    picked = ", ".join(f"<={tokens}: {way}" for tokens, way in zip(TOKENS, ways, strict=True))
    spent = ", ".join(f"{way} {row[TOKENS.index(256)]:.1f}" for way, row in times.items())
    return f"linears by tokens: {picked}; {copied} layers copied to bf16; ms at 256 tokens: {spent}"
