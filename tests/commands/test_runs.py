"""--runs: every run is a row with what differs from the recipe; the page beside them links the reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import runner
from cai.commands import runs
from cai.recipe import load as recipes

Runner = Callable[..., tuple[int, Path]]


@pytest.fixture
def three(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> list[Path]:
    """An m0, a fork of it with another beta that was not begun, and an m1 that was stopped after its pairs."""
    _, first = run_fake("--milestone", "m0")
    assert runner.main(["cai.toml", "--fork", "runs/latest", "--set", "dpo.beta=0.3"]) == 0
    second = (first.parent / "latest").resolve()
    _, third = run_fake("--milestone", "m1", "--until", "pairs")
    capsys.readouterr()
    return [first, second, third]


@pytest.mark.runs
def test_the_table_says_of_each_run_what_it_is_and_what_differs(
    three: list[Path], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["cai.toml", "--runs"]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in said if line[:2] == "20"}
    assert list(rows) == sorted((path.name for path in three), reverse=True)
    assert "forked, not begun" in rows[three[1].name] and "stopped as asked" in rows[three[2].name]
    assert rows[three[2].name].split()[1] == "*"  # runs/latest
    assert rows[three[0].name].split()[1:4] == ["m0", "fake", "1"] and "PASS" in rows[three[0].name]
    told = said[said.index(rows[three[1].name]) + 1]
    assert told.startswith("  differs: ") and "dpo.beta=0.3" in told
    page = (project / "runs" / "index.html").read_text()
    assert f'href="{three[0].name}/report.html"' in page and f'href="{three[1].name}/' not in page
    assert "<script" not in page and "http" not in page


@pytest.mark.runs
def test_a_damaged_run_is_a_row_and_stops_nothing(three: list[Path], project: Path) -> None:
    (three[0] / "manifest.json").write_bytes(b"{")
    (three[2] / "eval").mkdir(exist_ok=True)
    (three[2] / "eval" / "measured.json").write_bytes(b"[1]")
    found = runs.listed(project / "runs", recipes.read(project / "cai.toml"))
    assert [line.run for line in found] == sorted((path.name for path in three), reverse=True)
    assert found[-1].cells[-1] == "manifest.json cannot be read"


@pytest.mark.runs
def test_another_text_of_the_constitution_differs(three: list[Path], project: Path) -> None:
    with (project / "constitution.yaml").open("a") as file:
        file.write("\n# another\n")
    found = runs.listed(project / "runs", recipes.read(project / "cai.toml"))
    assert all("constitution.yaml (another text)" in line.differs for line in found)


@pytest.mark.runs
def test_a_narrow_terminal_gets_a_block_a_run(three: list[Path], project: Path) -> None:
    found = runs.listed(project / "runs", recipes.read(project / "cai.toml"))
    assert len(runs.table(found, 200)) < len(runs.table(found, 60))
    assert [line for line in runs.table(found, 60) if line[:2] == "20"] == [
        f"{entry.run}{' (latest)' if entry.latest else ''}" for entry in found
    ]


def test_no_run_yet_is_said(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project)
    assert runner.main(["cai.toml", "--runs"]) == 0
    assert "no run yet" in capsys.readouterr().out and not (project / "runs").exists()


def test_what_tells_two_runs_apart_is_named_before_what_they_share(run_fake, project):
    for beta in ("0.1", "0.3"):
        assert (
            run_fake("--milestone", "m0", "--until", "answers", "--set", "seed=5", "--set", f"dpo.beta={beta}")[0] == 0
        )
    newest, first = runs.listed(project / "runs", recipes.read(project / "cai.toml"))
    assert newest.differs[0] == "dpo.beta=0.3" and set(newest.differs[1:]) == set(first.differs) > {"seed=5"}
