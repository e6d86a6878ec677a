"""Two ways to answer the same held-out prompts, compared blind: fresh answers, and a judgement a principle.

Owns the rows `NAME.answers.ARM` (one greedy answer a prompt) and `NAME.judged` (one a prompt and principle, in both
orders) of a marked log below eval/; which arms, which prompts and what follows from the verdicts is the caller's.
Invariants: an arm never sees another's answer; no adapter is on while it is judged; of two equal answers
nothing is asked, they are a tie under every principle; a judgement that is on disk is never asked again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from cai.data import comparisons
from cai.engine import Sampling
from cai.engine.asks import Scorer, score
from cai.evaluate.answering import KEPT, drawn
from cai.evaluate.judge import Judge, finite
from cai.evaluate.scores import Evaluation, Key
from cai.metrics.figure import sample
from cai.recipe.constitution import Principle
from cai.recipe.prompts import Prompt
from cai.recipe.settings import LoraSection
from cai.run import loop
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record

ANSWERS_SLICE = 16  # answers drawn side by side between two writes
OVERALL = Principle("", "", "", "")  # place 0 of every list of principles: the judge's own wording


@dataclass(frozen=True)
class Question:
    """A held-out prompt. `topic`: of the grid's cell it was drawn from, "" for one of the user's own."""

    item: int
    prompt: str
    pool: str
    topic: str


@dataclass(frozen=True)
class Arm:
    """One way to answer. `adapter` None: the base. `prompt`: the form in which this arm is asked."""

    name: str
    adapter: Path | None
    lora: LoraSection
    prompt: Prompt


def heldout(rows: Sequence[Record]) -> list[Question]:
    """Every accepted held-out instruction once, by item: no pair's fate decides which prompts are asked."""
    found: dict[str, Question] = {}
    for row in sorted(rows, key=lambda row: row["item"]):
        if row["stage"] == "instructions" and row["status"] == "ok" and row.get("split") == "heldout":
            topic = (row.get("cell") or {}).get("topic", "")
            found.setdefault(row["text"], Question(row["item"], row["text"], row.get("pool", ""), topic))
    return list(found.values())


def chosen(questions: Sequence[Question], limit: int, context: Context) -> list[Question]:
    """The prompts that are asked: `limit` of them, else `evaluation.fresh_items`, else all; a seeded sample."""
    by_item = {question.item: question for question in questions}
    size = limit or context.recipe.evaluation.fresh_items or len(by_item)
    return [by_item[item] for item in sample(list(by_item), size)]


def mark(context: Context, arms: Sequence[Arm], principles: Sequence[Principle], judge: Judge | None) -> str:
    """16 hex of all that an answer or a judgement depends on: another adapter, prompt or principle begins a new log.

    How many prompts are asked is no part of it: more of them go on in the same log.
    """
    section = context.recipe.evaluation
    weights = [arm.adapter / "adapter_model.safetensors" for arm in arms if arm.adapter]
    parts = [
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights],
        [arm.prompt.sha for arm in arms],
        [section.fresh_max_new_tokens, section.max_text_tokens],
        [judge.single.sha, judge.pair.sha, *filter(None, [section.judge_model])] if judge else None,
        [[principle.id, principle.principle] for principle in principles],
    ]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:16]


def answers(evaluation: Evaluation, name: str, arm: Arm, questions: Sequence[Question]) -> dict[int, Row]:
    """The arm's greedy answer to each prompt, by item; a prompt that leaves no room for one is not among them."""
    metric, by_item = f"{name}.answers.{arm.name}", {question.item: question for question in questions}
    keys: list[Key] = [(item, 0) for item in by_item]
    armed = replace(evaluation, adapter=arm.adapter or evaluation.adapter, lora=arm.lora)
    for part in armed.left(metric, keys, loop.together(armed.context, ANSWERS_SLICE, len(keys))):
        asked = [by_item[item] for item, _ in part]
        rows = _answered(armed, arm, asked)
        known: list[Row] = [{"metric": metric, "item": q.item, "round": 0} for q in asked]
        armed.write(metric, part, [key | row for key, row in zip(known, rows, strict=True)])
    return {row["item"]: row for row in armed.rows(metric, keys)}


def _answered(evaluation: Evaluation, arm: Arm, asked: Sequence[Question]) -> list[Row]:
    greedy = Sampling(0.0, evaluation.section.fresh_max_new_tokens)
    fields = {place: {"instruction": question.prompt} for place, question in enumerate(asked)}
    with evaluation.model().adapter(arm.adapter is not None):
        where = "while answering held-out prompts"
        found = drawn(evaluation.context, arm.prompt, fields, greedy, where, bounded=True)
    return [{name: found[place][name] for name in KEPT if name in found[place]} for place in fields]


def judged(
    evaluation: Evaluation,
    metric: str,
    questions: Sequence[Question],
    ours: Mapping[int, str],
    theirs: Mapping[int, str],
    principles: Sequence[Principle],
) -> list[Row]:
    """One row a prompt and principle, OVERALL first: log-odds that `ours` is better, and whether it won both orders.

    A slice is one prompt under all principles: 4 asks a principle, and a kill loses no more than these.
    """
    asked = [question for question in questions if question.item in ours and question.item in theirs]
    places = (OVERALL, *principles)
    keys: list[Key] = [(question.item, place) for question in asked for place in range(len(places))]
    by_item = {question.item: question for question in asked}
    for part in evaluation.left(metric, keys, len(places)):
        question = by_item[part[0][0]]
        texts = ours[question.item], theirs[question.item]
        if texts[0] == texts[1]:
            rows: list[Row] = [{"first": 0.0, "second": 0.0, "log_odds": 0.0, "win": 0.5, "same": True} for _ in places]
        else:
            with evaluation.judging() as scorer:
                rows = compared(scorer, evaluation.judge, question.prompt, texts, places)
        known = [{"metric": metric, "item": question.item, "round": place, "principle": p.id} for place, p in
                 enumerate(places)]  # fmt: skip
        evaluation.write(metric, part, [key | row for key, row in zip(known, rows, strict=True)])
    return evaluation.rows(metric, keys)


def compared(
    scorer: Scorer, judge: Judge | None, prompt: str, texts: tuple[str, str], principles: Sequence[Principle]
) -> list[Row]:
    """The blind comparison of two answers under each principle, in both orders; null where a likelihood is none."""
    assert judge is not None
    asks = [
        ask
        for place, p in enumerate(principles)
        for ask in comparisons.comparison_asks(scorer, judge.pair, (place,), prompt, p.principle, *texts)
    ]
    scores, rows = score(scorer, asks), []
    for place in range(len(principles)):
        first, second = comparisons.orders(scores, (place,))
        odds = comparisons.pair_log_odds(scores, (place,)) if math.isfinite(first - second) else math.nan
        win = comparisons.pair_win(scores, (place,))
        rows.append({"first": finite(first), "second": finite(second), "log_odds": finite(odds), "win": finite(win)})
    return rows
