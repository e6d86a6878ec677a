"""The budget: ranges from measured rates, refusal of what cannot fit, a resumable stop at a limit over all attempts."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.pages import make_run, recipe

from cai.commands.status import screen
from cai.data import chain
from cai.errors import Stopped
from cai.recipe.settings import BudgetSection, DpoSection, PairsSection, PrinciplesSection
from cai.run import budget
from cai.run.budget import Budget, announce, enforced, slot_count, training_pairs_seen
from cai.run.events import read_events
from cai.run.folder import Run
from cai.run.progress import Progress
from cai.run.rates import ALONE, EMBEDDED, H200, Range, scored_seconds
from cai.run.stop import StopSwitch
from cai.run.words import in_words

ID = "20261122-200000-m1-abc123"


def estimate(recipe, backend, root):
    return budget.estimate(recipe, backend, root, chain.limit_tokens(recipe))


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


def test_a_fork_tells_no_rate(tmp_path):
    path = make_run(tmp_path)
    with Run.open(path) as run:
        run.event("forked", source="x", kept=12)
    assert estimate(recipe(), "fake", tmp_path).seconds is None
    assert "table" in estimate(recipe(), "embedded", tmp_path).source


def test_estimate_without_a_rate_says_so():
    found = estimate(recipe(), "fake", Path("no-such-folder"))
    assert found.seconds is None
    assert "no estimate" in found.line
    cuda = estimate(recipe(), "cuda", Path("no-such-folder"))
    assert cuda.missing == ["loading and evaluation"]
    assert "H200" in cuda.line


def test_what_is_read_by_likelihood_is_in_the_table_s_estimate_where_it_is_asked_for():
    """Relevance and labels took longer than drawing in an M3 at the 32B's shapes, and the estimate had neither."""
    plain = recipe(items=100, rounds=2)
    table = lambda **parts: estimate(plain.model_copy(update=parts), "cuda", Path("no-such-folder")).generation  # noqa: E731
    relevant = PrinciplesSection(choice="relevant")
    judged = plain.pairs.model_copy(update={"label": "judge"})
    slots, without = slot_count(plain), table()
    answers = table(principles=relevant)
    assert answers.low - without.low == pytest.approx(slots * 2 * H200.answer_scored) and H200.answer_scored > 0
    assert answers.high - without.high == pytest.approx(1.5 * (answers.low - without.low))
    both = table(principles=relevant, pairs=judged)
    assert both.low - answers.low == pytest.approx(slots * 2 * H200.compared) and H200.compared > 0


SCORED = {  # [pairs] -> how many answers of a slot are scored, and how often two of its texts are compared
    'label="always"': (2, 0),
    'label="judge" false_labels=0.1': (2, 3),
    'kind="sampled"': (1, 2),
    'kind="sampled" label="judge" false_labels=0.1': (1, 3),
    'kind="both" label="judge"': (2, 4),
    'label="judge" false_labels=0.1 by="answer"': (2, 3 * ALONE),
    'label="judge" by="answer"': (2, 3 * ALONE),
    'kind="sampled" by="answer"': (1, 3 * ALONE),
    'file="pairs.jsonl" label="judge"': (0, 0),
}


@pytest.mark.parametrize("keys", SCORED)
def test_only_stages_that_run_are_in_the_estimate(keys: str) -> None:
    section = tomllib.loads("\n".join(keys.split()))
    chosen = recipe(pairs=PairsSection(**section), principles=PrinciplesSection(choice="relevant"), rounds=2)
    found = scored_seconds(chosen, H200)
    compared = found.get("labels", 0.0) + found.get("comparisons", 0.0)
    wanted = SCORED[keys]
    assert (found.get("relevance", 0.0), compared) == pytest.approx(
        (wanted[0] * H200.answer_scored, wanted[1] * H200.compared)
    )
    run = {stage.name for stage, _ in chain.ordered(2, chosen)} if not chosen.pairs.file else set()
    assert set(found) == run & {"relevance", "labels", "comparisons"}
    assert not scored_seconds(chosen.model_copy(update={"principles": PrinciplesSection()}), H200).get("relevance")


def test_pairs_seen_by_steps_and_by_epochs():
    assert training_pairs_seen(recipe(dpo=DpoSection(max_steps=10, gradient_accumulation=4))) == 40
    assert training_pairs_seen(recipe(items=100, dpo=DpoSection(epochs=3.0, gradient_accumulation=8))) == 38 * 8


@pytest.mark.runs
def test_what_cannot_fit_is_refused_before_there_is_a_run_and_a_flag_overrides(project, run_fake, monkeypatch, capsys):
    """The rate of M0 says what M2 takes at least; the refused milestone leaves no folder behind."""
    monkeypatch.setattr("cai.run.budget.LOW", 100.0)  # the fake model's milliseconds as a real model's minutes
    assert run_fake("--milestone", "m0")[0] == 0
    limit = ("--milestone", "m2", "--set", "items=20", "--set", "heldout.items=2", "--set", "budget.max_usd=0.0001")
    assert run_fake(*limit)[0] == 2
    assert re.search(
        r"m2 does not fit: budget\.max_usd = 0\.0001: at least \$.* are needed \(rates: run .*-m0-",
        capsys.readouterr().err,
    )
    assert len(list((project / "runs").glob("2*"))) == 1
    code, path = run_fake(*limit, "--over-budget", "--set", "budget.max_usd=1000")
    assert (code, len(list((project / "runs").glob("2*")))) == (0, 2)
    assert next(e for e in read_events(path / "events.jsonl") if e["kind"] == "estimate")["source"].startswith("run ")


