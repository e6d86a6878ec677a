"""`[report] tracker`: steps and figures to an experiment tracker that the user has installed and named. Off by default.

Owns what is sent (training steps, then every figure with a value) and how each package is asked; the run's own files
stay the truth. Invariants: nothing is imported or sent unless the recipe names it; a package that is missing is told
before there is a run; one that fails later ends the tracking, never the run.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.errors import CaiError
from cai.terminal import printable, say

PROJECT = "constitutional-ai"  # under which runs stand in the tracker
FOLDER = "tracker"  # in the run folder, for those that write files
STEP_KINDS = ("train_step", "heldout")
NOT_SENT = {"step", "arm"}
NO_TELEMETRY = {  # of the packages themselves, read when they are imported; MLflow knows "true", not "1"
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


@dataclass
class Tracker:
    """An open tracker. `send(values, step)`; `end()`; after a failure it is silent."""

    name: str
    send: Callable[[dict[str, float], int], None]
    end: Callable[[], None]
    step: int = 0
    failed: bool = False

    def tell(self, kind: str, fields: Mapping[str, Any]) -> None:
        """What the run says of itself: a training step, or all figures."""
        if kind not in (*STEP_KINDS, "figures") or self.failed:
            return
        prefix = f"{fields['arm']}/" if fields.get("arm") else ""
        prefix = {"train_step": f"train/{prefix}", "heldout": f"heldout/{prefix}"}.get(kind, "")
        if kind != "figures" and isinstance(fields.get("step"), int):
            self.step = fields["step"]
        found = {
            f"{prefix}{name}": float(value) for name, value in fields.items() if name not in NOT_SENT and _is(value)
        }
        if found:
            self._try(lambda: self.send(found, self.step))

    def close(self) -> None:
        if not self.failed:
            self._try(self.end)

    def _try(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except Exception as error:  # a stranger's package or a network: whatever it raises, the run is worth more
            self.failed = True
            why = printable(f"{type(error).__name__}: {error}", one_line=True)[:200]
            say(f"tracker: {self.name} failed ({why}); the run goes on without it")


def _is(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require(name: str) -> None:
    """Exit 2 with the remedy where the package is not there; asked before anything is spent. Imports nothing."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise CaiError(
            f"report.tracker: {name} is not installed here. Run `.venv/bin/pip install {name}`, "
            'or set report.tracker="none".'
        )


def open_tracker(name: str, run: Path, facts: Mapping[str, Any]) -> Tracker | None:
    """The tracker of a run, on which a resume goes on; None for "none" and, said aloud, where it does not start."""
    if name == "none":
        return None
    for variable, value in NO_TELEMETRY.items():
        os.environ.setdefault(variable, value)
    try:
        send, end = OPEN[name](run, dict(facts))
    except Exception as error:  # as above
        why = printable(f"{type(error).__name__}: {error}", one_line=True)[:200]
        say(f"tracker: {name} did not start ({why}); the run goes on without it")
        return None
    return Tracker(name, send, end)


Ways = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]


def _tensorboard(run: Path, facts: dict[str, Any]) -> Ways:
    from tensorboard.summary import Writer  # type: ignore[import-not-found]  # the user's package, not a requirement

    writer = Writer(str(run / FOLDER))

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _trackio(run: Path, facts: dict[str, Any]) -> Ways:
    import trackio  # type: ignore[import-not-found]  # the user's package, not a requirement

    trackio.init(project=PROJECT, name=run.name, config=facts, resume="allow")
    return lambda values, step: trackio.log(values, step=step), trackio.finish


def _wandb(run: Path, facts: dict[str, Any]) -> Ways:
    import wandb  # type: ignore[import-not-found]  # the user's package, not a requirement

    (run / FOLDER).mkdir(mode=0o700, exist_ok=True)
    opened = wandb.init(
        project=PROJECT, name=run.name, id=run.name, resume="allow", config=facts, dir=str(run / FOLDER)
    )
    return lambda values, step: opened.log(values, step=step), opened.finish


def _mlflow(run: Path, facts: dict[str, Any]) -> Ways:
    folder = run / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    database = importlib.util.find_spec("sqlalchemy") is not None
    if not database:  # mlflow-skinny: 3.17 writes files only if it is told to
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow  # type: ignore[import-not-found]  # the user's package, not a requirement

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        place = folder.resolve()
        mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}" if database else place.as_uri())
        if mlflow.get_experiment_by_name(PROJECT) is None:  # files of a run would lie in ./mlruns otherwise
            mlflow.create_experiment(PROJECT, artifact_location=(place / "files").as_uri())
    mlflow.set_experiment(PROJECT)
    named = f"attributes.run_name = '{run.name}'"
    if before := mlflow.search_runs(filter_string=named, output_format="list"):
        mlflow.start_run(run_id=before[0].info.run_id)  # its facts are there, and may not be given anew
    else:
        mlflow.start_run(run_name=run.name)
        mlflow.log_params(facts)
    return lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run


OPEN: dict[str, Callable[[Path, dict[str, Any]], Ways]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
