"""Preference, health, forgetting, and the measurement of whole runs on the fake model; the traps of these parts."""

from __future__ import annotations

import math
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scores import pair_row

from cai.evaluate import dpo_health, forgetting, measure, preference
from cai.evaluate.gates import decide
from cai.evaluate.scores import KEY
from cai.metrics.figure import Figure
from cai.models.fake import FakeEngine
from cai.recipe.settings import HealthSection
from cai.recipe.settings_evaluation import GateSpec, GatesSection
from cai.store.records import read
from tests.conftest import FAKE

QUICK = ("--set", "evaluation.neutral_passages=4", "--set", "evaluation.kl_passages=0")
HELDOUT = ("--milestone", "m1", "--set", "heldout.items=4", "--set", "evaluation.fresh_items=2", *QUICK)


# --- preference


def test_trap_03_a_tie_counts_half_and_pairs_count_not_batches():
    """TRL's rewards/accuracies is 0.0 before the first step; every margin is 0 there, and P1 is 0.5."""
    rows = [pair_row(i, 0.0) for i in range(9)]
    assert preference.summarise(rows)["preference.p1"].value == 0.5
    uneven = [pair_row(0, 1.0), pair_row(1, 1.0), pair_row(2, 1.0), pair_row(3, -1.0), pair_row(4, 0.0)]
    assert preference.summarise(uneven)["preference.p1"].value == pytest.approx(3.5 / 5)


def test_p1_headline_has_interval_worst_and_control():
    rows = [pair_row(i, 1.0 if i else -2.0) for i in range(30)]
    figures = preference.summarise(rows)
    p1 = figures["preference.p1"]
    assert p1.value == pytest.approx(29 / 30)
    assert p1.low < p1.value < p1.high
    assert p1.worst[0] == {"item": 0, "margin": -2.0}
    assert p1.facts["permutation_p"] < 0.01


@pytest.mark.runs
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=20, max_size=60))
def test_permuting_labels_brings_p1_to_one_half_within_its_interval(margins):
    control, _ = preference.permuted([pair_row(i, m) for i, m in enumerate(margins)])
    assert control.low <= 0.5 <= control.high
    assert control.value == pytest.approx(0.5, abs=0.06)


def test_p2_compares_before_and_after_by_token():
    """Before: -20/10 against -30/10, chosen wins anyway. A longer chosen text is judged by the token."""
    rows = [pair_row(i, 0.0, chosen_tokens=5) for i in range(8)]  # -4 a token before and after, rejected -3
    figures = preference.summarise(rows)
    assert figures["preference.p2.before"].value == 0.0
    better = [row | {"chosen": -10.0} for row in rows]  # -2 a token after
    figures = preference.summarise(better)
    assert figures["preference.p2.after"].value == 1.0
    assert figures["preference.p2.after"].facts["mcnemar_p"] == pytest.approx(2 * 0.5**8)


@pytest.mark.parametrize("lost", [math.nan, None], ids=["from the model", "from the log"])
def test_trap_07_a_log_probability_that_is_none_is_unscored_and_no_loss_or_tie(lost):
    """A NaN margin was a lost pair (n counted it), a NaN judge a tie, and a null read back from the log a traceback."""
    rows = [pair_row(i, 1.0) for i in range(8)] + [
        pair_row(8, 1.0, chosen=lost),
        pair_row(9, 1.0, "train", chosen=lost),
    ]
    figures = preference.summarise(rows, too_long=1)
    for name in ("p1", "p2.before", "p2.after"):
        found = figures[f"preference.{name}"]
        assert (found.value, found.n, found.unscored) == (1.0, 8, 2), name
    assert (figures["preference.p1.train"].n, figures["preference.p1.train"].unscored) == (0, 1)
    assert decide(figures["preference.p1"], GateSpec(metric="m", above=0.8)).status == "UNMEASURED"
    assert preference.summarise([], too_long=3)["preference.p1"].unscored == 3
    fall = dpo_health.from_pairs(rows, 0.1, "heldout")["dpo.loss_fall.heldout"]
    assert (fall.n, fall.unscored) == (8, 2)
    fresh = [
        {"item": i, "j4": 1.0, "log_odds": 2.0, "base_words": 9, "tuned_words": 9, "base": "b", "tuned": "t"}
        for i in range(4)
    ]
    judged = preference.summarise_fresh([*fresh, fresh[0] | {"j4": lost, "log_odds": lost}], "judge")
    assert all((figure.n, figure.unscored) == (4, 1) for figure in judged.values())


