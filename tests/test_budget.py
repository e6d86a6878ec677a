"""The budget: ranges from measured rates, refusal of what cannot fit, a resumable stop at a limit over all attempts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from view_support import make_run, recipe

from cai.budget import Budget, check_fits, estimate, training_pairs_seen, usd_per_pair
from cai.console import StopSwitch
from cai.errors import CaiError, Stopped
from cai.progress import Progress
from cai.rates import EMBEDDED, H200, Range
from cai.run import Run
from cai.settings import BudgetSection, DpoSection

ID = "20261122-200000-m1-abc123"


def priced(**budget):
    return recipe(budget=BudgetSection(usd_per_hour=3600.0, **budget))  # a dollar a second


@pytest.fixture
def run(tmp_path):
    with Run.create(tmp_path, ID, {}, {"milestone": "m1"}, usd_per_hour=3600.0) as run:
        yield run


def context_of(run, chosen):
    switch = StopSwitch()
    progress = Progress(run, 1.0)
    return SimpleNamespace(run=run, recipe=chosen, stopped=switch, check_stop=switch.check, progress=progress)


def test_table_scales_with_the_batch_that_the_items_fill():
    assert EMBEDDED.at(1) == 11.0
    assert EMBEDDED.at(10) == 26.0
    assert H200.at(100) == 200.0
    assert H200.gain(1, 100) == 200.0 / 24.0
    assert H200.gain(100, 1) == 1.0


def test_estimate_from_a_run_is_a_range_around_linear_scaling(tmp_path):
    make_run(tmp_path)  # 3 + 1 items: 40 s of stages, 30 s of training in 10 steps
    found = estimate(recipe(items=6, dpo=DpoSection(max_steps=20)), "embedded", tmp_path)
    assert found.training == Range(60.0 * 0.7, 60.0 * 1.5)
    assert found.generation.high == pytest.approx(40.0 * 7 / 4 * 1.5 * 1.5)  # 2 of the 3 rounds were seen in the events
    assert found.generation.low < found.generation.high
    assert found.usd is None
    assert found.missing == []


def test_estimate_without_a_rate_says_so():
    from pathlib import Path

    found = estimate(recipe(), "fake", Path("no-such-folder"))
    assert found.seconds is None
    assert "no estimate" in found.line
    cuda = estimate(recipe(), "cuda", Path("no-such-folder"))
    assert cuda.missing == ["loading and evaluation"]
    assert "H200" in cuda.line


def test_pairs_seen_by_steps_and_by_epochs():
    assert training_pairs_seen(recipe(dpo=DpoSection(max_steps=10, gradient_accumulation=4))) == 40
    assert training_pairs_seen(recipe(items=100, dpo=DpoSection(epochs=3.0, gradient_accumulation=8))) == 38 * 8


def test_what_cannot_fit_is_refused_and_a_flag_overrides(run):
    chosen = recipe(items=5000, budget=BudgetSection(usd_per_hour=1.74, max_usd=0.01))
    inputs = SimpleNamespace(recipe=chosen, backend="cuda")
    with pytest.raises(CaiError, match=r"budget\.max_usd = 0\.01: at least .* --over-budget"):
        check_fits(context_of(run, chosen), inputs)
    assert check_fits(context_of(run, chosen), inputs, over_budget=True).usd.low > 0.01


def test_the_limit_stops_with_the_line_that_goes_on(run, monkeypatch):
    chosen = priced(max_usd=5.0)
    context = context_of(run, chosen)
    check_fits(context, SimpleNamespace(recipe=chosen, backend="fake"))
    assert not context.stopped()
    context.check_stop("in answers")
    spent = {"attempts": 2, "seconds": 6.0, "usd": 6.0}
    monkeypatch.setattr(run, "spent", lambda: spent)
    assert context.stopped()
    wanted = r"used up in answers: 6\.0 s, \$6\.00 over 2 attempt.*--resume .* --set budget\.max_usd=10"
    with pytest.raises(Stopped, match=wanted) as stop:
        context.check_stop("in answers")
    assert stop.value.code == 75


def test_hours_count_over_attempts(tmp_path):
    path = make_run(tmp_path)
    with Run.open(path, usd_per_hour=1.0) as run:
        spent = run.spent()
        assert spent["attempts"] == 2
        budget = Budget(BudgetSection(max_hours=spent["seconds"] / 3600 / 2 + 1e-9), run)
        assert budget.over()


def test_hooks_run_once_before_the_stop(run, monkeypatch):
    budget = Budget(BudgetSection(max_usd=0.001), run)
    monkeypatch.setattr(run, "spent", lambda: {"attempts": 1, "seconds": 1.0, "usd": 1.0})
    seen = []
    budget.before.append(lambda: seen.append(1))
    for _ in range(2):
        with pytest.raises(Stopped):
            budget.check()
    assert seen == [1]


def test_without_a_limit_nothing_is_stopped(run):
    context = context_of(run, recipe())
    check_fits(context, SimpleNamespace(recipe=recipe(), backend="fake"))
    assert not context.stopped()


def test_the_limit_is_said_once_and_leaves_a_report(run, monkeypatch, capsys):
    chosen = priced(max_hours=0.001)
    context = context_of(run, chosen)
    check_fits(context, SimpleNamespace(recipe=chosen, backend="fake"))
    monkeypatch.setattr(run, "spent", lambda: {"attempts": 1, "seconds": 9.0, "usd": 9.0})
    assert context.stopped()
    assert context.stopped()
    assert capsys.readouterr().err.count("the budget is used up") == 1
    with pytest.raises(Stopped):
        context.check_stop("in answers")
    assert run.report_md.is_file()


def test_dollars_a_pair():
    assert usd_per_pair({"usd": 1.0}, 10) == 0.1
    assert usd_per_pair({"usd": 1.0}, 0) is None
    assert usd_per_pair({"usd": 0.0}, 3) is None
