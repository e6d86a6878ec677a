"""A damaged run beside the one that is asked for holds nothing up, and what is damaged is not exported."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
