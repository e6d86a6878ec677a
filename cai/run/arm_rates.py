"""What the arms beside base and tuned take: each one's tokens and seconds, from the rates that `cai.run.rates` reads.

Owns the times of `cai.recipe.arm_costs`; the sum of a milestone and its price are `cai.run.budget`'s. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cai.recipe.arm_costs import ASIDE, ArmCost, costs
from cai.recipe.load import Recipe
from cai.run.rates import HIGH, LOW, Range, Speed, table_rates

SHORT = 0.25  # the share of the token limit that an answer uses, at least, where nothing says better


@dataclass(frozen=True)
class TimedArm:
    """`seconds`: None where no rate was measured."""

    cost: ArmCost
    tokens: Range
    seconds: Range | None


def timed(recipe: Recipe, backend: str, earlier: Speed | None, own_answers: int = 0) -> list[TimedArm]:
    """Every arm that the recipe switches on; of its own answers those that do not stand already."""
    found = []
    for cost in costs(recipe):
        took = None
        if cost.label == ASIDE[-1]:
            left = max(0, cost.answers - own_answers)
            cost = replace(cost, answers=left, tokens=cost.tokens // cost.answers * left)
            took = _as_earlier(left, earlier)
        if cost.answers:
            found.append(TimedArm(cost, *(took or drawing(cost.tokens, cost.answers, backend, earlier))))
    return found


def _as_earlier(answers: int, earlier: Speed | None) -> tuple[Range, Range] | None:
    """Tokens and seconds of so many own answers, with their requests, as the earlier run's took; None: it had none."""
    if earlier is None or not earlier.own_answers:
        return None
    share, gain = answers / earlier.own_answers, table_rates(earlier.backend).gain(earlier.own_answers, answers)
    tokens, seconds = (Range(LOW * share * of, HIGH * share * of) for of in (earlier.own_tokens, earlier.own_seconds))
    return tokens, Range(seconds.low / gain, seconds.high / gain)


def drawing(limit: int, answers: int, backend: str, earlier: Speed | None) -> tuple[Range, Range | None]:
    """Tokens, at most `limit`, and seconds of drawing so many answers."""
    tokens, speed = Range(limit * SHORT, float(limit)), table_rates(backend).at(answers)
    if earlier and earlier.generation_seconds:
        speed = earlier.tokens / earlier.generation_seconds
    return tokens, Range(tokens.low / speed, tokens.high / speed) if speed else None


def left(recipe: Recipe, backend: str, earlier: Speed | None, own_answers: int = 0) -> list[TimedArm]:
    """Those that the earlier run, whose time is scaled, did not measure; `own_answers`: how many stand already."""
    seen, every = earlier.labels if earlier else frozenset(), timed(recipe, backend, earlier, own_answers)
    return [arm for arm in every if not any(label.startswith(arm.cost.label) for label in seen)]
