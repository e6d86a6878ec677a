"""Resume and fork as typed: what is printed works, what is refused leaves no trace, more items are taken."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.runs import read_jsonl

import runner
from cai import errors
from cai.commands import verify
from cai.commands.status import screen
from cai.models.fake import FakeModel

Runner = Callable[..., tuple[int, Path]]
SMALL = ("--milestone", "m1", "--set", "items=2", "--set", "heldout.items=0", "--set", "dpo.max_steps=2")


def files_of(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def commands_in(text: str) -> list[list[str]]:
    """The command lines that a message offers, as a shell would split them."""
    return [shlex.split(line.partition("python runner.py ")[2]) for line in text.splitlines() if "runner.py" in line]


def edited(project: Path, before: str, after: str) -> None:
    text = (project / "cai.toml").read_text()
    assert before in text
    (project / "cai.toml").write_text(text.replace(before, after, 1))


@pytest.mark.runs
def test_each_remedy_of_a_drift_works(run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Items were changed in the recipe before training (allowed), then beta: both lines that are printed must go on."""
    assert run_fake("--milestone", "m1", "--set", "dpo.max_steps=2", "--until", "critiques")[0] == 0
    edited(project, "items = 10\n", "items = 3\n")
    assert run_fake("--resume", "runs/latest", fake=())[0] == 0
    edited(project, "beta = 0.1", "beta = 0.2")
    capsys.readouterr()
    code, run = run_fake("--resume", "runs/latest", fake=())
    found = commands_in(capsys.readouterr().err)
    assert code == errors.DRIFT and len(found) == 2
    assert [runner.main(argv) for argv in found] == [0, 0]
    assert len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 3
    assert (project / "runs" / "latest").resolve() != run, "the second line forks"


@pytest.mark.runs
@pytest.mark.parametrize("later", [("--limit", "1"), ("--set", "items=3")], ids=["--limit", "--set items"])
def test_a_number_of_items_that_a_resume_was_given_holds_on(run_fake: Runner, later: tuple[str, ...]) -> None:
    run_fake(*SMALL, "--until", "critiques")
    assert run_fake("--resume", "runs/latest", *later, fake=())[0] == 0
    code, run = run_fake("--resume", "runs/latest", fake=())
    assert code == 0 and len(read_jsonl(run / "dataset/pairs/train.jsonl")) == int(later[-1].partition("=")[2] or 1)