@pytest.mark.parametrize("lost", [math.nan, None], ids=["from the model", "from the log"])
def test_trap_07_a_broken_model_has_not_forgotten_nothing(lost):
    assert forgetting.not_negative(-1e-9) == 0.0 and math.isnan(forgetting.not_negative(math.nan))
    kl = forgetting.summarise_kl([{"kl": 0.01}, {"kl": lost}])["forgetting.kl"]
    assert (kl.value, kl.n, kl.unscored) == (0.01, 1, 1)
    nll = forgetting.summarise_nll([{"base": 3.0, "tuned": 3.1}, {"base": 3.0, "tuned": lost}])
    assert [(figure.n, figure.unscored) for figure in nll.values()] == [(1, 1), (1, 1)]


def test_trap_10_length_alone_is_measured_and_must_be_beaten():
    longer = {"chosen_words": 50, "rejected_words": 20}
    rows = [pair_row(i, 1.0, **longer) for i in range(40)] + [
        pair_row(i + 100, 1.0, "train", **longer) for i in range(5)
    ]
    figures = preference.summarise(rows)
    assert figures["preference.length_only"].value == 1.0
    verdict = decide(
        figures["preference.p1"], next(gate for gate in GatesSection().m2 if gate.metric == "preference.p1"), figures
    )
    assert verdict.status == "FAIL"
    assert "length_only" in verdict.reason


def test_baselines_take_their_direction_from_the_training_pairs():
    shorter = {"chosen_words": 5, "rejected_words": 20}
    train = [pair_row(i, 1.0, "train", **shorter) for i in range(5)]
    heldout = [pair_row(i + 10, 1.0, chosen_words=20, rejected_words=5) for i in range(5)]
    found = preference.summarise(train + heldout)["preference.length_only"]
    assert (found.value, found.facts["direction"]) == (0.0, "less")


def test_refusal_baseline_sees_a_policy_that_only_refuses():
    rows = [pair_row(i, 1.0, chosen_refuses=True) for i in range(10)]
    assert preference.summarise(rows)["preference.refusal_only"].value == 1.0


def test_length_controlled_takes_out_what_length_explains():
    """Log-odds are 2 x log length ratio: at equal length nothing is left."""
    rows = []
    for item, (tuned, base) in enumerate([(40, 20), (80, 20), (20, 20), (10, 20), (60, 20)]):
        log_odds = 2.0 * math.log((1 + tuned) / (1 + base))
        rows.append({"item": item, "j4": float(log_odds > 0), "log_odds": log_odds, "tuned": "t", "base": "b"})
        rows[-1] |= {"tuned_words": tuned, "base_words": base}
    figures = preference.summarise_fresh(rows, "judge")
    assert figures["preference.p3"].value > 0.5
    controlled = figures["preference.p3.length_controlled"]
    assert (controlled.value, controlled.n) == (0.5, 5)  # nothing is left: five ties
    assert controlled.facts["slope"] == pytest.approx(2.0)
    better = [row | {"log_odds": row["log_odds"] + 0.5} for row in rows]  # and half a nat that length does not explain
    controlled = preference.summarise_fresh(better, "judge")["preference.p3.length_controlled"]
    assert controlled.value == 1.0 and controlled.facts["log_odds"] == pytest.approx(0.5, abs=1e-5)
    worse = [row | {"log_odds": row["log_odds"] - 0.5} for row in rows]  # wins three of five by length alone
    figures = preference.summarise_fresh(worse, "judge")
    assert figures["preference.p3"].value == 0.6
    assert figures["preference.p3.length_controlled"].value == 0.0


