"""Where keys and values live: blocks of tokens for the rows' own parts, one store for the prefixes that rows share.

Owns the memory, its size and the free list. Doesn't know rows or requests. Block 0 is never handed out: rows that are
not there write into it. On a CPU a block is a whole row, so attention reads it in place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cai.engine.memory import free_gpu_bytes
from cai.engine.native.nesting import Part
from cai.errors import CaiError

TRASH = 0
SCALE = torch.float32  # of what is kept in 8 bits
GPU_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values take: numbers of a type, or (int8) 8 bits and a scale a head."""

    layers: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def eight_bits(self) -> bool:
        return self.dtype == torch.int8

    @property
    def bytes_per_token(self) -> int:
        head = self.dim * self.dtype.itemsize + (SCALE.itemsize if self.eight_bits else 0)
        return 2 * self.layers * self.kv_heads * head


class LayerCache(NamedTuple):
    """Keys and values of one layer (blocks, M, block_tokens, D); in 8 bits also the scale of each token's head."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None  # (blocks, M, block_tokens), fp32
    value_scales: torch.Tensor | None = None


class KVCache:
    """`blocks` blocks of `block_tokens` tokens (L, blocks, M, block_tokens, D), and their free list."""

    def __init__(
        self, shape: KVShape, blocks: int, block_tokens: int, device: torch.device, by_slot: bool = False
    ) -> None:
        size = (shape.layers, blocks + 1, shape.kv_heads, block_tokens, shape.dim)
        self.keys, self.values = (zeros(size, shape.dtype, device) for _ in range(2))
        self.scales = [zeros(size[:-1], SCALE, device) for _ in range(2)] if shape.eight_bits else []
        self.block_tokens, self.blocks, self.by_slot = block_tokens, blocks, by_slot
        self.free = list(range(blocks, TRASH, -1))

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.keys[index], self.values[index], *(scales[index] for scales in self.scales))

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, count: int, slot: int) -> list[int]:
        """`count` free blocks; on a CPU the one block that belongs to the slot."""
        if not self.by_slot:
            return [self.free.pop() for _ in range(count)]
        self.free.remove(slot + 1)
        return [slot + 1]

    def give_back(self, blocks: list[int]) -> None:
        self.free.extend(reversed(blocks))

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one block's first tokens into another (on a CPU, where a row's block is bound to its slot)."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :tokens] = cache[:, source, :, :tokens]

    def gather(self, blocks: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's keys and values as contiguous (L, M, tokens, D) copies."""
        index = torch.tensor(blocks, device=self.keys.device)

        def one(cache: torch.Tensor) -> torch.Tensor:
            picked = cache[:, index].transpose(1, 2)  # (L, M, blocks, block_tokens, D)
            return picked.reshape(picked.shape[0], picked.shape[1], -1, picked.shape[4])[:, :, :tokens].contiguous()

        return one(self.keys), one(self.values)


def zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU pages that nobody writes take no memory: rows of thousands of tokens may be planned, and few needed."""
    if torch.device(device).type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(size)


class PrefixStore:
    """What prompts share, each piece computed once: keys and values (L, M, capacity, D), read in place.

    `parts`: what stands there under which name, the one used last at the end. Rows of several prefixes may read it in
    one step.
    """

    def __init__(self, shape: KVShape, capacity: int, device: torch.device) -> None:
        size = (shape.layers, shape.kv_heads, capacity, shape.dim)
        self.keys, self.values = (zeros(size, shape.dtype, device) for _ in range(2))
        self.capacity = capacity
        self.parts: dict[Hashable, Part] = {}

    def find(self, name: Hashable) -> Part | None:
        """The part of that name, which is used now."""
        if (part := self.parts.pop(name, None)) is not None:
            self.parts[name] = part
        return part

    def take(self, name: Hashable, length: int, held: Collection[Part]) -> Part | None:
        """A place for `length` tokens; what was used longest ago gives way, but no part that is held. None: no room,
        and nothing gave way for it."""
        left = dict(self.parts)
        idle = [other for other, part in left.items() if part not in held]
        while (start := self._gap(left.values(), length)) is None and idle:
            del left[idle.pop(0)]
        if start is None:
            return None
        self.parts = left
        self.parts[name] = Part(start, length)
        return self.parts[name]

    def _gap(self, parts: Collection[Part], length: int) -> int | None:
        end = 0
        for start, taken in sorted(parts):
            if start - end >= length:
                return end
            end = start + taken
        return end if self.capacity - end >= length else None

    def put(self, part: Part, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Computed keys and values (L, M, tokens, D) in their place."""
        place = slice(part.start, part.start + part.length)
        self.keys[:, :, place], self.values[:, :, place] = keys, values

    def read(self, layer: int, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, (M, tokens, D)."""
        place = slice(part.start, part.start + part.length)
        return self.keys[layer, :, place], self.values[layer, :, place]


def small_card(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).total_memory < 40 << 30


def gpu_prefill_tokens(device: torch.device) -> int:
    """The most prompt tokens computed at a time."""
    return 1024 if small_card(device) else 4096


def reserve_bytes(device: torch.device) -> int:
    """Kept free for a prefill's activations, logits and graphs."""
    return (3 << 29) if small_card(device) else (4 << 30)


def gpu_blocks(shape: KVShape, device: torch.device, wanted_tokens: int, beside: int = 0) -> int:
    """How many blocks fit beside the reserve, at most what `wanted_tokens` need. Error: less than one long row.

    `beside`: bytes that come later, copies of LoRA factors; no row goes without for them.
    """
    room = free_gpu_bytes(device) - reserve_bytes(device)
    room -= min(beside, room // 8)
    fitting = room // (shape.bytes_per_token * GPU_BLOCK_TOKENS)
    if fitting * GPU_BLOCK_TOKENS < 4096:
        raise CaiError(
            f"engine: {room / 2**30:.1f} GiB are left for the KV cache, too few. Use a smaller model or card."
        )
    return int(min(fitting, -(-wanted_tokens // GPU_BLOCK_TOKENS)))
