"""Scores from the loaded model's own likelihood, adapter off: CSI of critiques and CRI of revisions.

Owns which (context, continuation) pairs are asked for and how they combine; the engine owns the scoring. Contexts are
plain text, the same for a base and a chat model, and hold no control token. Legend: lp = mean log-prob a token, nats.
  CSI(c) = lp(c | its prompt and answer) - mean over 3 other prompts and answers of lp(c | other)
  CRI(r) = lp(r | prompt, answer, its critique) - mean of lp(r | generic critique), lp(r | another's critique)
Controls reuse the same scores: a critique claimed for the first of its "other" contexts is the shuffled critique.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer, score
from cai.evaluate.cases import GENERIC_CRITIQUE, Case, others
from cai.metrics.figure import Outcome, Scored, Unscored

Key = tuple[int, int]


def _lp(scores: Mapping[Name, Score], name: Name) -> float:
    found = scores.get(name)
    return math.nan if found is None else found.mean


def _contrast(own: float, rest: Sequence[float], why: str) -> Outcome:
    if not rest or not all(map(math.isfinite, (own, *rest))):  # the sum of two infinities is none, or an error
        return Unscored(why)
    return Scored(round(own - math.fsum(rest) / len(rest), 6))


def critique_context(scorer: Scorer, case: Case) -> tuple[int, ...]:
    return scorer.context("Question:", case.instruction, "\n\nAnswer:", case.answer, "\n\nCritique of the answer:")


def revision_context(scorer: Scorer, case: Case, critique: str) -> tuple[int, ...]:
    cues = ("Question:", case.instruction, "\n\nAnswer:", case.answer, "\n\nCritique of the answer:", critique)
    return scorer.context(*cues, "\n\nBetter answer:")


def generic_lps(scorer: Scorer, cases: Sequence[Case]) -> dict[Key, float]:
    """lp of the fixed generic critique after each case's prompt and answer: one score a case, for the control."""
    generic = scorer.continuation(GENERIC_CRITIQUE)
    scores = score(scorer, (Ask((case.key,), critique_context(scorer, case), generic) for case in cases))
    return {case.key: round(_lp(scores, (case.key,)), 6) for case in cases}


def specificity(
    scorer: Scorer, cases: Sequence[Case], pool: Sequence[Case], generic: Mapping[Key, float] | None = None
) -> dict[Key, dict[str, Outcome]]:
    """CSI of each case: {"real", "shuffled", "generic"}. `pool`: the cases that serve as other prompts.

    `generic`: what `generic_lps` gave for the pool and the shipped cases; without it that control is left out.
    """
    asks: list[Ask] = []
    neighbours = {case.key: others(case, pool) for case in cases}
    for case in cases:
        own = scorer.continuation(case.critique)
        for place, context in enumerate((case, *neighbours[case.key])):
            given = critique_context(scorer, context)
            asks.append(Ask((case.key, place), given, own, len(given) if scorer.share_contexts else 0))
    scores = score(scorer, asks)
    return {case.key: _specificity(scores, case, neighbours[case.key], generic) for case in cases}


def _specificity(
    scores: Mapping[Name, Score], case: Case, neighbours: Sequence[Case], generic: Mapping[Key, float] | None
) -> dict[str, Outcome]:
    own = [_lp(scores, (case.key, place)) for place in range(1 + len(neighbours))]
    found = {
        "real": _contrast(own[0], own[1:], "empty critique"),
        "shuffled": _contrast(own[1], own[2:], "empty critique"),
    }
    if generic is not None:
        rest = [generic.get(other.key, math.nan) for other in neighbours]
        found["generic"] = _contrast(generic.get(case.key, math.nan), rest, "no score")
    return found


def responsiveness(
    scorer: Scorer, cases: Sequence[Case], pool: Sequence[Case], *, controls: bool = True
) -> dict[Key, dict[str, Outcome]]:
    """CRI of each case: {"real", "shuffled"}; shuffled: the revision is claimed to answer another critique."""
    asks: list[Ask] = []
    with_text = [case for case in pool if case.critique.strip()]
    for case in cases:
        first, second = (c.critique for c in others(case, with_text, 2))
        given = {"own": case.critique, "generic": GENERIC_CRITIQUE, "first": first}
        if controls:
            given["second"] = second
        revision = scorer.continuation(case.revision)
        shared = len(critique_context(scorer, case)) if scorer.share_contexts else 0
        asks += [
            Ask((case.key, n), revision_context(scorer, case, critique), revision, shared)
            for n, critique in given.items()
        ]
    scores = score(scorer, asks)
    return {case.key: _responsiveness(scores, case.key, controls) for case in cases}


def _responsiveness(scores: Mapping[Name, Score], key: Key, controls: bool) -> dict[str, Outcome]:
    own, generic, first, second = (_lp(scores, (key, name)) for name in ("own", "generic", "first", "second"))
    found = {"real": _contrast(own, [generic, first], "empty revision")}
    if controls:
        found["shuffled"] = _contrast(first, [generic, second], "empty revision")
    return found
