"""A run on pairs of the user's own: trained, measured, reported, resumed, forked and verified without generating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from support.runs import read_jsonl

import runner
from cai.report.snapshot import read_story
from cai.run.manifest import read_manifest

Runner = Callable[..., tuple[int, Path]]
OWN = ("--milestone", "m1", "--set", "pairs.file=mine.jsonl", "--set", "hygiene.leaks=false",
       "--set", "evaluation.neutral_passages=2", "--set", "evaluation.kl_passages=2")  # fmt: skip


@pytest.fixture
def mine(project: Path) -> Path:
    path = project / "mine.jsonl"
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"A kind answer {n} of some words.", "rejected": f"No {n}, go away now."}
        for n in range(30)
    ]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


@pytest.mark.runs
def test_it_trains_measures_and_reports_and_no_gate_asks_for_a_critique(
    run_fake: Runner, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = run_fake(*OWN, "--set", "heldout.items=6")
    said = capsys.readouterr()
    assert code == 0 and "nothing is generated" in said.out and "instructions:" not in said.err
    assert {row["stage"] for row in read_jsonl(run / "records.jsonl")} == {"probes"}  # what base and tuned answer
    train = read_jsonl(run / "dataset" / "pairs" / "train.jsonl")
    assert len(train) == 10 and len(read_jsonl(run / "dataset" / "pairs" / "heldout.jsonl")) == 6
    assert set(train[0]) == {"prompt", "chosen", "rejected", "item", "pool"}
    verdicts = {v["metric"]: v["status"] for v in orjson.loads((run / "eval" / "gates.json").read_bytes())["verdicts"]}
    assert set(verdicts) == {"dpo.first_loss_error", "dpo.loss_fall"}
    assert read_story(run).figures["preference.p1"]["n"] == 6
    assert (run / "adapter").is_dir() and "Question" in (run / "report.html").read_text()
    card = (run / "dataset" / "README.md").read_text()
    assert "not made by Constitutional AI" in card and "red-team pool" not in card
    assert (run / "pairs.file").read_bytes() == mine.read_bytes()
    assert "sha256(pairs.file)" in read_manifest(run / "manifest.json")["identity"]
    assert runner.main(["cai.toml", "--verify", "runs/latest"]) == 0


@pytest.mark.runs
def test_a_killed_run_goes_on_from_its_own_copy_and_a_changed_file_is_drift(
    run_fake: Runner, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake(*OWN, "--until", "pairs")
    before = (run / "dataset" / "pairs" / "train.jsonl").read_bytes()
    kept = mine.read_bytes()
    mine.write_bytes(kept.replace(b"kind", b"curt"))
    assert runner.main(["cai.toml", "--resume", "runs/latest"]) == 3
    assert "sha256(pairs.file)" in capsys.readouterr().err
    mine.unlink()
    assert runner.main(["cai.toml", "--resume", "runs/latest"]) == 0
    assert (run / "dataset" / "pairs" / "train.jsonl").read_bytes() == before
    assert (run / "adapter").is_dir()
    mine.write_bytes(kept)
    assert runner.main(["cai.toml", "--resume", "runs/latest", "--set", "items=20"]) == 0  # more of them, trained anew
    assert len(read_jsonl(run / "dataset" / "pairs" / "train.jsonl")) == 20
    assert runner.main(["cai.toml", "--verify", "runs/latest"]) == 0


@pytest.mark.runs
def test_a_fork_trains_on_the_same_pairs_with_another_beta(run_fake: Runner, mine: Path) -> None:
    _, run = run_fake(*OWN)
    assert runner.main(["cai.toml", "--fork", "runs/latest", "--set", "dpo.beta=0.4"]) == 0
    assert runner.main(["cai.toml", "--resume", "runs/latest"]) == 0
    new = (run.parent / "latest").resolve()
    assert new != run
    same = [(path / "dataset" / "pairs" / "train.jsonl").read_bytes() for path in (run, new)]
    assert same[0] == same[1] and read_story(new).recipe.dpo.beta == 0.4


@pytest.mark.runs
def test_a_fork_of_generated_pairs_to_own_ones_takes_no_row_along(
    run_fake: Runner, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fake("--milestone", "m0", "--until", "pairs")
    capsys.readouterr()
    argv = ["cai.toml", "--fork", "runs/latest", "--set", "pairs.file=mine.jsonl", "--dry-run"]
    assert runner.main(argv) == 0
    assert " 0 records stay" in capsys.readouterr().out


def test_data_alone_is_reported_and_exported_without_a_model(run_fake: Runner, mine: Path, tmp_path: Path) -> None:
    code, run = run_fake(*OWN, "--until", "pairs")
    assert code == 0 and "model" not in read_manifest(run / "manifest.json")
    assert (run / "report.html").is_file() and (run / "dataset" / "README.md").is_file()
    to = tmp_path / "elsewhere" / "out"
    to.parent.mkdir()
    assert runner.main(["cai.toml", "--export", "runs/latest", "--to", str(to)]) == 0
    assert {path.name for path in (to / "dataset").iterdir()} >= {"README.md", "pairs", "dataset_info.json"}
    found = orjson.loads((to / "dataset" / "conversational" / "train.jsonl").read_bytes().splitlines()[0])
    assert found["chosen"][0]["role"] == "assistant"


@pytest.mark.runs
def test_a_guard_that_refuses_one_gives_its_place_to_another(run_fake: Runner, mine: Path) -> None:
    code, run = run_fake(*OWN, "--until", "pairs", "--set", "guard.enabled=true", "--set", "guard.model=stand-in")
    rows = read_jsonl(run / "records.jsonl")
    train = {row["item"] for row in read_jsonl(run / "dataset" / "pairs" / "train.jsonl")}
    assert code == 0 and {row["stage"] for row in rows} == {"guard"}
    assert train == {row["item"] for row in rows if row["status"] == "ok"} and len(train) == 10


FAULTS = {
    ("--until", "answers"): "nothing is generated",
    ("--set", "instructions.file=mine.jsonl"): "Leave one out",
    ("--set", "pairs.file=missing.jsonl"): "Give an existing file",
}


@pytest.mark.parametrize("more", FAULTS, ids=" ".join)
def test_what_does_not_go_together_is_one_line_and_leaves_no_run(
    run_fake: Runner, mine: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fake(*OWN, *more)[0] == 2
    said = capsys.readouterr().err.strip()
    assert FAULTS[more] in said and "\n" not in said and not (mine.parent / "runs").exists()


def test_identical_pairs_alone_end_with_the_reasons(
    run_fake: Runner, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.write_bytes(b'{"prompt": "a?", "chosen": "same", "rejected": "same"}\n')
    assert run_fake(*OWN)[0] == 6
    assert "no pair to train on: identical 1" in capsys.readouterr().err


def test_a_dry_run_shows_what_is_taken_and_the_policys_prompt_alone(
    run_fake: Runner, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fake(*OWN, "--dry-run")[0] == 0
    said = capsys.readouterr().out
    assert "taken: 10 to train on" in said and "--- policy" in said and "--- critiques" not in said
    assert not (mine.parent / "runs").exists()


def test_marks_are_not_asked_for_of_pairs_that_were_given(
    run_fake: Runner, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fake(*OWN, "--until", "pairs")
    assert runner.main(["cai.toml", "--review", "runs/latest", "--terminal"]) == 2
    assert "no critique or revision to mark" in capsys.readouterr().err


def test_a_fault_after_the_data_set_was_written_removes_nothing(
    run_fake: Runner, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs of one's own leave no record: an empty log must not make a run with an adapter look like an empty one."""
    from cai import pipeline
    from cai.errors import CaiError

    def refuse(*_: object, **__: object) -> None:
        raise CaiError("a usage fault that is found late")

    monkeypatch.setattr(pipeline, "evaluate", refuse)
    code, run = run_fake(*OWN)
    assert code == 2 and (run / "adapter").is_dir() and (run / "dataset" / "pairs" / "train.jsonl").is_file()
