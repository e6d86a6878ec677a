"""--sweep: every combination of some values, each a run that shares what it can; the table and the frontiers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.runs import read_jsonl

from cai import errors
from cai.commands.experiments.sweep import combinations, of_data, sets_of
from cai.errors import CaiError
from cai.recipe.load import Recipe
from cai.recipe.settings_sweep import SweepSection
from cai.report import sweep
from cai.report.charts import Dot
from cai.report.snapshot import Snapshot
from cai.report.sweep import Point
from cai.training import arms

SMALL = ("--milestone", "m1", "--set", "items=3", "--set", "heldout.items=2", "--set", "evaluation.fresh_items=2")
SMALL += ("--set", "evaluation.critic_items=0", "--set", "evaluation.judge_items=1", "--set", "evaluation.probes=")
VALUES = ("--set", "sweep.beta=[0.1, 0.3]", "--sweep")


def pages(root: Path) -> dict[str, bytes]:
    [folder] = root.glob("sweep-*")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.runs
def test_a_sweep_that_was_killed_goes_on_shares_its_data_and_makes_the_page_of_one_that_was_not(
    run_paper, project, monkeypatch
):
    root, trained, begun = project / "runs", arms.trained, []

    def killed(context, arm):
        begun.append(context.run.path.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return trained(context, arm)

    monkeypatch.setattr(arms, "trained", killed)
    assert run_paper(*SMALL, *VALUES)[0] == errors.SIGINT
    monkeypatch.setattr(arms, "trained", trained)
    assert not list(root.glob("sweep-*"))
    assert run_paper(*SMALL, *VALUES)[0] == errors.DONE
    runs = sorted(path for path in root.glob("2*"))
    assert len(runs) == 2 and [path.name for path in runs] == begun  # the recipe's own run is one of the two
    assert (runs[0] / "records.jsonl").read_bytes() == (runs[1] / "records.jsonl").read_bytes()
    drawn = [event for event in read_jsonl(runs[1] / "events.jsonl") if event["kind"] == "stage"]
    assert not {event["stage"] for event in drawn} & {"instructions", "answers", "critiques", "revisions"}
    made = pages(root)
    assert set(made) == {"sweep.html", "sweep.md", "sweep.json"} and b"dpo.beta" in made["sweep.md"]

    run_paper("--fork", runs[0].name, "--set", "dpo.beta=0.3", fake=())  # the same by hand
    by_hand = root / (root / "latest").readlink()
    assert run_paper("--resume", by_hand.name, fake=())[0] == errors.DONE
    assert (by_hand / "eval" / "measured.json").read_bytes() == (runs[1] / "eval" / "measured.json").read_bytes()
    assert run_paper(*SMALL, *VALUES)[0] == errors.DONE and pages(root) == made


def test_combinations_of_one_data_set_stand_together_and_name_the_keys_they_set():
    recipe = Recipe.model_validate({"sweep": SweepSection(beta=(0.1, 0.3), rounds=(1, 2), seeds=(4,))})
    found = combinations(recipe)
    assert [of_data(one) for one in found] == [(("rounds", 1),)] * 2 + [(("rounds", 2),)] * 2
    assert sets_of(found[1]) == ["rounds=1", "dpo.beta=0.3", "dpo.seeds=[4]"]


def test_a_sweep_of_nothing_and_of_a_value_twice_is_one_clear_line(run_fake, capsys):
    assert run_fake("--sweep")[0] == errors.USAGE
    assert "[sweep]" in capsys.readouterr().err
    assert run_fake("--set", "sweep.seeds=[1, 1]", "--sweep")[0] == errors.USAGE
    assert "sweep.seeds" in capsys.readouterr().err


def dot(x: float, y: float) -> Dot:
    return Dot("", x, y, (x, x), (y, y))


def test_the_frontier_is_what_no_other_is_ahead_of_in_both():
    """(1, 1) is beaten by (0, 1); equal dots beat nobody. Where higher is better (2, 5) is worth its distance."""
    assert sweep.frontier([dot(0, 1), dot(1, 1), dot(2, 0), dot(0, 1)], higher=False) == (0, 3, 2)
    assert sweep.frontier([dot(0, 1), dot(1, 1), dot(2, 5), dot(3, 4)], higher=True) == (0, 2)


def test_a_cell_is_the_mean_with_least_and_most_over_seeds_and_a_failure_is_named():
    points = [
        Point((("dpo.beta", "0.1"),), ("a", "b"), ({"P3": 0.5, "KL": 0.01}, {"P3": 0.7, "KL": 0.03})),
        Point((("dpo.beta", "0.3"),), ("c",), ({"P3": 0.6, "KL": 0.005},)),
        Point((("dpo.beta", "9"),), ("d",), (), ("not finite",)),
    ]
    head, rows = sweep.table(points)
    assert head == ["row", "dpo.beta", "seeds", "P3", "KL", "runs"]
    assert rows[0] == ["1", "0.1", "2", "0.6 (0.5 to 0.7)", "0.02 (0.01 to 0.03)", "a, b"]
    assert rows[2] == ["3", "9", "0", "–", "–", "d, failed: not finite"]
    [chart] = sweep.charts(points, stand_in=False)
    assert chart.name == "frontier-drift" and "rows 2" in chart.summary


def test_the_picture_of_a_frontier_is_drawn_with_its_rows_and_the_same_each_time(tmp_path):
    both = [({"P3": 0.5, "KL": 0.01},), ({"P3": 0.6, "KL": 0.02},)]
    points = [Point((("rounds", str(n)),), (f"r{n}",), of) for n, of in enumerate(both)]
    page = sweep.write(tmp_path, points)
    first = page.read_bytes()
    assert b"<svg" in first and b"KL" in first
    assert (tmp_path / "plots" / "frontier-drift.svg").is_file()
    assert sweep.write(tmp_path, points).read_bytes() == first


def test_without_harmbench_in_every_run_the_frontier_is_of_xstests_unsafe_prompts():
    """It was left out where XSTest alone was on; two measures never share a column."""
    values = {"xstest.over_refusal.tuned": 0.1, "xstest.unsafe_compliance.tuned": 0.3, "harmbench.asr.tuned": 0.2}
    pairs, found = SimpleNamespace(train=[], heldout=[]), []
    for left_out in ((), ("harmbench.asr.tuned",)):
        read = {name: {"value": value} for name, value in values.items() if name not in left_out}
        found.append(sweep.figures_of(cast(Snapshot, SimpleNamespace(figures=read, scores={}, pairs=pairs))))
    assert [of.get("harmful compliance") for of in found] == [0.2, None]
    assert [of["unsafe compliance"] for of in found] == [0.3, 0.3]
    for which, axis in (((0, 0), "harmful compliance"), ((0, 1), "unsafe compliance")):
        points = [Point((("beta", str(n)),), (f"r{n}",), (found[at],)) for n, at in enumerate(which)]
        [chart] = sweep.charts(points, stand_in=False)
        assert chart.summary.startswith(f"{axis} against over-refusal, 2 combinations")


@pytest.mark.parametrize(
    ("tuned", "compliance", "over"),
    [
        ("Sure, here is how.", 1.0, 0.0),
        ("I can't help.", 0.0, 1.0),
        ("It is dangerous to do that.", 0.0, 0.0),
    ],
)
def test_without_benchmarks_refusals_in_fresh_answers_stand_in(tuned, compliance, over):
    heldout = [{"item": 1, "pool": "redteam"}, {"item": 2, "pool": "benign"}]
    scores = {("preference.fresh", item): {"tuned": tuned} for item in (1, 2)}
    read = SimpleNamespace(figures={}, scores=scores, pairs=SimpleNamespace(train=[], heldout=heldout))
    found = sweep.figures_of(cast(Snapshot, read))
    assert (found["harmful compliance"], found["over-refusal"]) == (compliance, over)


@pytest.mark.parametrize(
    ("figures", "stands_in"),
    [
        ({}, True),
        ({"mtbench.score.tuned": {"value": 5.0}}, True),
        ({"xstest.over_refusal.tuned": {"value": None}}, True),
        ({"xstest.over_refusal.tuned": {"value": 0.1}}, False),
        ({"harmbench.asr.tuned": {"value": 0.0}}, False),
    ],
)
def test_a_stand_in_is_what_stands_in_not_what_ran(tmp_path, figures, stands_in):
    """MT-Bench alone hid that the figures are a stand-in; a combination that failed said it of measured ones."""
    heldout = [{"item": 1, "pool": "redteam"}, {"item": 2, "pool": "benign"}]
    scores = {("preference.fresh", item): {"tuned": "Sure, here is how."} for item in (1, 2)}
    read = cast(
        Snapshot, SimpleNamespace(figures=figures, scores=scores, pairs=SimpleNamespace(train=[], heldout=heldout))
    )
    assert sweep.stands_in(read) is stands_in
    measured = Point((("dpo.beta", "0.1"),), ("a",), (sweep.figures_of(read),), stand_in=sweep.stands_in(read))
    failed = Point((("dpo.beta", "9"),), ("b",), (), ("not finite",))
    sweep.write(tmp_path, [measured, failed])
    assert [b"stand-in" in path.read_bytes() for path in sorted(tmp_path.glob("sweep.[hm]*"))] == [stands_in] * 2
    drawn = [Point((("rounds", str(n)),), ("a",), measured.figures, (), measured.stand_in) for n in (1, 2)]
    assert (
        b"stand-in"
        not in sweep.write(
            tmp_path, [Point(p.settings, p.runs, ({"P3": 0.5, "KL": 0.1},), (), True) for p in drawn]
        ).read_bytes()
    )


def test_a_sweep_of_more_runs_than_anybody_wants_is_refused_before_they_are_listed():
    recipe = Recipe.model_validate({"sweep": SweepSection(beta=(0.1, 0.3), seeds=tuple(range(501)))})
    with pytest.raises(CaiError, match="comes to 1,002 runs, at most 1,000"):
        combinations(recipe)
