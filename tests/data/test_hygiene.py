"""Hygiene: what each rule finds and removes, the floor, and that nothing is lost."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.data import hygiene
from cai.data.hygiene import clean, describe, find_leaks, held_back, lines
from cai.recipe.settings_evaluation import HygieneSection as Settings

TOPICS = ["copper", "rivers", "violins", "glaciers", "bakeries", "lanterns"]
TOPICS += ["orchids", "tunnels", "harbours", "magnets", "pepper", "comets"]


def section_of(**keys) -> Settings:
    return Settings(**{"quota_min_pairs": 1} | keys)


def pair(item: int, chosen: str = "", rejected: str = "") -> dict:
    topic = TOPICS[item % len(TOPICS)]
    return {
        "item": item,
        "prompt": f"Tell me about {topic}.",
        "chosen": chosen or f"People value {topic} {item} for many plain reasons known since long ago and told well.",
        "rejected": rejected or f"Nobody ever liked {topic} {item}, and whoever says otherwise lies to you on purpose.",
        "pool": "benign",
        "split": "train",
    }


def leaky(item: int) -> dict:
    topic = TOPICS[item % len(TOPICS)]
    return pair(item, f"Thank you for asking about this. The story of {topic} {item} is long and has many sides to it.")


def rule(result, name: str) -> dict:
    return result.facts["rules"][name]


def test_leaked_opener_is_listed_and_held_to_its_quota():
    pairs = [leaky(i) for i in range(12)] + drawn(12, 0)
    pairs = [row | {"item": i} for i, row in enumerate(pairs)]
    section = section_of(leak_max_share=0.25, evasions=False)
    assert ("opener", "thank you for asking") in {(leak.place, leak.phrase) for leak in find_leaks(pairs, section)}
    result = clean(pairs, section)
    holders = [p for p in result.kept if p["chosen"].startswith("Thank you")]
    assert len(holders) <= 0.25 * len(result.kept)
    assert {row["rule"] for row in result.removed} == {"leaks"}


def test_a_phrase_common_to_both_sides_is_no_leak():
    pairs = [pair(i, f"In short, the {t} is old.", f"In short, the {t} is new.") for i, t in enumerate(TOPICS)]
    assert find_leaks(pairs, section_of()) == []


VOCABULARY = [f"word{i}" for i in range(30)]


def drawn(count: int, opener_in: int, seed: int = 0) -> list[dict]:
    """Both sides of every pair from one source of text; the first `opener_in` chosen begin with the same words."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(VOCABULARY, weights=[1 / (i + 1) for i in range(30)], k=12))

    head = "it is best to "
    return [pair(i, (head if i < opener_in else "") + text(), text()) for i in range(count)]


@pytest.mark.runs
@pytest.mark.parametrize(("count", "opener_in"), [(10, 10), (100, 30), (5000, 600)])
def test_a_leak_is_found_at_every_size_and_chance_is_none(count, opener_in):
    """With no source but chance, phrases of three words stand in 3 of 10 chosen and in no rejected all the time."""
    found = find_leaks(drawn(count, opener_in), Settings())
    assert {leak.phrase for leak in found if leak.place == "opener"} == {"it is best to"}
    assert all("it is best" in leak.phrase or "is best to" in leak.phrase for leak in found)
    draws = range(1 if count > 1000 else 20)
    assert sum(bool(find_leaks(drawn(count, 0, seed), Settings())) for seed in draws) <= 1  # 20 at p = 0.05


def test_lift_alone_takes_chance_for_a_leak():
    draws = [find_leaks(drawn(10, 0, seed), Settings(leak_max_p=1.0)) for seed in range(20)]
    assert sum(map(bool, draws)) >= 4


def test_the_p_of_a_leak_by_hand():
    """In chosen only of 12 pairs, in rejected only of none, one phrase tried: 0.5 ** 12."""
    pairs = [pair(i, f"so it goes word{i}", f"word{i}") for i in range(12)]
    (leak,) = [leak for leak in find_leaks(pairs, Settings()) if leak.phrase == "so it goes"]
    assert leak.p == pytest.approx(0.5**12, rel=0.01)


def test_pairs_that_hold_most_leaks_go_first():
    """Half of the pairs open and close with leaks; dropping those serves both quotas at once."""
    head, tail = "thank you for asking", "hope that helps you"
    pairs = drawn(60, 0)
    for i, row in enumerate(pairs):
        row["chosen"] = f"{head if i < 30 else ''} {row['chosen']} {tail if i < 20 or 30 <= i < 40 else ''}"
    result = clean(pairs, section_of(leak_max_share=0.25, evasions=False))
    assert {row["item"] for row in result.removed} <= set(range(20))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("refusal", "I'm sorry, but I can't help with {} today."),
        ("disclaimer", "The {} is fine for most, yet please consult a doctor before you go on with all that plan."),
        ("hedge", "It depends on the {} and on much else that nobody here could possibly know about in advance."),
        ("truncation", "Many like {}."),
    ],
)
def test_evasion_quota(kind, text):
    evading = [pair(i, text.format(f"{TOPICS[i]} {i}")) for i in range(8)]
    section = section_of(leaks=False, **{f"max_{kind}_share": 0.5})
    result = clean(evading + [pair(i) for i in range(8, 12)], section)
    assert len(result.kept) == 8  # four of eight are left beside the four clean ones
    assert rule(result, "evasions")["removed"] == 4
    assert {row["detail"] for row in result.removed} == {kind}


