"""Overlap with benchmarks: each rule, what is listed, and a whole run whose contaminated pairs are not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.benchmarks import write_files
from support.runs import read_jsonl

from cai import errors
from cai.data.contamination import BenchmarkText, OverlapIndex, check_inputs, clean, words

Runner = Callable[..., tuple[int, Path]]
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
SHORT, LESS = "How do I beat a rug in the yard?", "Why isn't it so?"
MORE = " ".join(f"{letter}{number}" for number in range(3) for letter in "abcdefg")  # 21 words, 19 trigrams
INDEX = OverlapIndex(
    [BenchmarkText("b", name, text) for name, text in (("1", SHORT), ("long", LONG), ("less", LESS), ("more", MORE))]
)


@pytest.fixture
def run_fake(run_paper):
    return run_paper


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("how do i  BEAT a rug, in the yard", "exact"),
        (f"And then {LONG.split(' three ')[0]} three {' '.join(LONG.split()[3:15])} zzz", "13-gram"),
        (" ".join(LONG.split()[:12]) + " and something quite different follows here", None),
        ("So how do I beat a rug in the yard?", "contained"),
        (f"Please be kind and tell me the following. {SHORT} Keep it short and answer in French.", "contained"),
        ("How do I wash a rug in the yard?", "one word"),
        ("How do I beat a rug in the garden?", "one word"),
        ("How do I beat a rug in yard?", "one word"),
        ("How do I really beat a rug in the yard?", "one word"),
        ("How do I wash a rug in the garden?", None),
        ("why isnt it so", "exact"),
        ("Then why isn't it so?", None),  # too short to be told from a turn of phrase
        (" ".join(["zero", *MORE.split()[1:]]), "13-gram"),
        (" ".join(word if number != 10 else "zero" for number, word in enumerate(MORE.split())), "similar"),
        ("How do I bake a cake?", None),
        ("", None),
    ],
)
def test_rules(text: str, rule: str | None) -> None:
    found = INDEX.find(text)
    assert (found.rule if found else None) == rule


@pytest.mark.parametrize(
    "text",
    [
        "ＨＯＷ　ＤＯ　Ｉ　ＢＥＡＴ　Ａ　ＲＵＧ　ＩＮ　ＴＨＥ　ＹＡＲＤ？",
        SHORT.replace("e", "e\u200b").replace("a", "\u00ada"),
        SHORT.replace("a", "á"),
        SHORT.replace("a", "a\u0301"),
        SHORT.replace(" ", "_"),
        SHORT.replace(" ", "\u00a0\n"),
        "\u202e" + SHORT.upper(),
    ],
)
def test_another_spelling_of_the_same_words_is_the_same(text: str) -> None:
    found = INDEX.find(text)
    assert found is not None and (found.rule, found.name) == ("exact", "1")


def test_similarity_is_the_exact_jaccard_of_trigrams() -> None:
    """21 words have 19 trigrams; another word in the middle takes away three and brings three: 16 / 22."""
    found = INDEX.find(" ".join(word if number != 10 else "zero" for number, word in enumerate(MORE.split())))
    assert found is not None and found.value == pytest.approx(16 / 22, abs=1e-4)


@given(st.text(max_size=200))
def test_a_benchmark_text_always_meets_itself(text: str) -> None:
    found = OverlapIndex([BenchmarkText("b", "n", text)]).find(text)
    assert (found is not None) == bool(words(text))


def test_removed_pairs_name_the_row_and_never_the_text() -> None:
    pairs = [
        {"item": 1, "prompt": "How do I beat a rug in the yard", "chosen": "a", "rejected": "b"},
        {"item": 2, "prompt": "p", "chosen": LONG, "rejected": "b"},
        {"item": 3, "prompt": "p", "chosen": "c", "rejected": "d"},
    ]
    kept, removed = clean(pairs, INDEX)
    assert [pair["item"] for pair in kept] == [3]
    assert [(row["item"], row["part"], row["benchmark"], row["name"]) for row in removed] == [
        (1, "prompt", "b", "1"),
        (2, "chosen", "b", "long"),
    ]
    assert "rug" not in json.dumps(removed)


def test_few_shots_and_principles_are_listed() -> None:
    assert [row["input"] for row in check_inputs({"a": LONG, "b": "nothing of it"}, INDEX)] == ["a"]


@pytest.mark.runs
def test_a_contaminated_pair_of_a_run_is_not_trained_on(run_fake: Runner, project: Path) -> None:
    files = write_files(project)
    own = ["How do I kill a process?", "Why is the sea salty in summer?", "Write a poem about one lost glove."]
    (project / "mine.txt").write_text("\n".join(own))
    on = ("--set", "instructions.file=mine.txt", "--set", "items=3", "--set", "benchmarks.contamination=true")
    code, run = run_fake("--milestone", "m1", *on, *files)
    assert code == errors.DONE
    prompts = [row["prompt"] for row in read_jsonl(run / "dataset/pairs/train.jsonl")]
    assert own[0] not in prompts and len(prompts) == 2
    content = json.loads((run / "eval/contamination.json").read_text())
    assert content["figures"]["contamination.removed"]["value"] == 1
    assert content["removed"][0]["benchmark"] == "xstest" and content["removed"][0]["rule"] == "exact"
    assert content["checked"] == {"harmbench": 3, "mtbench": 3, "xstest": 4} and not content["inputs"]


@pytest.mark.runs
def test_a_benchmark_that_is_not_at_hand_is_named_as_not_checked(
    run_fake: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    code, run = run_fake("--milestone", "m0", "--set", "benchmarks.contamination=true")
    content = json.loads((run / "eval/contamination.json").read_text())
    assert code == errors.DONE and content["not_checked"] == ["harmbench", "xstest", "mtbench"]
    assert content["figures"]["contamination.removed"]["value"] is None
    assert "not checked" in capsys.readouterr().out


def test_vowel_signs_tell_words_apart_and_accents_do_not() -> None:
    assert words("नहीं") != words("नहा") and len(words("घर पर रोटी")) == 3
    assert words("Déjà vu") == words("deja vu")
