"""What the steps of a run share: the recipe and its inputs, the open run and its log, the model on demand.

Owns no work. The weights are loaded at the first unit that needs them, by whoever calls `model()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cai.engine import Engine
from cai.engine.model import Model
from cai.recipe.constitution import Constitution
from cai.recipe.load import Recipe
from cai.recipe.prompts import Prompt
from cai.run.folder import Run
from cai.run.progress import Progress
from cai.store.records import RecordLog
from cai.store.row_types import Record

if TYPE_CHECKING:
    from cai.run.sharing import Shared


class ModelOnCall(Protocol):
    """Gives the model, which is loaded at the first call. `model`: what is loaded now."""

    model: Model | None

    def __call__(self) -> Model: ...

    def set_aside(self) -> None:
        """Forget the weights, so that their memory is free; the next call loads them again."""


@dataclass
class Context:
    """What the stages share. `model` is a function: the weights are loaded at the first unit that needs them.

    `elsewhere`: the run's own folder, and which attempt of it this is, for a process that works in a copy of it.
    `shared`: by log, the step that the processes of the run are sharing.
    """

    recipe: Recipe
    run: Run
    log: RecordLog[Record]
    constitution: Constitution
    prompts: Mapping[str, Prompt]
    model: ModelOnCall
    stopped: Callable[[], bool]
    check_stop: Callable[[str], None]
    progress: Progress
    elsewhere: tuple[Path, int] | None = None
    shared: dict[Path, Shared] = field(default_factory=dict)

    @property
    def home(self) -> tuple[Path, int]:
        """The run's own folder, where shards stand, and its attempt's number."""
        return self.elsewhere or (self.run.path, self.run.attempt)

    @property
    def engine(self) -> Engine:
        engine = self.model().engine(self.recipe.engine, rounded=True)
        self.progress.follow(engine.stats)
        return engine

    def ok(self, stage: str, item: int, round_: int = 0) -> Record | None:
        """The accepted row of a stage, if there is one."""
        row = self.log.get(stage, item, round_)
        return row if row is not None and row["status"] == "ok" else None
