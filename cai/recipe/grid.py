"""The grid that makes generated instructions diverse: each request stands on its own cell (topic, kind, persona, tone).

Owns the word lists' schema (prompts/grid.yaml), the order in which a seed walks the cells, and which pool an item
draws from. Doesn't own the prompt. All functions are pure: any index can be asked alone.

Invariants, per seed and pool: no cell comes twice before all have come; any T consecutive indexes from a multiple of T
use each of the T topics once; every prefix of items has the recipe's red-team share, give or take two items.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cai.errors import CaiError
from cai.recipe.yaml_files import check_keys, check_text, load_yaml

Pool = Literal["benign", "redteam"]
POOLS: tuple[Pool, ...] = ("benign", "redteam")
AXES = {"topic": "topics", "kind": "kinds", "persona": "personas", "tone": "tones"}  # cell key -> list in the file
BLOCK = 4  # items among which the red-team places are shuffled


@dataclass(frozen=True, slots=True)
class Grid:
    """`axes[pool][name]`: the words of an axis, at least one, distinct. `sha`: 16 hex of the file's bytes."""

    path: str
    sha: str
    axes: dict[Pool, dict[str, tuple[str, ...]]]

    def size(self, pool: Pool) -> int:
        return math.prod(map(len, self.axes[pool].values()))

    def cell(self, seed: int, index: int, pool: Pool) -> dict[str, str]:
        """The index-th cell of a seed's walk: topics in shuffled decks, the rest in an order of each topic's own."""
        axes = self.axes[pool]
        topics = len(axes["topic"])
        walk, place = divmod(index, self.size(pool))
        visit, turn = divmod(place, topics)
        key = f"{seed}/{pool}/{walk}"
        topic = permute(turn, topics, f"{key}/{visit}")
        rest = permute(visit, self.size(pool) // topics, f"{key}/topic{topic}")
        cell = {"topic": axes["topic"][topic]}
        for name in list(AXES)[1:]:
            rest, at = divmod(rest, len(axes[name]))
            cell[name] = axes[name][at]
        return cell

    def pool(self, seed: int, item: int, red_team_share: float) -> Pool:
        """The pool of an item: a fixed number of red-team places in each block of items, shuffled within the block."""
        block, place = divmod(item, BLOCK)
        offset = _hash(f"{seed}/offset") / 2**64
        upto = [math.floor((block + i) * BLOCK * red_team_share + offset) for i in (0, 1)]
        return "redteam" if permute(place, BLOCK, f"{seed}/{block}") < upto[1] - upto[0] else "benign"


def permute(index: int, size: int, key: str) -> int:
    """A keyed bijection of range(size): a four-round Feistel network over the next even power of two, cycle-walked.

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains". A few steps at most: the domain is < 4 * size.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(4):
            left, right = right, left ^ (_hash(f"{key}/{round_}/{right}") & mask)
        index = left << half | right
        if index < size:
            return index


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def load_grid(path: str | Path, content: bytes | None = None) -> Grid:
    """Read and check the word lists: both pools, each with every axis, each axis with one distinct text or more."""
    data, sha = load_yaml(path, content)
    check_keys(data, POOLS, (), str(path))
    axes: dict[Pool, dict[str, tuple[str, ...]]] = {}
    for pool in POOLS:
        check_keys(data[pool], tuple(AXES.values()), (), f"{path}: {pool}")
        axes[pool] = {name: _words(data[pool][key], f"{path}: {pool}.{key}") for name, key in AXES.items()}
    return Grid(str(path), sha, axes)


def _words(rows: object, where: str) -> tuple[str, ...]:
    if not isinstance(rows, list) or not rows:
        raise CaiError(f"{where}: no list found; write one entry or more, each on a line behind '- '")
    for i, row in enumerate(rows):
        check_text(row, f"{where}[{i}]")
    words = tuple(" ".join(row.split()) for row in rows)
    if twice := next((word for i, word in enumerate(words) if word in words[:i]), None):
        raise CaiError(f"{where}: {twice[:60]!r} stands twice; remove one")
    return words
