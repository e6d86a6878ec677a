"""Peak memory of a phase, from the operating system and from torch where it is loaded; the limit of the GPU.

Imports torch only inside the functions about the GPU that need it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cai.store.jsonl import JsonObject

if TYPE_CHECKING:
    import torch

GIB = 2**30
MOST_COPIED = 2 * GIB  # bytes of fp32 weights of which a CPU holds a second copy (`native.packed`): 530 million


def _cuda() -> object | None:
    """torch.cuda of a process that has already used a GPU, else None."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_available() and cuda.is_initialized() else None


def limit_gpu(gigabytes: float) -> None:
    """From here on this process takes at most so many 10^9 bytes of the GPU (0: the card)."""
    import torch

    if gigabytes and torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def free_gpu_bytes(device: torch.device | str | None = None) -> int:
    """What may still be allocated: the driver's figure, what torch holds unused, and the limit set for the process."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free + unused, int(fraction * total) - torch.cuda.memory_allocated(device))


def begin_phase() -> None:
    """Count the GPU's peak from here on. The host's peak can't be reset: it is the process's so far."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()  # type: ignore[attr-defined]


def peaks() -> dict[str, float]:
    """`peak_host_gib`: highest resident memory of the process so far; `peak_gpu_gib`: highest reserved by torch in this
    phase; `peak_gpu_used_gib`: highest allocated."""
    found = {"peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / GIB, 3)}
    if (cuda := _cuda()) is not None:
        found["peak_gpu_gib"] = round(cuda.max_memory_reserved() / GIB, 3)  # type: ignore[attr-defined]
        found["peak_gpu_used_gib"] = round(cuda.max_memory_allocated() / GIB, 3)  # type: ignore[attr-defined]
    return found


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def by_phase(events: Iterable[JsonObject]) -> dict[str, dict[str, float]]:
    """The highest `peak_*_gib` of each phase over all attempts (stages by name, rounds together)."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        for name, value in event.items():
            if name.startswith("peak_") and name.endswith("_gib") and isinstance(value, int | float):
                phase = found.setdefault(str(event.get("stage") or event.get("phase") or event["kind"]), {})
                phase[name] = max(phase.get(name, 0.0), float(value))
    return found
