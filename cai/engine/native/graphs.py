"""CUDA graphs of the decode step at bucketed numbers of rows, captured when first needed and kept for each adapter.

Owns the buckets and the captured graphs. A step that cannot be captured (int8 linears read sizes back) runs eagerly.
Invariant: capturing leaves the rows' state as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cai.engine import Rules
from cai.engine.native.linears import is_int8

if TYPE_CHECKING:
    from cai.engine.native.adapters import Signature
    from cai.engine.native.engine import NativeEngine

T = TypeVar("T")
Pool = Any  # torch's handle of a memory pool, opaque; None: a new one
SIDE: dict[str, torch.cuda.Stream] = {}  # one for the process: cuBLAS keeps a workspace (32 MiB) for every stream
STEPS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


class Graphs:
    """`run(rows)` = one decode step for at least the first `rows` slots."""

    def __init__(self, engine: NativeEngine) -> None:
        self.engine = engine
        self.pool: Pool = None
        self.limit = engine.stats.batch_size
        self.captured: dict[tuple[int, Rules, Signature | None], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.eager = any(is_int8(module) for group in engine.groups for module in group.modules)

    def bucket(self, rows: int) -> int:
        return min(next((step for step in STEPS if step >= rows), self.limit), self.limit)

    def run(self, rows: int) -> torch.Tensor:
        """The drawn ids (bucket size); valid until the bucket's next run."""
        bucket = self.bucket(rows)
        if self.eager:
            return self.engine.decode_on_device(bucket)
        # the draw under its rules is part of the graph, and so are the adapter's factors
        key = bucket, self.engine.rules, self.engine.attached.signature
        if key not in self.captured:
            self.captured[key] = self._capture(bucket)
        graph, drawn = self.captured[key]
        graph.replay()
        return drawn

    def forget(self, signatures: Collection[Signature]) -> None:
        """Let the graphs of these adapters go: their factors are freed."""
        self.captured = {key: graph for key, graph in self.captured.items() if key[2] not in signatures}

    def clear(self) -> None:
        self.captured.clear()
        self.pool = None
        if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
            torch._C._cuda_clearCublasWorkspaces()

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        state = self.engine.state
        before = state.table.clone(), state.ids.clone()
        try:  # compiles kernels; rewrites the same keys and values as the real step
            warm_up(lambda: self.engine.decode_on_device(bucket))
        finally:
            state.table.copy_(before[0])
            state.ids.copy_(before[1])
        graph, drawn = capture(lambda: self.engine.decode_on_device(bucket), self.pool)
        self.pool = graph.pool()
        return graph, drawn


def side_stream() -> torch.cuda.Stream:
    if "warm-up" not in SIDE:
        SIDE["warm-up"] = torch.cuda.Stream()
    return SIDE["warm-up"]


def warm_up(run: Callable[[], object]) -> None:
    """Run on the stream on which it will be captured."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], T], pool: Pool = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of `run` and what it returned. Where memory runs out, that is the error, not the broken capture."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side_stream()):
            made = run()
    except RuntimeError as error:
        if isinstance(error.__context__, torch.OutOfMemoryError):
            raise error.__context__ from None
        raise
    return graph, made
