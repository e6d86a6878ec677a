"""What a fork says that it will take, where the run that it forks is itself a fork and drew nothing."""

from __future__ import annotations

from pathlib import Path

import orjson

from cai.commands.experiments.cost import cost_lines
from cai.commands.fork import ForkPlan, _rates, describe
from cai.recipe.load import Recipe
from cai.run.events import lineage
from cai.terminal import duration


def run_with(root: Path, name: str, *events: dict) -> Path:
    (root / name).mkdir()
    rows = [{"attempt": 1, "s": 0.0, **event} for event in events]
    (root / name / "events.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return root / name


def stage(name: str, seconds: float, tokens: int, items: int = 10) -> dict:
    return {"kind": "stage", "stage": name, "seconds": seconds, "tokens": tokens, "items": items}


def family(root: Path) -> Path:
    """The first run drew everything; its fork drew critiques more slowly; the fork of that only trained."""
    judged = stage("evaluate preference.p3", 40.0, 0)
    run_with(root, "one", stage("answers", 10.0, 1000), stage("critiques", 5.0, 100), stage("labels", 20.0, 0), judged)
    run_with(root, "two", {"kind": "forked", "source": "one"}, stage("critiques", 50.0, 100))
    return run_with(root, "three", {"kind": "forked", "source": "two"})


def test_rates_are_those_of_the_run_that_made_the_rows(tmp_path):
    three = family(tmp_path)
    assert [run.name for run in lineage(three)] == ["three", "two", "one"]
    rates = _rates(three)
    assert rates["answers"].seconds(3, 500) == 5.0
    assert rates["critiques"].seconds(3, 10) == 5.0  # two's own, not one's
    assert rates["labels"].seconds(3, 0) == 6.0  # a stage that only scores: by the row


def test_the_lines_of_a_fork_of_a_fork_are_not_nought_and_what_is_unknown_is_said(tmp_path):
    rows = [{"stage": name, "item": 0, "round": 0, "tokens": 100} for name in ("answers", "critiques")]
    told = "\n".join(describe(ForkPlan(family(tmp_path), [], rows, {}, _rates(tmp_path / "three"), {})))
    assert "answers: 1 again, about 100 tokens, 1 s" in told
    assert "critiques: 1 again, about 100 tokens, 50 s" in told and "together about 51 s" in told
    told = "\n".join(describe(ForkPlan(tmp_path / "three", [], rows, {}, {}, {})))
    assert "its time was not measured" in told and "together at least 0 s" in told


def test_what_an_experiment_takes_is_told_on_a_fork_too(tmp_path):
    (line,) = [
        line for line in cost_lines(Recipe(), family(tmp_path), prompts=2, arms=3, judgements=5) if "time" in line
    ]
    seconds = 2 * 3 * Recipe().evaluation.fresh_max_new_tokens * 0.01 + 2 * 5 * 4.0
    assert line == f"time: at most {duration(seconds)}, at the rates of three and of what it was forked from"


def test_a_source_that_is_gone_or_a_circle_ends_the_line(tmp_path):
    lost = run_with(tmp_path, "lost", {"kind": "forked", "source": "gone"})
    assert list(lineage(lost)) == [lost]
    odd = run_with(tmp_path, "odd", {"kind": "forked", "source": "../../etc"})
    assert list(lineage(odd)) == [odd]
    run_with(tmp_path, "a", {"kind": "forked", "source": "b"})
    run_with(tmp_path, "b", {"kind": "forked", "source": "a"})
    assert [run.name for run in lineage(tmp_path / "a")] == ["a", "b"]
