"""The progress line and status.json: rates, time left, money; plain lines without a terminal; ticks in a long batch."""

from __future__ import annotations

import time
from functools import partial

import pytest
from support.pages import make_run, recipe, records, row

from cai.data import chain
from cai.recipe import load as recipes
from cai.run import progress as module
from cai.run import words
from cai.run.folder import Run
from cai.run.pace import Pace
from cai.run.progress import Progress

ID = "20261122-200000-m1-abc123"


@pytest.fixture
def run(tmp_path):
    content = {"recipe.resolved.toml": recipes.dump(recipe())}
    with Run.create(tmp_path, ID, content, {"milestone": "m1"}, usd_per_hour=3600.0) as run:
        yield run


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that the test moves."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_stage_writes_its_status_and_event(run):
    shown = Progress(run, 3600.0)
    shown.begin("answers", 0, total=3)
    for _ in range(3):
        shown.step(20)
    shown.committed([row("answers", i, 0, "x") for i in range(2)] + [row("answers", 2, 0, "x", status="rejected")])
    shown.end()
    status = run.read_status()
    assert (status["stage"], status["done"], status["total"], status["rejected"]) == ("answers", 3, 3, 1)
    assert status["usd"] >= 0
    event = run.events("stage")[-1]
    assert (event["items"], event["rejected"], event["tokens"]) == (3, 1, 60)


def test_plain_line_every_half_minute_and_status_every_two_seconds(run, clock, capsys):
    shown = Progress(run, 3600.0)
    shown.begin("critiques", 1, total=100, per_round=True)
    clock[0] += 10.0
    shown.step(50)
    clock[0] += 21.0
    shown.tick()
    shown.tick()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("critiques, round 2: 1/100, 5 tok/s, $")  # 50 tokens in the 10 s that the finished row took
    assert "31 s so far, 11 min to 51 min to go" in err  # 99 x 10 s x 0.7 - 21 s; 99 x 21 s x 1.5 - 21 s
    shown.committed([row("critiques", 0, 1, "x")])
    before = run.read_status()
    clock[0] += 1.0
    shown.tick()
    assert run.read_status() == before
    clock[0] += 1.5
    shown.tick()
    assert run.read_status()["done"] == 1


def test_a_long_batch_ticks_through_the_stop_question(run, clock, capsys):
    shown = Progress(run, 0.0)
    shown.begin("answers", 0, total=16)
    stopped = shown.watch(lambda: False)
    clock[0] += 40.0
    assert stopped() is False
    assert "answers: 0/16, 40 s so far" in capsys.readouterr().err
    assert run.read_status()["stage_seconds"] == 40.0


def test_money_counts_earlier_attempts_and_their_whole_items(tmp_path):
    path = make_run(tmp_path, records(3, heldout=0, rejects=False))
    with Run.open(path, usd_per_hour=3600.0) as run:
        shown = Progress(run, 3600.0, partial(chain.whole_items, rounds=2))
        shown.begin("revisions", 1, total=4, done=3)
        shown.committed([row("revisions", 3, 1, "x")])
        assert shown.whole == {0, 1, 2, 3}
        assert shown.usd_per_pair() == pytest.approx(run.spent()["usd"] / 4, rel=0.5)
        assert "a pair" in shown.rates()


def test_training_shows_steps(run, capsys):
    shown = Progress(run, 0.0)
    shown.begin("train", 0, total=0, unit="step")
    for step in range(1, 4):
        shown.training(step, 3)
    shown.end()
    err = capsys.readouterr().err
    assert err.startswith("training: 3/3, ")
    assert "step/s" in err
    assert run.read_status()["total"] == 3


