"""bench/m3_phases.py's arithmetic: counts of an M3 times measured rates, and what is said of what was not measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from support.runs import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import m3_asks
import m3_counts
import m3_phases

from cai.data import principles
from cai.engine import ScoreRequest
from cai.engine.asks import score
from cai.run import budget
from cai.run.rates import Range

STAGES = {name: {"seconds_a_request": 0.1, "seconds_a_token": 0.001} for name in m3_phases.DEALT}
STAGES["answers"] = {"seconds_a_request": 0.06, "seconds_a_token": 0.0002}
STEPS = {
    "generation": {"set_up_s": 30.0, "stages": STAGES},
    "scoring": {"relevance": {"seconds_a_unit": 0.3}, "labels": {"seconds_a_unit": 0.5, "seconds_a_token": 0.0001}},
    "dpo": {"seconds_a_pair": 0.2, "save_seconds": 6.0, "reference_seconds_a_pair": 0.05, "set_up_seconds": 20.0},
    "guard": {"seconds_an_exchange": 0.005},
    "judge": {"seconds_an_exchange": 0.02},
}  # fmt: skip


def table_of(steps: dict) -> dict[str, dict]:
    return {row["phase"]: row for row in m3_counts.table({"steps": steps})}


@pytest.fixture(scope="module")
def whole() -> dict[str, dict]:
    return table_of(STEPS)


def test_a_phase_takes_its_count_times_the_rate(whole):
    """5,000 items and 200 held out, two rounds, 1 to 1.5 tries a slot; 3 epochs of 5,000 pairs, a save in 50 steps."""
    expected = {
        "answers": (5_200 * 0.06, 7_800 * 0.06),
        "revisions": (10_400 * 0.1, 15_600 * 0.1),
        "relevance": (10_490 * 0.3, 15_690 * 0.3),  # 26 known and 64 of its own first answers to compare with
        "guard": (10_440 * 0.005, 15_640 * 0.005),  # both texts of a pair, and the check set
        "train: the steps": (15_000 * 0.2, 15_000 * 0.2),
        "train: checkpoints": (38 * 6.0, 38 * 6.0),
        "train: the reference": (5_000 * 0.05, 5_000 * 0.05),
        "P1, P2: pairs, adapter on and off": (800 * 0.05, 800 * 0.05),
        "fresh answers, both arms": (400 * 600 * 0.25 * 0.0002, 400 * 600 * 0.0002),
        "harmbench: judge of 13B": (160 * 0.02, 160 * 0.02),
    }
    for name, seconds in expected.items():
        assert whole[name]["minutes"] == pytest.approx([value / 60 for value in seconds], abs=0.006), name
        assert whole[name]["note"] in ("", m3_counts.ESTIMATED)


def test_the_total_is_the_sum_and_the_estimate_is_the_dry_runs(whole):
    parts = [row for name, row in whole.items() if name != "total"]
    for side in (0, 1):
        measured = sum(row["minutes"][side] for row in parts if row["minutes"])
        assert whole["total"]["minutes"][side] == pytest.approx(measured, abs=0.2)
    inputs = m3_asks.m3()
    found = budget.estimate(inputs.recipe, "cuda", m3_counts.NOWHERE, inputs.limit_tokens, inputs.once_tokens)
    assert whole["total"]["estimate_minutes"] == pytest.approx([v / 60 for v in found.seconds], abs=0.01)
    assert whole["total"]["note"] == f"WITHOUT {'; '.join(m3_counts.ASIDE)}"
    assert all(whole[name]["note"].startswith("not measured here") for name in m3_counts.ASIDE)


def test_what_was_cut_off_or_never_run_is_said_and_named_in_the_total():
    cut = {"generation": {"error": "cut off after 90 s", "set_up_s": 30.0, "stages": {"answers": STAGES["answers"]}}}
    found = table_of(cut)
    assert found["answers"]["minutes"] and not found["answers"]["note"]
    assert found["revisions"]["minutes"] is None
    assert found["revisions"]["note"] == "not measured: cut off after 90 s"
    assert found["guard"]["note"] == "not measured: the step was not run"
    left_out = found["total"]["note"].removeprefix("WITHOUT ").split("; ")
    assert {"revisions", "guard", "train: the steps", "report"} <= set(left_out) and "answers" not in left_out
    text = m3_counts.shown(list(found.values()), {"machine": "a card", "shape": "qwen2-32b", "layers": "64 of 64"})
    assert "a card, qwen2-32b, 64 of 64 layers" in text and "| guard | 10,440 to 15,640 exchanges |" in text


def test_what_the_estimate_has_of_the_rest_is_in_the_total():
    phase = m3_counts.Phase("one", Range(2.0, 2.0), "rows", "a.seconds")
    *_, rest, total = m3_counts.rows([phase], {"a": {"seconds": 30.0}}, Range(120.0, 240.0))
    assert rest["minutes"] == [2.0, 4.0] and "report" in rest["note"]
    assert total["minutes"] == [3.0, 5.0] and total["note"] == ""


def test_a_shared_beginning_and_an_equal_row_are_computed_once():
    counter, head, case = m3_asks.Counter(), tuple(range(20)), tuple(range(50, 80))
    requests = [ScoreRequest(i, (*head, 4, 5), (word,), 20) for i, word in enumerate((7, 8))]  # one row: 4 5
    requests += [ScoreRequest(2, (*head, 6), (7,), 20), ScoreRequest(3, (9, 9), (7, 8), 0)]
    requests += [ScoreRequest(i, (*head, *case, i), (7,), 50, 20) for i in (4, 5)]  # its head is saved
    for _ in range(2):
        assert len(list(counter.score(requests))) == 6
    assert counter.tokens == 20 + 30 + 2 * (2 + 1 + 3 + 2)


def test_the_examples_of_a_relevance_are_computed_once_for_all_answers():
    inputs, answers = m3_asks.m3(), 5
    asks, counter = m3_asks.relevance_asks(inputs, answers), m3_asks.Counter()
    score(m3_asks.scorer_of(inputs, counter), asks)
    (head,) = {ask.head for ask in asks}
    cases = {ask.context[: ask.shared] for ask in asks}
    assert len(cases) == answers and len({ask.context[:head] for ask in asks}) == 1 and head > 4_000  # bytes
    own = sum(len(ask.context) - ask.shared for ask in asks)
    assert counter.tokens == head + sum(map(len, cases)) - answers * head + own


def test_asks_in_ids_of_no_meaning_share_what_the_programs_share():
    inputs = m3_asks.m3()
    of = {"relevance": m3_asks.relevance_asks(inputs, 2), "labels": m3_asks.label_asks(inputs, 2)}
    fits = [principles.fitting(inputs.constitution, pool) for pool in ("benign", "redteam")]
    assert len(of["relevance"]) == sum(map(len, fits)) < 2 * len(inputs.constitution.principles)
    assert len(of["labels"]) == 2 * (inputs.recipe.rounds + 1) * 4  # a principle a round and none; orders and letters
    for asks in of.values():
        made, tokens = m3_asks.shrunk(asks, 40_000), []
        for some, size in ((asks, m3_asks.BYTES), (made, 1)):
            counter = m3_asks.Counter()
            score(m3_asks.scorer_of(inputs, counter), some)
            tokens.append(counter.tokens / size)
        assert tokens[1] == pytest.approx(tokens[0], rel=0.02)
        assert len({ask.context for ask in made}) == len({ask.context for ask in asks})
        assert len({ask.context[: ask.shared] for ask in made}) == len({ask.context[: ask.shared] for ask in asks})


def test_a_step_that_is_cut_off_keeps_what_it_has_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(m3_phases, "LEAST", 0.0)
    session = m3_phases.Session(tmp_path / "found.json", time.monotonic() + 60)

    def slow(row):
        row["first"] = 1.0
        try:
            time.sleep(30)
        except Exception:  # what is between may take any fault for its own
            row["swallowed"] = True

    def broken(row):
        raise RuntimeError("two\nlines")

    assert not session.step("slow", 0.2, slow)
    assert not session.step("broken", 5.0, broken)
    assert session.step("sound", 5.0, lambda row: row.update(x=1))
    session.ends = time.monotonic() - 1
    assert not session.step("late", 5.0, lambda row: row.update(x=1))
    steps = json.loads((tmp_path / "found.json").read_text())["steps"]
    assert steps["slow"]["first"] == 1.0 and steps["slow"]["error"].startswith("cut off after 0 s")
    assert steps["broken"]["error"] == "RuntimeError: two lines" and steps["sound"]["x"] == 1
    assert "swallowed" not in steps["slow"] and "x" not in steps["late"]


def test_a_table_of_no_file_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "bench/m3_phases.py"), str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--seconds" in done.stderr
