"""Near-duplicates by candidates: the decisions of comparing all pairs, in time that grows with the number of texts."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cai.data.instructions import ALL_COMPARED, diversity
from cai.data.near import MOST, BandIndex, NearDuplicates, in_order, mean_nearest, normalise

VOCABULARY = random.Random(7)  # words of this test alone: those of the pages changed the texts with every edit
SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "ot", "us")]
WORDS = ["".join(VOCABULARY.choices(SYLLABLES, k=VOCABULARY.randint(1, 4))) for _ in range(3000)]
SHORT = ["".join(VOCABULARY.choices("abcdefghijklmnopqrstuvwxyz", k=VOCABULARY.randint(2, 3))) for _ in range(150)]


def line(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(6, 22)))


def other_words(draw: random.Random, text: str) -> str:
    found = text.split()
    for _ in range(draw.randint(1, 3)):
        found[draw.randrange(len(found))] = draw.choice(WORDS)
    return " ".join(found)


def other_endings(draw: random.Random, text: str) -> str:
    return " ".join(word + draw.choice(("", "s", "ed", "ing")) for word in text.split())


def other_letters(draw: random.Random, text: str) -> str:
    found = list(text)
    for _ in range(int(len(found) * draw.choice((0.05, 0.1, 0.15)))):
        found[draw.randrange(len(found))] = draw.choice("abcdefghijklmnopqrstuvwxyz")
    return "".join(found)


def decisions(texts: list[str], exact_characters: int) -> list[bool]:
    seen, found = NearDuplicates([], 0.8, exact_characters=exact_characters), []
    for text in texts:
        found.append(bool(seen.nearest(text)))
        if not found[-1]:
            seen.add(text)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, other_words, other_endings, other_letters])
def test_candidates_decide_as_all_pairs_do_on_3000_texts(change: Callable[[random.Random, str], str] | None) -> None:
    """Random texts, and near-duplicates by words, endings and letters: not one decision differs."""
    draw = random.Random(2)
    texts = [line(draw) for _ in range(3000 if change is None else 1500)]
    if change is not None:
        texts += [change(draw, text) for text in texts]
        draw.shuffle(texts)
    every = decisions(texts, 10**12)
    assert decisions(texts, 0) == every
    assert sum(every) < 10 if change is None else sum(every) > 600


@pytest.mark.slow
def test_short_texts_with_other_endings_are_decided_as_all_pairs_do() -> None:
    """ "be from had of" and "bes froms haded ofed" are 0.82 alike and share a quarter of their trigrams."""
    draw = random.Random(4)
    texts = [" ".join(draw.choice(SHORT) for _ in range(draw.randint(4, 7))) for _ in range(1500)]
    texts += [other_endings(draw, text) for text in texts]
    draw.shuffle(texts)
    every = decisions(texts, 10**12)
    assert decisions(texts, 0) == every and sum(every) > 100


@pytest.mark.slow
def test_what_a_text_is_compared_with_hardly_grows_with_what_is_known() -> None:
    """Of 12,000 texts, a new one is compared with fewer than 100 beside the newest, which are not in the index yet."""
    draw = random.Random(3)
    index = BandIndex()
    texts = [in_order(line(draw)) for _ in range(12_000)]
    index.extend(texts)
    compared = [len(index.candidates(in_order(line(draw)))) for _ in range(200)]
    assert sum(compared) / 200 < 100
    assert all(place in index.candidates(texts[place]) for place in range(0, 12_000, 1000))


def test_a_few_texts_are_all_compared_whatever_the_index_would_find() -> None:
    seen = NearDuplicates(["one two three four five six", "seven eight nine"], 0.8)
    assert seen.nearest("six one two three four five") == 1.0 and seen._indexed() is None
    assert seen.nearest("nothing of the kind") == 0.0


def test_texts_of_any_script_and_none_have_keys() -> None:
    texts = ["", "a", "שלום עולם טוב", "写一首关于秋天的诗歌", "🙂 🙂"]
    seen = NearDuplicates(texts, 0.8, exact_characters=0)
    assert seen.nearest("写一首关于秋天的诗歌") == 1.0


@pytest.mark.runs
def test_the_diversity_of_many_texts_asks_a_thousand_and_says_so() -> None:
    draw = random.Random(4)
    few = [line(draw) for _ in range(300)]
    assert "nearest_asked" not in diversity(few)
    many = [f"{text} {number}" for number in range(ALL_COMPARED // 300 + 1) for text in few]
    found = diversity(many)
    assert found["nearest_asked"] == 1000 and 0.9 < found["nearest_neighbour"] <= 1.0


def test_the_mean_over_a_part_is_that_of_the_texts_asked() -> None:
    texts = ["a b c", "a b c", "x y z", "q r s"]
    assert mean_nearest(texts, 4)[1] == 4 and mean_nearest(texts, 2) == (pytest.approx(0.7, abs=0.31), 2)
    assert mean_nearest([], 5) == (0.0, 0) and mean_nearest(["alone"], 5) == (0.0, 1)


def test_texts_of_few_syllables_have_no_more_candidates_and_their_near_ones_are_among_them() -> None:
    """One in six shares two bands by chance there: compared with all of these, time was quadratic again."""
    draw = random.Random(3)
    words = ["".join(draw.choice("bdgklmnst") + draw.choice("aeiou") for _ in range(3)) for _ in range(900)]
    texts = [["explain", *draw.choices(words, k=10)] for _ in range(2500)]
    known = NearDuplicates([" ".join(text) for text in texts], 0.8, exact_characters=0)
    index = known._indexed()
    assert index is not None and index._inside == len(texts)
    for text in draw.sample(texts, 40):
        changed = list(text)
        changed[draw.randrange(1, 11)] = draw.choice(words)
        ordered = in_order(normalise(" ".join(changed)))
        found = index.candidates(ordered)
        assert len(found) <= MOST and found == sorted(set(found))
        assert known.nearest(" ".join(changed)) == known._best(ordered, known.known) > 0
