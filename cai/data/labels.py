"""Is the chosen text better than the rejected one? The check of every label before it becomes a pair.

Owns the row of stage `labels` and the rule that reads it. Two tests by the model that wrote the texts, adapter off:
- the blind comparison under each principle that was used, in both orders (`comparisons`): half the difference of the
  orders is the `margin`, in which a liking for a letter cancels. It must be above the bar;
- without such a bar both orders must agree, and of the principles' scores before and after those that were used must
  have fallen, the others must not have risen. (Over known revisions the margin parts better from no better with an AUC
  of 0.82 to 0.86, the fall with 0.70, both together no better than the margin alone: a model of 1.5B.)
The judge is the writer, so this is a floor and no proof: `evaluate` measures with other questions.

Owns the bar, too: the margins of that comparison over revisions whose worth is known (cai/data/cases). A judge prefers
one letter, a small one most of all, so "better in both orders" refuses nearly everything (that pull was 1.0 and 3.8
spreads of the margin on a model of 1.5B). It cancels in the margin, and the bar says from which margin on that means
something: `pairs.false_labels` of the revisions that are known to be no better are above it. Half of the cases set
the bar, the other half measure what it does (`labels.known.*`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cai.data import answer_signs, principles
from cai.data.comparisons import PAIR_FIELDS, answer_asks, comparison_asks, margin, orders
from cai.data.principles import cases
from cai.data.stage import Stage, Unit
from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer, score
from cai.recipe.load import Recipe
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record

RISE = (
    0.5  # nats: how far the mean of the principles that were not used may rise (noise of one score is about as large)
)


def check(context: Context, units: Sequence[Unit]) -> list[Row]:
    """One row a unit: `margin`, `first`, `second` (log-odds by order), `used`; `bar`, or `fallen`, `risen` (nats)."""
    scorer, after = principles.scorer_of(context), {}
    bar, asks = verdict_asks(context, units, "chosen", "rejected")
    scores = score(scorer, asks)
    # the chosen texts, where the rejected ones have scores to compare with
    with_scores = [unit for unit in units if unit.extra["before"] and bar is None and not principles.by_critic(context)]
    if again := {(u.item,): (u.fields["instruction"], u.fields["chosen"]) for u in with_scores}:
        every = context.constitution.principles
        found = score(scorer, answer_signs.question_asks(context, scorer, again, every))
        raw = answer_signs.raw_scores(found, again, every)
        after = {item: principles.centred(context, of) for (item,), of in raw.items()}
    return [row_of(u, verdict(scores, u, bar) | _change(u, after.get(u.item)), bar) for u in units]


def verdict_asks(context: Context, units: Sequence[Unit], ours: str, theirs: str) -> tuple[float | None, list[Ask]]:
    """The bar, and what `verdict` reads the scores of: two texts of each unit, its fields `ours` and `theirs`."""
    scorer, bar = principles.scorer_of(context), bar_of(context)
    asks: list[Ask] = []
    for unit in units:
        both = unit.fields[ours], unit.fields[theirs]
        for id_, principle in under(context, unit, bar):
            asks += asks_of(context, scorer, (unit.item, id_), unit.fields["instruction"], principle, *both)
    return bar, asks


BY_ANSWER = "judge_answer"  # the prompt file that asks about one text


def chosen(recipe: Recipe) -> str:
    """The prompt file where texts are asked about one by one; "" where they are compared."""
    return BY_ANSWER if recipe.pairs.by == "answer" else ""


def asked_alone(recipe: Recipe) -> bool:
    """Whether labels are checked, and that by asking about one text at a time."""
    return recipe.pairs.label == "judge" and bool(chosen(recipe))


def asks_of(context: Context, scorer: Scorer, name: Name, *texts: str) -> list[Ask]:
    """Instruction, principle, ours, theirs: both texts compared, or each asked about by itself (`pairs.by`)."""
    if chosen(context.recipe):
        return answer_asks(scorer, context.prompts[BY_ANSWER], name, *texts)
    return comparison_asks(scorer, context.prompts["judge_pair"], name, *texts)


def margin_asks(context: Context, scorer: Scorer, name: Name, *texts: str) -> list[Ask]:
    """The same under the principle and under none; `comparisons.margin` reads the scores."""
    instruction, principle, ours, theirs = texts
    return [
        ask
        for place, under in enumerate((principle, ""))
        for ask in asks_of(context, scorer, (*name, place), instruction, under, ours, theirs)
    ]


def row_of(unit: Unit, found: Mapping[str, float], bar: float | None) -> Row:
    """What the log holds of a verdict: four decimals, null where there is no number; the bar; the principles."""
    return with_bar(principles.rounded(found), bar) | {"used": list(unit.extra["used"])}


GENERAL = ""  # stands for no principle in particular: an answer is helpful, honest and harmless


def under(context: Context, unit: Unit, bar: float | None) -> list[tuple[str, str]]:
    """(id, text) of what two texts are compared under: the principles used and, where there is a bar, none as well.

    Under a principle that has nothing to do with the request, whatever speaks of it is the better text.
    """
    used = [(id_, context.constitution[id_].principle) for id_ in unit.extra["used"]]
    return used if bar is None else [*used, (GENERAL, "")]


def verdict(scores: Mapping[Name, Score], unit: Unit, bar: float | None) -> dict[str, float]:
    """Mean log-odds of either order over the unit's principles, and the margin: a liking for a letter cancels in it.

    Where there is a bar the comparison under no principle counts as much as all others together.
    """
    both = [orders(scores, (unit.item, id_)) for id_ in unit.extra["used"]]
    first, second = (_mean(side) for side in zip(*both, strict=True))
    if bar is not None:
        general = orders(scores, (unit.item, GENERAL))
        first, second = _mean((first, general[0])), _mean((second, general[1]))
    return {"first": first, "second": second, "margin": (first - second) / 2}


def with_bar(row: Row, bar: float | None) -> Row:
    """The row with the bar that its margin has to pass; without numbers where no bar could be drawn."""
    if bar is None:
        return row
    return row | {"bar": bar} if math.isfinite(bar) else {"first": None, "second": None, "margin": None}


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
    return {name: math.fsum(some) / len(some) for name, some in (("fallen", used), ("risen", others)) if some}


def _mean(values: Sequence[float]) -> float:
    """NaN where one is no finite number: the sum of two infinities would be none, or an error."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def fault(row: Record) -> str:
    """Why the chosen text is not better, or "". What could not be scored is not better."""
    first, second = row.get("first"), row.get("second")
    if first is None or second is None:
        return "unscored: a likelihood is not finite"
    if (bar := row.get("bar")) is not None:
        margin = row["margin"] if row["margin"] is not None else math.nan
        return "" if margin > bar else f"no clear margin: {margin:.2f}, the bar is {bar:.2f}"
    if not first > 0 > second:
        where = "both orders" if first <= 0 <= second else "one order"
        return f"the original is preferred in {where}: {row['margin']:.2f}"
    if (fallen := row.get("fallen")) is not None and fallen <= 0:
        return f"what was criticised did not get better: {fallen:.2f} nats"
    if (risen := row.get("risen")) is not None and risen > RISE:
        return f"other principles are broken more: {risen:.2f} nats"
    return ""


