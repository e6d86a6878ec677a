"""What looks at a training after each of its steps: stops, progress, signs of ill health, checkpoints by time.

Each is a transformers callback over a `Guarded` trainer, whose plan says what to ask and whom to tell. Imports
transformers. Invariant: none of them changes a weight; what they end, they end with a sealed checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from cai import errors
from cai.errors import CaiError
from cai.training import health as signs
from cai.training import ranks
from cai.training.guards import Guarded, TrainingPlan

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

    from cai.training.trainers import PairTrainer


def callbacks_of(plan: TrainingPlan) -> list[Callable[[Any], TrainerCallback]]:
    """What both trainers have."""
    return [ClockSave, Watch] if plan.dpo.save_minutes else [Watch]


class ClockSave(TrainerCallback):
    """A checkpoint when `dpo.save_minutes` have passed since the last one (or since the start), and at the end."""

    def __init__(self, trainer: Guarded) -> None:
        self.trainer = trainer
        self.last = time.monotonic()

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        plan = self.trainer.plan
        due = time.monotonic() - self.last >= 60.0 * plan.dpo.save_minutes
        if due or state.global_step >= plan.steps:
            control.should_save = True

    def on_save(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.last = time.monotonic()


class Watch(TrainerCallback):
    """Asks `stopped()` between micro-batches and tells the progress.

    At the end of a step transformers logs and saves after this callback, so a stop waits for both: a checkpoint made
    before the step's log entry would lose it for good.
    """

    def __init__(self, trainer: Guarded) -> None:
        self.trainer = trainer
        self.stopping = False

    def on_substep_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if ranks.stopping(self.trainer.plan.stopped, state.global_step + 1):
            self.trainer.stop_here()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        plan = self.trainer.plan
        plan.progress(state.global_step, plan.steps)
        if state.global_step < plan.steps and ranks.stopping(plan.stopped, state.global_step):
            self.stopping = control.should_log = control.should_save = True

    def on_save(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.stopping:
            self.trainer.stop_here()


class HealthWatch(TrainerCallback):
    """Looks at the log after each step: a sign of ill health is an event once an attempt; one in `health.stop` ends it.

    The log that it reads is restored with a checkpoint, so a resume judges what the run left alone would have judged.
    """

    def __init__(self, trainer: Guarded) -> None:
        self.trainer = trainer
        self.told: set[str] = set()
        self.ending: signs.Sign | None = None

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.ending = self._look(state)
        if self.ending:
            control.should_log = control.should_save = True

    def on_save(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.ending:
            raise CaiError(
                f"training step {state.global_step}: {self.ending.text}. health.stop names it: the last checkpoint in "
                f"{self.trainer.plan.folder} is sealed; cure it with --fork, or resume with --set health.stop=[].",
                errors.QUALITY,
            )

    def on_train_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._look(state)

    def _look(self, state: TrainerState) -> signs.Sign | None:
        """Tell what is new; the sign that ends the training, if one does."""
        plan = self.trainer.plan
        found = signs.in_log(state.log_history, plan.health)
        for sign in found:
            if sign.name not in self.told:
                self.told.add(sign.name)
                plan.event("health", step=state.global_step, sign=sign.name, value=sign.value, text=sign.text)
        return next((sign for sign in found if sign.name in plan.health.stop), None)


class MakeUp(TrainerCallback):
    """A stop while held-out pairs are measured leaves a checkpoint without their entry: the resume measures first."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step:
            self.trainer.watch_heldout()
