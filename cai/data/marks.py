"""Marks that people gave to critiques and revisions, and how far the metric and people agree. Pure.

Owns the marks' vocabulary and the agreement figures; `review` owns asking for them. A row of reviews.jsonl: v, rater,
item, round, what ("critique" or "revision"), mark, control ("" or the kind of planted text), key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cai.metrics.stats import kappa
from cai.report.examples import judge_critique, judge_revision
from cai.report.snapshot import Story

Row = dict[str, Any]
REVIEW_KEY = ("rater", "key")
CRITIQUE_MARKS = ("meaningful", "not")
REVISION_MARKS = ("fixed", "partly", "not")
GOOD = {"critique": ("meaningful",), "revision": ("fixed",)}  # "partly" is no fix


def agreement(story: Story) -> list[Row]:
    """One row a pair of raters (metric and person, person and person) and a kind of text."""
    if not story.reviews:
        return []
    people = sorted({str(row["rater"]) for row in story.reviews})
    rows = []
    for what in ("critique", "revision"):
        votes = {person: _votes(story.reviews, person, what) for person in people}
        metric = _metric(story, what)
        for person in people:
            rows.append(_compare("metric", person, what, metric, votes[person]))
        for i, one in enumerate(people):
            for two in people[i + 1 :]:
                rows.append(_compare(one, two, what, votes[one], votes[two]))
        for person in people:
            if (found := controls(story.reviews, person, what)) is not None:
                rows.append(found)
    return [row for row in rows if row["n"]]


def _votes(reviews: Sequence[Row], rater: str, what: str) -> dict[int, bool]:
    """item -> good, of real texts only (controls are counted apart)."""
    mine = [r for r in reviews if r["rater"] == rater and r["what"] == what and not r.get("control")]
    return {int(r["item"]): r["mark"] in GOOD[what] for r in mine if r["mark"] != "skip"}


def _metric(story: Story, what: str) -> dict[int, bool]:
    """The metric's verdict of every item that it decided."""
    judge = judge_critique if what == "critique" else judge_revision
    found = {}
    for item, scores in story.scores_by_item.items():
        status = judge(scores, story.recipe.evaluation).status
        if status in ("yes", "no"):
            found[item] = status == "yes"
    return found


def _compare(one: str, two: str, what: str, first: dict[int, bool], second: dict[int, bool]) -> Row:
    items = sorted(first.keys() & second.keys())
    a, b = [first[i] for i in items], [second[i] for i in items]
    raw = sum(x == y for x, y in zip(a, b, strict=True)) / len(items) if items else None
    return {"who": f"{one} and {two}", "what": what, "n": len(items), "raw": raw, "kappa": kappa(a, b),
            "yes": (sum(a), sum(b))}  # fmt: skip


def controls(reviews: Sequence[Row], rater: str, what: str) -> Row | None:
    """How often a rater saw a control for one: should be nearly always, or the marks mean little."""
    mine = [r for r in reviews if r["rater"] == rater and r["what"] == what and r.get("control")]
    if not mine:
        return None
    right = sum(r["mark"] not in GOOD[what] for r in mine)
    return {"who": f"{rater}, controls called bad", "what": what, "n": len(mine), "raw": right / len(mine),
            "kappa": None, "yes": (right, len(mine))}  # fmt: skip


def refused(reviews: Sequence[Row]) -> dict[int, str]:
    """item -> the marks that refuse it, for `hygiene.reviews`: "critique not (ann), revision partly (ben)"."""
    found: dict[int, list[str]] = {}
    for row in reviews:
        if not row.get("control") and row["mark"] != "skip" and row["mark"] not in GOOD[row["what"]]:
            found.setdefault(int(row["item"]), []).append(f"{row['what']} {row['mark']} ({row['rater']})")
    return {item: ", ".join(marks) for item, marks in sorted(found.items())}


def filter_pairs(pairs: Sequence[Row], reviews: Sequence[Row]) -> list[Row]:
    """Pairs without those whose critique or revision somebody marked as not good; unmarked pairs stay."""
    bad = refused(reviews)
    return [pair for pair in pairs if pair["item"] not in bad]