def test_length_controlled_of_equal_lengths_is_the_plain_rate():
    """No spread of lengths, so no line: three of four log-odds are above 0."""
    row = {"j4": 1.0, "tuned": "t", "base": "b", "tuned_words": 9, "base_words": 9}
    rows = [row | {"item": i, "log_odds": value} for i, value in enumerate((0.2, 0.1, 0.4, -0.3))]
    controlled = preference.length_controlled(rows, "judge")
    assert (controlled.value, controlled.facts["slope"]) == (0.75, 0.0)
    assert controlled.low < 0.75 < controlled.high


def test_no_heldout_pair_is_unmeasured_not_zero():
    figures = preference.summarise([pair_row(0, 1.0, "train")])
    assert figures["preference.p1"].value is None
    assert "heldout.items" in figures["preference.p1"].note


# --- health


def test_health_by_hand():
    """Margin 2 at beta 0.5: loss = log(1 + e^-1) = 0.3133."""
    figures = dpo_health.from_pairs([pair_row(0, 2.0, "train")], 0.5)
    assert figures["dpo.loss"].value == pytest.approx(math.log1p(math.exp(-1.0)))
    assert figures["dpo.loss_fall"].value == pytest.approx(math.log(2) - math.log1p(math.exp(-1.0)))
    assert figures["dpo.chosen_fall"].value == pytest.approx(-0.2)


def test_displacement_is_warned_of_with_its_remedy():
    """Both texts lost likelihood, the rejected one more: the loss fell all the same."""
    row = pair_row(0, -5.0, "train", rejected=-60.0)
    figures = dpo_health.from_pairs([row], 0.1)
    assert figures["dpo.loss_fall"].value > 0
    assert figures["dpo.chosen_fall"].value == pytest.approx(0.5)
    (line,) = dpo_health.warnings(figures, HealthSection())
    assert 'loss_type = ["sigmoid", "sft"]' in line


def test_what_is_warned_of_is_the_recipes():
    figures = dpo_health.from_pairs([pair_row(0, -5.0, "train", rejected=-60.0)], 0.1)
    assert dpo_health.warnings(figures, HealthSection(max_chosen_fall=0.6)) == []
    assert "more than 0.1" in dpo_health.warnings(figures, HealthSection(max_chosen_fall=0.1))[0]


def test_log_figures():
    log = [{"loss": 0.6931, "grad_norm": 1.0}, {"loss": 0.6, "grad_norm": 2.0}, {"loss": 0.5, "grad_norm": 3.0}]
    figures = dpo_health.from_log(log, truncated=1, pairs=10)
    assert figures["dpo.first_loss_error"].value < 0.001
    assert figures["dpo.grad_norm_max"].value == 3.0
    assert figures["dpo.logged_fall"].value == pytest.approx(0.1931)
    assert "truncated" in dpo_health.warnings(figures, HealthSection())[0]
    assert dpo_health.from_log([], truncated=0, pairs=1)["dpo.first_loss_error"].value is None
    other = dpo_health.from_log(log, truncated=0, pairs=1, expected=0.6931)["dpo.first_loss_error"]
    assert other.value == 0.0
    mixed = [{"loss": 2.4, "rewards/margins": 0.25}]  # sigmoid and sft: the texts decide the loss, not the margin
    assert dpo_health.from_log(mixed, truncated=0, pairs=1, expected=None)["dpo.first_loss_error"].value == 0.25
    assert dpo_health.from_log(log, truncated=0, pairs=1, expected=None)["dpo.first_loss_error"].value is None
    broken = dpo_health.from_log([{"loss": 0.9, "grad_norm": math.inf}], truncated=0, pairs=1)
    assert broken["dpo.finite"].value == 0.0
    assert len(dpo_health.warnings(broken, HealthSection())) == 2


# --- forgetting


def test_neutral_passages_are_many_varied_and_of_one_size():
    passages = forgetting.passages()
    assert len(passages) >= 60
    assert all(60 <= len(text.split()) <= 120 for text in passages)
    assert len({text[:40] for text in passages}) == len(passages)


def test_nll_is_paired_by_document():
    rows = [{"item": i, "base": 2.0 + i, "tuned": 2.1 + i} for i in range(20)]
    delta = forgetting.summarise_nll(rows)["forgetting.nll_delta"]
    assert delta.value == pytest.approx(0.1)
    assert delta.high - delta.low < 0.001  # the spread between documents does not matter
    assert decide(delta, GateSpec(metric="x", at_most=0.02, bound="upper")).status == "FAIL"


