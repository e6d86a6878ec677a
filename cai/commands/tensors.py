"""Tensors of a safetensors file as numpy arrays, without torch: for checks that must start at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson

from cai.store.jsonl import Row


def safetensors_fp32(path: Path) -> Row:
    """Tensors of a safetensors file as fp32 arrays, bf16 included (numpy has none), without torch."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = orjson.loads(data[8 : 8 + size])
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
    tensors = {}
    for name, facts in header.items():
        if name != "__metadata__" and facts["dtype"] in kinds:
            start, end = (8 + size + offset for offset in facts["data_offsets"])
            value = np.frombuffer(data[start:end], dtype=kinds[facts["dtype"]])
            if facts["dtype"] == "BF16":
                value = (value.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = value
    return tensors
