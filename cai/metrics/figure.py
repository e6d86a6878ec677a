"""One unit's outcome (a score, or unscored with a reason) and its summary as a `Figure`.

Owns the rule that an unscored unit is counted, never dropped and never good. Pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypedDict, TypeGuard, TypeVar, Unpack, cast

from cai.metrics.stats import bootstrap_mean, mcnemar_exact, wilcoxon, wilson
from cai.store.jsonl import Row
from cai.store.row_types import FigureRow
from cai.store.rows import R

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Scored:
    value: float


@dataclass(frozen=True, slots=True)
class Unscored:
    reason: str


Outcome = Scored | Unscored


class More(TypedDict, total=False):
    """What a figure may carry beside its number."""

    worst: tuple[Row, ...]
    note: str
    facts: Row


def unmeasured(metric: str, why: str, judge: str = "deterministic", unscored: int = 0) -> Figure:
    """Nothing could be measured, and why: a gate on it does not pass."""
    return Figure(metric, None, n=0, unscored=unscored, judge=judge, note=why)


def _split(outcomes: Iterable[Outcome]) -> tuple[list[float], list[str]]:
    values: list[float] = []
    reasons: list[str] = []
    for outcome in outcomes:
        if isinstance(outcome, Scored) and math.isfinite(outcome.value):
            values.append(outcome.value)
        else:
            reasons.append(outcome.reason if isinstance(outcome, Unscored) else "not finite")
    return values, reasons


def rate(metric: str, outcomes: Sequence[Outcome], *, judge: str = "deterministic", **more: Unpack[More]) -> Figure:
    """Share of units whose value is 1 (a tie is 0.5), with its Wilson interval."""
    values, reasons = _split(outcomes)
    if not values:
        return unmeasured(metric, _why(reasons), judge, len(reasons))
    low, high = wilson(sum(values), len(values))
    return Figure(metric, sum(values) / len(values), low, high, len(values), len(reasons), judge, **more)


def mean(metric: str, outcomes: Sequence[Outcome], *, judge: str, **more: Unpack[More]) -> Figure:
    """Mean over units with its bootstrap interval; no interval below two units."""
    values, reasons = _split(outcomes)
    if not values:
        return unmeasured(metric, _why(reasons), judge, len(reasons))
    low, high = bootstrap_mean(values) or (None, None)
    return Figure(metric, math.fsum(values) / len(values), low, high, len(values), len(reasons), judge, **more)


def count(metric: str, value: float, n: int, **more: Unpack[More]) -> Figure:
    """A plain figure without an interval (a count, a single run's loss)."""
    return Figure(metric, float(value), n=n, **more)


def _why(reasons: Sequence[str]) -> str:
    return f"no unit scored: {reasons[0]}" if reasons else "there was nothing to score"


def indicator(flag: bool) -> Scored:
    return Scored(1.0 if flag else 0.0)


def unscored(count: int, why: str = "a log-probability is not finite") -> list[Outcome]:
    """So many units that could not be scored."""
    return [Unscored(why)] * count


def finite_rows(rows: Sequence[R], *names: str) -> list[R]:
    """The rows whose numbers of these names are finite; what is not stands in a stored row as null."""
    return [row for row in rows if all(is_finite(row[name]) for name in names)]


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number at all, of a stored row too: null and what was damaged are none."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_whole(row: Mapping[str, object]) -> bool:
    """Whether a stored figure has the kinds of `Figure`; what was damaged since has not."""
    numbers = all(row.get(name) is None or is_finite(row[name]) for name in ("value", "low", "high"))
    counts = all(isinstance(row.get(name, 0), int) for name in ("n", "unscored"))
    texts = all(isinstance(row.get(name, ""), str) for name in ("metric", "judge", "note"))
    return numbers and counts and texts and isinstance(row.get("facts", {}), dict)


def as_json(outcome: Outcome) -> float | None:
    """For a row: the value, or None (the reason stands beside it)."""
    return outcome.value if isinstance(outcome, Scored) else None


def worst_rows(rows: Sequence[R], order: Callable[[R], float | tuple[float, ...]], keep: int = 3) -> tuple[R, ...]:
    return tuple(sorted(rows, key=order)[:keep])


def sample(keys: Iterable[T], size: int, seed: int = 0) -> list[T]:
    """A seeded sample in the given order: the `size` keys whose hashes are lowest; a larger sample holds a smaller."""
    ordered = list(keys)
    if len(ordered) <= size:
        return ordered
    chosen = set(sorted(ordered, key=lambda key: _hash(seed, key))[:size])
    return [key for key in ordered if key in chosen]


def shuffled(keys: Sequence[T], seed: int, salt: object) -> list[T]:
    """A seeded order, by hash: the same on every machine and Python."""
    return sorted(keys, key=lambda key: _hash(seed, (salt, key)))


def seeded_index(size: int, salt: object) -> int:
    """A seeded place in a list of this size."""
    return int.from_bytes(_hash(0, (salt, "place"))[:8], "little") % size


def _hash(seed: int, key: object) -> bytes:
    return hashlib.sha256(f"{seed}|{key!r}".encode()).digest()


def rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Six decimals: what a row stores, so that the last bits of a batch do not show."""
    return {
        name: None if value is None or not math.isfinite(value) else round(value, 6) for name, value in values.items()
    }


@dataclass(frozen=True)
class Figure:
    """One figure with all that is needed to believe it.

    `low`, `high`: 95% interval, None where there is none. `n`: scored units; `unscored`: units that could not be
    scored, never counted as good. `judge`: who said so ("deterministic", a model's name, "likelihood of ...").
    `worst`: up to three rows to look at. `facts`: further numbers of the same measurement (p-values, counts).
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unscored: int = 0
    judge: str = "deterministic"
    worst: tuple[Row, ...] = ()
    note: str = ""
    facts: Row = field(default_factory=dict)

    def as_dict(self) -> FigureRow:
        return cast(FigureRow, asdict(self))

    @property
    def text(self) -> str:
        """`0.72 [0.43, 0.90] (n=11, 1 unscored)`"""
        if self.value is None:
            return f"not measured{': ' + self.note if self.note else ''}"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        missing = f", {self.unscored} unscored" if self.unscored else ""
        return f"{self.value:.4g}{interval} (n={self.n}{missing})"


Figures = dict[str, Figure]


def by_metric(*figures: Figure) -> Figures:
    return {figure.metric: figure for figure in figures}


def paired(
    metric: str, first: Sequence[float], second: Sequence[float], judge: str, lost: int, yes_no: bool, sign: float = 1
) -> Figure:
    """Mean of sign * (second - first) with its bootstrap interval over units; facts: both means and p.

    Exact McNemar for yes/no values, else Wilcoxon's signed ranks. `lost`: units that are not scored on both sides.
    """
    n, deltas = len(first), [sign * (b - a) for a, b in zip(first, second, strict=True)]
    low, high = bootstrap_mean(deltas) or (None, None)
    if yes_no:
        p, test = mcnemar_exact([a == 1.0 for a in first], [b == 1.0 for b in second]), "exact McNemar"
    else:
        p, test = wilcoxon(deltas), "Wilcoxon signed-rank"
    facts = {"base": sum(first) / n, "tuned": sum(second) / n, "p": p, "test": test}
    return Figure(metric, sum(deltas) / n, low, high, n, lost, judge, facts=facts)
