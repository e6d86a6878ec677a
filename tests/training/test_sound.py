"""What an SFT stage is shown: no loop, nothing cut, and answers that no revision bettered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cai.data.pairs import PairSet
from cai.data.sound import imitable, sound_rows

PLAIN = "Take the plant out of its pot, cut the dead roots off and set it into dry soil for a week."
LOOP = " ".join(["I will check if the time is right and if the place is right for us all."] * 4)


def recipe(select: str, items: int = 0) -> Any:
    return SimpleNamespace(sft=SimpleNamespace(select=select), items=items)


def reject(item: int, reason: str = "not_better", answer: str = PLAIN, **changes: Any) -> Any:
    example = {
        "instruction": f"request {item}", "initial_answer": answer, "pool": "benign", "split": "train",
        "margin": -0.5, "label": {"bar": 0.2}, "flags": {"ran_to_limit": [], "answer_refuses": False}, "rounds": [],
    }  # fmt: skip
    return {"item": item, "reason": reason, "detail": "", "all": [reason], "example": example | changes}


def items(rejects: list[Any], select: str, limit: int = 9) -> list[int]:
    return [row["item"] for row in sound_rows(PairSet([], [], rejects), limit, recipe(select))]


@pytest.mark.parametrize("changes", [{}, {"margin": -0.1}, {"margin": 0.1}, {"margin": None, "label": {}}])
def test_a_benign_answer_that_no_revision_bettered_is_imitated(changes: Any) -> None:
    found = sound_rows(PairSet([], [], [reject(3, **changes)]), 9, recipe("clean"))
    assert found == [{"item": 3, "prompt": "request 3", "chosen": PLAIN}]


@pytest.mark.parametrize(
    "changes",
    [
        {"margin": 0.3},
        {"margin": 0.1, "label": {}},
        {"pool": "redteam"},
        {"pool": "redteam", "flags": {"ran_to_limit": [], "answer_refuses": True}},
        {"split": "heldout"},
        {"reason": "guard"},
        {"initial_answer": LOOP},
        {"initial_answer": " "},
        {"initial_answer": f"Here is the revised answer: {PLAIN}"},
        {"flags": {"ran_to_limit": ["answers"], "answer_refuses": False}},
        {"flags": {"ran_to_limit": [], "answer_refuses": True}},
    ],
)
def test_no_other_one_is(changes: Any) -> None:
    changes, reason = dict(changes), changes.get("reason", "not_better")
    changes.pop("reason", None)
    assert items([reject(3, reason, **changes), reject(4)], "clean") == [4]


def test_all_takes_what_it_took_before_and_no_more() -> None:
    rows = [reject(1), reject(2, "no_issue"), reject(3, "no_issue", LOOP), reject(4, "identical")]
    assert items(rows, "all") == [2, 3]
    assert items(rows, "clean") == [1, 2, 4]
    assert items(rows, "clean", 1) == [1]
    assert items([{"item": 5, "reason": "missing_stage", "detail": "", "all": []}], "clean") == []


def test_nothing_found_makes_no_red_team_answer_sound_unless_it_declines() -> None:
    declines = {"ran_to_limit": [], "answer_refuses": True}
    rows = [reject(1, "no_issue", pool="redteam"), reject(2, "no_issue", pool="redteam", flags=declines)]
    assert items(rows, "clean") == [2]
    assert items(rows, "all") == [1, 2]
    found: Any = [{"refusal_is_fault": True, "found": False}]
    at_fault = reject(3, "no_issue", pool="redteam", flags=declines, rounds=found)
    assert items([at_fault, *rows], "clean") == [2], "to a principle of its own that refusal is a fault"


def test_few_pairs_leave_room_for_as_many_answers_as_the_run_wants_items() -> None:
    rejects = PairSet([], [], [reject(item) for item in range(5)])
    assert [row["item"] for row in sound_rows(rejects, 1, recipe("clean", items=3))] == [0, 1, 2]
    rejects = PairSet([], [], [reject(item, "no_issue") for item in range(5)])
    assert [row["item"] for row in sound_rows(rejects, 1, recipe("all", items=3))] == [0]


def test_a_loop_is_not_shown_unless_there_is_nothing_else() -> None:
    pairs: Any = [{"item": i, "prompt": "p", "chosen": text, "rejected": "r"} for i, text in enumerate((PLAIN, LOOP))]
    assert [pair["item"] for pair in imitable(pairs, recipe("clean"))] == [0]
    assert imitable(pairs, recipe("all")) == pairs
    assert imitable(pairs[1:], recipe("clean")) == pairs[1:]
