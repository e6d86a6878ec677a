"""The four generated stages as data: instructions -> answers -> critiques and revisions, round by round.

Owns what fills each prompt and which parser judges what came back. No loops, no files, no model: `stage.run_stage`
runs them, `runner` orders them. A round is one principle: critique of the current text, then revision of it.
"""

from __future__ import annotations

from typing import Any

from cai.data import parsing, slots
from cai.data.parsing import Parsed, Unparsed
from cai.data.stage import Stage, Unit
from cai.recipe.constitution import Principle, choose
from cai.recipe.grid import Grid
from cai.run.context import Context


def principle_of(context: Context, item: int, round_: int) -> Principle:
    """The principle of an item's round: seeded, balanced over the run, never twice within an item."""
    recipe = context.recipe
    return choose(context.constitution, recipe.seed, item, recipe.rounds)[round_]


def current_text(context: Context, item: int, round_: int) -> str | None:
    """What round `round_` criticises: the answer, or the revision of the round before."""
    row = context.ok("answers", item) if round_ == 0 else context.ok("revisions", item, round_ - 1)
    return row["text"] if row else None


def instruction_of(context: Context, item: int) -> dict[str, Any] | None:
    """The accepted instruction row of an item, whichever attempt produced it."""
    for attempt in range(context.recipe.instructions.max_tries):
        row = context.log.get("instructions", item, attempt)
        if row is None:
            return None
        if row["status"] == "ok":
            return row
    return None


def make_instructions(grid: Grid) -> Stage:
    """Instructions from the seeded grid: `round` is the attempt; each attempt stands on its own cell."""

    def render(context: Context, item: int, attempt: int) -> Unit:
        recipe = context.recipe
        slot, number = slots.slot_of(item), slots.try_of(item) * recipe.instructions.max_tries + attempt
        pool = grid.pool(recipe.seed, slot, recipe.instructions.red_team_share)
        index = slot % slots.HELDOUT + number * slots.HELDOUT * 2 + (slots.HELDOUT if slot >= slots.HELDOUT else 0)
        cell = grid.cell(recipe.seed, index, pool)
        extra = {"pool": pool, "cell": cell, "split": slots.split_of(item), "parent": None}
        return Unit(item, attempt, cell, None, extra, shift=slot)

    return Stage("instructions", "instructions", render, lambda text, unit: parsing.instruction(text), True, False)


def _render_answer(context: Context, item: int, round_: int) -> Unit | None:
    row = instruction_of(context, item)
    return Unit(item, 0, {"instruction": row["text"]}) if row else None


def _render_critique(context: Context, item: int, round_: int) -> Unit | None:
    row, text = instruction_of(context, item), current_text(context, item, round_)
    if row is None or text is None:
        return None
    principle = principle_of(context, item, round_)
    fields = {"instruction": row["text"], "answer": text, "critique_request": principle.critique_request}
    return Unit(item, round_, fields, principle.id)


def _render_revision(context: Context, item: int, round_: int) -> Unit | None:
    row, text = instruction_of(context, item), current_text(context, item, round_)
    critique = context.ok("critiques", item, round_)
    if row is None or text is None or critique is None:
        return None
    principle = principle_of(context, item, round_)
    fields = {
        "instruction": row["text"],
        "answer": text,
        "critique": critique["text"],
        "revision_request": principle.revision_request,
    }
    return Unit(item, round_, fields, principle.id)


def _parse(parser: Any) -> Any:
    def parse(text: str, unit: Unit) -> Parsed | Unparsed:
        return parser(text)

    return parse


ANSWERS = Stage("answers", "answers", _render_answer, _parse(parsing.answer), redraws_limit=True)
CRITIQUES = Stage("critiques", "critiques", _render_critique, _parse(parsing.critique))
REVISIONS = Stage("revisions", "revisions", _render_revision, _parse(parsing.revision), redraws_limit=True)
