"""P3 at equal length is unmeasured where hardly any two answers are near equal length: its line is a guess there."""

from __future__ import annotations

from typing import Any

import pytest
from support.runs import ROOT

from cai.evaluate import head_to_head_figures, preference
from cai.evaluate.gates import decide
from cai.metrics.figure import Figure
from cai.recipe.load import read, resolve

METRIC = "preference.p3.length_controlled"


def row(tuned: int, base: int, log_odds: float, item: int = 0) -> dict[str, Any]:
    return {"item": item, "round": 0, "j4": preference.win(log_odds), "win": preference.win(log_odds),
            "log_odds": log_odds, "tuned_words": tuned, "base_words": base, "tuned": "t", "base": "b"}  # fmt: skip


def controlled(rows: list[dict[str, Any]]) -> Figure:
    return preference.summarise_fresh(rows, "judge")[METRIC]


def status(figure: Figure) -> str:
    gates = resolve(read(ROOT / "cai.toml"), milestone="m2").gates.of("m2")
    return decide(figure, next(gate for gate in gates if gate.metric == METRIC)).status


def test_a_line_read_where_no_answer_lies_is_no_measurement() -> None:
    """A collapsed run: 17 words of 180, and 19 where the base refused in 8. The line gave 0.77, and a PASS."""
    far = [row(17, 180, 0.1) for _ in range(60)] + [row(19, 8, 0.4) for _ in range(36)]
    near = [row(20, 16, 0.2) for _ in range(32)]
    measured, unknown = controlled(far + near), controlled(far + near[:26])
    assert measured.n == 128 and status(measured) == "PASS"
    assert unknown.value is None and status(unknown) == "UNMEASURED"
    assert unknown.note.startswith("26 of 122 answers are near equal length") and "25%" in unknown.note


@pytest.mark.parametrize(("near", "measured"), [(4, False), (5, True)])
def test_a_quarter_is_five_of_the_twenty_that_the_gate_wants(near: int, measured: bool) -> None:
    rows = [row(10, 9, 0.2)] * near + [row(90, 9, 0.2)] * (20 - near)
    assert (controlled(rows).value is not None) == measured
    assert status(controlled(rows)) == ("PASS" if measured else "UNMEASURED")


@pytest.mark.parametrize(
    ("tuned", "base", "measured"),
    [(19, 9, True), (9, 19, True), (20, 9, False), (9, 20, False), (0, 0, True), (0, 1, True), (0, 2, False)],
)
def test_near_is_half_to_twice_both_ends_counted_and_one_answer_may_do(tuned: int, base: int, measured: bool) -> None:
    """Of m0 and m1 a row or two may be judged: few are no reason by themselves, the gate has its minimum_n."""
    assert (controlled([row(tuned, base, 0.3)]).value is not None) == measured


def test_one_ratio_for_all_answers_is_no_equal_length() -> None:
    """Without a spread there is no line: of answers three times as long it gave the plain win rate."""
    assert controlled([row(29, 9, 0.3)] * 30).value is None
    assert controlled([row(9, 9, 0.3)] * 30).value == 1.0


def test_answers_that_are_the_same_text_are_neither_near_nor_far() -> None:
    """An adapter that barely moved is measured; many same answers do not stand for those that differ."""
    same = [row(9, 9, 0.0)] * 90
    assert controlled(same).value == 0.5
    assert controlled([*same, row(9, 10, 0.3), row(90, 9, 0.3)]).value is not None
    unknown = controlled(same + [row(90, 9, 0.3)] * 10)
    assert unknown.value is None and unknown.note.startswith("0 of 10 ")


def test_two_constitutions_and_the_base_prompted_well_are_held_to_it_too() -> None:
    texts = head_to_head_figures.Texts({i: "ours " * 90 for i in range(9)}, {i: "theirs " * 9 for i in range(9)})
    rows = [row(0, 0, 0.3, item) for item in range(8)] + [row(0, 0, 0.3, 8) | {"log_odds": None, "win": None}]
    found = head_to_head_figures.under("all", rows, texts, "judge")
    assert found.wins.value == 1.0 and found.controlled.value is None
    assert found.controlled.metric == "all.wins.length_controlled" and found.controlled.unscored == 1
    assert found.controlled.note.startswith("0 of 8 ")
