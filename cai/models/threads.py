"""How many threads compute on a CPU, and how they wait: chosen once from measurements, shown, never changed in a run.

Owns the wait policy, the cap by a container's quota and the line about both. Invariant: what the environment says
holds. The count is not chosen by a trial at the start: sums round by it, and a resume on a busier machine would give
other bytes (G4).

Measured on two cores under a load of 5 to 7, the embedded model drawing one row, two interleaved rounds, tokens/s:
two spinning threads (the default of OpenMP) 0.9 and 1.1, two that wait passively 3.3 and 4.5, one thread 4.7 and 6.3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
BUSY = 2.0  # processes that want a core, a core, above which one thread is worth a line


def prepare_threads() -> None:
    """Waiting threads sleep instead of spinning, and no more than a quota lets run; before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cores = usable_cores()
    if cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def usable_cores() -> int:
    """Cores that this process may use: of the machine, its affinity, and the quota of its container (rounded up)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = next((found for path in QUOTAS if (found := _quota(path))), 0.0)
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def _quota(path: Path) -> float:
    """Cores a cgroup may use; 0 where there is no limit or no such file."""
    try:
        words = path.read_text().split()
        period = words[1] if len(words) > 1 else path.with_name("cpu.cfs_period_us").read_text()
        return max(0.0, int(words[0]) / int(period))
    except (OSError, ValueError, IndexError, ZeroDivisionError):  # "max 100000", "-1", another system
        return 0.0


def in_words(count: int, environment: Mapping[str, str]) -> str:
    """`2 threads, passive wait`."""
    wait = environment.get("OMP_WAIT_POLICY", "default").lower()
    return "1 thread" if count == 1 else f"{count} threads, {wait} wait"


def advice(count: int, load: float, cores: int) -> str:
    """One line where others want the cores as well; nothing on a quiet machine or with one thread."""
    if count == 1 or load < BUSY * cores:
        return ""
    return (
        f"the cores are busy (load {load:.0f} on {cores}): OMP_NUM_THREADS=1 was 1.4 times as fast in that "
        "case (measured); a run's bytes follow the number of threads, so set it when one begins"
    )


def drift(then: object, now: int) -> str:
    """One line where a resume computes with another number of threads than the run began with."""
    if not isinstance(then, int) or then == now:
        return ""
    return (
        f"the run began with {then} thread{'s' if then > 1 else ''} and goes on with {now}: on a CPU the last bits of "
        f"sums follow that number; for the very same bytes: OMP_NUM_THREADS={then}"
    )
