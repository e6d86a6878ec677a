"""What the linears' ways took on a card, kept in the cache folder: a later start chooses at once, and the same.

Owns the file (one for each card, memory, versions, driver, shapes and sources). A cache that can't be read or written
is no fault: it is measured again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from cai.errors import CaiError
from cai.store.files import cache_root, write_json_atomic
from cai.store.jsonl import JsonObject, Row

if TYPE_CHECKING:
    from cai.engine.native.decoder import Decoder
    from cai.engine.native.linears import Way

SOURCES = ("nf4.py", "rounded.py", "fp8.py", "int8.py", "linears.py", "tuning.py")
VERSIONED = ("torch", "triton", "bitsandbytes")


def facts(decoder: Decoder, copied: int, linears: str) -> Row:
    """All that the timings depend on."""
    import torch

    from cai.engine.native.linears import base_layer

    card = torch.cuda.get_device_properties(decoder.device)
    groups = decoder.layers[0].linears.groups
    return {
        "card": card.name,
        "memory": card.total_memory,
        "versions": {name: version(name) for name in VERSIONED},
        "driver": driver(),
        "sources": hashlib.sha256(b"".join(map(source, SOURCES))).hexdigest()[:16],
        "shapes": [[(b.out_features, b.in_features) for b in map(base_layer, group.modules)] for group in groups],
        "layers": len(decoder.layers),
        "all_copied": copied == len(decoder.layers),
        "dtype": str(decoder.dtype),
        "linears": linears,
    }


def driver() -> str:
    """The kernel module's line, with its version; empty where the system does not say."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""


def source(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()


def version(name: str) -> str:
    """Empty for what was installed under another name, as nightly builds of Triton are."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def path_of(found: JsonObject) -> Path:
    key = hashlib.sha256(orjson.dumps(found, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
    return cache_root() / "linears" / f"{key}.json"


def recall(found: JsonObject, tokens: Sequence[int]) -> dict[Way, list[float]] | None:
    """Milliseconds by way at each of `tokens`; None where nothing, or nothing usable, is kept."""
    try:
        kept = orjson.loads(path_of(found).read_bytes())
        times = {way: [math.inf if ms is None else float(ms) for ms in row] for way, row in kept["ms"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    usable = kept.get("tokens") == list(tokens) and times and all(len(row) == len(tokens) for row in times.values())
    return times if usable and all(ms > 0 for row in times.values() for ms in row) else None


def remember(found: JsonObject, times: Mapping[Way, Sequence[float]], tokens: Sequence[int]) -> None:
    path = path_of(found)
    rows = {way: [ms if math.isfinite(ms) else None for ms in row] for way, row in times.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**found, "tokens": list(tokens), "ms": rows}, durable=False)
    except (OSError, CaiError):
        return
