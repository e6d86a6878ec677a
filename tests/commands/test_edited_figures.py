"""Figures that were edited after a run ended: whoever shows them says so, what decides by them refuses, and no attempt
that leaves them as they are makes them good.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from support import rich_run as rich
from support.runs import FAKE, PAPERS_WAY

import runner
from cai import errors
from cai.report.snapshot import read_story
from cai.run import digests
from cai.run.events import read_events

pytestmark = pytest.mark.runs
SMALL = (*FAKE, *PAPERS_WAY, "--milestone", "m1", "--set", "items=2", "--set", "heldout.items=2")
RUN = "runs/latest"
WORD = "since the run ended"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = rich.project(tmp_path_factory.mktemp("made"))
    assert rich.go(folder, *SMALL)[0] == 0
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "project"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    yield folder


def edit(project: Path, name: str = "eval/measured.json") -> Path:
    path = rich.latest(project) / name
    path.write_bytes(path.read_bytes().replace(b"0.", b"1.", 1))
    return path


@pytest.mark.parametrize("argv", [("--report", RUN), ("--compare", RUN, RUN), ("--runs",), ("--status", RUN)])
def test_who_shows_edited_figures_says_so_in_one_line(
    argv: tuple[str, ...], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "eval/gates.json" if argv[0] == "--status" else "eval/measured.json"
    assert runner.main(["cai.toml", *argv]) == 0
    assert name not in capsys.readouterr().out
    edit(project, name)
    assert runner.main(["cai.toml", *argv]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert len(said) == (2 if argv[0] == "--compare" else 1)
    assert all(WORD in line or "edited since" in line for line in said)
    if argv[0] == "--report":
        for page in ("report.html", "report.md"):
            assert WORD in (rich.latest(project) / page).read_text()


@pytest.mark.parametrize("command", [("--attribute", RUN), ("--inverse", RUN)])
@pytest.mark.parametrize("name", ["eval/measured.json", "dataset/pairs/train.jsonl"])
def test_an_attempt_that_leaves_an_edit_does_not_make_it_good(
    command: tuple[str, ...], name: str, project: Path
) -> None:
    path = edit(project, name) if name.endswith("json") else rich.latest(project) / name
    if not name.endswith(".json"):
        path.write_bytes(path.read_bytes().replace(b"a", b"e", 1))
    before = path.read_bytes()
    assert rich.go(project, *SMALL, *command)[0] == 0 and path.read_bytes() == before
    for argv in (("--verify", RUN), ("--export", RUN, "--to", "out")):
        code, said = rich.go(project, *argv)
        assert code == errors.CORRUPT and name in said
    assert rich.go(project, *SMALL, "--resume", RUN)[0] == 0, "a resume writes it again"
    assert path.read_bytes() != before
    assert rich.go(project, "--verify", RUN)[0] == 0


def test_marks_of_a_second_person_after_an_attempt_are_no_edit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--review writes dataset/reviewed.jsonl beside the attempts; the one that came between noted its first form."""
    for rater, mark in (("ann", "1\n"), ("ben", "2\nbad\n")):
        monkeypatch.setattr("sys.stdin", io.StringIO(mark * 20))
        assert rich.go(project, "--review", RUN, "--terminal", "--rater", rater)[0] == 0
        before = (rich.latest(project) / "dataset" / "reviewed.jsonl").read_bytes()
        assert rich.go(project, *SMALL, "--attribute", RUN)[0] == 0 if rater == "ann" else before == b""
    assert rich.go(project, "--verify", RUN)[0] == 0
    assert WORD not in rich.go(project, "--report", RUN)[1]
    assert rich.go(project, "--export", RUN, "--to", "out")[0] == 0


@pytest.mark.parametrize("command", [("--next-round", RUN), ("--benchmark", "xstest", "--resume", RUN)])
def test_what_decides_by_edited_figures_refuses_before_anything_is_made(
    command: tuple[str, ...], project: Path
) -> None:
    edit(project)
    events = (rich.latest(project) / "events.jsonl").read_bytes()
    code, said = rich.go(project, *SMALL, "--set", "benchmarks.xstest=xs.csv", *command)
    assert code == errors.CORRUPT and "eval/measured.json" in said and "--resume" in said
    assert (rich.latest(project) / "events.jsonl").read_bytes() == events


def test_while_a_run_goes_on_nothing_is_called_edited(project: Path) -> None:
    run = rich.latest(project)
    edit(project)
    events = read_events(run / "events.jsonl")
    assert list(digests.edited(run, events)) == ["eval/measured.json"]
    going = [*events, {"attempt": 2, "kind": "attempt", "s": 0.0}]
    assert not digests.edited(run, going)


@pytest.mark.parametrize(
    "odd", [{"value": "x"}, {"low": [1]}, {"value": True, "n": "3"}, {"facts": []}, {"unscored": None}, {"judge": 3}]
)
def test_a_figure_that_is_none_is_left_out_and_told(
    odd: dict[str, object], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    path = rich.latest(project) / "eval" / "measured.json"
    content = orjson.loads(path.read_bytes())
    content["figures"]["preference.p1"] |= odd
    path.write_bytes(orjson.dumps(content))
    read = read_story(rich.latest(project))
    assert "preference.p1" not in read.figures and "preference.p1.train" in read.figures
    assert any("eval/measured.json: 1 of" in gap for gap in read.gaps)
    for argv in (("--report", RUN), ("--compare", RUN, RUN), ("--review", RUN, "--terminal", "--rater", "a")):
        code, said = rich.go(project, *argv)
        assert code == 0 and "Traceback" not in said
