"""The data half of a run: every slot through the stages; a rejected pair is tried again and replaced, within a bound.

Owns the order of stages and waves and what is left to do; `stage_loop` owns the loop, `pairs` what makes a pair.
Everything is computed from the records, so a resume walks the same waves and finds them done.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.data import chain, guarding, instructions, own_answers, rounds, slots, stages
from cai.data.kinds import build
from cai.data.pairs import PairSet, plan_of
from cai.data.stage_loop import run_stage
from cai.models import checks
from cai.recipe.grid import Grid
from cai.recipe.intake.entries import Given
from cai.recipe.intake.instructionfile import Intake
from cai.run.context import Context


def pairs_so_far(context: Context, before: PairSet | None = None, attempt: int | None = None) -> PairSet:
    """Examples, kept pairs and rejects of all records, or of tries up to `attempt` alone.

    A resume that stands in an earlier wave must not see the rows of later ones, or it would judge and slice otherwise
    than the run that was never stopped. What `before` has of items without news is kept.
    """
    wanted = set(slots.slots(context.recipe))
    plan = plan_of(context.recipe, context.constitution.principles)

    def of_interest(item: int) -> bool:
        return slots.slot_of(item) in wanted and (attempt is None or slots.try_of(item) <= attempt)

    return build(context.log.rows, plan, context.recipe.pairs, of_interest, before)


def waves(context: Context, pairs: PairSet, attempt: int) -> list[int]:
    """Items of try number `attempt`: every slot at first, then the slots whose pair is still missing."""
    filled = {slots.slot_of(pair["item"]) for pair in pairs.kept}
    return [slots.item_at(slot, attempt) for slot in slots.slots(context.recipe) if slot not in filled]


def collect(context: Context, grid: Grid, given: Intake | None, until: str = "") -> PairSet:
    """Run the stages until each slot has its pair or its tries are used up.

    `until`: stop after that stage; "pairs" is the end of all. `given`: the user's own instructions, if any.
    """
    recipe, before = context.recipe, len(context.log.rows)
    checks.remake(context)
    lines = given.requests if given else ()
    asking = chain.make_instructions(grid)
    pairs = PairSet([], [], [])
    for attempt in range(slots.tries(recipe)):
        items = waves(context, pairs, attempt)
        if not items:
            break
        if attempt and not _nothing_to_try(context, items, lines, pairs):
            context.run.event("wave", attempt=attempt, slots=len(items), reasons=pairs.reasons)
            why = ", ".join(f"{name} {count}" for name, count in list(pairs.reasons.items())[:3])
            context.progress.say(
                f"{len(items)} of {len(slots.slots(recipe))} items have no pair yet ({why}): "
                f"try {attempt + 1} of at most {slots.tries(recipe)} for each"
            )
        fresh = _fresh(context, items, pairs)
        instructions.repeat(context, sorted(set(items).difference(fresh)))
        if lines:
            instructions.take_from_file(context, fresh, lines)
        else:
            for again in range(recipe.instructions.max_tries):
                todo = instructions.rejected(context, fresh, again)
                run_stage(context, asking, todo, again, accept=instructions.drop_near_duplicates(context))
        last = asking.name
        for stage, round_ in chain.ordered(recipe.rounds, recipe)[1:]:
            if until == last or stage.aside:
                break
            run_stage(context, stage, items, round_)
            last = stage.name
        pairs = pairs_so_far(context, pairs, attempt)
        if until not in ("", "pairs", *own_answers.STAGES):
            break
        if recipe.guard.enabled and guarding.run_guard(context, pairs.examples):
            pairs = pairs_so_far(context, pairs, attempt)
    if until in ("", "pairs", *own_answers.STAGES):
        further = own_answers.passes(context, stages.SFT_INSTRUCTIONS, stages.SFT_ANSWERS, grid, until)
        for stage, numbers, again, accept in further:
            run_stage(context, stage, numbers, again, accept)
    if len(context.log.rows) > before:
        found = instructions.summary(context.log.by_stage("instructions"), len(slots.slots(recipe)))
        context.run.event("instructions_summary", **found)
    return pairs


def _nothing_to_try(context: Context, items: Sequence[int], lines: Sequence[Given], pairs: PairSet) -> bool:
    """Whether each item wants a new line of the user's file and none is left: such a wave is not worth a word."""
    told = any(event.get("lines") == len(lines) for event in context.run.events("instructions_short"))
    return bool(lines) and told and len(_fresh(context, items, pairs)) == len(items)


def _fresh(context: Context, items: Sequence[int], pairs: PairSet) -> list[int]:
    """The items that want a new instruction; the others are tried again with the one they had."""
    hopeless = {reject["item"] for reject in pairs.rejects if reject["reason"] == "no_issue"}
    return [
        i
        for i in items
        if slots.is_fresh(i, context.recipe)
        or slots.earlier(i) in hopeless  # nothing is wrong with its answers: another request may do better
        or not _worth_repeating(context, slots.earlier(i))
    ]


def _worth_repeating(context: Context, item: int) -> bool:
    """Whether other seeds may help this item: it has an instruction, and one that leaves room for an answer."""
    answer = context.log.get("answers", item, 0)
    too_long = answer is not None and str(answer["reason"]).startswith("prompt_too_long")
    return not too_long and rounds.instruction_of(context, item) is not None
