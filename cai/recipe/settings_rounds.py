"""The recipe's section for a further round of a run, its answers written by the adapter of the round before.

Owns names, ranges and defaults; `--next-round` sets the first three keys. Imports nothing above `settings`, no torch.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from cai.metrics import names as metrics
from cai.recipe.settings import Positive, Section


class OnPolicySection(Section):
    """`round` above 1: the adapter of run `parent` (sha256 `adapter`) writes the answers, and DPO starts from it.

    `critic`: who writes critiques and revisions, the frozen base or the adapter that wrote the answers.
    `metric`, `min_gain`: a round adds nothing unless this figure is above the round before's by more than that, with
    the whole 95% interval of the gain where the figure has one; of such a run no further round begins. `metric` = "":
    the rule is off.
    """

    round: Positive = 1
    parent: str = ""
    adapter: str = ""
    critic: Literal["base", "tuned"] = "base"
    metric: str = "preference.p3.length_controlled"
    min_gain: float = 0.0

    @model_validator(mode="after")
    def _made_by_the_command(self) -> OnPolicySection:
        if (self.round > 1) != bool(re.fullmatch(r"[0-9a-f]{64}", self.adapter)):
            raise ValueError("on_policy.round: is set by --next-round, which takes the adapter along. Leave it out")
        if self.metric and (fault := metrics.fault(self.metric)):
            raise ValueError(f"on_policy.metric: {fault}")
        return self
