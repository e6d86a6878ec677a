"""What the steps of a run share: the recipe and its inputs, the open run and its log, the model on demand.

Owns no work. The weights are loaded at the first unit that needs them, by whoever calls `model()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cai.engine import Engine
from cai.engine.model import Model
from cai.recipe.constitution import Constitution
from cai.recipe.load import Recipe
from cai.recipe.prompts import Prompt
from cai.run.folder import Run
from cai.run.progress import Progress
from cai.store.records import RecordLog
from cai.store.row_types import Record


class ModelOnCall(Protocol):
    """Gives the model, which is loaded at the first call. `model`: what is loaded now."""

    model: Model | None

    def __call__(self) -> Model: ...

    def set_aside(self) -> None:
        """Forget the weights, so that their memory is free; the next call loads them again."""


@dataclass
class Context:
    """What the stages share. `model` is a function: the weights are loaded at the first unit that needs them."""

    recipe: Recipe
    run: Run
    log: RecordLog[Record]
    constitution: Constitution
    prompts: Mapping[str, Prompt]
    model: ModelOnCall
    stopped: Callable[[], bool]
    check_stop: Callable[[str], None]
    progress: Progress

    @property
    def engine(self) -> Engine:
        return self.model().engine(self.recipe.engine, rounded=True)

    def ok(self, stage: str, item: int, round_: int = 0) -> Record | None:
        """The accepted row of a stage, if there is one."""
        row = self.log.get(stage, item, round_)
        return row if row is not None and row["status"] == "ok" else None