def test_trap_05_gibberish_and_silence_show_beside_the_preference():
    """A policy that says nothing, or the same words again and again, is seen in the same adapter's figures."""
    figures = forgetting.degeneration(["", "so it goes on and on in circles " * 9], [False, True], "tuned")
    assert figures["fresh.tuned.empty"].value == 0.5
    assert figures["fresh.tuned.repeats"].value == 0.5
    assert figures["fresh.tuned.at_limit"].value == 0.5
    assert figures["fresh.tuned.distinct_2"].value < 0.2
    assert figures["fresh.tuned.loops"].value == 0.5
    ended = forgetting.degeneration(["so it goes on and on in circles " * 9], [False], "tuned")
    assert ended["fresh.tuned.loops"].value == 0.0  # it repeated itself, and ended


# --- whole runs on the fake model


def figures_of(run: Path) -> dict:
    return orjson.loads((run / "eval" / "measured.json").read_bytes())["figures"]


@pytest.mark.runs
def test_a_run_is_measured_whole(run_fake):
    code, run = run_fake(*HELDOUT)
    assert code == 0
    figures = figures_of(run)
    wanted = ["critiques.meaningful", "critiques.meaningful.shuffled", "critiques.meaningful.generic"]
    wanted += ["revisions.addresses", "revisions.addresses.shuffled", "revisions.improves", "preference.p1"]
    wanted += ["preference.p1.permuted", "preference.p2.after", "preference.p3", "preference.p3.length_controlled"]
    wanted += ["preference.length_only", "preference.refusal_only", "forgetting.nll_delta", "forgetting.kl"]
    wanted += ["dpo.first_loss_error", "dpo.loss_fall", "dpo.chosen_fall", "fresh.tuned.empty", "pairs.kept"]
    for name in wanted:
        assert set(figures[name]) == {
            "metric", "value", "low", "high", "n", "unscored", "judge", "worst", "note", "facts",
        }  # fmt: skip
    assert figures["preference.p1"]["n"] == 4
    assert figures["forgetting.kl"]["value"] is None  # the fake has no distributions, and says so


