"""Which way the linears are computed on this card with this memory: measured in seconds at the start, said with reason.

Owns the choice for each number of tokens and the bf16 copies. What was measured is kept for the next start (`timings`).
A kernel that this card cannot run, or whose product is not the dequantised one's, is never chosen. The recipe may force
the way: "bnb" (modules as loaded), "bf16" (copies), "fused" (the NF4 kernels, nothing copied), "auto" (the fastest),
"fp8" and "int8" (8-bit copies for drawing; scores and prefixes by the fastest of the others). What is not NF4 stays as
loaded, group by group.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from triton.errors import TritonError

from cai.engine.foreign import HfModule
from cai.engine.memory import free_gpu_bytes
from cai.engine.native import timings
from cai.engine.native.cache import reserve_bytes
from cai.engine.native.graphs import capture, warm_up
from cai.engine.native.linears import ROUNDED, Group, Shared, Way, base_layer, is_nf4, rounding
from cai.errors import RESUMABLE, CaiError

if TYPE_CHECKING:
    from cai.engine.native.decoder import Decoder
    from cai.engine.native.families import Layer

TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 4096)  # numbers of tokens that are measured
KV_SHARE = 0.75  # of the memory left by weights goes to the KV cache first when copies do not fit whole
KV_BYTES_WANTED = 40 << 30  # copies may not push the cache below this
KV_BYTES_NEEDED = 4 << 30  # 8-bit copies leave at least this
FUSED_TOKENS = 512  # above it the weights would be decoded again and again
AGREE_WITHIN = 1e-2  # relative; both round their weights to bf16 alike and differ by the order of sums
AGREES_WITHIN: dict[Way, float] = {"fp8": 0.1, "int8": 0.05}  # 0.038 and 0.013 were seen on random inputs


def choose(decoder: Decoder, linears: str, beside: int = 0, wanted: int = KV_BYTES_WANTED) -> str:
    """Set up the ways that `linears` allows, measure them, put the fastest in place, and say why it is.

    `beside`: bytes that others will take of what is free; `wanted`: those of the KV cache before any copy.
    """
    for layer in decoder.layers:
        layer.linears.split(is_nf4)
    every = [group for layer in decoder.layers for group in layer.linears.groups]
    groups = [group for group in every if all(map(is_nf4, group.modules))]
    if linears == "bnb" or not groups:
        return as_loaded(every, linears)
    shared = Shared(rounding=cast(Way, linears) if linears in ROUNDED else None)
    for group in every:
        group.shared = shared
    for group in groups:
        group.unpack(shared, decoder.dtype)
    if not right_weights(groups[:4]):
        for group in every:
            group.drop()
        if shared.rounding:
            raise CaiError(
                f'engine.linears: "{linears}" is made of weights that come out wrong on this card. Use "bnb".'
            )
        return "linears: the loaded modules, since own dequantisation differs from bitsandbytes' on this card"
    copied = 0 if linears == "fused" or shared.rounding else copy_layers(decoder, linears == "bf16", beside, wanted)
    if copied < len(decoder.layers):
        shared.buffer = torch.empty(max(group.numel for group in groups), dtype=decoder.dtype, device=decoder.device)
    if shared.rounding:
        round_layers(decoder, shared.rounding, beside)
        if shared.rounding == "int8":  # what is not rounded, down_proj, is copied as far as the cache leaves room
            copied = copy_layers(decoder, False, beside, wanted)
    others = len(every) - len(groups)
    return set_ways(decoder, shared, copied, linears) + (f"; {others} groups are not NF4, as loaded" if others else "")


def as_loaded(groups: Sequence[Group], linears: str) -> str:
    """Nothing to choose; an error where 8-bit copies are wanted."""
    kind = type(base_layer(groups[0].modules[0])).__name__
    if linears in ROUNDED:
        text = f"and no projection is that (a {kind}, or other blocks)"
        raise CaiError(f'engine.linears: "{linears}" is made of NF4 weights in blocks of 64, {text}. Use "auto".')
    return f"linears: the loaded modules ({kind}) as they are"


def set_ways(decoder: Decoder, shared: Shared, copied: int, linears: str) -> str:
    """Measure, or recall, what each way takes; put the fastest in place, and say why it is."""
    facts = timings.facts(decoder, copied, linears)
    known = timings.recall(facts, TOKENS)
    times = known or measure(decoder, copied, linears)
    if not known and not any(map(math.isnan, itertools.chain(*times.values()))):
        timings.remember(facts, times, TOKENS)
    ways = fastest({way: row for way, row in times.items() if way not in ROUNDED})

    def exact(tokens: int) -> Way:
        return ways[min(bisect.bisect_left(TOKENS, tokens), len(TOKENS) - 1)]

    def way_for(tokens: int) -> Way:
        if shared.drawing and shared.rounding:  # whatever the number of rows: a row's text does not depend on it
            return shared.rounding
        return exact(tokens)

    shared.choose, shared.exact = way_for, exact
    seen = " (measured at an earlier start)" if known else ""
    drawn = f"drawing: {linears} (8-bit products); the rest: " if shared.rounding else ""
    return drawn + reason(ways, times, f"{copied}/{len(decoder.layers)}") + seen


def right_weights(groups: Sequence[Group]) -> bool:
    """Own dequantisation gives bitsandbytes' numbers to the bit: all that follows is compared with it alone."""
    from cai.engine.native.nf4 import dequantise

    for module, weight in ((m, w) for group in groups for m, w in zip(group.modules, group.nf4 or (), strict=True)):
        expected = bitsandbytes_weight(module)
        if not torch.equal(dequantise(weight, torch.empty_like(expected)), expected):
            return False
    return True


