"""Which items a run has: slots, tries and splits. Pure arithmetic over item numbers and records.

A slot is a place in the data set that one accepted pair should fill. An item is one try to fill it:
`item = slot + TRY * try`, so more slots or more tries never renumber what is on disk. Held-out slots start at HELDOUT;
what goes through them is never trained on, and the split of a prompt is fixed before any answer to it exists.
"""

from __future__ import annotations

import hashlib

from cai.recipe.load import Recipe

TRY = 1_000_000
HELDOUT = 500_000
SAMPLED = 10**12  # added to the item of a pair of two sampled answers: above any try


def slots(recipe: Recipe) -> list[int]:
    """Training slots, then held-out slots."""
    return [*range(recipe.items), *range(HELDOUT, HELDOUT + recipe.heldout.items)]


def slot_of(item: int) -> int:
    return item % TRY


def try_of(item: int) -> int:
    return drawn_item(item) // TRY


def split_of(item: int) -> str:
    return "heldout" if slot_of(item) >= HELDOUT else "train"


def sampled_item(item: int) -> int:
    """The number of an item's pair of two sampled answers; its slot and its split stay what they are."""
    return SAMPLED + item


def drawn_item(item: int) -> int:
    """The item whose records a pair was made of."""
    return item % SAMPLED


def item_at(slot: int, attempt: int) -> int:
    return slot + TRY * attempt


def tries(recipe: Recipe) -> int:
    """How many items a slot may use up: each instruction once and its retries, then a fresh instruction."""
    return (1 + recipe.pairs.retries) * (1 + recipe.pairs.replacements)


def is_fresh(item: int, recipe: Recipe) -> bool:
    """Whether this try wants a new instruction (else it repeats that of the try before, with new seeds)."""
    return try_of(item) % (1 + recipe.pairs.retries) == 0


def earlier(item: int) -> int:
    """The try before this one."""
    return item - TRY


def seed_of(run_seed: int, stage: str, item: int, round_: int, draw: int = 0) -> int:
    """63-bit seed of one draw: depends on nothing but the run's seed and what the draw is for."""
    text = f"{run_seed}/{stage}/{item}/{round_}{f'/{draw}' if draw else ''}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
