"""What the steps of a run share: the recipe and its inputs, the open run and its log, the model on demand.

Owns no work. The weights are loaded at the first unit that needs them, by whoever calls `model()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cai.engine import Engine
from cai.engine.model import Model
from cai.recipe.constitution import Constitution
from cai.recipe.load import Recipe
from cai.recipe.prompts import Prompt
from cai.run.folder import Run
from cai.store.jsonl import Row
from cai.store.records import RecordLog


@dataclass
class Context:
    """What the stages share. `model` is a function: the weights are loaded at the first unit that needs them."""

    recipe: Recipe
    run: Run
    log: RecordLog
    constitution: Constitution
    prompts: Mapping[str, Prompt]
    model: Callable[[], Model]
    stopped: Callable[[], bool]
    check_stop: Callable[[str], None]
    progress: Any

    @property
    def engine(self) -> Engine:
        engine = self.model().engine(self.recipe.engine, rounded=True)
        self.progress.follow(engine.stats)
        return engine

    def ok(self, stage: str, item: int, round_: int = 0) -> Row | None:
        """The accepted row of a stage, if there is one."""
        row = self.log.get(stage, item, round_)
        return row if row is not None and row["status"] == "ok" else None