def test_length_balance_drops_the_longest_first():
    long = [pair(i, "word " * (40 + i)) for i in range(4)]
    short = [pair(i, "A short one.", "word " * 5) for i in range(4, 8)]
    section = section_of(leaks=False, evasions=False, length_balance=True, max_longer_share=0.34)
    result = clean(long + short, section)
    assert sorted(row["item"] for row in result.removed) == [2, 3]


def test_displacement_drops_near_equal_texts():
    same = pair(0, "one two three four five six seven eight nine ten", "one two three four five six seven eight nine x")
    result = clean([same, pair(1), pair(2)], section_of(max_pair_similarity=0.85))
    assert [row["rule"] for row in result.removed] == ["displacement"]


def test_off_counts_but_removes_nothing():
    pairs = [leaky(i) for i in range(12)]
    result = clean(pairs, section_of(enabled=False))
    assert result.kept == pairs
    assert rule(result, "leaks")["marked"] > 0


def test_no_rule_goes_below_the_floor(monkeypatch):
    monkeypatch.setattr(hygiene, "MIN_PAIRS", 10)
    assert len(clean([leaky(i) for i in range(12)], section_of()).kept) == 10


def test_what_all_revisions_share_takes_no_more_than_the_allowed_part_of_them():
    """A quota cannot be met by dropping: the share stays at 100%, and pair after pair would go, down to one."""
    pairs = [leaky(i) for i in range(40)]
    result = clean(pairs, section_of())
    assert len(result.kept) == 20
    assert rule(result, "leaks")["marked"] == 40
    (line,) = held_back(result.facts)
    assert "leaks marked 40 of 40 pairs and removed 20" in line and line in lines(result.facts)
    assert len(clean(pairs, section_of(max_removed_share=0.2)).kept) == 32
    same = [pair(i, f"one two three four {i}", f"one two three four {i} five") for i in range(4)]
    assert (
        len(clean(same, section_of(max_pair_similarity=0.8)).kept) == 1
    )  # not a rule over shares: each pair is at fault


def test_shares_of_few_pairs_remove_nothing():
    result = clean([leaky(i) for i in range(12)], Settings())
    assert len(result.kept) == 12
    assert rule(result, "leaks")["idle"] == "fewer than 20 pairs"


def test_length_only_accuracy_is_reported_both_ways():
    shorter = [pair(i, "short", "much longer text") for i in range(4)]
    assert describe(shorter)["length_only_accuracy"] == 1.0
    assert describe(shorter)["chosen_longer_share"] == 0.0


def test_single_pair_of_m0_stays():
    assert clean([pair(0)], section_of()).kept == [pair(0)]


@pytest.mark.runs
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=80), st.text(max_size=80)), min_size=1, max_size=12))
def test_nothing_is_lost_and_the_floor_holds(texts):
    pairs = [pair(i, a, b) for i, (a, b) in enumerate(texts)]
    result = clean(pairs, section_of(length_balance=True))
    assert len(result.kept) + len(result.removed) == len(pairs)
    assert len(result.kept) >= 1
    assert result == clean(pairs, section_of(length_balance=True))


def test_each_pair_is_measured_once_however_many_rules_ask(monkeypatch: pytest.MonkeyPatch):
    """Both descriptions, four rules and four kinds of evasion: 27 readings of each pair's texts, once."""
    asked = []
    monkeypatch.setattr(hygiene, "rouge_l", lambda left, right: asked.append(left) or 0.5)
    pairs = [leaky(i) for i in range(12)] + drawn(12, 0)
    clean(pairs, section_of(max_pair_similarity=0.9))
    assert len(asked) == len(pairs)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["as", "a", "rule", "Tell", "kelp", "xyz", "it's"]), max_size=14), st.sets(
    st.sampled_from(["as", "a", "rule", "tell", "it's"])))  # fmt: skip
def test_phrases_among_common_words_are_those_of_all_that_hold_no_other(tokens: list[str], common: set[str]):
    text = " ".join(tokens)
    every = hygiene.phrases(text)
    assert hygiene.phrases(text, common) == {entry for entry in every if common.issuperset(entry[1].split(" "))}
    met = {two for two in pairwise(hygiene.words(text)) if len(two[0] + two[1]) % 3}
    assert hygiene.phrases(text, common, met) == {
        entry for entry in hygiene.phrases(text, common) if met.issuperset(pairwise(entry[1].split(" ")))
    }