def bitsandbytes_weight(module: HfModule) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = base_layer(module).weight
    return dequantize_4bit(weight.data, weight.quant_state).contiguous()


def fastest(times: Mapping[Way, Sequence[float]]) -> list[Way]:
    """The way for each of TOKENS: the loaded modules where no other could be timed."""
    ways: list[Way] = []
    for i in range(len(TOKENS)):
        timed = {way: row[i] for way, row in times.items() if math.isfinite(row[i])}
        ways.append(min(timed, key=lambda way: timed[way]) if timed else "module")
    return ways


def nf4_groups(layer: Layer) -> list[Group]:
    return [group for group in layer.linears.groups if group.nf4 is not None]


def room_for_copies(decoder: Decoder, beside: int) -> int:
    return free_gpu_bytes(decoder.device) - reserve_bytes(decoder.device) - beside


def copy_layers(decoder: Decoder, must: bool, beside: int = 0, wanted: int = KV_BYTES_WANTED) -> int:
    """Copy as many layers to bf16 as leave room for the KV cache, without what has an 8-bit copy; the number copied."""
    layers = [[group for group in nf4_groups(layer) if group.int8 is None] for layer in decoder.layers]
    sizes = [sum(group.numel for group in groups) * decoder.dtype.itemsize for groups in layers]
    room = room_for_copies(decoder, beside)
    if must and room < sum(sizes) * 1.05:
        need = sum(sizes) / 2**30
        raise CaiError(f'engine.linears: "bf16" needs {need:.0f} GiB, {room / 2**30:.0f} are free. Use "auto".')
    budget = room if must else room - min(wanted, int(KV_SHARE * room))
    copied = sum(size <= budget for size in itertools.accumulate(sizes))
    for group in itertools.chain(*layers[:copied]):
        rows = sum(base_layer(module).out_features for module in group.modules)
        columns = base_layer(group.modules[0]).in_features
        group.copy = group.dequantised(torch.empty(rows, columns, dtype=decoder.dtype, device=decoder.device))
    return copied


def rounded_groups(layer: Layer, way: Way) -> list[Group]:
    """What is rounded of a layer: in int8 all but down_proj, whose inputs have channels that stand out."""
    kept = layer.linears.down if way == "int8" else None
    return [group for group in nf4_groups(layer) if group is not kept]


def round_layers(decoder: Decoder, way: Way, beside: int = 0) -> None:
    """8-bit copies of the linears beside the NF4 weights."""
    module, wish = rounding(way), f'engine.linears: "{way}"'
    module.require(decoder.device, decoder.dtype)
    groups = [group for layer in decoder.layers for group in rounded_groups(layer, way)]
    need, room = sum(group.numel for group in groups), room_for_copies(decoder, beside) - KV_BYTES_NEEDED
    if room < need:
        text = f"{need / 2**30:.1f} GiB for 8-bit copies, {max(0, room) / 2**30:.1f} are free beside the KV cache"
        raise CaiError(f'{wish} needs {text}. Use "auto".')
    first = groups[:4]
    try:
        for group in groups:
            setattr(group, way, module.round_rows(group.dequantised()))
        within = AGREES_WITHIN[way]
        right = all(agrees(first, _inputs(first, tokens, decoder), way, within) for tokens in (1, 16, 512))
        for group in first:  # as many tokens as a prefill has: that it runs
            group.base(_inputs([group], TOKENS[-1], decoder)[base_layer(group.modules[0]).in_features], way)
    except torch.OutOfMemoryError:
        raise CaiError(f'{wish}: out of memory over its copies. Use "auto".', RESUMABLE) from None
    except (RuntimeError, TritonError) as error:  # widths or a card that the product does not take
        raise CaiError(f'{wish} cannot run here ({str(error).splitlines()[0]}). Use "auto".') from None
    if not right:
        raise CaiError(f'{wish} gives wrong products on this card. Use "auto".')


def measure(decoder: Decoder, copied: int, linears: str) -> dict[Way, list[float]]:
    """Milliseconds of all layers' linears at each of TOKENS, by way, from two layers with as many NF4 groups as any."""
    counts = [len(nf4_groups(layer)) for layer in decoder.layers]
    fullest = [index for index, count in enumerate(counts) if count == max(counts)]
    first = next((index for index in fullest if index >= copied), fullest[0])
    plain = [group for index in (fullest[-1], first) for group in nf4_groups(decoder.layers[index])]
    whole = copied == len(decoder.layers) and linears not in ROUNDED
    ways: list[Way] = ["fused", "bf16"] if whole else ["fused", "dequant"]
    if linears in ("auto", *ROUNDED):
        ways.append("module")
    if linears in ROUNDED:
        ways.append(cast(Way, linears))
    times: dict[Way, list[float]] = {}
    for way in ways:
        times[way] = [_measure_way(plain, way, tokens, decoder) * len(counts) / 2 for tokens in TOKENS]
    return times


def _measure_way(groups: list[Group], way: Way, tokens: int, decoder: Decoder) -> float:
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


def _inputs(groups: Sequence[Group], tokens: int, decoder: Decoder) -> dict[int, torch.Tensor]:
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


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time on the device, captured in a graph as a decode step is: launched one by one, a few rows would be
    timed at what the host takes (on an H200, 16 tokens through the NF4 kernels 59 ms instead of what they need)."""
    with torch.no_grad():
        warm_up(run)
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
