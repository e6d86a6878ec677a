"""What a run would refuse at its start, its dry run refuses; what no remedy named before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import FAKE

import runner
from cai import errors

Runner = Callable[..., tuple[int, Path]]


@pytest.mark.parametrize("what", ["no such folder", "no config.json in it"])
def test_a_model_s_folder_that_is_none(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    if what.startswith("no config"):
        folder.mkdir()
    given = ("--set", "model.backend=cpu", "--set", f"model.name={json.dumps(str(folder))}")
    assert runner.main(["cai.toml", *given, "--dry-run"]) == errors.USAGE
    assert capsys.readouterr().err == (f"model.name: {folder}: {what}. Give a hub id or the folder of a saved model.\n")


@pytest.mark.parametrize("name", ["harmbench", "xstest"])
def test_a_benchmark_file_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--set", f'benchmarks.run=["{name}"]', "--set", f"benchmarks.{name}=/nowhere/rows.csv")
    assert runner.main(["cai.toml", *FAKE, *given, "--dry-run"]) == errors.USAGE
    assert f"/nowhere/rows.csv: benchmarks.{name}" in capsys.readouterr().err


def test_no_module_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["cai.toml", *FAKE, "--set", "lora.target_modules=[]", "--dry-run"]) == errors.USAGE
    assert "lora.target_modules" in capsys.readouterr().err


@pytest.mark.runs
def test_requests_that_leave_no_room_are_the_remedy(
    run_fake: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"Tell me about {' '.join(f'thing{i}' for i in range(9000))} number {k}?" for k in range(2)]
    (tmp_path / "long.txt").write_text("\n".join(rows) + "\n")
    given = ("--set", f"instructions.file={json.dumps(str(tmp_path / 'long.txt'))}", "--set", "items=2")
    code, _ = run_fake("--milestone", "m1", "--override-gate", "tried", *given, "--until", "pairs")
    assert code == errors.QUALITY
    assert "then shorten the requests or raise model.max_seq_length" in capsys.readouterr().err
