"""The judge: J1-J4, read from the likelihood of one-word verdicts of the loaded model, adapter off.

Owns the questions, their two wordings of opposite polarity and how the log-odds combine; it parses no generated text,
so no verdict can be unparsed. Legend: d = log p(Yes) - log p(No), nats.
  J1-J3 = (d(plain) - d(opposite)) / 2, minus the same with the critique removed; above 0 is a yes.
  J4    = (d(A is the revision) - d(B is the revision)) / 2: negated when the two texts swap places.
The subtraction cancels what the judge says whatever it reads: one that always says yes scores 0 and passes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cai.data.comparisons import comparison_asks, log_odds, pair_log_odds, pair_win, verdict_asks
from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer, score
from cai.evaluate.cases import Case, others
from cai.metrics.text import best_span
from cai.recipe.prompts import Prompt
from cai.store.jsonl import Row

JUDGE_FIELDS = frozenset({"instruction", "answer", "critique", "question"})
REMOVED = "(none was written)"
NO_SPAN = -20.0  # the critique points at nothing in the answer: a sure no


@dataclass(frozen=True)
class Judge:
    """The two prompts. `questions`: name -> (plain, opposite)."""

    single: Prompt
    pair: Prompt


QUESTIONS = {
    "j1": (
        "Does the answer really have the problem that the critique names?",
        "Is the critique mistaken about what the answer says?",
    ),
    "j2": (
        "Would changing the answer as the critique says make it better?",
        "Would the answer be just as good without the change that the critique wants?",
    ),
    "j3": (
        "Is the problem that the critique names solved in the answer?",
        "Does the answer still have the problem that the critique names?",
    ),
}


def question(name: str, side: int, span: str) -> str:
    """A question's wording; the passage that it is about stands before it where there is one."""
    quoted = f'The passage in question is "{span}". ' if span else ""
    return quoted + QUESTIONS[name][side]


def _asks(scorer: Scorer, judge: Judge, name: Name, question_name: str, case: Case, span: str = "") -> list[Ask]:
    """Eight asks: two wordings, with the critique and without, Yes and No."""
    asks: list[Ask] = []
    for side in (0, 1):
        for removed in (False, True):
            fields = {
                "instruction": scorer.cut(case.instruction),
                "answer": scorer.cut(case.answer),
                "critique": REMOVED if removed else scorer.cut(case.critique),
                "question": question(question_name, side, scorer.cut(span)),
            }
            asks += verdict_asks(scorer, judge.single, (*name, question_name, side, removed), fields, ("Yes", "No"))
    return asks


def _combined(scores: Mapping[Name, Score], name: Name, question_name: str) -> float | None:
    """None, which is unscored, where a log-probability is no finite number."""

    def d(side: int, removed: bool) -> float:
        return log_odds(scores, (*name, question_name, side, removed), ("Yes", "No"))

    with_it = (d(0, False) - d(1, False)) / 2
    without = (d(0, True) - d(1, True)) / 2
    return finite(with_it - without)


def finite(value: float) -> float | None:
    """For a row: six decimals, null where there is no number."""
    return round(value, 6) if math.isfinite(value) else None


def judge_critiques(
    scorer: Scorer, judge: Judge, cases: Sequence[Case], pool: Sequence[Case], *, controls: bool = True
) -> list[Row]:
    """J1 and J2 of each critique and, with `controls`, of its critique laid on another answer."""
    asks: list[Ask] = []
    spans: dict[Name, str] = {}
    for case in cases:
        variants = _with_shuffled(case, pool) if controls else {"real": case}
        for kind, variant in variants.items():
            name = (case.key, kind)
            spans[name] = best_span(variant.critique, variant.answer)
            if spans[name]:
                asks += _asks(scorer, judge, name, "j1", variant, spans[name])
            if variant.critique.strip():
                asks += _asks(scorer, judge, name, "j2", variant)
    scores = score(scorer, asks)
    return [_critique_row(scores, spans, case) for case in cases]


def _with_shuffled(case: Case, pool: Sequence[Case]) -> dict[str, Case]:
    return {"real": case, "shuffled": replace(others(case, pool)[0], critique=case.critique)}


def _critique_row(scores: Mapping[Name, Score], spans: Mapping[Name, str], case: Case) -> Row:
    row: Row = {"metric": "critiques.judge", "item": case.item, "round": case.round}
    for kind in ("real", "shuffled"):
        name = (case.key, kind)
        if name not in spans:
            continue
        j1 = _combined(scores, name, "j1") if spans[name] else NO_SPAN
        j2 = _combined(scores, name, "j2") if case.critique.strip() else NO_SPAN
        row[kind] = {"j1": j1, "j2": j2, "span": spans[name][:200]}
    return row


def judge_revisions(scorer: Scorer, judge: Judge, cases: Sequence[Case]) -> list[Row]:
    """J3 (the problem is gone: asked of the revision, minus asked of the answer) and J4 (blind, both orders)."""
    asks: list[Ask] = []
    for case in cases:
        if case.critique.strip() and case.revision.strip():
            asks += _asks(scorer, judge, (case.key, "revision"), "j3", replace(case, answer=case.revision))
            asks += _asks(scorer, judge, (case.key, "answer"), "j3", case)
        if case.revision.strip():
            asks += pair_asks(scorer, judge, (case.key,), case, case.revision, case.initial or case.answer)
    scores = score(scorer, asks)
    return [_revision_row(scores, case) for case in cases]


def _revision_row(scores: Mapping[Name, Score], case: Case) -> Row:
    row: Row = {"metric": "revisions.judge", "item": case.item, "round": case.round, "j3": None, "j4": None}
    if case.critique.strip() and case.revision.strip():
        after, before = (_combined(scores, (case.key, which), "j3") for which in ("revision", "answer"))
        row["j3"] = None if after is None or before is None else round(after - before, 6)
    if case.revision.strip():
        row |= {"j4": finite(pair_win(scores, (case.key,))), "j4_log_odds": finite(pair_log_odds(scores, (case.key,)))}
    return row


def pair_asks(scorer: Scorer, judge: Judge, name: Name, case: Case, ours: str, theirs: str) -> list[Ask]:
    """Four asks: `ours` as A then as B, letters A and B."""
    return comparison_asks(scorer, judge.pair, name, case.instruction, case.principle, ours, theirs)
