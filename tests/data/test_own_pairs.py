"""Which of the user's own pairs are trained on, held out, or left out with a reason."""

from __future__ import annotations

import pytest

from cai.data.own_pairs import about, build
from cai.data.slots import HELDOUT
from cai.recipe.intake.pairfile import OwnPair, PairIntake
from cai.recipe.load import Recipe
from cai.recipe.settings import HeldoutSection


def pair(number: int, **other: object) -> OwnPair:
    return OwnPair(f"prompt {number}", f"good {number}", f"bad {number}", "benign", number + 1)._replace(**other)


def recipe(items: int, heldout: int = 0) -> Recipe:
    return Recipe(items=items, heldout=HeldoutSection(items=heldout))


def test_the_first_sound_rows_are_trained_on_and_items_bound_them() -> None:
    rows = [pair(0), pair(1, chosen="bad 1"), pair(0), pair(3), pair(4)]
    found = build(rows, recipe(2))
    assert [example["item"] for example in found.examples] == [0, 3]
    assert found.reasons == {"duplicate": 1, "identical": 1}
    assert [(p["prompt"], p["chosen"], p["rejected"], p["split"]) for p in found.kept] == [
        ("prompt 0", "good 0", "bad 0", "train"),
        ("prompt 3", "good 3", "bad 3", "train"),
    ]


def test_the_same_texts_the_other_way_round_contradict() -> None:
    rows = [pair(0), pair(0, chosen="bad 0", rejected="good 0")]
    assert build(rows, recipe(5)).reasons == {"contradicts": 1}


def test_held_out_rows_are_drawn_by_the_seed_and_more_items_change_none_of_them() -> None:
    rows = [pair(n) for n in range(40)]
    few, many = build(rows, recipe(5, 10)), build(rows, recipe(30, 10))
    held = [p["item"] for p in few.heldout]
    assert held == [p["item"] for p in many.heldout] and len(held) == 10 and min(held) >= HELDOUT
    assert held != list(range(HELDOUT, HELDOUT + 10))  # not the first ones: a file may be sorted
    assert [p["item"] for p in many.train][:5] == [p["item"] for p in few.train]
    other = build(rows, recipe(5, 10).model_copy(update={"seed": 1}))
    assert [p["item"] for p in other.heldout] != held


def test_no_prompt_is_trained_on_and_held_out() -> None:
    rows = [pair(n, prompt=f"prompt {n % 8}") for n in range(40)]
    found = build(rows, recipe(40, 4))
    assert not {p["prompt"] for p in found.train} & {p["prompt"] for p in found.heldout}
    assert found.reasons["prompt_held_out"] > 0
    assert len(found.train) + len(found.heldout) + len(found.rejects) == 40


def test_rows_that_say_they_are_held_out_are_and_no_others() -> None:
    rows = [pair(n, heldout=n >= 7) for n in range(10)]
    found = build(rows, recipe(10, 5))
    assert [p["item"] for p in found.heldout] == [HELDOUT + 7, HELDOUT + 8, HELDOUT + 9]
    assert [p["item"] for p in found.train] == list(range(7))
    assert [p["item"] for p in build(rows, recipe(10, 0)).train] == list(range(7))


def test_what_the_guard_refuses_is_replaced_by_the_next_row() -> None:
    rows = [pair(n) for n in range(6)]
    found = build(rows, recipe(3), {1: "chosen_unsafe"})
    assert [p["item"] for p in found.train] == [0, 2, 3]
    assert found.rejects[0]["detail"] == "chosen_unsafe" and found.reasons == {"guard": 1}
    held = build(rows, recipe(2, 2)).heldout[0]["item"]
    again = build(rows, recipe(2, 2), {held: "chosen_unsafe"})
    assert held not in [p["item"] for p in again.heldout] and len(again.heldout) == 2
    assert again.reasons == {"guard": 1}


def test_an_example_has_the_keys_of_a_generated_one_and_claims_no_chain() -> None:
    example = build([pair(0, margin=2.0)], recipe(1)).examples[0]
    assert {"instruction", "initial_answer", "revised_answer", "preference_pair"} < set(example)
    assert (example["rounds"], example["critique"], example["principle"], example["margin"]) == ([], "", "", 2.0)


@pytest.mark.parametrize(
    ("items", "heldout", "said"),
    [(10, 0, "short: 10 to train on"), (2, 0, "not taken: 3 more; --set items=5"), (5, 0, "taken: 5 to train on")],
)
def test_what_is_taken_left_out_and_short_is_said(items: int, heldout: int, said: str) -> None:
    intake = PairIntake((*(pair(n) for n in range(5)), pair(0)), "JSON lines")
    lines = about(intake, "mine.jsonl", recipe(items, heldout))
    assert any(said in line for line in lines) and "6 pairs" in lines[0]
    assert ("duplicate" in " ".join(lines)) == (items > 5)
