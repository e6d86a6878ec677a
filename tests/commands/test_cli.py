"""The command line: what would start, or silently not be done, by mistake is refused with one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.pages import make_run

import runner
from cai import commands, errors
from cai.commands import cli
from cai.errors import CaiError

EXPORT = "--export runs/a --push me/x --dry-run"


@pytest.mark.parametrize(
    "flag", ["resume", "verify", "repair", "fork", "report", "review", "export", "chat", "benchmark"]
)
@pytest.mark.parametrize("value", ["", " "])
def test_an_unset_variable_starts_no_run(flag, value):
    """`--resume "$RUN"` with RUN unset would begin a new, paid run."""
    with pytest.raises(CaiError, match=rf"--{flag}: is empty, it must name something"):
        cli.parse([f"--{flag}", value])


def test_an_override_needs_its_reason():
    with pytest.raises(CaiError, match="--override-gate: is empty"):
        cli.parse(["--override-gate", ""])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--status runs/a --compare runs/a runs/b", "--status and --compare"),
        ("--doctor --export runs/a --to out", "--doctor and --export"),
        ("--status --resume runs/a", "--status and --resume"),
        ("--report runs/a --dry-run", "--report and --dry-run"),
        ("--chat runs/a --resume runs/a", "--chat and --resume"),
        ("--benchmark xstest --resume runs/a --until answers", "--benchmark and --until"),
    ],
)
def test_two_commands_at_once_are_refused(argv, named):
    with pytest.raises(CaiError, match=f"{named}: one at a time"):
        cli.parse(argv.split())


@pytest.mark.parametrize("argv", ["--status", "--benchmark xstest --resume runs/a", "--fork runs/a --dry-run", EXPORT])
def test_what_belongs_together_stays(argv):
    assert len(cli.commands(cli.parse(argv.split()))) == 1


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["a" * 300], "--recipe: .*is longer than any path"),
        (["--resume", "a/" * 3000], "--resume: .*is longer than any path"),
        (["--compare", "runs/a", "runs/\0"], "--compare: .*holds a NUL"),
        (["--export", "runs/a", "--to", "é" * 200], "--to: .*is longer than any path"),
        (["--next-round", "a\0"], "--next-round: .*holds a NUL"),
    ],
)
def test_a_name_that_no_file_can_have_is_a_fault_of_usage(argv, why):
    with pytest.raises(CaiError, match=why) as caught:
        cli.parse(argv)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_run_is_no_command():
    assert cli.commands(cli.parse(["--resume", "runs/a", "--dry-run"])) == []


def test_a_fault_is_told_inert(capsys):
    assert runner.main(["\x1b]52;c;aGk=\x07\u202e.toml"]) == errors.USAGE
    said = capsys.readouterr().err
    assert said.startswith(r"\x1b]52;c;aGk=\x07\u202e.toml: no such recipe file")


def test_a_fault_of_the_program_is_told_as_one(capsys, monkeypatch):
    monkeypatch.setattr(runner, "read_inputs", lambda args: {}["gone"])
    assert runner.main(["cai.toml"]) == errors.BUG
    said = capsys.readouterr().err
    assert "KeyError: 'gone'" in said and said.endswith("the run folder is intact and can be resumed.\n")


def test_a_line_without_a_word_shows_the_two_commands_and_starts_nothing(capsys, monkeypatch, tmp_path):
    """A newcomer's first try; it began M0, which loads a model and, on a GPU, downloads one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "read_inputs", lambda args: pytest.fail("a run was begun"))
    assert runner.main([]) == errors.USAGE
    monkeypatch.setattr(sys, "argv", ["runner.py"])
    assert runner.main() == errors.USAGE
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cai"])
    assert runner.main() == errors.USAGE
    said = capsys.readouterr().out
    for line in ("python runner.py cai.toml --dry-run", "cai cai.toml --milestone m0", "--help"):
        assert line in said
    assert list(tmp_path.iterdir()) == [] and all(len(line) <= 60 for line in said.splitlines())


@pytest.mark.parametrize("command", ["review", "report", "export", "fork", "chat"])
def test_runs_latest_is_named_before_anything_is_done_with_it(command, capsys, tmp_path, monkeypatch):
    """`make review` takes the latest run, which may be another than one thinks; stdout stays the answer's alone."""
    path = make_run(tmp_path / "runs", [], run_id="20261122-180000-m1-abc123")
    (tmp_path / "cai.toml").write_text("[milestones.m0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "silent", SimpleNamespace(command=lambda args: 0))
    monkeypatch.setattr(commands, "MODULES", dict.fromkeys(commands.MODULES, "silent"))
    monkeypatch.setattr(commands, "_fork", lambda args: 0)
    for named in ("latest", "runs/latest", path.name):
        assert runner.main(["cai.toml", f"--{command}", named]) == 0
        out, said = capsys.readouterr()
        known = f"{named}: runs/20261122-180000-m1-abc123 (m1 of 20"
        assert out == "" and (said.startswith(known) if "latest" in named else said == "")


def test_a_python_without_the_requirements_is_told_which_one_has_them():
    """`python runner.py` outside .venv: what a new user types first. -S: without installed packages."""
    command = [sys.executable, "-S", str(Path(cli.__file__).parents[2] / "runner.py"), "--status"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == errors.USAGE
    assert "source .venv/bin/activate" in done.stderr and done.stderr.count("\n") == 1
