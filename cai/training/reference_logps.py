"""The reference model's log-probabilities, computed once and kept beside the checkpoints.

The reference is the policy before its first step: the adapter is in place and its B matrices are zero (or all are the
SFT stage's, where DPO starts from that), so reference and policy run through the very same kernels in the very same
micro-batches and the first DPO loss is log 2 to the last bit. (Other kernels differ by rounding: 0.07% of a sum of
6,000 nats is a margin of 0.4.) TRL's own cache hashes all weights through the CPU, 20-40 s at 32B; this one is keyed by
what they are called, the data and the batches.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError
from cai.store.files import write_json_atomic
from cai.training import ranks
from cai.training.ranks import Logps

NAME = "reference.json"
HELDOUT = "heldout-reference.json"
NAN: Logps = (math.nan, math.nan)  # of a row that is not visited


def key_of(**facts: object) -> str:
    """32 hex of the facts; anything JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def cached(folder: Path, key: str, name: str = NAME) -> list[Logps] | None:
    """The cached values, or None where there are none, they are damaged or belong to other data."""
    try:
        value = orjson.loads((folder / name).read_bytes())
        if value["key"] != key:
            return None
        return [NAN if entry is None else (entry[0], entry[1]) for entry in value["logps"]]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, IndexError):
        return None


def compute(
    order: Sequence[int],
    rows: int,
    micro_batch: int,
    score: Callable[[Sequence[int]], list[Logps]],
    stopped: Callable[[], bool],
) -> list[Logps] | None:
    """Score every row that `order` visits, in the micro-batches of its first visit; None if stopped on the way.

    Of several processes each scores every n-th micro-batch, and has all of them.
    """
    seen: set[int] = set()
    groups = []  # the micro-batches in which some row is visited for the first time
    for start in range(0, len(order), micro_batch):
        group = order[start : start + micro_batch]
        if not seen.issuperset(group):
            groups.append(group)
        seen.update(group)
    scored = ranks.scored_by_all(groups, score, stopped)
    if scored is None:
        return None
    found: dict[int, Logps] = {}
    for number, group in enumerate(groups):
        for i, logps in zip(group, scored[number], strict=True):
            found.setdefault(i, logps)
    return [found.get(i, NAN) for i in range(rows)]


def store(folder: Path, key: str, logps: Sequence[Logps], visited: set[int], name: str = NAME) -> None:
    """Write the cache atomically; a non-finite value of a visited row ends the run (exit 6)."""
    bad = [i for i in sorted(visited) if not all(map(math.isfinite, logps[i]))]
    if bad:
        raise CaiError(
            f"{folder / name}: the reference log-probability of pair {bad[0]} is not finite: the loaded model is "
            "broken (wrong quantisation or damaged weights). Run --doctor.",
            errors.QUALITY,
        )
    values = [list(entry) if i in visited else None for i, entry in enumerate(logps)]
    write_json_atomic(folder / name, {"v": 1, "key": key, "logps": values})
