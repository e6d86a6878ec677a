"""One verdict a critique and one a revision: gate, report, agreement and comparison read the same."""

from __future__ import annotations

import itertools

import pytest
import support.pages  # noqa: F401 - the shared fixtures

from cai.commands.compare import OUTCOMES, side
from cai.evaluate import critiques, revisions
from cai.metrics.figure import Scored, Unscored
from cai.recipe.settings_evaluation import EvaluationSection
from cai.report.agreement import _metric
from cai.report.examples import exhibits, judge_critique, judge_revision
from cai.report.snapshot import read_story
from cai.report.tables import by_principle
from cai.store.jsonl import Row

GOOD = {"g1_words": 20, "g2_echo": 0.1, "g3_copied": 0.0, "g4_grounding": 0.5, "g5_repeated": 0.1, "g6_misquoted": 0.0,
        "g7_only_praise": 0.0}  # fmt: skip
FINE = {"r1_words": 30, "r2_similarity": 0.5, "r3_length_ratio": 1.0, "r4_refuses_benign": 0.0, "r5_quotes": 1.0,
        "r5_quotes_kept": 0.0}  # fmt: skip


def critique_scores(form: bool, csi: float | str | None, j1: float | None) -> dict[str, Row]:
    """`csi`: a value, None (not finite) or "absent" (outside of the sample); the judge's J2 always says yes."""
    passed = [gate for gate in critiques.GATES if form or gate != "g2"]
    one: Row = {"item": 1, "round": 0, "text": "t", "finds_nothing": False}
    found = {"critiques.gates": one | {kind: GOOD | {"pass": passed} for kind in critiques.KINDS}}
    if csi != "absent":
        found["critiques.csi"] = {"item": 1, "round": 0} | dict.fromkeys(critiques.KINDS, csi)
    if j1 is not None:
        found["critiques.judge"] = {"item": 1, "round": 0, "real": {"j1": j1, "j2": 1.0}}
    return found


def revision_scores(form: bool, cri: float | str | None, j3: float | None) -> dict[str, Row]:
    passed = [check for check in revisions.CHECKS if form or check != "r2"]
    found = {
        "revisions.gates": FINE | {"item": 1, "round": 0, "text": "t", "nothing_to_address": False, "pass": passed}
    }
    if cri != "absent":
        found["revisions.cri"] = {"item": 1, "round": 0, "real": cri, "shuffled": cri}
    if j3 is not None:
        found["revisions.judge"] = {"item": 1, "round": 0, "j3": j3, "j4": 0.5}
    return found


SIDES = {
    "critique": (critiques, "critiques.csi", "critiques.meaningful", critique_scores, judge_critique),
    "revision": (revisions, "revisions.cri", "revisions.addresses", revision_scores, judge_revision),
}
CASES = list(
    itertools.product((True, False), (1.0, 0.0, None, "absent"), (1.0, -1.0, None), ("off", "report", "require"))
)


@pytest.mark.parametrize("what", SIDES)
@pytest.mark.parametrize("case", CASES, ids=[str(case) for case in CASES])
def test_the_gates_figure_and_the_reports_verdict_never_differ(what, case):
    form, likelihood, log_odds, judge = case
    module, likelihood_metric, metric, scores_of, shown = SIDES[what]
    section = EvaluationSection(judge=judge)
    scores = scores_of(form, likelihood, log_odds)
    part = metric.split(".")[0]
    rows = [[scores[name]] if name in scores else [] for name in (f"{part}.gates", likelihood_metric, f"{part}.judge")]
    figure = module.summarise(*rows, section, "j")[metric]
    verdict = module.verdict(scores, section)
    assert verdict.decided == ({1.0: True, 0.0: False}[figure.value] if figure.n else None)
    status = shown(scores, section).status
    if likelihood != "absent":
        assert status == {True: "yes", False: "no", None: "unscored"}[verdict.decided]
        assert figure.n + figure.unscored == 1
    else:  # the figure leaves it out; a reader still sees what failed
        assert (figure.n, figure.unscored) == (0, 0) and verdict.decided is None
        refused = not form or (judge == "require" and log_odds == -1.0)
        assert status == ("no" if refused else "unscored")


def test_an_unjudged_critique_is_unscored_where_the_recipe_requires_the_judge():
    scores = critique_scores(True, 1.0, None)
    assert critiques.verdict(scores, EvaluationSection(judge="report")).outcome == Scored(1.0)
    assert critiques.verdict(scores, EvaluationSection(judge="require")).outcome == Unscored("unjudged")
    assert judge_critique(scores, EvaluationSection(judge="require")).status == "unscored"


@pytest.mark.runs
def test_gate_and_report_agree_where_fewer_are_judged_than_scored(run_fake):
    """judge_items < likelihood_items under "require": what was not judged is unscored, for everybody who reads it."""
    sets = ("evaluation.judge='require'", "evaluation.likelihood_items=8", "evaluation.judge_items=3")
    sets += ("evaluation.min_specificity=-9.0", "evaluation.min_response=-9.0")
    sets += ("rounds=1",)  # the report shows the last round, the figure has all
    sets += ("evaluation.max_repeated=1.0",)  # what the fake writes passes
    path = run_fake("--milestone", "m1", *(part for one in sets for part in ("--set", one)))[1]
    snapshot = read_story(path)
    shown = {e.item: e for e in exhibits(snapshot)}
    for what, metric in (("critique", "critiques.meaningful"), ("revision", "revisions.addresses")):
        figure, decided = snapshot.figures[metric], _metric(snapshot, what)
        assert figure["unscored"] > 0, "no text that was scored and not judged: the test shows nothing"
        assert figure["n"] == len(decided) and sum(decided.values()) == round(figure["value"] * figure["n"])
        for item, good in decided.items():
            assert item not in shown or getattr(shown[item], what).status == ("yes" if good else "no")
    both = side(snapshot)
    compared = [OUTCOMES["critique meaningful"](both, item) for item in both.examples]
    assert sum(flag is not None for flag in compared) == sum(row["meaningful_n"] for row in by_principle(snapshot))
    assert {item: flag for item, flag in zip(both.examples, compared, strict=True) if flag is not None} == {
        item: flag for item, flag in _metric(snapshot, "critique").items() if item in both.examples
    }
