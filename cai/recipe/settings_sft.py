"""The recipe's [sft] section: supervised training on the revisions, beside DPO or before it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cai.recipe.settings import ADDED, Count, DpoSection, Section


class SftSection(Section):
    """A second arm: the same LoRA trained from the start on the revisions alone; it says what DPO adds.

    With `dpo.start = "sft"` it is DPO's first stage, whether enabled or not. Seed, batch, schedule and `max_length` are
    [dpo]'s; with `max_steps` and `epochs` at 0 its length is too. `select` = "clean": no text that repeats itself or
    was cut, and answers that no revision bettered; "all": every revision, and answers in which nothing was found.
    `answers`: further benign requests that the model answers itself, to be shown beside them. `end_weight`: what the
    end token counts in the mean (1 = as every other token).
    """

    enabled: bool = False
    max_steps: Count = 0
    epochs: Annotated[float, Field(ge=0.0)] = 0.0
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4  # LoRA at 33B and 65B: Dettmers et al. 2023, table 9
    end_weight: Annotated[float, Field(ge=1.0, le=100.0)] = 1.0
    select: Literal["all", "clean"] = "all"
    answers: Annotated[int, Field(ge=0, le=500_000)] = 0

    @model_validator(mode="after")
    def _length(self) -> SftSection:
        if self.max_steps > 0 and self.epochs > 0:
            raise ValueError("set at most one of sft.max_steps and sft.epochs above 0; with neither, as [dpo]")
        return self

    def recipe(self, dpo: DpoSection) -> DpoSection:
        """[dpo] with what this arm has of its own: length, learning rate and the plain likelihood of the revision."""
        own = {"max_steps": self.max_steps, "epochs": self.epochs} if self.max_steps or self.epochs else {}
        plain = {name: DpoSection.model_fields[name].default for name in (*ADDED, "eval_steps", "keep")}
        changed = {
            "learning_rate": self.learning_rate,
            "loss_type": ("sft",),
            "loss_weights": (),
            **plain,
            **own,
            "end_weight": self.end_weight,
        }
        return dpo.model_copy(update=changed)
