"""A damaged run beside the one that is asked for holds nothing up, and what is damaged is not exported."""

from __future__ import annotations

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
