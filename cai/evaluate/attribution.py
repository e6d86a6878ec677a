"""What each principle bought and cost: judged wins of the tuned model over its base, principle by principle.

Pure: judgements of `head_to_head` in, ranked rows and two heat maps out. Legend: `ours` is the tuned model, `theirs`
the base; of a fork that was trained without a principle, `ours` is the whole run and `theirs` the fork, so a gain under
the principle is what its pairs bought, and a loss under the others is what they cost there. A 95% interval above 0 says
bought, below 0 cost, and one that holds 0 says that nothing is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cai.evaluate import head_to_head_figures as figures
from cai.evaluate.head_to_head import Question
from cai.evaluate.head_to_head_figures import Texts
from cai.metrics.figure import Scored, finite_rows, mean
from cai.recipe.constitution import Principle
from cai.store.jsonl import Row


def ranking(
    rows: Sequence[Row], principles: Sequence[Principle], texts: Texts, pairs: Mapping[str, int], judge: str
) -> list[Row]:
    """One row a principle, the most gained first: log-odds with interval, wins, training pairs, and the verdict."""
    found: list[Row] = []
    for place, principle in enumerate(principles, start=1):
        under = figures.under(f"attribution.{principle.id}", figures.of_place(rows, place), texts, judge).as_dict()
        row: Row = {"id": principle.id, "principle": principle.principle, "pairs": pairs.get(principle.id, 0)}
        found.append(row | under | {"verdict": verdict(under["log_odds"])})
    values = {row["id"]: row["log_odds"]["value"] for row in found}
    return sorted(found, key=lambda row: (values[row["id"]] is None, -(values[row["id"]] or 0.0), row["id"]))


def verdict(log_odds: Row) -> str:
    """`bought`, `cost`, or `not shown` where the interval holds 0 or there is none."""
    low, high = log_odds["low"], log_odds["high"]
    if low is None or high is None:
        return "not shown"
    return "bought" if low > 0 else "cost" if high < 0 else "not shown"


def heat(rows: Sequence[Row], principles: Sequence[Principle], groups: Mapping[str, Sequence[int]]) -> list[Row]:
    """Principle by group (pool or topic): the share that wins, a tie one half, with n; None where none was scored."""
    found: list[Row] = []
    for place, principle in enumerate(principles, start=1):
        judged = finite_rows(figures.of_place(rows, place), "win")
        cells: Row = {}
        for group, items in groups.items():
            wins = [row["win"] for row in figures.of_items(judged, items)]
            cells[group] = {"wins": sum(wins) / len(wins) if wins else None, "n": len(wins)}
        found.append({"id": principle.id, "cells": cells})
    return found


def without(
    rows: Sequence[Row], principles: Sequence[Principle], left_out: Sequence[str], texts: Texts, judge: str
) -> Row:
    """What the pairs of the principles that were left out had bought: the whole run judged over the fork.

    `own`: under the principles themselves, one row each; `others`: the mean over the other principles, one value a
    prompt, so that its interval is over independent prompts.
    """
    own: list[Row] = []
    for place, principle in enumerate(principles, start=1):
        if principle.id in left_out:
            name = f"attribution.without.{principle.id}"
            under = figures.under(name, figures.of_place(rows, place), texts, judge).as_dict()
            own.append({"id": principle.id, **under, "verdict": verdict(under["log_odds"])})
    kept = [place for place, principle in enumerate(principles, start=1) if principle.id not in left_out]
    others = _mean_over(rows, kept, judge)
    return {"left_out": list(left_out), "own": own, "others": others, "others_verdict": verdict(others)}


def _mean_over(rows: Sequence[Row], places: Sequence[int], judge: str) -> Row:
    """Mean log-odds under these principles: first over a prompt's principles, then over prompts."""
    by_item: dict[int, list[float]] = {}
    for row in finite_rows([row for row in rows if row["round"] in places], "log_odds"):
        by_item.setdefault(row["item"], []).append(row["log_odds"])
    values = [Scored(sum(odds) / len(odds)) for odds in by_item.values()]
    return dict(mean("attribution.without.others.log_odds", values, judge=judge).as_dict())


def groups_of(questions: Sequence[Question]) -> dict[str, dict[str, list[int]]]:
    """`pool` and `topic` -> group -> items."""
    return {name: figures.by_group(questions, name) for name in ("pool", "topic")}
