"""The constitution: principles read strictly from YAML, and which one each round of each item uses.

Owns the file's schema and the seeded choice. Doesn't own how a request is put to the model (prompts/critiques.yaml).
`choose` is a pure function of (constitution, seed, item, rounds): any item can be computed alone and in any order.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.errors import CaiError
from cai.recipe.yaml_files import check_keys, check_text, load_yaml

KEYS = ("id", "principle", "critique_request", "revision_request")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Principle:
    id: str
    principle: str
    critique_request: str
    revision_request: str


@dataclass(frozen=True, slots=True)
class Constitution:
    """`sha`: 16 hex of the file's bytes. `principles`: at least one, ids distinct, in file order."""

    path: str
    sha: str
    principles: tuple[Principle, ...]

    def __getitem__(self, id: str) -> Principle:
        return next(principle for principle in self.principles if principle.id == id)


def load_constitution(path: str | Path) -> Constitution:
    """Read and check a constitution: a YAML list of one principle or more, each with the four KEYS."""
    rows, sha = load_yaml(path)
    if not isinstance(rows, list) or not rows:
        raise CaiError(f"{path}: no principles found; write a list, each entry with the keys {', '.join(KEYS)}")
    principles = tuple(_principle(row, i, str(path)) for i, row in enumerate(rows))
    seen: dict[str, int] = {}
    for i, principle in enumerate(principles):
        if (first := seen.setdefault(principle.id, i)) != i:
            raise CaiError(f"{path}: principles[{i}]: id {principle.id!r} is that of principles[{first}]; rename one")
    return Constitution(str(path), sha, principles)


def _principle(row: Any, i: int, path: str) -> Principle:
    named = isinstance(row, dict) and isinstance(row.get("id"), str)
    where = f"{path}: principles[{i}]" + (f" ({row['id'][:64]!r})" if named else "")
    check_keys(row, KEYS, (), where)
    for key in KEYS:
        check_text(row[key], f"{where}: {key}")
    if not ID.fullmatch(row["id"]):
        raise CaiError(f"{where}: id: use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    return Principle(row["id"], *(" ".join(row[key].split()) for key in KEYS[1:]))


def check_rounds(constitution: Constitution, rounds: int) -> None:
    """An item never meets a principle twice, so it can't have more rounds than there are principles."""
    if not 1 <= rounds <= len(constitution.principles):
        have = len(constitution.principles)
        raise CaiError(
            f"rounds: {rounds} asked for, {constitution.path} has {have} principles; set rounds to 1..{have}"
        )


def choose(constitution: Constitution, seed: int, item: int, rounds: int) -> list[Principle]:
    """The principles of an item's rounds: no repetition within it; over items 0..n-1 all counts differ by at most one.

    Rounds are dealt from a shuffled deck of P principles, over and over in the same order, which can't repeat within
    rounds <= P consecutive cards; where a deck's end meets an item's end (every
    P / gcd(P, rounds) items) it is shuffled anew.
    """
    check_rounds(constitution, rounds)
    size = len(constitution.principles)
    items_per_deck = size // math.gcd(size, rounds)
    deck, place = divmod(item, items_per_deck)
    order = sorted(range(size), key=lambda i: hashlib.sha256(f"{seed}/{rounds}/{deck}/{i}".encode()).digest())
    return [constitution.principles[order[(place * rounds + r) % size]] for r in range(rounds)]