def test_a_resume_as_another_milestone_is_refused_and_its_line_forks(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake(*SMALL, "--until", "answers")
    before = files_of(run)
    assert run_fake("--resume", "runs/latest", "--milestone", "m2", fake=())[0] == errors.DRIFT
    assert files_of(run) == before
    (line,) = commands_in(capsys.readouterr().err)
    assert line[-2:] == ["--fork", f"runs/{run.name}"] and "m2" in line
    assert runner.main(line) == 0


@pytest.mark.runs
def test_a_refused_resume_leaves_a_finished_run_finished(run_fake: Runner) -> None:
    _, run = run_fake(*SMALL)
    before = files_of(run)
    assert run_fake("--resume", "runs/latest", "--set", "dpo.beta=0.3", fake=())[0] == errors.DRIFT
    assert files_of(run) == before
    assert "state        done" in screen(run)


@pytest.mark.runs
def test_more_items_on_a_finished_run_are_made_and_trained_on(run_fake: Runner) -> None:
    _, run = run_fake(*SMALL)
    rows, adapter = (run / "records.jsonl").read_bytes(), (run / "adapter/adapter_model.safetensors").read_bytes()
    code, again = run_fake("--resume", "runs/latest", "--set", "items=4", fake=())
    assert (code, again) == (0, run)
    assert (run / "records.jsonl").read_bytes().startswith(rows), "what was generated stays"
    assert len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 4
    (kept,) = run.glob("quarantine/trained-*/adapter/adapter_model.safetensors")
    assert kept.read_bytes() == adapter
    assert verify.sound(verify.verify(run))
    _, fresh = run_fake(*SMALL, "--set", "items=4")
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == (
        fresh / "adapter/adapter_model.safetensors"
    ).read_bytes()
    assert run_fake("--resume", str(run), "--set", "items=3", fake=())[0] == errors.DRIFT, "fewer are another run"


@pytest.mark.runs
def test_a_fork_keeps_the_milestone_and_the_keys_that_were_set(run_fake: Runner) -> None:
    """The line of docs/troubleshooting.md, after an m1 with keys of its own: everything stays."""
    _, old = run_fake(*SMALL)
    code, forked = run_fake("--fork", "runs/latest", fake=())
    manifest = orjson.loads((forked / "manifest.json").read_bytes())
    assert code == 0 and manifest["milestone"] == "m1" and "items=2" in manifest["sets"]
    kept = [line for line in (old / "records.jsonl").read_bytes().splitlines(True) if b'"stage":"probes"' not in line]
    assert (forked / "records.jsonl").read_bytes() == b"".join(kept)  # its own model answers the probes
    run_fake("--fork", str(old), "--set", "items=3", fake=())
    again = orjson.loads((old.parent / "latest" / "manifest.json").read_bytes())
    assert [text for text in again["sets"] if text.startswith("items")] == ["items=3"]


@pytest.mark.runs
def test_the_card_of_a_fork_names_the_model_that_wrote_the_text(run_fake: Runner) -> None:
    _, old = run_fake(*SMALL, "--until", "pairs")
    code, forked = run_fake("--fork", "runs/latest", fake=())
    assert code == 0 and orjson.loads((forked / "manifest.json").read_bytes())["model"]["backend"] == "fake"
    assert run_fake("--resume", str(forked), "--until", "pairs", fake=())[0] == 0
    assert (forked / "dataset/README.md").read_bytes() == (old / "dataset/README.md").read_bytes()
    assert "fake" in (forked / "dataset/README.md").read_text()


@pytest.mark.runs
def test_so_does_that_of_a_run_whose_manifest_lost_it(run_fake: Runner) -> None:
    _, run = run_fake(*SMALL, "--until", "pairs")
    card = (run / "dataset/README.md").read_bytes()
    manifest = orjson.loads((run / "manifest.json").read_bytes())
    del manifest["model"], manifest["sums"]
    (run / "manifest.json").write_bytes(orjson.dumps(manifest))
    assert run_fake("--resume", "runs/latest", "--until", "pairs", fake=())[0] == 0
    assert (run / "dataset/README.md").read_bytes() == card


LATE = {
    "no such benchmark file": ("--set", 'benchmarks.run=["xstest"]', "--set", "benchmarks.xstest=none.csv"),
    "no such guard": ("--set", "guard.enabled=true", "--set", "guard.model=nobody/qwen3guard-none"),
    "no such local model": ("--set", "model.backend=fake", "--set", "model.name=fake:unknown"),
}


@pytest.mark.parametrize("keys", LATE.values(), ids=LATE.keys())
def test_a_usage_fault_leaves_no_run_behind_and_runs_latest_as_it_was(
    run_fake: Runner, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    _, run = run_fake(*SMALL, "--until", "instructions")
    before = sorted(path.name for path in run.parent.iterdir())
    if "fake:unknown" in keys[-1]:
        monkeypatch.setattr(FakeModel, "__init__", refuse)
    code, latest = run_fake(*SMALL, *keys)
    assert code == errors.USAGE and latest == run
    assert sorted(path.name for path in run.parent.iterdir()) == before


def refuse(self: FakeModel, section: object) -> None:
    from cai.errors import CaiError

    raise CaiError("model.name: there is no such model. Give another.")


def test_a_first_run_that_fails_so_leaves_no_latest(run_fake: Runner, project: Path, monkeypatch) -> None:
    monkeypatch.setattr(FakeModel, "__init__", refuse)
    assert run_fake(*SMALL)[0] == errors.USAGE
    assert not [*(project / "runs").iterdir()]


def test_every_second_counts_while_a_model_loads_and_while_inputs_are_read(
    run_fake: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk of an attempt's time at any moment lags by no more than a heartbeat."""
    monkeypatch.setattr("cai.run.folder.HEARTBEAT_SECONDS", 0.1)
    seen: list[tuple[float, float]] = []
    real_init, real_read = FakeModel.__init__, runner.read_inputs

    def slow_load(self: FakeModel, section: object) -> None:
        from cai.run.events import read_events, spent

        time.sleep(1.0)
        run = max(Path("runs").glob("2*"))
        seen.append((time.monotonic() - began, spent(read_events(run / "events.jsonl"))["seconds"]))
        real_init(self, section)

    def slow_read(args: object) -> object:
        time.sleep(0.5)
        return real_read(args)

    monkeypatch.setattr(FakeModel, "__init__", slow_load)
    monkeypatch.setattr(runner, "read_inputs", slow_read)
    began = time.monotonic()
    run_fake(*SMALL, "--until", "instructions")
    passed, counted = seen[0]
    assert passed > 1.5 and passed - counted < 0.6


@pytest.mark.runs
def test_until_pairs_writes_the_report_and_can_be_exported(run_fake: Runner, project: Path, capsys) -> None:
    _, run = run_fake(*SMALL, "--until", "pairs")
    assert (run / "report.html").is_file() and (run / "dataset/README.md").is_file()
    assert run_fake("--export", "runs/latest", "--to", str(project / "out"), fake=())[0] == 0
    assert (project / "out/dataset/pairs/train.jsonl").is_file() and not (project / "out/adapter").exists()
    assert "load_dataset" in capsys.readouterr().out
    assert run_fake("--export", "runs/latest", "--to", str(project / "o2"), "--merged", fake=())[0] == errors.USAGE


@pytest.mark.runs
def test_a_fork_of_the_same_critic_does_not_sit_the_exam_again(run_fake: Runner) -> None:
    """It drew all of it anew for another beta, where "nothing is drawn again" was promised."""

    def exam(run: Path) -> tuple[list[str], list[dict[str, Any]]]:
        stages = [str(e["stage"]) for e in read_jsonl(run / "events.jsonl") if e["kind"] == "stage"]
        rows = [row for row in read_jsonl(run / "eval" / "critic.jsonl") if row["metric"].startswith("critic.")]
        return [stage for stage in stages if stage.startswith("critic's exam")], rows

    few = ("--milestone", "m1", "--set", "items=2", "--set", "evaluation.critic_items=4")
    _, first = run_fake(*few)
    run_fake("--fork", str(first), "--set", "dpo.beta=0.3", fake=())
    _, second = run_fake("--resume", "runs/latest", fake=())
    assert second != first and exam(first)[0] and exam(second) == ([], exam(first)[1])
    run_fake("--fork", str(first), "--set", "sampling.critiques.temperature=0.9", fake=())
    _, third = run_fake("--resume", "runs/latest", fake=())
    assert third != second and exam(third)[0], "another critic sits it itself"