def test_a_terminal_gets_a_bar(run, monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    shown = Progress(run, 0.0)
    shown.begin("answers", 0, total=2)
    assert shown.bar is not None
    shown.step(10, 2)
    shown.end()
    assert shown.bar is None
    last = capsys.readouterr().err.split("\r")[-1]
    assert "answers" in last and "tok/s" in last and "?" not in last


def test_time_to_go_within_a_batch_is_unknown_then_near_the_truth(run, clock, capsys):
    """Sixteen rows a batch, a batch in 30 s, 96 rows: 180 s in all. The first row, at 20 s, says nothing of that."""
    shown = Progress(run, 0.0)
    shown.begin("answers", 0, total=96, together=16)
    began = clock[0]
    for batch in range(5):
        for i in range(16):
            clock[0] = began + 30.0 * batch + 20.0 + 10.0 * i / 15
            shown.step(20)
            true = 180.0 - (clock[0] - began)
            eta = shown.eta_seconds()
            if batch == 0 and i < 15:
                assert eta is None
            else:
                assert eta and eta[0] <= true + 1e-6 and true - 1e-6 <= eta[1] < 1.9 * true + 60, (batch, i, eta, true)
        shown.committed([row("answers", 16 * batch + i, 0, "x") for i in range(16)])
        if batch == 0:
            clock[0] += 25.0
            shown.tick()
            assert "to go" in capsys.readouterr().err
            clock[0] -= 25.0
    assert run.read_status()["eta_seconds"] is None or len(run.read_status()["eta_seconds"]) == 2


def test_a_batch_that_takes_longer_than_the_one_before_raises_the_estimate():
    pace = Pace(together=4)
    pace.note(10.0, 4, left=8)
    assert pace.to_go(10.0) == (8 * 2.5 * 0.7, 8 * 2.5 * 1.5)
    late = pace.to_go(50.0)  # 40 s for the next four already
    assert late and late[1] == 8 * 10.0 * 1.5 - 40.0


def test_the_first_stretch_warms_up_and_margins_narrow():
    pace = Pace()
    pace.note(100.0, 1, left=9)
    for n in range(2, 7):
        pace.note(100.0 + 10.0 * (n - 1), n, left=10 - n)
    low, high = pace.to_go(150.0) or (0.0, 0.0)
    assert low == pytest.approx(40.0 * (1 - 0.3 / 5**0.5)) and high == pytest.approx(40.0 * (1 + 0.5 / 5**0.5))


@pytest.mark.parametrize(
    ("stage", "round_", "name"),
    [
        ("instructions", 0, "instructions"),
        ("instructions", 1, "instructions, try 2"),
        ("critiques", 0, "critiques, round 1"),
        ("revisions", 1, "revisions, round 2"),
        ("answers", 0, "answers"),
    ],
)
def test_a_try_is_not_called_a_round(stage, round_, name):
    assert chain.label(stage, round_) == name


STEPS = (
    *(("instructions", 0), ("critiques", 0), ("revisions", 0), ("critiques", 1), ("train", 0), ("evaluate", 0)),
    *(("sft_instructions", 0), ("sft_answers", 0)),
)


def test_a_step_is_told_with_its_place_and_in_words(run, clock, capsys):
    shown = Progress(run, 0.0, steps=STEPS)
    for stage, round_, per_round, said in (
        ("critiques", 1, True, "step 4 of 8, critiques, round 2: 0/2"),
        ("instructions", 2, False, "step 1 of 8, instructions, try 3: 0/2"),
        ("sft_instructions", 0, False, "step 7 of 8, further requests, for SFT: 0/2"),
        ("sft_instructions", 1, False, "step 7 of 8, further requests, for SFT, try 2: 0/2"),
        ("sft_answers", 0, False, "step 8 of 8, the model's own answers to them: 0/2"),
        ("evaluate revisions.cri", 0, False, "step 6 of 8, measuring: do revisions follow their critiques (CRI): 0/2"),
        ("train", 0, False, "step 5 of 8, training: 0/2"),
        ("calibration", 0, False, "where the critic draws its line: 0/2"),
    ):
        shown.begin(stage, round_, total=2, per_round=per_round)
        shown.end()
        assert capsys.readouterr().err.startswith(said), stage
    shown.begin("critiques", 0, total=1, per_round=True)
    status = run.read_status()
    assert (status["step"], status["steps"], status["stage"]) == (2, 8, "critiques"), "names stay what they are"


def test_a_later_try_of_a_stage_that_has_tries_is_no_other_step():
    from cai.data.stages import CHAIN

    steps = [(stage.name, 0) for stage in CHAIN]
    tried = [stage.name for stage in CHAIN if stage.attempts]
    assert tried == ["instructions", "sft_instructions"]
    for name in tried:
        assert words.place(steps, name, 3) == words.place(steps, name, 0) == steps.index((name, 0)) + 1
    assert words.place(steps, "critiques", 3) == 0, "whose rounds are steps"


@pytest.mark.runs
def test_every_stage_of_a_run_has_a_place_and_no_word_of_the_trade(run_fake):
    """A fake M1 from start to end: each line says which step it is; CSI and CRI stand beside what they mean."""
    import re

    _, path = run_fake("--milestone", "m1", "--set", "items=2", "--set", "heldout.items=1")
    from cai.run import words
    from cai.run.events import read_events

    labels = {event["stage"] for event in read_events(path / "events.jsonl") if event["kind"] == "stage"}
    assert len(labels) > 10
    for label in labels:
        said = words.in_words(label)
        assert not re.search(r"wave|slot|generic_lp|\.cri|\.csi|\.nll|\.kl|\.gates", said), said


def test_the_whole_run_is_estimated_until_it_is_spent(run, clock, capsys):
    shown = Progress(run, 0.0)
    shown.expected = (100.0, 300.0)
    shown.begin("answers", 0, total=4)
    clock[0] += 40.0
    shown.tick()
    assert "1 min to 4 min 20 s left of the whole run" in capsys.readouterr().err
    assert run.read_status()["run_seconds"] == [60.0, 260.0]
    clock[0] += 400.0
    shown.tick()
    assert "whole run" not in capsys.readouterr().err


def test_tokens_count_while_they_are_made(run, clock, capsys):
    from cai.engine import EngineStats

    stats = EngineStats()
    shown = Progress(run, 0.0)
    shown.begin("answers", 0, total=16)
    shown.follow(stats)
    stats.in_flight = 400
    clock[0] += 40.0
    shown.tick()
    assert "answers: 0/16, 10 tok/s, 40 s so far" in capsys.readouterr().err
    assert run.read_status()["tokens_per_second"] == 10.0
    stats.in_flight = 0
    shown.step(400)
    assert shown.made == 400
