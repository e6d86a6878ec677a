"""What the metric says of one critique or one revision: an outcome and the checks behind it. Pure.

Owns how checks become an outcome, and which of them a figure counts. The checks themselves are `critiques`' and
`revisions`'. Whoever shows or compares verdicts (gate, report, tables, agreement, comparison) reads this one; nobody
decides again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cai.metrics.figure import Outcome, Scored, Unscored, as_json, indicator
from cai.store.jsonl import Row

Scores = Mapping[str, Row]  # metric -> the row of one item and round


@dataclass(frozen=True)
class Criterion:
    """One check. `value`: what was found, None where nothing was; `wanted` in words. `passed` None: not scored.

    `counts`: part of the outcome; else it is only shown. `found`: the value where a number does not say it.
    """

    name: str
    value: float | None
    wanted: str
    passed: bool | None
    counts: bool = True
    unscored: str = ""
    found: str = ""

    @property
    def outcome(self) -> Outcome:
        return Unscored(self.unscored) if self.passed is None else indicator(self.passed)

    @property
    def score(self) -> Outcome:
        return Unscored(self.unscored) if self.value is None else Scored(self.value)


@dataclass(frozen=True)
class TextVerdict:
    """`outcome`: 1 where every check that counts is met, 0 where one is not, else unscored with its reason.

    `sampled`: the figures are over this text (its likelihood was asked for). `nothing`: no problem was named, so the
    text is counted apart.
    """

    outcome: Outcome
    criteria: tuple[Criterion, ...] = ()
    sampled: bool = False
    nothing: bool = False

    @property
    def decided(self) -> bool | None:
        """The verdict as one unit of the figures: None where these leave the text out or cannot score it.

        A text outside the sample could only be decided by failing, which would count failures alone.
        """
        if self.nothing or not self.sampled or isinstance(self.outcome, Unscored):
            return None
        return self.outcome.value == 1.0

    @property
    def failed(self) -> list[str]:
        return [criterion.name for criterion in self.criteria if criterion.counts and criterion.passed is False]


NOT_SCORED = TextVerdict(Unscored("it was not scored"))


def decide(criteria: Sequence[Criterion], *, sampled: bool, nothing: bool) -> TextVerdict:
    counted = [criterion.outcome for criterion in criteria if criterion.counts]
    return TextVerdict(combine(counted), tuple(criteria), sampled, nothing)


def combine(parts: Sequence[Outcome]) -> Outcome:
    """All parts must be 1. One that is 0 decides; else one that is unscored leaves the whole unscored."""
    if any(isinstance(part, Scored) and part.value < 1.0 for part in parts):
        return Scored(0.0)
    return next((part for part in parts if isinstance(part, Unscored)), Scored(1.0))


def likelihood(name: str, row: Row | None, kind: str, bar: float, why: str) -> Criterion:
    """CSI or CRI against its bar."""
    value = None if row is None else row.get(kind)
    return Criterion(name, value, f"at least {bar:g}", None if value is None else value >= bar, unscored=why)


def score_rows(metric: str, found: Mapping[tuple[int, int], Mapping[str, Outcome]]) -> list[Row]:
    """CSI or CRI as rows; None is unscored, with its reason."""
    rows: list[Row] = []
    for (item, round_), by_kind in found.items():
        reasons = {kind: outcome.reason for kind, outcome in by_kind.items() if isinstance(outcome, Unscored)}
        values = {kind: as_json(outcome) for kind, outcome in by_kind.items()}
        rows.append({"metric": metric, "item": item, "round": round_, **values, "unscored": reasons})
    return rows


def by_judge(name: str, log_odds: float | None, required: bool) -> Criterion:
    """A judge's yes: strictly above 0, where a judge that says the same whatever it reads stands."""
    passed = None if log_odds is None else log_odds > 0.0
    return Criterion(name, log_odds, "above 0", passed, counts=required, unscored="unjudged")
