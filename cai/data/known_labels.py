"""Where the comparison of two texts draws its line: its margins over revisions whose worth is known.

Owns the known cases (cai/data/cases), the stage that compares them on the loaded model, and the bar. A judge prefers
one letter, a small one most of all, so "better in both orders" refuses nearly everything (that pull was 1.0 and 3.8
spreads of the margin on a model of 1.5B). It cancels in the margin, and the bar says from which margin on that means
something: `pairs.false_labels` of the revisions that are known to be no better are above it. Half of the cases set
the bar, the other half measure what it does (`labels.known.*`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cai.data import principles
from cai.data.comparisons import PAIR_FIELDS, margin, margin_asks
from cai.data.principles import cases
from cai.data.stage import Stage, Unit
from cai.engine.asks import Ask, score
from cai.recipe.load import Recipe
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record

LEAST = 10  # known non-improvements with a finite margin, below which no bar is drawn


def barred(recipe: Recipe) -> bool:
    """Whether labels are read by a bar that the loaded model's own margins set."""
    return recipe.pairs.label == "judge" and recipe.pairs.false_labels > 0


def _unit(context: Context, item: int, round_: int) -> Unit | None:
    return Unit(item, 0, {}) if item < len(cases()) else None


def compare(context: Context, units: Sequence[Unit]) -> list[Row]:
    """One row a case: the `margin` of its revision over its answer, in nats, null where there is none.

    It is the mean of two comparisons, under the case's principle and under none, as a pair's label.
    """
    scorer, prompt = principles.scorer_of(context), context.prompts["judge_pair"]
    asks: list[Ask] = []
    for unit in units:
        case = cases()[unit.item]
        texts = (case["instruction"], case["principle"], case["revision"], case["answer"])
        asks += margin_asks(scorer, prompt, (unit.item,), *texts)
    scores = score(scorer, asks)
    rows: list[Row] = []
    for unit in units:
        case, found = cases()[unit.item], principles.rounded({"margin": margin(scores, (unit.item,))})
        known = "better" if case["better"] else "no better"
        rows.append({**found, "known": known, "use": case["use"], "kind": case["kind"]})
    return rows


def bar_of(context: Context) -> float | None:
    """The margin that `pairs.false_labels` of the known non-improvements pass, never below 0.

    None where the recipe asks for none (both orders must agree then); infinite where too few margins are finite.
    """
    if not barred(context.recipe):
        return None
    rows = rows_of(context)
    worse = sorted(m for row in rows if _sets(row) and (m := row["margin"]) is not None)
    if len(worse) < LEAST:
        return math.inf
    place = math.ceil((1 - context.recipe.pairs.false_labels) * len(worse)) - 1
    return max(0.0, worse[max(0, place)])


def rows_of(context: Context) -> Sequence[Record]:
    """The records of the known cases."""
    return context.log.by_stage(LABEL_BAR.name)


def _sets(row: Record) -> bool:
    return row["status"] == "ok" and row["use"] == "bar" and row["known"] == "no better"


LABEL_BAR = Stage(
    "label_bar",
    "judge_pair",
    _unit,
    score=compare,
    keys=("principles.max_text_tokens", "pairs.label", "pairs.false_labels"),
    fields=PAIR_FIELDS,
    optional=True,
    enabled=barred,
    items=lambda context, items: range(len(cases())),
)
