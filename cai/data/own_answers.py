"""Further benign requests and the model's own answers to them, for an SFT stage to be shown (`sft.answers`).

Few revisions teach an end at the price of everything else; what the base writes itself behind its few-shot examples
costs it next to nothing to learn (context distillation, Askell et al. 2021, section 2; own answers to helpful requests
stand beside the revisions in Bai et al. 2022, section 3.2, too). Owns the two stages' numbers (0 .. answers - 1), what
they are filled with, their order, and which answers are imitated. Invariants: no request is near to one of a slot, held
out or not; the rows of all other stages are what they are without it, and more answers renumber none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cai.data import instructions
from cai.data.rounds import instruction_of
from cai.data.slots import HELDOUT
from cai.data.stage import Accept, Stage, Unit
from cai.metrics.wordings import is_refusal
from cai.recipe.arm_costs import ASIDE, answers_further_requests
from cai.recipe.grid import Grid, Pool
from cai.run.context import Context
from cai.store.row_types import SoundAnswer, UnitExtra

STAGES = REQUESTS, ANSWERS = ASIDE
POOL: Pool = "benign"
WALK = 10_000  # attempts from which these requests go on in the grid: no try of a slot comes so far


def asking(stage: Stage, grid: Grid) -> Stage:
    """The stage of requests over the benign half of the grid; `round` is the attempt, as with a slot's instruction."""

    def render(context: Context, item: int, attempt: int) -> Unit:
        index = item + (WALK + attempt) * HELDOUT * 2
        cell = grid.cell(context.recipe.seed, index, POOL)
        extra: UnitExtra = {"pool": POOL, "cell": cell, "split": "train", "parent": None}
        return Unit(item, attempt, cell, None, extra, shift=item)

    return replace(stage, render=render)


def passes(
    context: Context, requests: Stage, answers: Stage, grid: Grid, until: str = ""
) -> Iterator[tuple[Stage, Sequence[int], int, Accept]]:
    """What `run_stage` brings into the log, one after the other: each pass is told of when the one before has run.

    Every request, its tries, then its answer; nothing where the recipe wants none.
    """
    if not answers_further_requests(context.recipe):
        return
    items, asked = range(context.recipe.sft.answers), asking(requests, grid)
    near, before = instructions.drop_near_duplicates(context, REQUESTS, "instructions"), len(context.log.rows)
    for again in range(context.recipe.instructions.max_tries):
        yield asked, instructions.rejected(context, items, again, REQUESTS), again, near
    accepted = sum(instruction_of(context, item, REQUESTS) is not None for item in items)
    if accepted < len(items) and len(context.log.rows) > before:
        context.progress.say(
            f"sft.answers: {accepted} of {len(items)} requests came through, the others were refused at every try: SFT "
            "is shown fewer. A --fork with a higher instructions.max_tries or a wider prompts/grid.yaml gives more."
        )
    if until != REQUESTS:
        yield answers, items, 0, lambda rows: rows


def imitated(context: Context, sound: Callable[[str], bool]) -> list[SoundAnswer]:
    """The answers that stand, ended by themselves, decline nothing and are `sound`, in the order of their numbers."""
    found: list[SoundAnswer] = []
    if not answers_further_requests(context.recipe):
        return found
    for item in range(context.recipe.sft.answers):
        request, answer = instruction_of(context, item, REQUESTS), context.ok(ANSWERS, item)
        if request is None or answer is None or answer["finish"] == "length" or is_refusal(answer["text"]):
            continue
        if sound(answer["text"]):
            found.append({"item": item, "prompt": request["text"], "chosen": answer["text"]})
    return found
