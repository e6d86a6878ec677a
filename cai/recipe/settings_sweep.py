"""The recipe's section of a sweep: which values of which keys `--sweep` runs, in every combination.

Owns names and ranges; what a combination shares with another is the fork's matter. Imports nothing above `settings`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from cai.recipe.settings import Fraction, Positive, Section, Seed

KEYS = {  # of [sweep] -> of the recipe; those that change the data stand first
    "red_team_share": "instructions.red_team_share",
    "rounds": "rounds",
    "top": "principles.top",
    "beta": "dpo.beta",
    "learning_rate": "dpo.learning_rate",
    "seeds": "dpo.seeds",
}
OF_DATA = ("red_team_share", "rounds", "top")


class SweepSection(Section):
    """Values of `dpo.beta`, `dpo.learning_rate`, ..., `principles.top`; `seeds`: every combination once from each."""

    beta: tuple[Annotated[float, Field(gt=0.0, le=100.0)], ...] = ()
    learning_rate: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = ()
    red_team_share: tuple[Fraction, ...] = ()
    rounds: tuple[Positive, ...] = ()
    top: tuple[Positive, ...] = ()
    seeds: tuple[Seed, ...] = ()

    @model_validator(mode="after")
    def _once(self) -> SweepSection:
        for name in KEYS:
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"sweep.{name}: names a value twice")
        return self
