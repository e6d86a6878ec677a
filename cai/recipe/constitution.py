"""The constitution: its principles, and which one each round of each item uses.

Owns the seeded choice; `principle_lists` has what a principle is and reads the file. Doesn't own how a request is put
to the model (prompts/critiques.yaml).
`choose` is a pure function of (constitution, seed, item, rounds): any item can be computed alone and in any order.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError
from cai.recipe import principle_lists
from cai.recipe.intake.decoding import text_of
from cai.recipe.principle_lists import KEYS, Principle
from cai.recipe.yaml_files import read_yaml_bytes

__all__ = ["KEYS", "Constitution", "Principle", "check_rounds", "choose", "load_constitution"]


@dataclass(frozen=True, slots=True)
class Constitution:
    """`sha`: 16 hex of the file's bytes. `principles`: at least one, ids distinct, in file order. `notes`: how read."""

    path: str
    sha: str
    principles: tuple[Principle, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, id: str) -> Principle:
        return next(principle for principle in self.principles if principle.id == id)


def load_constitution(path: str | Path, data: bytes | None = None) -> Constitution:
    """Read and check a constitution of one principle or more: YAML with the four KEYS, or a shape of `principles`.

    `data`: the file's bytes, where the caller has read them already.
    """
    if data is None:
        data = read_yaml_bytes(path)
    text, _ = text_of(data, str(path))
    found, notes = principle_lists.read(text, path)
    seen: dict[str, int] = {}
    for i, principle in enumerate(found):
        if (first := seen.setdefault(principle.id, i)) != i:
            raise CaiError(f"{path}: principles[{i}]: id {principle.id!r} is that of principles[{first}]; rename one")
    return Constitution(str(path), hashlib.sha256(data).hexdigest()[:16], tuple(found), tuple(notes))


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
