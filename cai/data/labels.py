"""Is the chosen text better than the rejected one? The check of every label before it becomes a pair.

Owns the row of stage `labels` and the rule that reads it. Two tests by the model that wrote the texts, adapter off:
- the blind comparison under each principle that was used, in both orders (`comparisons`); their mean is the `margin`;
- the principles' scores before and after: those that were used must have fallen, the others must not have risen.
The judge is the writer, so this is a floor and no proof: `evaluate` measures with other questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cai.data import principles
from cai.data.comparisons import comparison_asks, orders
from cai.data.stage import Unit
from cai.engine import Score
from cai.engine.asks import Ask, Name, score
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record

RISE = (
    0.5  # nats: how far the mean of the principles that were not used may rise (noise of one score is about as large)
)


def check(context: Context, units: Sequence[Unit]) -> list[Row]:
    """One row a unit: `margin`, `first` and `second` (log-odds by order), `used`, `fallen` and `risen` (nats)."""
    scorer = principles.scorer_of(context)
    asks: list[Ask] = []
    for unit in units:
        for id_ in unit.extra["used"]:
            principle = context.constitution[id_].principle
            texts = (unit.fields["instruction"], principle, unit.fields["chosen"], unit.fields["rejected"])
            asks += comparison_asks(scorer, context.prompts["judge_pair"], (unit.item, id_), *texts)
    scores = score(scorer, asks)
    after = {}
    # the chosen texts, where the rejected ones have scores to compare with
    if again := {(u.item,): (u.fields["instruction"], u.fields["chosen"]) for u in units if u.extra["before"]}:
        every = context.constitution.principles
        found = score(scorer, principles.question_asks(context, scorer, again, every))
        raw = principles.raw_scores(found, again, every)
        after = {item: principles.centred(context, of) for (item,), of in raw.items()}
    rows = []
    for unit in units:
        row = verdict(scores, unit) | _change(unit, after.get(unit.item))
        rows.append(rounded(row) | {"used": list(unit.extra["used"])})
    return rows


def verdict(scores: Mapping[Name, Score], unit: Unit) -> dict[str, float]:
    """Mean log-odds of either order over the unit's principles, and the margin: a liking for a letter cancels in it."""
    both = [orders(scores, (unit.item, id_)) for id_ in unit.extra["used"]]
    first, second = (_mean(side) for side in zip(*both, strict=True))
    return {"first": first, "second": second, "margin": (first - second) / 2}


def rounded(row: Mapping[str, float]) -> Row:
    """For the log: four decimals, null where there is no number."""
    return {name: _finite(value) for name, value in row.items()}


def _change(unit: Unit, after: Mapping[str, float | None] | None) -> dict[str, float]:
    """Mean fall of the principles that were used, mean rise of the others."""
    before = unit.extra["before"]
    if not before or after is None:
        return {}
    differences = {
        id_: now - then for id_, then in before.items() if then is not None and (now := after.get(id_)) is not None
    }
    used = [-value for id_, value in differences.items() if id_ in unit.extra["used"]]
    others = [value for id_, value in differences.items() if id_ not in unit.extra["used"]]
    mean = {"fallen": math.fsum(used) / len(used)} if used else {}
    return mean | ({"risen": math.fsum(others) / len(others)} if others else {})


def _mean(values: Sequence[float]) -> float:
    """NaN where one is no finite number: the sum of two infinities would be none, or an error."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def fault(row: Record) -> str:
    """Why the chosen text is not better, or "". What could not be scored is not better."""
    first, second = row.get("first"), row.get("second")
    if first is None or second is None:
        return "unscored: a likelihood is not finite"
    if not first > 0 > second:
        where = "both orders" if first <= 0 <= second else "one order"
        return f"the original is preferred in {where}: {row['margin']:.2f}"
    if (fallen := row.get("fallen")) is not None and fallen <= 0:
        return f"what was criticised did not get better: {fallen:.2f} nats"
    if (risen := row.get("risen")) is not None and risen > RISE:
        return f"other principles are broken more: {risen:.2f} nats"
    return ""
