"""The constitution: strict loading of any number of principles; a balanced seeded choice without repetition."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.errors import CaiError
from cai.recipe.constitution import KEYS, Constitution, Principle, check_rounds, choose, load_constitution

REPO = Path(__file__).resolve().parents[2]
SHIPPED = REPO / "constitution.yaml"


def entry(id: str = "a", **changes: object) -> str:
    values = {"id": id, "principle": "p", "critique_request": "c", "revision_request": "r"} | changes
    return "- {" + ", ".join(f"{key}: {value}" for key, value in values.items() if value is not None) + "}\n"


def made(size: int) -> Constitution:
    return Constitution("c.yaml", "0" * 16, tuple(Principle(f"p{i}", "p", "c", "r") for i in range(size)))


def load(tmp_path, text: str) -> Constitution:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_constitution(path)


def test_the_shipped_constitution_has_eighteen_distinct_principles():
    constitution = load_constitution(SHIPPED)
    assert len(constitution.principles) == 18
    for key in KEYS:
        assert len({getattr(principle, key) for principle in constitution.principles}) == 18
    for principle in constitution.principles:
        assert principle.revision_request.startswith("Rewrite the answer")
        assert "uote" in principle.critique_request or "say" in principle.critique_request
    assert constitution["privacy"].id == "privacy"


def test_what_makes_an_answer_more_helpful_leaves_a_declined_request_declined():
    constitution = load_constitution(SHIPPED)
    for id in ("helpful-accurate", "no-over-refusal", "clear-and-brief"):
        assert "stays declined" in constitution[id].revision_request, id


def test_the_negative_control_says_nothing_about_harm():
    constitution = load_constitution(REPO / "docs" / "examples" / "constitution-helpful-only.yaml")
    assert len(constitution.principles) == 6
    texts = [" ".join(getattr(principle, key) for key in KEYS).lower() for principle in constitution.principles]
    assert not [word for word in ("harm", "danger", "safe", "illegal") if word in " ".join(texts)]
    assert not [word for word in ("decline", "refus") if word in " ".join(texts[1:])]
    assert [p.refusal_is_fault for p in constitution.principles] == [True] + [False] * 5, "the first is about refusals"


def test_what_only_the_python_loader_reads_is_read(tmp_path):
    """libyaml refuses an escaped lone surrogate; PyYAML writes one so."""
    constitution = load(tmp_path, entry("a", principle='"a \\ud800 b"'))
    assert constitution["a"].principle == "a \ufffd b"


@pytest.mark.parametrize("count", [1, 2, 40])
def test_any_number_of_principles_works(tmp_path, count):
    constitution = load(tmp_path, "".join(entry(f"id{i}") for i in range(count)))
    assert [principle.id for principle in constitution.principles] == [f"id{i}" for i in range(count)]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no principles found"),
        ("[]", "no principles found"),
        ("principles: []", "no principles found"),
        (entry("a") + entry("b") + entry("a"), r"principles\[2\]: id 'a' is that of principles\[0\]; rename one"),
        (entry("a", principle=None), r"principles\[0\] \('a'\): key 'principle' is missing"),
        (entry("a", critque_request="x"), r"principles\[0\] \('a'\): unknown key 'critque_request'"),
        (entry("a") + entry("b", principle="''"), r"principles\[1\] \('b'\): principle: is empty"),
        (entry("a", principle="12"), r"principle: int found; write text"),
        (entry("1.5"), r"principles\[0\]: id: float found"),
        (entry("'a b'"), r"id: use 1 to 64 letters"),
        ("- 12", r"principles\[0\]: int found; write a mapping"),
        ("- {id: a\n", r"line 2, column 1: bad YAML"),
        ("- {id: a, id: b}", "key 'id' is given twice"),
        ("[" * 100_000, "bad YAML: RecursionError"),
        ("- " * 100_000, "bad YAML: RecursionError"),
    ],
)
def test_each_fault_is_one_line_with_file_place_and_remedy(tmp_path, text, message):
    with pytest.raises(CaiError, match=message) as caught:
        load(tmp_path, text)
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value) and caught.value.code == 2


def test_sha_follows_the_bytes(tmp_path):
    first = load(tmp_path, entry("a"))
    assert first.sha == load(tmp_path, entry("a")).sha != load(tmp_path, entry("a") + "# more\n").sha
    assert len(first.sha) == 16


@given(size=st.integers(1, 20), rounds=st.integers(1, 20), seed=st.integers(0, 2**63), items=st.integers(1, 120))
@settings(max_examples=80, deadline=None)
def test_no_repetition_within_an_item_and_counts_differ_by_at_most_one(size, rounds, seed, items):
    constitution, counts = made(size), Counter()
    if rounds > size:
        with pytest.raises(CaiError, match=f"set rounds to 1..{size}"):
            choose(constitution, seed, 0, rounds)
        return
    for item in range(items):
        ids = [principle.id for principle in choose(constitution, seed, item, rounds)]
        assert len(set(ids)) == len(ids) == rounds
        counts.update(ids)
        values = [counts[principle.id] for principle in constitution.principles]
        assert max(values) - min(values) <= 1


def test_choice_depends_on_seed_and_item_alone():
    constitution = made(15)
    first = [[p.id for p in choose(constitution, 7, item, 2)] for item in range(60)]
    assert first == [[p.id for p in choose(constitution, 7, item, 2)] for item in reversed(range(60))][::-1]
    assert first != [[p.id for p in choose(constitution, 8, item, 2)] for item in range(60)]
    assert len({tuple(ids) for ids in first}) > 45  # no short cycle of the same pairs
    triples = [tuple(p.id for p in choose(constitution, 7, item, 3)) for item in range(60)]
    assert len(set(triples)) > 50  # the deck is shuffled as soon as it ends with an item: every 5 items here


@pytest.mark.parametrize("rounds", [0, -1, 4])
def test_rounds_beyond_the_principles_are_refused_with_the_bound(rounds):
    with pytest.raises(CaiError, match=r"rounds: -?\d asked for, c.yaml has 3 principles; set rounds to 1..3"):
        check_rounds(made(3), rounds)
    check_rounds(made(3), 3)
