"""What a fork took over is not counted again: in its estimate, on the dry run, and in the time that is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from support.pages import make_run, recipe
from support.runs import PAPERS_WAY, read_jsonl

from cai.commands.fork import ForkPlan, Rate, standing
from cai.data import chain
from cai.recipe.settings import DpoSection
from cai.run import budget
from cai.run.folder import Run
from cai.run.progress import Progress
from cai.run.rates import Range, from_events
from cai.run.standing import Standing, of_run

Runner = Callable[..., tuple[int, Path]]


def estimate(chosen, root: Path, stands: Standing | None = None):
    return budget.estimate(chosen, "embedded", root, chain.limit_tokens(chosen), 0, stands)


def test_a_fork_that_keeps_all_text_draws_nothing_and_trains_all_the_same(tmp_path: Path) -> None:
    make_run(tmp_path)  # 3 + 1 items
    chosen = recipe(items=3, dpo=DpoSection(max_steps=20))
    slots, whole = budget.slot_count(chosen), estimate(chosen, tmp_path)
    fork = estimate(chosen, tmp_path, Standing(1.0, slots))
    assert fork.generation == Range(0.0, 0.0) and fork.tokens == Range(0.0, 0.0)
    assert fork.training == whole.training and fork.rest == whole.rest
    half = estimate(chosen, tmp_path, Standing(0.5, slots))
    assert half.generation == Range(whole.generation.low / 2, whole.generation.high / 2)


def test_more_items_than_the_source_had_are_drawn_and_the_table_counts_alike(tmp_path: Path) -> None:
    assert (
        Standing(1.0, 10).left(20) == 0.5 and Standing(1.0, 10).left(5) == 0.0 and Standing(0.25, 10).left(10) == 0.75
    )
    fork = estimate(recipe(), tmp_path, Standing(1.0, budget.slot_count(recipe())))  # no run is there: from the table
    assert fork.generation == Range(0.0, 0.0) and fork.training is not None


def test_scores_of_the_base_that_stand_are_no_part_of_the_rest() -> None:
    events = [
        {"kind": "attempt", "attempt": 1, "s": 0.0},
        {"kind": "stage", "attempt": 1, "s": 10.0, "stage": "answers", "seconds": 10.0, "tokens": 100},
        {"kind": "stage", "attempt": 1, "s": 40.0, "stage": "evaluate critiques.csi", "seconds": 20.0},
        {"kind": "stage", "attempt": 1, "s": 50.0, "stage": "critic's exam: critiques", "seconds": 10.0},
        {"kind": "stage", "attempt": 1, "s": 60.0, "stage": "evaluate preference.pairs", "seconds": 20.0},
    ]
    speed = from_events("x", {"stages": {"answers": {}}, "items": 4, "backend": "fake"}, events)
    assert speed is not None and speed.base_seconds == 30.0 and speed.rest_seconds == 50.0
    whole = Range(50.0, 100.0)
    assert Standing(1.0, 4, scored=True).rest(whole, speed, 4) == Range(20.0, 40.0)
    assert Standing(1.0, 4, scored=False).rest(whole, speed, 4) == whole
    assert Standing(1.0, 4, scored=True).rest(whole, speed, 8) == whole, "of other texts"
    assert Standing(1.0, 4, scored=True).rest(whole, None, 4) == whole
    assert Standing(1.0, 4, scored=True).rest(whole, replace(speed, seconds=0.0), 4) == whole


def test_the_share_is_of_the_time_that_the_source_took(tmp_path: Path) -> None:
    def rows(stage: str, count: int, tokens: int) -> list:
        return [{"stage": stage, "item": i, "round": 0, "tokens": tokens, "status": "ok"} for i in range(count)]

    facts = {"items": 4, "heldout_items": 1, "identity": {"rounds": "1"}}
    with Run.create(tmp_path, "20261122-200000-m1-abc123", {}, facts) as run:
        source = run.path
    rates = {"answers": Rate(0.01, 0.0), "critiques": Rate(0.03, 0.0), "probes": Rate(1.0, 0.0)}
    again = [*rows("critiques", 4, 100), *rows("probes", 6, 50)]  # probes are the tuned model's own: no drawing
    plan = ForkPlan(source, rows("answers", 4, 100), again, {}, rates)
    assert standing(plan) == Standing(0.25, 0), "no chain is whole, so no slot is"
    (source / "dataset" / "pairs").mkdir(parents=True)
    assert standing(plan) == Standing(0.25, 5)
    assert standing(replace(plan, rates={})).share == 0.5, "by tokens where no rate is known"
    assert standing(replace(plan, kept=[], rates={})).share == 0.0


def test_a_run_that_is_no_fork_or_was_forked_before_says_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    assert of_run(path) is None
    with Run.open(path) as run:
        run.event("forked", source="x", kept=12)
        assert of_run(path) is None
        run.event("forked", source="x", kept=12, share=1.0, slots=4, scored=True)
        assert of_run(path) == Standing(1.0, 4, True)
        progress = Progress(run, 0.0)
        context = SimpleNamespace(run=run, recipe=recipe(), progress=progress, stopped=lambda: False)
        told = SimpleNamespace(recipe=recipe(), backend="embedded", limit_tokens=1000, once_tokens=0)
        found = budget.announce(context, told)
        assert found.generation == Range(0.0, 0.0) and progress.expected == found.seconds
        assert len(run.events("estimate")) == 1, "said once, in the first attempt that works"
        budget.announce(context, told)
        assert len(run.events("estimate")) == 1


@pytest.mark.runs
def test_dry_runs_of_a_fork_say_what_is_left(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--milestone", "m1", "--set", "items=2", "--set", "dpo.max_steps=2", "--set", "evaluation.critic_items=0")
    _, first = run_fake(*few, *PAPERS_WAY)
    capsys.readouterr()
    assert run_fake("--fork", str(first), "--set", "dpo.beta=0.3", "--dry-run", fake=())[0] == 0
    assert "all of it: " in (shown := capsys.readouterr().out) and "of them the tuned model's own" in shown
    assert run_fake("--fork", str(first), "--set", "dpo.beta=0.3", fake=())[0] == 0
    capsys.readouterr()
    assert run_fake("--resume", "runs/latest", "--dry-run", fake=())[0] == 0
    shown = capsys.readouterr().out
    assert re.search(r"estimate +0 to 0 generated tokens", shown) and "without the 100% of the drawing" in shown
    code, run = run_fake("--resume", "runs/latest", fake=())
    assert code == 0 and run != first
    events = read_jsonl(run / "events.jsonl")
    forked = next(event for event in events if event["kind"] == "forked")
    assert (forked["share"], forked["slots"], forked["scored"]) == (1.0, 2, True)
    assert [event["attempt"] for event in events if event["kind"] == "estimate"] == [2]
    assert orjson.loads((run / "status.json").read_bytes())["step"] > 5
