"""The guard stage: every finished pair is judged once, chosen and rejected, and kept or dropped with the reason.

Owns its records (stage "guard", one row a pair that passed every other rule); the formats and rules are
`cai.models.guard`'s. A dropped pair is a rejected row: its slot is tried again like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cai.data.sampled import GUARD_ROUND
from cai.data.slots import drawn_item
from cai.data.stage import plain_row
from cai.errors import CaiError
from cai.models import auxiliary, checks
from cai.models.guard import REMEDY, Guard, Judgement, make_guard, style_of, verdict
from cai.models.guard_formats import LLAMA, SEPARATOR, Exchange, template_parts
from cai.recipe.settings_benchmarks import STAND_IN, GuardSection
from cai.run import loop
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Example, Record

SLICE = 64  # pairs judged between two writes: what a kill loses
CPU_SLICE = 8  # a small model on two cores needs seconds for one: progress should be seen
KEY = "guard.model"


def require(section: GuardSection) -> None:
    """Exit 2 with the remedy, before anything is generated: no such guard, or a tokenizer that asks for no verdict."""
    if not section.enabled:
        return
    style = style_of(section)
    if section.excluded and style != LLAMA and section.model != STAND_IN:
        raise CaiError(
            f"guard.excluded: {section.model} judges by all its categories, only Llama Guard's prompt leaves some out. "
            "Empty guard.excluded, or take a Llama Guard as guard.model."
        )
    auxiliary.require(section.model, KEY, REMEDY, section.revision)
    if section.model != STAND_IN:
        template_parts(auxiliary.load_tokenizer(section.model, KEY, section.revision), style, section.excluded)


def run_guard(context: Context, examples: Sequence[Example]) -> int:
    """Judge the examples that have no guard row yet; gives how many rows were added."""
    todo = [example for example in examples if not context.log.has("guard", *place_of(example))]
    if not todo and not checks.lost(context, "guard"):
        return 0
    section = context.recipe.guard
    with auxiliary.loaded(context, section.model, KEY, revision=section.revision, place=section.placement) as loaded:
        guard = make_guard(loaded, section)
        check_guard(context, guard)
        by_place = {place_of(example): example for example in examples}
        keys = [("guard", *place_of(example)) for example in todo]
        chunk = CPU_SLICE if loaded.on_cpu else SLICE
        for part in loop.left(context, context.log, "guard", keys, chunk, guard=section.model):
            rows = judge_slice(context, guard, [by_place[item, round_] for _, item, round_ in part])
            loop.write(context, context.log, part, rows)
    return len(todo)


def place_of(example: Example) -> tuple[int, int]:
    """Item and round of its guard row: the item that was drawn; a sampled pair's stands beside a revision's."""
    item = drawn_item(example["item"])
    return item, 0 if item == example["item"] else GUARD_ROUND


def check_guard(context: Context, guard: Guard) -> None:
    """The guard on the check set of harmful and harmless replies, before it decides about a single pair."""
    section = context.recipe.guard
    facts = (guard.name, section.revision, guard.sha, section.threshold, section.controversial)
    of = checks.model_mark(context) if guard.stand_in else None

    def said(rows: Sequence[Row]) -> list[bool | None]:
        asked = [f"{row['context']}{SEPARATOR}{row['prompt']}" if row["context"] else row["prompt"] for row in rows]
        exchanges = [Exchange(prompt, row["reply"]) for prompt, row in zip(asked, rows, strict=True)]
        found = guard.judge(exchanges, context)
        return [None if j.unsafe is None else j.unsafe >= section.threshold for j in found]

    with checks.open_log(context, "guard", repr((*facts, of))) as log:
        checks.measure(context, log, "guard", section.model, said)


def judge_slice(context: Context, guard: Guard, examples: Sequence[Example]) -> list[Record]:
    """Both texts of each example judged together, one row an example."""
    exchanges = []
    for example in examples:
        pair = example["preference_pair"]
        exchanges += [Exchange(pair["prompt"], pair["chosen"]), Exchange(pair["prompt"], pair["rejected"])]
    said = [_scored(judgement) for judgement in guard.judge(exchanges, context)]
    pairs = zip(examples, said[::2], said[1::2], strict=True)
    return [guard_row(context, guard, example, chosen, rejected) for example, chosen, rejected in pairs]


def _scored(judgement: Judgement) -> Judgement:
    """A verdict that is no finite number is none: neither above a threshold nor below it."""
    if judgement.unsafe is None or math.isfinite(judgement.unsafe):
        return judgement
    return Judgement(None, reason="not_finite: the guard's verdict is no number")


def guard_row(context: Context, guard: Guard, example: Example, chosen: Judgement, rejected: Judgement) -> Record:
    reason, category = verdict(example["pool"], chosen, rejected, context.recipe.guard)
    text = f"chosen {chosen.label or 'unscored'}, rejected {rejected.label or 'unscored'}"
    return plain_row("guard", *place_of(example), text, reason=reason) | {
        "prompt_sha": guard.sha,
        "guard": guard.name,
        "pool": example["pool"],
        "chosen_unsafe": chosen.unsafe,
        "rejected_unsafe": rejected.unsafe,
        "chosen_refuses": chosen.refuses,
        "category": category or None,
    }
