"""Pairs without a revision (`pairs.kind` "sampled", "both"): two answers of one request, ordered by the model's judge.

Owns the stages `second_answers` and `comparisons`, the rule that reads a comparison, and the example that it becomes.
The judge is the model that wrote both answers, adapter off, in both orders, under the principles that the request's
first answer breaks most (or those that were dealt); its mean log-odds are the pair's `margin`, which `dpo.weight` and
`dpo.soft_labels` read (RL-CAI's soft labels, Bai et al. 2022, section 4.1, with DPO in place of a preference model).
Invariant: a sampled pair has an item number of its own (`slots.sampled_item`), so one request may give two pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.data import examples, labels, principles, slots
from cai.data.rounds import instruction_of
from cai.data.stage import Unit
from cai.engine.asks import score
from cai.recipe.constitution import Principle, choose
from cai.recipe.settings import PairsSection
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Example, Record, UnitExtra

KIND = "sampled"
SECOND, COMPARED = "second_answers", "comparisons"
GUARD_ROUND = 1  # of a guard's row about a sampled pair: its item's revision pair has round 0


def render_comparison(context: Context, item: int, round_: int) -> Unit | None:
    """Two answers that stand, and the principles under which they are compared."""
    row, first, second = instruction_of(context, item), context.ok("answers", item), context.ok(SECOND, item)
    if row is None or first is None or second is None:
        return None
    used = principles_of(context, item, row["pool"])
    if not used:
        return None
    extra: UnitExtra = {"used": tuple(principle.id for principle in used), "before": {}}
    return Unit(item, 0, {"instruction": row["text"], "first": first["text"], "second": second["text"]}, extra=extra)


def principles_of(context: Context, item: int, pool: str) -> list[Principle]:
    """As many as a revision has rounds: those that the first answer breaks most, or those that are dealt to the item.

    No threshold: whether either answer breaks one at all doesn't matter to which of the two breaks it less.
    """
    recipe = context.recipe
    if recipe.principles.choice == "uniform":
        return list(choose(context.constitution, recipe.seed, item, recipe.rounds))
    row = context.ok("relevance", item)
    scores = row["scores"] if row is not None else {}
    fits = principles.fitting(context.constitution, pool)
    return principles.highest([(v, p) for p in fits if (v := scores.get(p.id)) is not None], recipe.rounds)


def compare(context: Context, units: Sequence[Unit]) -> list[Row]:
    """One row a unit: `first`, `second` (log-odds by order, for the first answer), their `margin`, and `used`."""
    bar, asks = labels.verdict_asks(context, units, "first", "second")
    scores = score(principles.scorer_of(context), asks)
    return [labels.row_of(unit, labels.verdict(scores, unit, bar), bar) for unit in units]


def undecided(row: Record, config: PairsSection) -> str:
    """Why neither answer is the better one, or "". With `pairs.label` "judge" the margin must pass the bar,
    or without one both orders must prefer the same answer.
    """
    first, second, margin = row.get("first"), row.get("second"), row.get("margin")
    if first is None or second is None or margin is None:
        return "unscored: a likelihood is not finite"
    if margin == 0:
        return "neither is preferred"
    if config.label == "judge" and (bar := row.get("bar")) is not None:
        return "" if abs(margin) > bar else f"no clear margin: {margin:.2f}, the bar is {bar:.2f}"
    if config.label == "judge" and not (first > 0 > second or first < 0 < second):
        return f"each order prefers another one: {margin:.2f}"
    return ""


def example_of(instruction: Record, answers: tuple[Record, Record], row: Record, texts: dict[str, str]) -> Example:
    """The preferred answer as chosen; in the form of a revision's example, with what it doesn't have left empty.

    `texts`: principle id -> its text. Swapping the answers swaps the two orders and negates the margin.
    """
    first, second, margin = row["first"], row["second"], row["margin"]
    kept, other = answers
    if margin is not None and margin < 0:
        kept, other, first, second, margin = other, kept, second, first, -margin
    used = list(row["used"])
    limited = [record["stage"] for record in answers if record.get("finish") == "length"]
    about = examples.NOTHING
    if used:
        about = about | {"principle_id": used[0], "principle": texts.get(used[0], used[0])}
    bar = {"bar": row["bar"]} if "bar" in row else {}
    example = examples.example_of(
        {"prompt": instruction["text"], "chosen": kept["text"], "rejected": other["text"]},
        slots.sampled_item(row["item"]),
        instruction.get("pool", "benign"),
        instruction.get("split", "train"),
        last=about,
        limited=limited,
    )
    label = {"first": first, "second": second, **bar, "used": used}
    return example | {"margin": margin, "label": label, "kind": KIND}
