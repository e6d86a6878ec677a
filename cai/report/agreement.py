"""How far the metric and people agree on critiques and revisions, and people with each other. Pure.

Owns these agreement figures; those of fresh answers are `people`'s, the marks' vocabulary is `cai.data.marks`'s, asking
for them `cai.commands.review`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.data.marks import GOOD
from cai.evaluate import critiques, revisions
from cai.metrics.stats import kappa, kappa_interval
from cai.report.snapshot import Snapshot
from cai.store.jsonl import Row


def agreement(snapshot: Snapshot) -> list[Row]:
    """One row a pair of raters (metric and person, person and person) and a kind of text."""
    if not snapshot.reviews:
        return []
    people = sorted({str(row["rater"]) for row in snapshot.reviews})
    rows = []
    for what in ("critique", "revision"):
        votes = {person: _votes(snapshot.reviews, person, what) for person in people}
        metric = _metric(snapshot, what)
        for person in people:
            rows.append(_compare("metric", person, what, metric, votes[person]))
        for i, one in enumerate(people):
            for two in people[i + 1 :]:
                rows.append(_compare(one, two, what, votes[one], votes[two]))
        for person in people:
            if (found := controls(snapshot.reviews, person, what)) is not None:
                rows.append(found)
    return [row for row in rows if row["n"]]


def _votes(reviews: Sequence[Row], rater: str, what: str) -> dict[int, bool]:
    """item -> good, of real texts only (controls are counted apart)."""
    mine = [r for r in reviews if r["rater"] == rater and r["what"] == what and not r.get("control")]
    return {int(r["item"]): r["mark"] in GOOD[what] for r in mine if r["mark"] != "skip"}


def _metric(snapshot: Snapshot, what: str) -> dict[int, bool]:
    """The metric's verdict of every item that its figure decides."""
    verdict = critiques.verdict if what == "critique" else revisions.verdict
    every, section = snapshot.scores_by_item, snapshot.recipe.evaluation
    return {i: decided for i, scores in every.items() if (decided := verdict(scores, section).decided) is not None}


def _compare(one: str, two: str, what: str, first: dict[int, bool], second: dict[int, bool]) -> Row:
    items = sorted(first.keys() & second.keys())
    a, b = [first[i] for i in items], [second[i] for i in items]
    raw = sum(x == y for x, y in zip(a, b, strict=True)) / len(items) if items else None
    value = kappa(a, b)
    low, high = (None, None) if value is None else kappa_interval(list(zip(a, b, strict=True)), kappa)
    return {"who": f"{one} and {two}", "what": what, "n": len(items), "raw": raw, "kappa": value, "low": low,
            "high": high, "yes": (sum(a), sum(b))}  # fmt: skip


def controls(reviews: Sequence[Row], rater: str, what: str) -> Row | None:
    """How often a rater saw a control for one: should be nearly always, or the marks mean little."""
    mine = [r for r in reviews if r["rater"] == rater and r["what"] == what and r.get("control")]
    if not mine:
        return None
    right = sum(r["mark"] not in GOOD[what] for r in mine)
    return {"who": f"{rater}, controls called bad", "what": what, "n": len(mine), "raw": right / len(mine),
            "kappa": None, "low": None, "high": None, "yes": (right, len(mine))}  # fmt: skip
