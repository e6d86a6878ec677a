"""One decode step of an engine: milliseconds at full rows, the roofline it is held against, the share the GPU idles.

Used by bench/generate.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cai.engine import Request, Sampling


def submit_full(engine: Any, rows: int, new: int, scale: float) -> None:
    """`rows` rows of prefix 800 and 240 own tokens that draw `new` tokens; the last one draws 8 and marks that step."""
    prefix = tuple(range(100, 100 + round(800 * scale)))
    own = round(240 * scale)
    for i in range(rows):
        sampling = Sampling(0.7, 8 if i == rows - 1 else new)
        engine.submit(Request(i, (*prefix, *range(50 + i, 50 + i + own)), sampling, i, len(prefix)))


def step_times(engine: Any, counts: Sequence[int], scale: float) -> dict[str, float]:
    """ms of a decode step at full rows (prefix 800, inputs 240): all rows draw 72 tokens, the last one 8.

    That row's completion marks the eighth step; prefill, capture and compilation lie before it. A number of rows that
    memory does not hold at once (then more than 72 steps were needed) has no time.
    """
    times = {}
    for rows in counts:
        if rows > engine.stats.batch_size:
            continue
        before = engine.stats.decode_steps
        submit_full(engine, rows, 72, scale)
        at = {done.id: time.monotonic() for done in engine.completions()}
        if engine.stats.decode_steps - before <= 72:
            times[str(rows)] = round((at[0] - at[rows - 1]) / 64 * 1e3, 2)
    return times


def profile_steps(engine: Any, rows: int, scale: float) -> tuple[float, dict[str, float]]:
    """Of a window of some 25 decode steps: the share in which no kernel ran (what the host costs), and the ten kernels
    that took most of the busy time, with their shares of it.

    Busy time is the union of the kernels' intervals as CUPTI stamps them. The profiler slows the host, not the kernels,
    so the figure is an upper bound. The first sixth of the kernels is left out: the profiler's own start lies there.
    """
    from torch.profiler import ProfilerActivity, profile

    submit_full(engine, rows, 40, scale)
    profiler, spans = profile(activities=[ProfilerActivity.CUDA]), []
    for done in engine.completions():
        if done.id == rows - 1:  # the eighth step: prefill, capture and compilation lie before it
            profiler.start()
        elif not spans:  # the first of the rows that all end together
            profiler.stop()
            spans = sorted(kernel_spans(profiler))
    spans = spans[len(spans) // 6 :]
    idle = 1 - covered(spans) / (max(end for _, end, _ in spans) - spans[0][0])
    spent: Counter[str] = Counter()
    for start, end, name in spans:
        spent[name.removeprefix("void ").split("<")[0].split("(")[0][:40]] += end - start
    return round(idle, 4), {name: round(part / spent.total(), 4) for name, part in spent.most_common(10)}


def kernel_spans(profiler: Any) -> list[tuple[int, int, str]]:
    """(start, end, name), in ns, of everything that ran on the device."""
    from torch.autograd import DeviceType

    events = profiler.profiler.kineto_results.events()
    return [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if e.device_type() == DeviceType.CUDA
    ]


def covered(spans: Iterable[tuple[int, int, str]]) -> int:
    """Length of the union of intervals, given by their start."""
    total, reached = 0, 0
    for start, end, _ in spans:
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def ceilings() -> dict[str, float]:
    """Measured bf16 matrix rate (TFLOP/s) and copy bandwidth (TB/s) of this card."""
    import torch
    from torch import cuda

    def seconds(run: Any, repeats: int) -> float:
        run()
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        cuda.synchronize()
        return start.elapsed_time(end) / repeats / 1e3

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix = 2 * 8192**3 / seconds(lambda: a @ b, 10) / 1e12
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), 5) / 1e12
    return {"matrix_tflops": round(matrix, 1), "copy_tb_s": round(copy, 3)}


def roofline(config: Any, rows: int, limits: dict[str, float], own: int = 276, prefix: int = 800) -> float:
    """ms of a decode step: max(2 * rows * weights / rate, bf16 weight bytes / bandwidth) + KV bytes / bandwidth."""
    kv = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    layer = config.hidden_size * (2 * config.hidden_size + 2 * kv + 3 * config.intermediate_size)
    weights = layer * config.num_hidden_layers + config.vocab_size * config.hidden_size
    compute = 2 * rows * weights / (limits["matrix_tflops"] * 1e12)
    read = 2 * weights / (limits["copy_tb_s"] * 1e12)
    cache = (rows * own + prefix) * 4 * kv * config.num_hidden_layers / (limits["copy_tb_s"] * 1e12)
    return (max(compute, read) + cache) * 1e3
