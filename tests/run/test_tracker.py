"""`[report] tracker`: off by default, refused where the package is missing, fed where it is; never the run's end."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest
from support.rich_run import go, latest, project
from support.runs import FAKE

from cai.errors import CaiError
from cai.run import tracker

M0 = (*FAKE, "--milestone", "m0")
NOTE = """
import json, os
def note(*what):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(what) + "\\n")
"""
STAND_INS = {
    "trackio": NOTE + """
def init(**facts): note("init", facts)
def log(values, step): note("log", values, step)
def finish(): note("finish")
""",
    "wandb": NOTE + """
class Opened:
    def log(self, values, step): note("log", values, step)
    def finish(self): note("finish")
def init(**facts):
    note("init", facts)
    return Opened()
""",
    "mlflow": NOTE + """
from types import SimpleNamespace
def set_tracking_uri(uri):  # as 3.17 does
    if uri.startswith("file:") and os.environ.get("MLFLOW_ALLOW_FILE_STORE") != "true":
        raise RuntimeError("The filesystem tracking backend is in maintenance mode")
    note("uri", uri)
def get_experiment_by_name(name): return None
def create_experiment(name, artifact_location): note("files", artifact_location)
def set_experiment(name): note("experiment", name)
def search_runs(filter_string, output_format):
    begun = [json.loads(line) for line in open(os.environ["TOLD"])] if os.path.exists(os.environ["TOLD"]) else []
    names = [what[1]["name"] for what in begun if what[0] == "init" and what[1].get("name")]
    return [SimpleNamespace(info=SimpleNamespace(run_id=name)) for name in names if name in filter_string][:1]
def start_run(run_name=None, run_id=None): note("init", {"name": run_name, "id": run_id})
def log_params(facts): note("params", facts)
def log_metrics(values, step): note("log", values, step)
def end_run(): note("finish")
""",
    "tensorboard": "",
}  # fmt: skip
WRITER = (
    NOTE
    + """
class Writer:
    def __init__(self, output): note("init", {"name": output})
    def add_scalar(self, tag, data, step): note("log", {tag: data}, step)
    def flush(self): pass
    def close(self): note("finish")
"""
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module of a tracker's name on sys.path that notes what it is told; gives the notes."""
    folder, told = tmp_path / "packages", tmp_path / "told.jsonl"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TOLD", str(told))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(name, text=None):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(STAND_INS[name] if text is None else text)
        if name == "tensorboard":
            (folder / name / "summary.py").write_text(WRITER)
        return lambda: [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] in tracker.OPEN]:
        sys.modules.pop(name)


@pytest.mark.runs
@pytest.mark.parametrize("name", sorted(tracker.OPEN))
def test_each_tracker_is_told_every_step_and_every_figure(tmp_path, stand_in, name):
    told, folder = stand_in(name), project(tmp_path)
    code, said = go(folder, *M0, "--set", "dpo.max_steps=3", "--set", f"report.tracker={name}")
    assert code == 0, said
    notes = told()
    assert notes[-1] == ["finish"] and latest(folder).name in json.dumps(notes[0:4])
    losses = [note[2] for note in notes if note[0] == "log" and "train/loss" in note[1]]
    assert losses == [1, 2, 3]
    figures = {metric for note in notes if note[0] == "log" for metric in note[1]}
    assert {"pairs.kept", "dpo.loss", "train/grad_norm"} <= figures
    assert not any(value is None for note in notes if note[0] == "log" for value in note[1].values())
    code, said = go(folder, "--verify", "runs/latest")
    assert code == 0, said


@pytest.mark.runs
def test_nothing_is_imported_or_sent_unasked(tmp_path, stand_in):
    for name in tracker.OPEN:
        told = stand_in(name, "raise RuntimeError('nobody asked for it')")
    assert go(project(tmp_path), *M0)[0] == 0
    assert told() == [] and not set(sys.modules) & set(tracker.OPEN)


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_a_package_that_is_missing_is_one_line_before_there_is_a_run(tmp_path, monkeypatch, how):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = project(tmp_path)
    code, said = go(folder, *M0, *how, "--set", "report.tracker=wandb")
    assert code == 2 and not (folder / "runs").exists()
    assert said.strip().splitlines()[-1].startswith("report.tracker: wandb is not installed here. Run `")


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path):
    code, said = go(project(tmp_path), *M0, "--set", "report.tracker=visdom")
    assert code == 2 and "report.tracker" in said and "'wandb'" in said


NO_START = "def init(**f): raise OSError('no network')"
NO_STEP = "def init(**f): pass\ndef finish(): pass\ndef log(v, step): raise OSError('no network')"


@pytest.mark.runs
@pytest.mark.parametrize("fault", [NO_START, NO_STEP])
def test_a_tracker_that_fails_ends_no_run_and_is_told_once(tmp_path, stand_in, fault):
    stand_in("trackio", fault)
    code, said = go(project(tmp_path), *M0, "--set", "dpo.max_steps=3", "--set", "report.tracker=trackio")
    assert code == 0 and said.count("tracker: trackio ") == 1 and "OSError: no network" in said


@pytest.mark.runs
def test_a_resume_may_change_it(tmp_path, stand_in):
    told, folder = stand_in("trackio"), project(tmp_path)
    assert go(folder, *M0)[0] == 0
    code, said = go(folder, *FAKE, "--resume", "runs/latest", "--set", "report.tracker=trackio")
    assert code == 0, said
    assert [note[1]["resume"] for note in told() if note[0] == "init"] == ["allow"]


@pytest.mark.parametrize("database", [False, True], ids=["mlflow-skinny", "mlflow"])
def test_mlflow_goes_on_with_the_run_that_it_knows_and_keeps_it_in_the_run_folder(
    tmp_path, stand_in, monkeypatch, database
):
    """MLflow 3.17 refuses a store of files unless told, and a run's facts may be given once."""
    find = importlib.util.find_spec
    there = object() if database else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there if name == "sqlalchemy" else find(name))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    told = stand_in("mlflow")
    for _ in range(2):
        (tmp_path / "r1").mkdir(exist_ok=True)
        found = tracker.open_tracker("mlflow", tmp_path / "r1", {"milestone": "m0"})
        assert found is not None
        found.tell("train_step", {"step": 1, "loss": 0.5})
        found.close()
    notes = told()
    assert [note[1] for note in notes if note[0] == "init"] == [{"name": "r1", "id": None}, {"name": None, "id": "r1"}]
    assert len([note for note in notes if note[0] == "params"]) == 1
    where = [note[1] for note in notes if note[0] in ("uri", "files")]
    assert all(f"{tmp_path}/r1/tracker" in uri for uri in where)
    assert where[0].startswith("sqlite:" if database else "file:")


def test_the_packages_own_telemetry_is_off_before_they_are_imported(tmp_path, stand_in, monkeypatch):
    """MLflow reads DO_NOT_TRACK for "true", at import; what a user has set holds."""
    for name in tracker.NO_TELEMETRY:
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    seen = "import os\nassert os.environ['DO_NOT_TRACK'] == os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'true'\n"
    stand_in("trackio", seen + STAND_INS["trackio"])
    assert tracker.open_tracker("trackio", tmp_path, {}) is not None
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"


def test_require_names_the_package():
    tracker.require("none")
    with pytest.raises(CaiError, match="no_such_tracker is not installed"):
        tracker.require("no_such_tracker")