def test_the_limit_stops_with_the_line_that_goes_on(run, monkeypatch):
    chosen = priced(max_usd=5.0)
    context = context_of(run, chosen)
    announce(context, SimpleNamespace(recipe=chosen, backend="fake", limit_tokens=1000, once_tokens=0))
    assert not context.stopped()
    context.check_stop("in answers")
    spent = {"attempts": 2, "seconds": 6.0, "usd": 6.0}
    monkeypatch.setattr(run, "spent", lambda: spent)
    assert context.stopped()
    wanted = r"used up in answers: 6\.0 s, \$6\.00 over 2 attempt.*--resume .* --set budget\.max_usd=12"
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


def test_without_a_limit_nothing_is_stopped(run):
    context = context_of(run, recipe())
    announce(context, SimpleNamespace(recipe=recipe(), backend="fake", limit_tokens=1000, once_tokens=0))
    assert not context.stopped()


def test_the_limit_is_said_once(run, monkeypatch, capsys):
    chosen = priced(max_hours=0.001)
    context = context_of(run, chosen)
    announce(context, SimpleNamespace(recipe=chosen, backend="fake", limit_tokens=1000, once_tokens=0))
    monkeypatch.setattr(run, "spent", lambda: {"attempts": 1, "seconds": 9.0, "usd": 9.0})
    assert context.stopped()
    assert context.stopped()
    said = capsys.readouterr().err
    assert said.count("the budget is used up") == 1
    assert "--set budget.max_hours=0.005" in said  # twice what was spent, not twice the limit: that is spent already


SAID = {"revisions": ("revisions", 0, True)}  # a stage's round in words; the others by their name alone
SPENT = {  # phase -> what a run has done when its money is gone
    "instructions": lambda run: len(run.events("model_loaded")) > 0,
    "revisions": lambda run: rows(run.records_path, b'"revisions"') > 3,
    "train": lambda run: len(run.events("train_step")) >= 3,
    "evaluate critiques.csi": lambda run: rows(run.eval / "scores.jsonl", b'"critiques.csi"') > 0,
    "evaluate forgetting.nll": lambda run: rows(run.eval / "scores.jsonl", b'"forgetting.nll"') > 0,
}


def rows(path, word):
    return path.read_bytes().count(word) if path.exists() else 0


def made(path):
    """The bytes that a stop may not change: records, data set, adapter, scores."""
    names = ("records.jsonl", "dataset/pairs/train.jsonl", "adapter/adapter_model.safetensors", "eval/scores.jsonl")
    return {name: (path / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("phase", SPENT)
def test_the_limit_stops_every_phase_with_a_report_and_the_line_that_goes_on(phase, run_fake, monkeypatch, capsys):
    _, alone = run_fake("--milestone", "m1", "--set", "engine.batch_size=2")
    wanted = made(alone)
    real = Run.spent

    def spent(run):
        return real(run) | {"usd": 5.0 if SPENT[phase](run) else 0.0}

    monkeypatch.setattr(Run, "spent", spent)
    capsys.readouterr()
    code, path = run_fake("--milestone", "m1", "--set", "engine.batch_size=2", "--set", "budget.max_usd=4")
    assert code == 75
    last = capsys.readouterr().err.splitlines()[-1]
    said = in_words(*SAID.get(phase, (phase,)))
    assert "the budget is used up in step " in last and f", {said}: " in last
    assert "$5.00 over 1 attempt(s) (budget.max_usd = 4)" in last
    cut = [e for e in read_events(path / "events.jsonl") if e["kind"] == "stage" and e.get("cut")]
    assert [e["stage"] for e in cut] == [phase.split(" r")[0]]
    html = (path / "report.html").read_text()
    assert re.search(rf"It stopped at its budget in step \d+ of \d+, {re.escape(said)}", html)
    assert "a limit of [budget] was reached" in html
    if phase == "train":
        assert "step 3" in screen(path)
    line = shlex.split(last.split("python runner.py ")[1])
    assert line[-2:] == ["--set", "budget.max_usd=10"]
    assert run_fake(*line[1:], fake=())[0] == 0
    assert made(path) == wanted


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_the_grace_period_of_a_signal_still_waits_for_a_save(run, limit):
    """Training asks for it through whatever was put around the switch."""
    context = context_of(run, recipe())
    switch = context.stopped
    announce(context, SimpleNamespace(recipe=priced(max_usd=limit), backend="fake", limit_tokens=1000, once_tokens=0))
    assert context.stopped is not switch
    with context.stopped.hold():
        assert switch._held
    assert not switch._held


def test_a_stop_by_a_signal_is_not_called_the_budgets(run):
    context = context_of(run, recipe())
    inputs = SimpleNamespace(recipe=priced(max_usd=1e9), backend="fake", limit_tokens=1000, once_tokens=0)
    with pytest.raises(Stopped, match="stopped by SIGTERM"), enforced(context, inputs, lambda run: None):
        raise Stopped("stopped by SIGTERM in answers")
    assert not run.events("budget_stop")
    assert not run.report_html.exists()


def test_a_limit_in_dollars_needs_a_price(run_fake, capsys):
    """Without a price nothing is ever spent, and the limit would hold nothing."""
    assert run_fake("--set", "budget.usd_per_hour=0", "--set", "budget.max_usd=3")[0] == 2
    assert "budget.max_usd: needs a price to hold. Set budget.usd_per_hour" in capsys.readouterr().err
