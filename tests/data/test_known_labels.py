"""A label's bar: which margins of known revisions set it, what it lets pass, and what is compared under what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import ROOT, read_jsonl

from cai import errors
from cai.data import labels, principles
from cai.data import labels as known_labels
from cai.data.sampled import undecided
from cai.data.stage import Unit
from cai.engine import Score
from cai.recipe.constitution import Principle
from cai.recipe.identity import identity
from cai.recipe.load import read, resolve
from cai.recipe.settings import PairsSection


def context(margins, share=0.2, label="judge"):
    rows = [
        {"stage": "label_bar", "item": i, "status": "ok", "use": use, "known": known, "margin": margin}
        for i, (use, known, margin) in enumerate(margins)
    ]
    recipe = SimpleNamespace(pairs=PairsSection(label=label, false_labels=share))
    return SimpleNamespace(recipe=recipe, log=SimpleNamespace(by_stage=lambda name: rows))


WORSE = [("bar", "no better", i / 10) for i in range(-4, 6)]  # -0.4 to 0.5, ten of them


def test_the_bar_is_the_margin_that_so_many_known_non_improvements_pass():
    bar = known_labels.bar_of(context(WORSE))
    assert bar == 0.3 and sum(margin > bar for _, _, margin in WORSE) == 2  # a fifth of ten
    others = [("exam", "no better", 9.0), ("bar", "better", 9.0)]  # half is kept for measuring; the good set no bar
    assert known_labels.bar_of(context(WORSE + others)) == bar
    assert known_labels.bar_of(context(WORSE, share=0.5)) == 0.0
    assert known_labels.bar_of(context(WORSE, share=0.9)) == 0.0, "worse than the original is never better"


def test_no_bar_where_none_is_asked_for_and_nothing_passes_where_none_could_be_drawn():
    assert known_labels.bar_of(context(WORSE, share=0.0)) is None
    assert known_labels.bar_of(context(WORSE, label="always")) is None
    blind = [(use, known, None) for use, known, _ in WORSE]
    assert known_labels.bar_of(context(blind)) == math.inf
    row = labels.with_bar({"first": 1.0, "second": -1.0, "margin": 1.0}, math.inf)
    assert labels.fault(row).startswith("unscored")


def test_a_liking_for_a_letter_decides_nothing_where_there_is_a_bar():
    leaning = {"first": 1.4, "second": 0.8, "margin": 0.3, "used": ["p"]}  # A either way, and more so for the revision
    assert labels.fault(leaning).startswith("the original is preferred in one order")
    assert labels.fault(leaning | {"bar": 0.2}) == ""
    assert labels.fault(leaning | {"bar": 0.3}) == "no clear margin: 0.30, the bar is 0.30"
    both = {"first": 0.1, "second": -0.1, "margin": 0.1, "used": ["p"], "fallen": 1.0, "risen": 0.0}
    assert labels.fault(both) == "" and labels.fault(both | {"bar": 0.2})


def test_of_two_sampled_answers_either_may_be_clearly_better():
    config = PairsSection(label="judge", false_labels=0.2)
    row = {"first": 0.2, "second": 0.8, "margin": -0.3}
    assert undecided(row | {"bar": 0.2}, config) == "" and undecided(row | {"bar": 0.4}, config)
    assert undecided(row, config).startswith("each order prefers another one")


def scores_for(margins):
    """Scores from which `orders` reads these (first, second) for each name."""
    found = {}
    for name, sides in margins.items():
        for order, odds in enumerate(sides):
            found[(*name, "j4", order, "A")] = Score(0, (odds,))
            found[(*name, "j4", order, "B")] = Score(0, (0.0,))
    return found


def test_a_principle_that_has_nothing_to_do_with_the_request_does_not_decide_alone():
    unit = Unit(3, 0, {}, extra={"used": ("care",), "before": {}})
    found = scores_for({(3, "care"): (1.0, -1.0), (3, ""): (-0.8, 0.8)})
    assert labels.verdict(found, unit, None)["margin"] == 1.0
    assert labels.verdict(found, unit, 0.3)["margin"] == pytest.approx(0.1)
    ours = SimpleNamespace(constitution={"care": SimpleNamespace(principle="An answer cares.")})
    assert labels.under(ours, unit, None) == [("care", "An answer cares.")]
    assert labels.under(ours, unit, 0.3) == [("care", "An answer cares."), ("", "")]


def test_the_cases_are_whole_and_halved_alike():
    cases = known_labels.cases()
    assert len({case["id"] for case in cases}) == len(cases)
    for use in ("bar", "exam"):
        half = [case for case in cases if case["use"] == use]
        assert sum(case["better"] for case in half) == 13
        assert {case["kind"] for case in half if not case["better"]} >= {
            "cosmetic",
            "disclaimer",
            "refusal",
            "misplaced",
        }
        assert {case["pool"] for case in half} == {"benign", "redteam"}
        assert sum(not case["better"] for case in half) >= 5 * known_labels.LEAST
    texts = {use: {c["answer"] for c in cases if c["use"] == use} for use in ("bar", "exam")}
    assert not texts["bar"] & texts["exam"], "no answer sets the bar and measures it"


def test_the_critics_sign_is_read_in_spreads_over_known_answers(monkeypatch):
    two = (Principle("loud", "", "", ""), Principle("calm", "", "", ""))
    rows = [{"item": 0, "scores": {"loud": 4.0 + s, "calm": -3.0 + s / 10}} for s in (-1.0, 1.0)]
    ours = SimpleNamespace(
        recipe=SimpleNamespace(principles=SimpleNamespace(by="critic")),
        constitution=SimpleNamespace(principles=two),
        log=SimpleNamespace(by_stage=lambda name: rows),
    )
    odds = {(7, "loud"): 4.5, (7, "calm"): -2.7}
    monkeypatch.setattr(principles, "critic_odds", lambda scores: odds)
    found = principles.scores_of(ours, {}, {(7,): two})[7,]
    assert found == {"loud": 0.5, "calm": 3.0}, "the likelier word is not the more broken principle"
    odds[7, "calm"] = math.nan
    assert principles.scores_of(ours, {}, {(7,): two})[7,]["calm"] is None
    assert principles.scores_of(ours, {}, {(7,): two[:1]})[7,] == {"loud": 0.5}, "one that does not fit has no score"


@pytest.mark.parametrize(
    ("found", "round_", "drawn"),
    [("compared", 0, ["loud"]), ("compared", 1, []), ("drawn", 0, []), ("calibrated", 0, ["loud", "calm"])],
)
def test_an_answer_that_breaks_nothing_clearly_is_criticised_once_where_the_label_decides(found, round_, drawn):
    ours = SimpleNamespace(
        recipe=SimpleNamespace(
            principles=SimpleNamespace(threshold=0.0, top=3), critiques=SimpleNamespace(found=found)
        ),
        constitution=SimpleNamespace(principles=[SimpleNamespace(id=i, pools=()) for i in ("calm", "loud")]),
        ok=lambda stage, item, r: None,
    )
    unit = Unit(0, round_, {}, extra={"pool": "benign"})
    most = principles.most_broken(ours, unit, {"loud": -0.1, "calm": -0.2})
    assert [p.id for p in most] == drawn
    assert [p.id for p in principles.most_broken(ours, unit, {"loud": -0.1, "calm": 0.3})][:1] == ["calm"]
    assert principles.most_broken(ours, unit, {"loud": None, "calm": None}) == []


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("critiques.found=calibrated", "principles.by=critic"), 'principles.by = "rule_check"'),
        (("pairs.false_labels=1",), "pairs.false_labels"),
    ],
)
def test_keys_that_do_not_go_together_are_told(run_fake, capsys, sets, says):
    code, _ = run_fake("--dry-run", *(word for one in sets for word in ("--set", one)))
    said = capsys.readouterr().err
    assert code == errors.USAGE and says in said and "Traceback" not in said


@pytest.mark.runs
def test_a_run_draws_its_bar_before_its_labels_and_measures_it(run_fake):
    sets = ("--set", "items=4", "--set", "evaluation.critic_items=12")
    code, run = run_fake("--milestone", "m1", *sets)
    assert code == errors.DONE
    rows = read_jsonl(run / "records.jsonl")
    stages = [row["stage"] for row in rows]
    assert stages.count("label_bar") == len(known_labels.cases())
    assert stages.index("label_bar") < stages.index("labels")
    assert all("bar" in row and "fallen" not in row for row in rows if row["stage"] == "labels")
    figures = json.loads((run / "eval" / "measured.json").read_bytes())["figures"]
    assert figures["labels.known.better"]["n"] == 13 and figures["labels.known.worse"]["n"] > 50
    margins = {r["item"]: r["margin"] for r in read_jsonl(Path(run) / "eval" / "critic.jsonl") if "margin" in r}
    assert margins, "the exam asks whether each revision is better"
    assert figures["critic.recall"]["n"] + figures["critic.false_alarms"]["n"] == 12


@pytest.mark.runs
def test_in_the_exam_a_critique_whose_revision_is_no_better_found_nothing(run_fake, monkeypatch):
    monkeypatch.setattr("cai.evaluate.critic_stage._better", lambda *_: set())
    code, run = run_fake("--milestone", "m1", "--set", "items=4", "--set", "evaluation.critic_items=12")
    assert code == errors.DONE
    figures = json.loads((run / "eval" / "measured.json").read_bytes())["figures"]
    for name in ("critic.recall", "critic.false_alarms", "critic.flaw_gone"):
        assert figures[name]["value"] == 0 and figures[name]["n"] > 0, name


def test_a_recipe_of_before_has_the_identity_of_before():
    sets = ['pairs.label="judge"', 'principles.choice="relevant"', 'critiques.found="calibrated"']
    before = {"pairs.false_labels": 0.0, "principles.by": "rule_check", "pairs.max_added_repetition": 1.0}
    before |= {"principles.over": "known"}
    old = resolve(
        read(ROOT / "cai.toml"), sets=[*sets, *(f"{key}={json.dumps(value)}" for key, value in before.items())]
    )
    assert not set(before) & set(identity(old, {}))
    new = resolve(read(ROOT / "cai.toml"))
    assert set(before) <= set(identity(new, {}))


@pytest.mark.parametrize(("select", "noted"), [("all", False), ("clean", True)])
def test_what_an_sft_stage_is_shown_is_noted_where_it_is_not_what_it_was(select, noted):
    recipe = resolve(read(ROOT / "cai.toml"), sets=['dpo.start="sft"', f'sft.select="{select}"'])
    assert ("sft.select" in identity(recipe, {}, training=True)) is noted
    assert "sft.learning_rate" in identity(recipe, {}, training=True)


def _comparing(over: str, own: int, items: int = 100, known: int = 26, drawn: tuple[int, ...] = ()) -> SimpleNamespace:
    """A run whose calibration has `known` shipped answers with odds around 0 and `own` ones around 4."""
    rows = [{"item": i, "scores": {"loud": float(i % 2)}} for i in range(known)]
    rows += [{"item": principles.FIRST_OWN + i, "scores": {"loud": 4.0 + i % 2}} for i in range(own)]
    return SimpleNamespace(
        recipe=SimpleNamespace(principles=SimpleNamespace(by="critic", over=over), items=items),
        constitution=SimpleNamespace(principles=(Principle("loud", "", "", ""),)),
        log=SimpleNamespace(by_stage=lambda name: rows if name == "calibration" else drawn),
    )


@pytest.mark.parametrize(
    ("own", "mean"), [(0, 0.5), (principles.LEAST_OWN - 1, 0.5), (principles.LEAST_OWN, 4.5), (64, 4.5)]
)
def test_scores_are_compared_over_the_runs_own_answers_where_it_has_enough(own, mean):
    found, spread = principles.spreads(_comparing("run", own))["loud"]
    assert found == pytest.approx(mean, abs=0.1) and spread == pytest.approx(0.5, abs=0.1)


def test_own_answers_are_the_first_tries_of_the_first_slots_and_only_where_asked_for():
    known = len(principles.known_answers())
    assert principles.calibration_items(_comparing("known", 0)) == list(range(known))
    assert principles.calibration_items(_comparing("run", 0, items=3))[known:] == [
        principles.FIRST_OWN + i for i in range(3)
    ]
    assert len(principles.calibration_items(_comparing("run", 0, items=5000))) == known + principles.OWN
    more = principles.calibration_items(_comparing("run", 4, items=40, drawn=(1,)))
    assert len(more) == known + 4, "a run that was given more items compares with what it compared with"
