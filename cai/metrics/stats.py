"""The few statistics that the evaluation needs: intervals, paired tests, corrections.

Owns no data. Intervals are two-sided 95%. Everything is deterministic: bootstraps take a fixed seed.
What every run asks for is computed here and held against scipy.stats by a test, intervals to the last bit: its import
alone takes 1.5 s of the processor, more than all that a resume with nothing left has to do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T", bound=Hashable)
Interval = tuple[float, float]


Z = 1.959963984540054  # the normal distribution's 97.5% point


def wilson(successes: float, n: int) -> Interval:
    """Wilson score interval of a proportion. Half successes (ties) widen it: floor for the low end, ceil for high."""
    if n == 0:
        return (0.0, 1.0)
    return (_wilson(math.floor(successes), n)[0], _wilson(math.ceil(successes), n)[1])


def _wilson(k: int, n: int) -> Interval:
    """Wilson (1927) in the terms and the order of Newcombe (1998), as scipy computes it."""
    p = k / n
    denominator = 2 * (n + Z**2)
    centre = (2 * n * p + Z**2) / denominator
    delta = Z / denominator * math.sqrt(4 * n * p * (1 - p) + Z**2)
    return (0.0 if k == 0 else centre - delta, 1.0 if k == n else centre + delta)


def difference(before: tuple[float, Interval], now: tuple[float, Interval]) -> Interval:
    """Interval of `now - before` from each one's value and interval, whatever made them (MOVER, Zou and Donner 2008).

    As for independent samples: where both are of the same prompts it is as a rule wider than a paired one would be.
    """
    (old, (old_low, old_high)), (new, (new_low, new_high)) = before, now
    gain = new - old
    return (gain - math.hypot(new - new_low, old_high - old), gain + math.hypot(new_high - new, old - old_low))


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p that two paired yes/no series have the same rate: a binomial test over the discordant pairs."""
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return min(1.0, 2.0 * _at_most(min(gained, lost), gained + lost))  # a fair coin is symmetric: twice one tail


def gained_exact(gained: int, lost: int) -> float:
    """One-sided exact p of McNemar's test that something came more often than it went, of the discordant counts."""
    return _at_most(lost, gained + lost)


@lru_cache(maxsize=4096)
def _at_most(k: int, n: int) -> float:
    """P(at most k heads of n fair coins), of whole numbers throughout, so that only the last division rounds."""
    if 2 * k > n:  # the shorter tail is summed
        return 1.0 - _at_most(n - k - 1, n) if k < n else 1.0
    term = total = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    return total / (1 << n)


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

    data = np.asarray(values, dtype=np.float64)
    if float(np.ptp(data)) == 0.0:
        return (float(data[0]), float(data[0]))
    rng, size = np.random.default_rng(seed), len(data)
    means: list[float] = []
    for done in range(0, samples, 200):  # so many at once: 8 MB of 5,000 values
        drawn = rng.integers(0, size, (min(200, samples - done), size))
        means += np.mean(data[drawn], axis=-1).tolist()
    means.sort()
    tail = (1 - 0.95) / 2  # as scipy has it: 0.025 and one bit
    return (_quantile(means, tail), _quantile(means, 1 - tail))


def _quantile(ordered: Sequence[float], p: float) -> float:
    """Between two neighbours of the ordered values, linearly (type 7 of Hyndman and Fan 1996)."""
    place = p * len(ordered) + (1 - p)
    below, share = int(place // 1) - 1, place % 1
    return (1 - share) * ordered[below] + share * ordered[min(below + 1, len(ordered) - 1)]


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
