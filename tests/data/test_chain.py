"""The chain as data: a stage is one object, and everything that knows of stages reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import read_jsonl

from cai import errors
from cai.commands.verify import verify
from cai.data import chain, rounds, stages
from cai.data.stage import Stage, Unit
from cai.recipe.principle_lists import Principle
from cai.run.context import Context

OFF = {"second_answers", "comparisons", "sft_instructions", "sft_answers"}  # unless the recipe asks for them


def _render(context: Context, item: int, round_: int) -> Unit | None:
    row = context.ok("revisions", item, round_)
    return Unit(item, round_, {"instruction": row["text"]}, row["principle"]) if row else None


FIFTH = Stage(
    "summaries",
    "summaries",
    _render,
    stages.ANSWERS.parse,
    per_round=True,
    needs=lambda round_: (("revisions", round_),),
    keys=("sampling.answers",),
    fields=frozenset({"instruction"}),
    sampling="answers",
)


@pytest.fixture
def fifth_stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "CHAIN", (*chain.CHAIN, FIFTH))
    (project / "prompts" / "summaries.yaml").write_bytes((project / "prompts" / "policy.yaml").read_bytes())


@pytest.mark.runs
def test_a_stage_that_is_added_runs_forks_verifies_and_is_shown(fifth_stage, project, run_fake, capsys):
    code, run = run_fake("--milestone", "m1", "--set", "items=3")
    assert code == errors.DONE
    rows = [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == "summaries"]
    revisions = [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == "revisions"]
    assert len(rows) == len([row for row in revisions if row["status"] == "ok"]) >= 3
    assert all(check.verdict != "FAIL" for check in verify(run))
    assert "summaries, round 1" in (run / "report.md").read_text()
    capsys.readouterr()
    assert run_fake("--status", str(run))[0] == errors.DONE
    assert f"summaries    {len(rows)} accepted" in capsys.readouterr().out
    assert run_fake("--dry-run")[0] == errors.DONE
    assert "--- summaries" in capsys.readouterr().out


@pytest.mark.runs
def test_a_fork_knows_what_an_added_stage_depends_on(fifth_stage, project, run_fake):
    """Its own prompt changed: only its rows are made again. The answers' prompt changed: its rows too."""
    _, run = run_fake("--milestone", "m0")
    path = project / "prompts" / "summaries.yaml"
    path.write_text(path.read_text() + "\n# changed\n")
    code, fork = run_fake("--fork", str(run), "--milestone", "m0")
    kept = {row["stage"] for row in read_jsonl(fork / "records.jsonl")}
    assert code == errors.DONE and kept == set(chain.names()) - {"summaries", "guard", *OFF}
    path = project / "prompts" / "answers.yaml"
    path.write_text(path.read_text() + "\n# changed\n")
    _, fork = run_fake("--fork", str(run), "--milestone", "m0")
    assert {row["stage"] for row in read_jsonl(fork / "records.jsonl")} == {
        "instructions",
        "label_bar",
    }


@pytest.mark.runs
def test_a_row_without_its_input_is_found_also_of_an_added_stage(fifth_stage, run_fake):
    _, run = run_fake("--milestone", "m0")
    lines = (run / "records.jsonl").read_bytes().splitlines(keepends=True)
    (run / "records.jsonl").write_bytes(b"".join(line for line in lines if b'"stage":"revisions"' not in line))
    (run / "records.sum").unlink()
    assert any("summaries" in check.found for check in verify(run) if check.verdict == "FAIL")


def test_what_a_row_depends_on_is_what_its_stage_says():
    before = {"instructions", "answers", "calibration", "relevance"}
    assert chain.upstream("critiques", 0) == before | {"critiques"}
    assert chain.upstream("critiques", 1) == before | {"critiques", "revisions"}
    assert chain.upstream("labels", 0) == before | {"critiques", "revisions", "label_bar", "labels"}
    assert chain.upstream("guard", 0) == set(chain.names())
    assert chain.upstream("no such stage", 0) == frozenset()


def test_rounds_stand_between_what_stands_once():
    order = [(stage.name, round_) for stage, round_ in chain.ordered(2) if stage.name not in OFF]
    assert order == [
        ("instructions", 0),
        ("answers", 0),
        ("calibration", 0),
        ("label_bar", 0),
        ("relevance", 0),
        ("critiques", 0),
        ("revisions", 0),
        ("relevance", 1),
        ("critiques", 1),
        ("revisions", 1),
        ("labels", 0),
    ]
    last = replace(FIFTH, per_round=False)
    assert chain.label(last.name, 0) == "summaries" and chain.label("critiques", 1) == "critiques, round 2"


@pytest.mark.parametrize(
    ("shown", "transcript", "orders"), [(1, "separate", {0}), (1, "joint", {0}), (-1, "separate", {0, 2, 4})]
)
def test_a_critic_that_is_shown_one_example_is_never_shown_only_the_one_that_finds_nothing(shown, transcript, orders):
    few = SimpleNamespace(by_topic=False, rotate=True, critiques=shown, reviews=shown)
    recipe = SimpleNamespace(few_shot=few, critiques=SimpleNamespace(transcript=transcript))
    context: Any = SimpleNamespace(recipe=recipe, prompts={})
    principle = Principle("kind", "Be kind.", "Is it kind?", "Make it kind.")
    seen = {rounds.review_shots(context, "critiques", item, principle, "benign") for item in range(9)}
    assert seen == orders
    assert {rounds.shift_of(recipe, item) for item in range(9)} == {0, 2, 4}, "a request is asked for in another way"
