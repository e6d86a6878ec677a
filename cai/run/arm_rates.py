"""What the arms beside base and tuned take: each one's tokens and seconds, from the rates that `cai.run.rates` reads.

Owns the times of `cai.recipe.arm_costs`; the sum of a milestone and its price are `cai.run.budget`'s. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from cai.recipe.arm_costs import ArmCost, costs
from cai.recipe.load import Recipe
from cai.run.rates import Range, Speed, table_rates

SHORT = 0.25  # the share of the token limit that an answer uses, at least, where nothing says better


@dataclass(frozen=True)
class TimedArm:
    """`seconds`: None where no rate was measured."""

    cost: ArmCost
    tokens: Range
    seconds: Range | None


def timed(recipe: Recipe, backend: str, earlier: Speed | None) -> list[TimedArm]:
    """Every arm that the recipe switches on."""
    return [TimedArm(cost, *drawing(cost.tokens, cost.answers, backend, earlier)) for cost in costs(recipe)]


def drawing(limit: int, answers: int, backend: str, earlier: Speed | None) -> tuple[Range, Range | None]:
    """Tokens, at most `limit`, and seconds of drawing so many answers."""
    tokens, speed = Range(limit * SHORT, float(limit)), table_rates(backend).at(answers)
    if earlier and earlier.generation_seconds:
        speed = earlier.tokens / earlier.generation_seconds
    return tokens, Range(tokens.low / speed, tokens.high / speed) if speed else None


def left(recipe: Recipe, backend: str, earlier: Speed | None) -> list[TimedArm]:
    """Those that the earlier run, whose time is scaled, did not measure."""
    seen = earlier.labels if earlier else frozenset()
    return [arm for arm in timed(recipe, backend, earlier) if not any(s.startswith(arm.cost.label) for s in seen)]
