"""Printed commands: whole, pasteable from where one stands, each --set once. They are run here as they are printed."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import runner
from cai.recipe import load as recipes
from cai.run import lines
from cai.run.manifest import read_manifest
from cai.terminal import UNSAFE, printable, word

Runner = Callable[..., tuple[int, Path]]
COMMAND = re.compile(r"python runner\.py (.*)")


def pasted(text: str) -> list[list[str]]:
    """The arguments of every command in a text."""
    return [shlex.split(match[1]) for match in COMMAND.finditer(text)]


def test_each_set_stands_once_and_words_are_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert lines.once(["dpo.beta=0.1", "items=5", "dpo.beta=0.3"]) == ["dpo.beta=0.3", "items=5"]
    run = tmp_path / "my runs" / "a"
    run.mkdir(parents=True)
    assert lines.resume(run, ["x='y z'"]).endswith(
        "'my runs/a/recipe.toml' --resume 'my runs/a' --set 'x='\"'\"'y z'\"'\"''"
    )


def test_the_program_is_named_as_it_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {"/usr/bin/cai": "cai", str(tmp_path / "runner.py"): "python runner.py", "": "python runner.py"}
    for called, shown in (cases | {"/opt/cai/runner.py": "python /opt/cai/runner.py"}).items():
        monkeypatch.setattr("sys.argv", [called])
        assert lines.program() == shown


@pytest.mark.runs
def test_the_lines_of_a_refused_resume_work_as_they_are_printed(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ways on of exit 3, and the one that the fork prints; another beta draws nothing anew."""
    _, run = run_fake("--milestone", "m1", "--set", "dpo.max_steps=3", "--set", "evaluation.enabled=false")
    before = (run / "records.jsonl").read_bytes()
    capsys.readouterr()
    argv = ["cai.toml", "--resume", f"runs/{run.name}", "--set", "dpo.beta=0.2", "--set", "dpo.beta=0.3"]
    assert runner.main(argv) == 3
    said = capsys.readouterr().err
    assert str(project) not in said and said.count("dpo.beta=0.3") == 1 and "dpo.beta=0.2" not in said
    on, fork = pasted(said)
    assert runner.main(on) == 0
    capsys.readouterr()
    assert runner.main(fork) == 0
    (go,) = pasted(capsys.readouterr().out)
    assert runner.main(go) == 0
    new = (project / "runs" / "latest").resolve()
    assert new != run and (new / "records.jsonl").read_bytes() == before
    manifest = read_manifest(new / "manifest.json")
    assert manifest["milestone"] == "m1"
    sets = [text.partition("=")[0] for text in manifest["sets"]]
    assert len(sets) == len(set(sets)) and "dpo.beta=0.3" in manifest["sets"]
    found = recipes.read(new / "recipe.resolved.toml").table
    assert (found["dpo"]["beta"], found["dpo"]["max_steps"]) == (0.3, 3)


@pytest.mark.runs
def test_the_data_alone_are_exported_by_the_line_that_is_printed(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fake("--milestone", "m1", "--until", "pairs")
    said = capsys.readouterr().out
    export, _ = pasted(said)
    assert runner.main(export) == 0
    assert (project / "out" / "dataset" / "dataset_info.json").is_file()
    assert (project / "out" / "report.html").is_file() and not (project / "out" / "adapter").exists()


def test_a_stop_by_a_signal_prints_the_line_that_goes_on(
    run_fake: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai.run.stop import StopSwitch

    def turned(switch: StopSwitch) -> bool:
        switch.signal_number = 2
        return True

    monkeypatch.setattr(StopSwitch, "__call__", turned)
    assert run_fake("--milestone", "m0")[0] == 75
    (go,) = pasted(capsys.readouterr().err)
    assert go[1] == "--resume"


@pytest.mark.runs
def test_a_stop_that_was_asked_for_prints_the_line_that_goes_on(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake("--milestone", "m0", "--until", "answers", "--set", "evaluation.enabled=false")
    (go,) = pasted(capsys.readouterr().out)
    assert go == [f"runs/{run.name}/recipe.toml", "--resume", f"runs/{run.name}"]
    assert runner.main(go) == 0
    assert (run / "adapter").is_dir()


NAMES = (b"plain", b"a b", b"it's", b"caf\xc3\xa9", b"new\nline", b"\xff\xfe", b"esc\x1b[2J", b"$x`id`!", b"back\\x",
         b"\xe2\x80\xaergb", b"tab\tx", b"\xc3\xa9a0")  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("name", NAMES)
def test_a_printed_path_can_be_pasted_back_whatever_the_terminal_can_show(
    name: bytes, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `LC_ALL=C`, where a byte beyond ASCII is no letter; a shell gets the very bytes back."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", out)
    text = name.decode(encoding if encoding == "ascii" else "utf-8", "surrogateescape")
    line = printable(lines.command("--export", Path(text) / "run", "--set", f"runs={text}"))
    out.write(line)
    out.flush()
    shown = out.buffer.getvalue().decode(encoding).encode()  # type: ignore[attr-defined]
    assert b"\n" not in shown and not UNSAFE.search(line)
    words = shown.split(b"runner.py ", 1)[1]
    got = subprocess.run([b"bash", b"-c", b"printf '%s\\0' " + words], capture_output=True).stdout.split(b"\0")
    assert got[:-1] == [b"--export", name + b"/run", b"--set", b"runs=" + name]


def test_a_path_that_begins_with_a_dash_is_no_flag() -> None:
    assert lines.command("--report", Path("-r")).endswith("--report ./-r") and word("-r") == "-r"