# --- the bar, over revisions whose worth is known

LEAST = 10  # known non-improvements with a finite margin, below which no bar is drawn


def barred(recipe: Recipe) -> bool:
    """Whether labels are read by a bar that the loaded model's own margins set."""
    return recipe.pairs.label == "judge" and recipe.pairs.false_labels > 0


def compare(context: Context, units: Sequence[Unit]) -> list[Row]:
    """One row a case: the `margin` of its revision over its answer, in nats, null where there is none.

    It is the mean of two comparisons, under the case's principle and under none, as a pair's label.
    """
    scorer, asks = principles.scorer_of(context), list[Ask]()
    for unit in units:
        case = cases()[unit.item]
        texts = (case["instruction"], case["principle"], case["revision"], case["answer"])
        asks += margin_asks(context, scorer, (unit.item,), *texts)
    scores = score(scorer, asks)
    rows: list[Row] = []
    for unit in units:
        case, found = cases()[unit.item], principles.rounded({"margin": margin(scores, (unit.item,))})
        known = "better" if case["better"] else "no better"
        rows.append({**found, "known": known, "use": case["use"], "kind": case["kind"]})
    return rows


def bar_of(context: Context) -> float | None:
    """The margin that `pairs.false_labels` of the known non-improvements pass, never below 0.

    Where the recipe asks for none it is None (both orders must agree then), or 0 where texts are asked about one by
    one, whatever `pairs.label` says: a fork that turns it keeps the comparisons. Infinite where too few are finite.
    """
    if not barred(context.recipe):
        return 0.0 if chosen(context.recipe) else None
    rows = [row for row in rows_of(context) if row["status"] == "ok" and row["use"] == "bar"]
    worse = sorted(m for row in rows if row["known"] == "no better" and (m := row["margin"]) is not None)
    if len(worse) < LEAST:
        return math.inf
    place = math.ceil((1 - context.recipe.pairs.false_labels) * len(worse)) - 1
    return max(0.0, worse[max(0, place)])


def rows_of(context: Context) -> Sequence[Record]:
    """The records of the known cases."""
    return context.log.by_stage(LABEL_BAR.name)


LABEL_BAR = Stage(
    "label_bar",
    "judge_pair",
    lambda context, item, round_: Unit(item, 0, {}) if item < len(cases()) else None,
    score=compare,
    keys=("principles.max_text_tokens", "pairs.label", "pairs.by", "pairs.false_labels"),
    fields=PAIR_FIELDS,
    chosen=chosen,
    optional=True,
    enabled=barred,
    items=lambda context, items: range(len(cases())),
)
