"""Marks that people gave to critiques and revisions, and how far the metric and people agree. Pure.

Owns the marks' vocabulary and the agreement figures; `review` owns asking for them. A row of reviews.jsonl: v, rater,
item, round, what ("critique" or "revision"), mark, control ("" or the kind of planted text), key.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.store.jsonl import Row
from cai.store.row_types import Pair

REVIEW_KEY = ("rater", "key")
CRITIQUE_MARKS = ("meaningful", "not")
REVISION_MARKS = ("fixed", "partly", "not")
WHOLE = {"rater": str, "key": str, "what": str, "mark": str, "item": int}  # what every mark has
GOOD = {"critique": ("meaningful",), "revision": ("fixed",)}  # "partly" is no fix


def whole(reviews: Sequence[Row]) -> list[Row]:
    """The rows that are marks; what a person's editor or a disk made of others is none."""
    return [
        row
        for row in reviews
        if all(isinstance(row.get(name), kind) for name, kind in WHOLE.items()) and row["what"] in GOOD
    ]


def refused(reviews: Sequence[Row]) -> dict[int, str]:
    """item -> the marks that refuse it, for `hygiene.reviews`: "critique not (ann), revision partly (ben)"."""
    found: dict[int, list[str]] = {}
    for row in reviews:
        if not row.get("control") and row["mark"] != "skip" and row["mark"] not in GOOD[row["what"]]:
            found.setdefault(int(row["item"]), []).append(f"{row['what']} {row['mark']} ({row['rater']})")
    return {item: ", ".join(marks) for item, marks in sorted(found.items())}


def filter_pairs(pairs: Sequence[Pair], reviews: Sequence[Row]) -> list[Pair]:
    """Pairs without those whose critique or revision somebody marked as not good; unmarked pairs stay."""
    bad = refused(reviews)
    return [pair for pair in pairs if pair["item"] not in bad]
