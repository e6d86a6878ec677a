"""The surface control sees a marker or a length, nothing where labels are drawn, and tests on what it never saw."""

from __future__ import annotations

import random

import pytest

from cai.evaluate import surface
from cai.evaluate.surface import Surface, fit_and_test, visible, widened

SUBJECTS = (
    "bread rises because yeast makes gas", "a kite needs steady wind and a long tail", "frost cracks wet stone",
    "the moon pulls the sea twice a day", "bees find clover by its smell", "glass is sand that was melted",
    "a lever trades distance for force", "old maps drew the coast too wide", "salt lowers the point of freezing",
    "owls turn the head because the eyes stay still", "ink spreads faster on thin paper", "a tuned string has a pitch",
)  # fmt: skip


def text(item: int, salt: str) -> str:
    """Five sentences; those of one item differ in the last, as a revision keeps most of an answer."""
    first, rest = random.Random(f"{item}").sample(SUBJECTS, 5), random.Random(f"{item}/{salt}")
    return ". ".join([*first, rest.choice(SUBJECTS)]).capitalize() + "."


def pairs(first: int, count: int, tail: str = "") -> list[dict]:
    """Pairs of texts from one distribution; `tail` is what every chosen one ends with."""
    return [
        {"item": item, "prompt": "", "chosen": text(item, "a") + tail, "rejected": text(item, "b")}
        for item in range(first, first + count)
    ]


@pytest.mark.runs
def test_a_marker_at_the_end_of_chosen_texts_is_seen_and_named() -> None:
    found = fit_and_test(pairs(0, 30, " ### Case"), pairs(100, 20, " ### Case"))
    assert (found.accuracy, found.n, found.tested_on) == (1.0, 20, "held-out pairs")
    assert found.low is not None and found.low > 0.8
    marker, *_ = [f for f in found.for_chosen if "Case" in f.readable]
    assert marker.readable.endswith(" ### Case") and (marker.chosen, marker.rejected) == (1.0, 0.0)
    assert "in 100% of chosen, 0% of rejected" in marker.line
    assert not any("###" in f.readable for f in found.for_rejected)


@pytest.mark.runs
def test_pairs_whose_labels_are_drawn_by_lot_are_told_by_chance_only() -> None:
    found = fit_and_test(pairs(0, 60), pairs(1000, 200))
    assert found.accuracy is not None and abs(found.accuracy - 0.5) < 0.12


def test_a_length_alone_is_seen() -> None:
    def doubled(rows: list[dict]) -> list[dict]:
        return [row | {"chosen": f"{row['chosen']} {text(row['item'], 'more')}"} for row in rows]

    found = fit_and_test(doubled(pairs(0, 30)), doubled(pairs(100, 20)))
    assert found.accuracy is not None and found.accuracy > 0.9
    assert {"words", "characters"} & {f.text for f in found.for_chosen}


@pytest.mark.runs
def test_the_same_pairs_in_any_order_give_the_same_figures() -> None:
    train, heldout = pairs(0, 12, " Stay safe!"), pairs(100, 6, " Stay safe!")
    assert fit_and_test(train[::-1], heldout[::-1]) == fit_and_test(train, heldout)
    assert fit_and_test(train[::-1], []) == fit_and_test(train, [])


def test_the_prompt_is_never_read() -> None:
    train, heldout = pairs(0, 6, "!"), pairs(100, 3, "!")
    told = [row | {"prompt": f"secret {row['item']}", "instruction": "secret"} for row in train]
    assert fit_and_test(told, heldout) == fit_and_test(train, heldout)


@pytest.mark.runs
def test_without_held_out_pairs_the_training_pairs_are_cross_validated() -> None:
    found = fit_and_test(pairs(0, 12, " ### Case"), [])
    assert (found.accuracy, found.n, found.tested_on) == (1.0, 12, "training pairs, cross-validated")
    lots = fit_and_test(pairs(0, 60), [])
    assert lots.accuracy is not None and 0.3 < lots.accuracy < 0.7  # tested on what it was fitted on it would be 1


@pytest.mark.parametrize(
    ("train", "heldout", "why"),
    [
        ([], pairs(0, 2), "no training pair"),
        (pairs(0, 1), [], "one training pair cannot be cross-validated"),
        ([{"item": 0, "chosen": "same", "rejected": "same"}], [], "two different texts"),
        (pairs(0, 2), [row | {"item": row["item"] + 100} for row in pairs(0, 2)], "every held-out pair has a text"),
    ],
)
def test_what_cannot_be_tested_is_unscored_with_its_reason(train: list, heldout: list, why: str) -> None:
    found = fit_and_test(train, heldout)
    assert (found.accuracy, found.n, found.for_chosen) == (None, 0, ())
    assert why in found.reason
    measured = found.as_measured()
    assert measured.value is None and measured.note == found.reason


def test_one_training_pair_is_enough_for_held_out_pairs() -> None:
    found = fit_and_test(pairs(0, 1, " ### Case"), pairs(100, 5, " ### Case"))
    assert (found.n, found.fitted_on) == (5, 1) and found.accuracy is not None and found.accuracy > 0.5


def test_two_equal_texts_are_a_tie_and_a_known_text_is_not_tested_on() -> None:
    train = pairs(0, 12, "!")
    tie = {"item": 900, "chosen": "The same text.", "rejected": "The same text."}
    assert dict(fit_and_test(train, [tie]).wins) == {900: 0.5}
    known = {"item": 901, "chosen": train[0]["chosen"], "rejected": "A text that nobody knows."}
    assert dict(fit_and_test(train, [tie, known]).wins) == {900: 0.5}


def test_twins_in_the_training_pairs_do_not_vouch_for_each_other() -> None:
    """Ten pairs that are all the same pair: cross-validation would recognise it in every fold."""
    (pair,) = pairs(0, 1)
    found = fit_and_test([pair | {"item": item} for item in range(10)], [])
    assert found.accuracy is None and "share their texts" in found.reason


def test_the_measured_figure_lists_the_features() -> None:
    measured = fit_and_test(pairs(0, 12, " ### Case"), pairs(100, 6, " ### Case")).as_measured("preference.surface")
    assert (measured.value, measured.n, measured.unscored) == (1.0, 6, 0)
    assert any("### Case" in line for line in measured.facts["for_chosen"])
    assert isinstance(Surface(None, None, None, 0, 0, "", reason="x").as_measured().note, str)


def test_of_very_many_training_pairs_a_seeded_part_is_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface, "MOST_PAIRS", 8)
    found = fit_and_test(pairs(0, 20, "!"), pairs(100, 3, "!"))
    assert found.fitted_on == 8
    assert found == fit_and_test(pairs(0, 20, "!")[::-1], pairs(100, 3, "!"))


def test_a_feature_is_widened_to_what_always_stands_around_it() -> None:
    texts = ["One. ### Case", "Two! ### Case", "Three? ### Case"]
    assert widened("##", texts) == " ### Case"
    assert widened("absent", texts) == "absent"
    assert visible("a\n\tb") == "a↵⇥b"