@pytest.mark.slow
def test_twice_the_same_numbers(run_fake):
    _, first = run_fake(*HELDOUT)
    _, second = run_fake(*HELDOUT)
    assert first != second
    assert figures_of(first) == figures_of(second)
    scores = [(run / "eval" / "scores.jsonl").read_bytes() for run in (first, second)]
    assert [line for line in scores[0].split(b"\n")[1:]] == [line for line in scores[1].split(b"\n")[1:]]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(run_fake, monkeypatch):
    _, whole_run = run_fake(*HELDOUT)
    done = read(whole_run / "eval" / "scores.jsonl", KEY)
    path = whole_run / "eval" / "scores.jsonl"
    lines = path.read_bytes().split(b"\n")
    before = path.read_bytes()
    keep = lines[: len(lines) // 2]
    path.write_bytes(b"\n".join(keep) + b"\n" + b'{"torn')
    path.with_suffix(".sum").unlink()
    calls = []
    real = FakeEngine.score
    monkeypatch.setattr(
        FakeEngine, "score", lambda self, r, s=lambda: False: (calls.append(len(r)), real(self, r, s))[1]
    )
    code, _ = run_fake("--resume", whole_run.name, *HELDOUT[2:])
    assert code == 0
    assert path.read_bytes() == before
    assert read(path, KEY) == done
    assert calls


@pytest.mark.runs
def test_a_finished_evaluation_loads_no_model(run_fake, monkeypatch):
    _, run = run_fake(*HELDOUT)
    monkeypatch.setattr("cai.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    code, _ = run_fake("--resume", run.name, *HELDOUT[2:])
    assert code == 0


@pytest.mark.runs
def test_other_thresholds_start_a_new_score_log_and_keep_the_old(run_fake):
    _, run = run_fake(*HELDOUT)
    run_fake("--resume", run.name, *HELDOUT[2:], "--set", "evaluation.max_text_tokens=40")
    old = [path for path in (run / "eval").glob("scores-*.jsonl")]
    assert len(old) == 1
    assert read(old[0], KEY)


@pytest.mark.runs
def test_trap_06_only_the_base_judges(run_fake, monkeypatch):
    """Critiques, revisions and fresh answers are scored with the adapter off; pairs and passages with both."""
    seen: dict[str, set[bool]] = {}
    metric = ["?"]
    real_left = measure.Evaluation.left

    def left(self, name, *more):
        for part in real_left(self, name, *more):
            metric[0] = name
            yield part

    real_score = FakeEngine.score

    def score(self, requests, stopped=lambda: False):
        seen.setdefault(metric[0], set()).add(self.model.tuned)
        return real_score(self, requests, stopped)

    monkeypatch.setattr(measure.Evaluation, "left", left)
    monkeypatch.setattr(FakeEngine, "score", score)
    run_fake(*HELDOUT)
    judged = {"critiques.csi", "critiques.generic_lp", "revisions.cri", "critiques.judge", "revisions.judge"}
    for name in judged | {"preference.p3"}:
        assert seen[name] == {False}, name
    assert seen["preference.pairs"] == seen["forgetting.nll"] == {True, False}


@pytest.mark.runs
def test_trap_08_fresh_answers_are_cut_at_the_stop_string_before_judging(run_fake, monkeypatch):
    """A base model runs on into the next turn; the request carries the prompt's stop strings."""
    stops = []
    real = FakeEngine.submit
    monkeypatch.setattr(FakeEngine, "submit", lambda self, r: (stops.append(r.sampling.stop), real(self, r))[1])
    _, run = run_fake(*HELDOUT, "--set", "model.format=base", "--set", "evaluation.likelihood_items=0")
    fresh = [row for row in read(run / "eval" / "scores.jsonl", KEY) if row["metric"] == "preference.fresh"]
    assert len(fresh) == 2
    assert all("\nInstruction:" in stop for stop in stops[-4:])


@pytest.mark.runs
def test_rejected_items_are_measured_too(run_fake):
    """A generator that refuses keeps no pair: its critiques and revisions still stand in the denominators."""
    code, run = run_fake(*HELDOUT, fake=(*FAKE[:3], "model.name=fake:refusing"))
    if code == 0:
        figures = figures_of(run)
        assert figures["revisions.gates"]["n"] >= figures["pairs.kept"]["value"]
    else:
        assert code == 6


@pytest.mark.runs
def test_evaluation_off_counts_pairs_only(run_fake):
    code, run = run_fake("--milestone", "m0", "--set", "evaluation.enabled=false")
    assert code == 0
    assert not (run / "eval" / "scores.jsonl").exists()


def test_an_adapter_that_barely_moved_or_moved_too_far_is_told_with_the_key_to_change():
    still = {name: Figure(name, 0.001, n=9) for name in ("dpo.margin.heldout", "forgetting.kl")}
    still["fresh.tuned.same_as_base"] = preference.same_answers([{"base": "a", "tuned": "a"}] * 3)
    (line,) = dpo_health.warnings(still, HealthSection())
    assert "barely moved" in line and "100% of the fresh answers unchanged" in line and "dpo.learning_rate" in line
    far = {"forgetting.kl": Figure("forgetting.kl", 0.5, n=9), "dpo.margin.heldout": Figure("m", 3.0, n=9)}
    (line,) = dpo_health.warnings(far, HealthSection())
    assert "moved too far" in line and "dpo.beta" in line
    short = {name: Figure(name, words, n=9) for name, words in (("fresh.tuned.words", 17), ("fresh.base.words", 276))}
    (line,) = dpo_health.warnings(short, HealthSection())
    assert "end at the first occasion" in line


def test_p1_is_split_by_the_groups_of_an_item():
    rows = [pair_row(0, 2.0), pair_row(1, -2.0), pair_row(2, 2.0), pair_row(3, 2.0, "train")]
    found = preference.by_group(rows, {0: ["honesty", "harm"], 1: ["harm"], 3: ["harm"]})
    assert found == {"harm": "1 of 2", "honesty": "1 of 1"}
