"""The few statistics that the evaluation needs, over scipy.stats: intervals, paired tests, corrections.

Owns no data. Intervals are two-sided 95%. Everything is deterministic: bootstraps take a fixed seed.
scipy.stats is imported where it is asked: half of the 2.7 s of processor time that a `--status` took were its import.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T", bound=Hashable)
Interval = tuple[float, float]


@lru_cache(maxsize=4096)  # scipy makes a whole test object for it, and a run asks for the same counts again and again
def wilson(successes: float, n: int) -> Interval:
    """Wilson score interval of a proportion. Half successes (ties) widen it: floor for the low end, ceil for high."""
    if n == 0:
        return (0.0, 1.0)
    from scipy import stats

    low = stats.binomtest(math.floor(successes), n).proportion_ci(method="wilson").low
    high = stats.binomtest(math.ceil(successes), n).proportion_ci(method="wilson").high
    return (float(low), float(high))


def difference(before: tuple[float, Interval], now: tuple[float, Interval]) -> Interval:
    """Interval of `now - before` from each one's value and interval, whatever made them (MOVER, Zou and Donner 2008).

    As for independent samples: where both are of the same prompts it is as a rule wider than a paired one would be.
    """
    (old, (old_low, old_high)), (new, (new_low, new_high)) = before, now
    gain = new - old
    return (gain - math.hypot(new - new_low, old_high - old), gain + math.hypot(new_high - new, old - old_low))


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p that two paired yes/no series have the same rate: a binomial test over the discordant pairs."""
    from scipy import stats

    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def gained_exact(gained: int, lost: int) -> float:
    """One-sided exact p of McNemar's test that something came more often than it went, of the discordant counts."""
    from scipy import stats

    return float(stats.binomtest(gained, gained + lost, alternative="greater").pvalue) if gained + lost else 1.0


def wilcoxon(deltas: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that paired differences lie around 0; 1 where none differs."""
    from scipy import stats

    return float(stats.wilcoxon(deltas).pvalue) if any(deltas) and len(deltas) > 1 else 1.0


def bootstrap_mean(values: Sequence[float], *, samples: int = 2000, seed: int = 0) -> Interval | None:
    """Percentile bootstrap of the mean over independent units (documents, items); None below two of them.

    For a paired comparison pass the differences. Percentile, not BCa: BCa is undefined when all values are equal.
    """
    if len(values) < 2:
        return None
    import numpy as np
    from scipy import stats

    data = np.asarray(values, dtype=np.float64)
    if float(np.ptp(data)) == 0.0:
        return (float(data[0]), float(data[0]))
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((data,), np.mean, n_resamples=samples, method="percentile", rng=rng, batch=200)
    return (float(found.confidence_interval.low), float(found.confidence_interval.high))


def rogan_gladen(apparent: float, sensitivity: float, specificity: float) -> float | None:
    """True rate behind an imperfect judge's: (apparent + sp - 1) / (se + sp - 1), clipped to [0, 1].

    None when the judge is no better than a coin (se + sp <= 1): no rate can be recovered (Rogan and Gladen 1978).
    """
    informedness = sensitivity + specificity - 1.0
    if informedness <= 0.0:
        return None
    return min(1.0, max(0.0, (apparent + specificity - 1.0) / informedness))


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa of two raters' yes/no series (Cohen 1960); None where both always say the same one thing."""
    n = len(first)
    if not n:
        return None
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    yes = (sum(first) / n) * (sum(second) / n)
    expected = yes + (1 - sum(first) / n) * (1 - sum(second) / n)
    return None if expected >= 1.0 else (agreed - expected) / (1.0 - expected)


def kappa_of(first: Sequence[T], second: Sequence[T]) -> float | None:
    """Cohen's kappa of two raters who choose among any number of answers, none of them half right; None as above."""
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    by_chance = sum(first.count(answer) * second.count(answer) for answer in set(first))  # of n * n
    return None if by_chance == n * n else (agreed * n - by_chance) / (n * n - by_chance)


def kappa_interval(
    both: Sequence[tuple[T, T]],
    of: Callable[[Sequence[T], Sequence[T]], float | None],
    draws: int = 2000,
) -> tuple[float | None, float | None]:
    """The middle 95% of kappa over resampled units; a resample in which kappa is undefined counts as 0."""
    if len(both) < 2:
        return None, None
    dice, found = random.Random(0), []
    for _ in range(draws):
        again = dice.choices(both, k=len(both))
        found.append(of([a for a, _ in again], [b for _, b in again]) or 0.0)
    found.sort()
    return found[math.floor(0.025 * (draws - 1))], found[math.ceil(0.975 * (draws - 1))]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979). A p that is NaN rejects nothing: 1."""
    p_values = [1.0 if math.isnan(p) else p for p in p_values]
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = running
    return adjusted
