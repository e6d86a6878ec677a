"""A damaged run beside the one that is asked for holds nothing up, and what is damaged is not exported."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.runs import FAKE

import runner
from cai import errors
from cai.commands.experiments.whole_runs import manifests
from cai.training.checkpoints import sums_of

Runner = Callable[..., tuple[int, Path]]
pytestmark = pytest.mark.runs
PIPES = ("manifest.json", "events.jsonl", "recipe.resolved.toml", "eval/gates.json", "eval/measured.json")


@contextmanager
def never_waiting() -> Iterator[None]:
    """A read that waits for a pipe's writer ends in the default of SIGALRM's handler: an error."""

    def late(*_: object) -> None:
        raise AssertionError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def piped(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_another_run_is_waited_for_by_nobody(
    name: str, run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake("--milestone", "m0")
    piped(run / name)
    capsys.readouterr()
    with never_waiting():
        assert runner.main(["cai.toml", "--runs"]) == 0
        assert "a pipe" in (said := capsys.readouterr().out) or "cannot be read" in said
        assert runner.main(["cai.toml", *FAKE, "--milestone", "m1", "--override-gate", "tried", "--dry-run"]) == 0
        assert runner.main(["cai.toml", *FAKE, "--milestone", "m1", "--dry-run"]) in (0, errors.GATE)
        assert not list(manifests(run.parent))


@pytest.mark.parametrize("name", ["eval/measured.json", "eval/gates.json", "report.html", "recipe.resolved.toml"])
def test_a_figure_that_was_changed_is_not_exported(
    name: str, run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake("--milestone", "m0")
    data = (run / name).read_bytes()
    (run / name).write_bytes(data.replace(b"0", b"9", 1))
    capsys.readouterr()
    argv = [str(run / "recipe.toml"), "--export", str(run), "--to", str(project / "out")]
    assert runner.main(argv) == errors.CORRUPT
    assert name in capsys.readouterr().err and not (project / "out").exists()
    (run / name).write_bytes(data)
    assert runner.main(argv) == 0


@pytest.mark.parametrize(
    ("name", "edit", "argv"),
    [
        ("train/result.json", lambda of: of["log"].__setitem__(0, 3), ("--report", "runs/latest")),
        ("eval/guard.json", lambda of: of["figures"]["guard.dropped"]["facts"].clear(), ("--report", "runs/latest")),
        ("records.jsonl", lambda of: of.pop("text"), ("--attribute", "runs/latest")),
        ("events.jsonl", lambda of: of.update(seconds="x", usd_per_hour="y"), ("--fork", "runs/latest", "--dry-run")),
    ],
)
def test_values_of_another_kind_in_an_edited_run_are_its_damage_and_no_bug(
    name: str, edit: Callable[[Any], object], argv: tuple[str, ...], run_fake: Runner,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line with the run, the file and the way on; no reader can foresee every value."""
    keys = ("items=2", "heldout.items=2", "guard.enabled=true", 'guard.model="stand-in"', "pairs.label=always")
    _, run = run_fake("--milestone", "m1", *(part for key in keys for part in ("--set", key)))
    path = run / name
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.suffix == ".jsonl" else []
    content = rows[-1 if name == "records.jsonl" else 0] if rows else orjson.loads(path.read_bytes())
    edit(content)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows) or orjson.dumps(content))
    path.with_suffix(".sum").unlink(missing_ok=path.suffix != ".jsonl")
    capsys.readouterr()
    code = runner.main(["cai.toml", *FAKE, "--milestone", "m1", *argv])
    said = capsys.readouterr().err
    assert "Traceback" not in said and code in (0, errors.CORRUPT)
    assert code == 0 or (path.name in said and run.name in said)


def test_a_failure_on_a_sound_run_is_a_bug(run_fake: Runner, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run_fake("--milestone", "m0")

    def broken(*_: object) -> None:
        raise TypeError("a fault of ours")

    monkeypatch.setattr("cai.commands.report.write_pages", broken)
    assert runner.main(["cai.toml", "--report", "runs/latest"]) == errors.BUG
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("--chat", "runs/latest"), ("--export", "runs/latest", "--to", "out")])
@pytest.mark.parametrize("sums", ["of the trained one", "taken out"])
def test_another_adapter_than_the_trained_one_answers_nobody(
    argv: tuple[str, ...], sums: str, run_fake: Runner, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nor where the file that says which it was is edited beside it."""
    _, run = run_fake("--milestone", "m0")
    weights, result = run / "adapter" / "adapter_model.safetensors", run / "train" / "result.json"
    held = sums_of(run / "adapter") if sums == "of the trained one" else {}
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    result.write_bytes(orjson.dumps(orjson.loads(result.read_bytes()) | {"files": held}))
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n"))
    assert runner.main([str(run / "recipe.toml"), *argv]) == errors.CORRUPT
    said = capsys.readouterr()
    assert "[tuned]" not in said.out and "that was trained" in said.err and "esume the run" in said.err


def test_against_latest_is_the_run_that_was_meant_and_nothing_is_made_for_one_that_cannot_be_read(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is made for the comparison becomes runs/latest itself."""
    keys = ("--milestone", "m1", "--set", "items=2", "--set", "heldout.items=2", "--set", "pairs.label=always")
    _, other = run_fake(*keys, "--set", "instructions.pool=benign")
    path = other / "manifest.json"
    content = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps(content | {"schema": 99}))
    capsys.readouterr()
    code, _ = run_fake(*keys, "--against", "runs/latest")
    assert code == errors.USAGE and "newer" in capsys.readouterr().err
    assert [found for found in (project / "runs").glob("2*") if found.is_dir()] == [other]
    path.write_bytes(orjson.dumps(content))
    code, _ = run_fake(*keys, "--set", "dpo.beta=0.3", "--against", "runs/latest")
    assert "is the run itself" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("--attribute", "runs/latest"), ("--export", "runs/latest", "--to", "out"),
                                  ("--review", "runs/latest", "--terminal")])  # fmt: skip
def test_records_that_are_gone_are_told_as_such(argv: tuple[str, ...], run_fake: Runner, capsys: Any) -> None:
    _, run = run_fake("--milestone", "m0")
    (run / "records.jsonl").unlink()
    capsys.readouterr()
    assert runner.main([str(run / "recipe.toml"), *argv]) == errors.CORRUPT
    assert "records.jsonl: missing" in capsys.readouterr().err
