"""The data half of a run: every slot through the stages; a rejected pair is tried again and replaced, within a bound.

Owns the order of stages and waves and what is left to do; `stage.run_stage` owns the loop, `pairs` what makes a pair.
Everything is computed from the records, so a resume walks the same waves and finds them done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cai.data import chain, guarding, instructions, slots
from cai.data.pairs import PairPlan, PairSet, build
from cai.data.stage import run_stage
from cai.recipe.grid import Grid
from cai.run.context import Context


def pair_plan(context: Context) -> PairPlan:
    return PairPlan(context.recipe.rounds, {p.id: p.principle for p in context.constitution.principles})


def pairs_so_far(context: Context, before: PairSet | None = None) -> PairSet:
    """Examples, kept pairs and rejects of all records up to now; what `before` has of items without news is kept."""
    wanted = {slot for slot in slots.slots(context.recipe)}
    rows = context.log.rows
    return build(rows, pair_plan(context), context.recipe.pairs, lambda item: slots.slot_of(item) in wanted, before)


def waves(context: Context, pairs: PairSet, attempt: int) -> list[int]:
    """Items of try number `attempt`: every slot at first, then the slots whose pair is still missing."""
    filled = {slots.slot_of(pair["item"]) for pair in pairs.kept}
    return [slots.item_at(slot, attempt) for slot in slots.slots(context.recipe) if slot not in filled]


def collect(context: Context, grid: Grid, source: Path | None, until: str = "") -> PairSet:
    """Run the stages until each slot has its pair or its tries are used up.

    `until`: stop after that stage; "pairs" is the end of all. `source`: the user's own instructions, if any.
    """
    recipe = context.recipe
    lines = instructions.read_file(source) if source else []
    stage = chain.make_instructions(grid)
    pairs = PairSet([], [], [])
    for attempt in range(slots.tries(recipe)):
        items = waves(context, pairs, attempt)
        if not items:
            break
        if attempt:
            context.run.event("wave", attempt=attempt, slots=len(items), reasons=pairs.reasons)
            context.progress.say(
                f"{len(items)} slot(s) have no pair yet: wave {attempt + 1} of at most {slots.tries(recipe)}"
            )
        _instructions(context, stage, items, lines)
        if until != "instructions":
            _answers_to_revisions(context, items, until)
        pairs = pairs_so_far(context, pairs)
        if until not in ("", "pairs"):
            break
        if recipe.guard.enabled and guarding.run_guard(context, pairs.examples):
            pairs = pairs_so_far(context, pairs)
    return pairs


def _instructions(context: Context, stage: chain.Stage, items: Sequence[int], lines: Sequence[tuple[str, str]]) -> None:
    fresh = [i for i in items if slots.is_fresh(i, context.recipe) or not _has_instruction(context, slots.earlier(i))]
    instructions.repeat(context, [i for i in items if i not in set(fresh)])
    if lines:
        instructions.take_from_file(context, fresh, lines)
    else:
        instructions.generate(context, stage, fresh)


def _has_instruction(context: Context, item: int) -> bool:
    return chain.instruction_of(context, item) is not None


def _answers_to_revisions(context: Context, items: Sequence[int], until: str) -> None:
    for stage, round_ in chain.ordered(context.recipe.rounds, context.recipe)[1:]:
        run_stage(context, stage, items, round_)
        if until == stage.name:
            return
