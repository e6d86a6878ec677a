"""Marks that people gave to critiques, revisions and fresh answers: their words, and what they leave out. Pure.

Owns the marks' vocabulary; `review` owns asking for them, `report.agreement` and `report.people` what they show. A row
of reviews.jsonl: v, rater, item, round, what ("critique", "revision" or "answers"), mark, control ("" or the kind of
planted text), key; of "answers" also `left` and `right`, the arms that stood there.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.store.jsonl import Row
from cai.store.row_types import Pair

REVIEW_KEY = ("rater", "key")
CRITIQUE_MARKS = ("meaningful", "not")
REVISION_MARKS = ("fixed", "partly", "not")
ANSWERS = "answers"  # two fresh answers beside each other
ANSWER_MARKS = ("left", "right", "equal")
WHOLE = {"rater": str, "key": str, "what": str, "mark": str, "item": int}  # what every mark has
GOOD = {"critique": ("meaningful",), "revision": ("fixed",)}  # "partly" is no fix


def whole(reviews: Sequence[Row]) -> list[Row]:
    """The rows that are marks; what a person's editor or a disk made of others is none."""
    return [
        row for row in reviews if all(isinstance(row.get(name), kind) for name, kind in WHOLE.items()) and _known(row)
    ]


def _known(row: Row) -> bool:
    """Of a text, or of two answers with the arms that gave them."""
    if row["what"] != ANSWERS:
        return row["what"] in GOOD
    arms = [row.get(side) for side in ("left", "right")]
    return row["mark"] in (*ANSWER_MARKS, "skip") and all(isinstance(arm, str) for arm in arms) and arms[0] != arms[1]


def of_texts(reviews: Sequence[Row]) -> list[Row]:
    """The marks of critiques and revisions: what a pair is made of. Those of fresh answers say nothing of a pair."""
    return [row for row in reviews if row["what"] in GOOD]


def refused(reviews: Sequence[Row]) -> dict[int, str]:
    """item -> the marks that refuse it, for `hygiene.reviews`: "critique not (ann), revision partly (ben)"."""
    found: dict[int, list[str]] = {}
    for row in of_texts(reviews):
        if not row.get("control") and row["mark"] != "skip" and row["mark"] not in GOOD[row["what"]]:
            found.setdefault(int(row["item"]), []).append(f"{row['what']} {row['mark']} ({row['rater']})")
    return {item: ", ".join(marks) for item, marks in sorted(found.items())}


def filter_pairs(pairs: Sequence[Pair], reviews: Sequence[Row]) -> list[Pair]:
    """Pairs without those whose critique or revision somebody marked as not good; unmarked pairs stay."""
    bad = refused(reviews)
    return [pair for pair in pairs if pair["item"] not in bad]
