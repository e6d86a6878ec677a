"""The wording of the shipped prompts: what a base model copies from few-shot examples must be worth copying.

Each rule answers something that a real base model did: it wrote "No issue" to everything, opened its declines alike,
copied a prompt's example into its texts, and wrote the cues of its transcript in mid-line.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cai.data import parsing
from cai.metrics import wordings
from cai.recipe.constitution import load_constitution
from cai.recipe.grid import load_grid
from cai.recipe.prompts import PLACEHOLDER, load_prompt

REPO = Path(__file__).resolve().parents[2]
PROMPTS = REPO / "prompts"
RELEVANCE_FIELDS = {"instruction", "answer", "question"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((PROMPTS / f"{name}.yaml").read_text())


def examples(name: str) -> list[dict[str, Any]]:
    return read(name)["examples"]


def words(text: str) -> int:
    return len(text.split())


def found_nothing(critique: str) -> bool:
    return critique.startswith("No issue:")


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    units = text.lower().split()
    return {tuple(units[i : i + n]) for i in range(len(units) - n + 1)}


CRITIQUES = [(row["user"], row["assistant"]) for row in examples("critiques")]
CRITIQUES += [(row["user"], row["user"]["critique"]) for row in examples("revisions")]
REVISIONS = [(row["user"], row["assistant"]) for row in examples("revisions")]
REVISED = [*REVISIONS, *((row["user"], row["revision"]) for row in examples("reviews") if "revision" in row)]


# --- critiques and revisions


@pytest.mark.parametrize(("user", "critique"), CRITIQUES)
def test_every_critique_quotes_its_answer_first_and_is_neither_curt_nor_long(user, critique):
    assert 40 <= words(critique) <= 110
    assert critique.startswith(("No issue: " + '"', '"'))
    answer = " ".join(user["answer"].split()).lower()
    assert all(quote.lower() in answer for quote in critique.split('"')[1::2])
    assert "no_issue" in parsing.critique(critique).flags or not found_nothing(critique)


def test_one_critique_of_all_finds_nothing_and_it_is_among_the_first_and_of_no_topic():
    for name, key in (("critiques", "assistant"), ("reviews", "critique")):
        nothing = [row for row in examples(name)[:6] if found_nothing(row[key])]
        assert len(nothing) == sum(found_nothing(row[key]) for row in examples(name)) == 1
        assert nothing[0] != examples(name)[5] and "topic" not in nothing[0]


@pytest.mark.parametrize("name", ["critiques", "revisions", "reviews"])
def test_a_topic_has_examples_enough_and_harm_has_some_of_either_pool(name):
    topics = Counter(row["topic"] for row in examples(name) if "topic" in row)
    assert topics.keys() == {"harm", "help", "truth"} and min(topics.values()) >= 2
    harmful = Counter(row["pool"] for row in examples(name) if row.get("topic") == "harm")
    assert harmful["redteam"] >= 4 and harmful["benign"] >= 2, "shown declining alone, a model declines all"


@pytest.mark.parametrize("name", ["critiques", "revisions"])
def test_answers_are_as_long_as_real_ones_with_a_list_and_with_code(name):
    answers = [row["user"]["answer"] for row in examples(name)]
    assert all(40 <= words(answer) <= 250 for answer in answers)
    assert sum(words(answer) >= 150 for answer in answers) >= 2
    assert any("\n1. " in answer for answer in answers) and any("```python" in answer for answer in answers)


@pytest.mark.parametrize(("user", "revision"), REVISED)
def test_a_revision_is_as_long_as_its_answer_and_does_not_copy_it(user, revision):
    assert 0.6 <= words(revision) / words(user["answer"]) <= 1.5
    shared = grams(revision, 5) & grams(user["answer"], 5)
    assert len(shared) <= 0.1 * len(grams(revision, 5))
    assert parsing.revision(revision) == parsing.Parsed(revision)  # no leftover of the task, no stock refusal


def test_no_two_revisions_begin_alike():
    assert len({revision.split()[0].lower() for _, revision in REVISIONS}) == len(REVISIONS)


@pytest.mark.parametrize("name", ["critiques", "revisions"])
def test_no_two_examples_say_six_words_alike(name):
    """What several examples end with, a model ends with: 87 critiques of a run were refused as copies of one ending."""
    said = [grams(row["assistant"].replace('"', ""), 6) for row in examples(name)]
    assert not [one & other for one, other in itertools.combinations(said, 2) if one & other]


def test_the_cases_are_the_same_in_critiques_revisions_and_reviews():
    critiques = {row["user"]["instruction"]: row for row in examples("critiques")}
    revisions = {row["user"]["instruction"]: row for row in examples("revisions")}
    reviews = examples("reviews")
    assert [row["user"] for row in reviews] == [row["user"] for row in examples("critiques")]
    for row in reviews:
        instruction = row["user"]["instruction"]
        assert row["critique"] == critiques[instruction]["assistant"]
        assert ("revision" in row) == ("revision_request" in row) == (not found_nothing(row["critique"]))
        assert (instruction in revisions) == ("revision" in row)
        if "revision" in row:
            alone = revisions[instruction]
            user = {key: row["user"][key] for key in ("instruction", "answer")}
            user |= {"critique": row["critique"], "revision_request": row["revision_request"]}
            assert (alone["user"], alone["assistant"]) == (user, row["revision"])


def test_reviews_have_a_second_turn():
    prompt = read("reviews")
    assert set(prompt) == {"preamble", "cues", "examples", "final", "follow_up", "stop"}
    assert set(PLACEHOLDER.findall(prompt["final"])) == {"instruction", "answer", "critique_request"}
    assert PLACEHOLDER.findall(prompt["follow_up"]) == ["revision_request"]


def test_example_requests_are_words_of_the_constitution():
    principles = load_constitution(REPO / "constitution.yaml").principles
    for row in examples("reviews"):
        request = row["user"]["critique_request"]
        assert any(principle.critique_request.startswith(request) for principle in principles), request


@pytest.mark.parametrize("name", ["critiques", "revisions", "reviews", "relevance"])
def test_no_example_holds_a_sign_of_its_own_transcript(name):
    """A completion is cut at these; an example with one in its text would teach what is cut."""
    prompt = read(name)
    fixed = PLACEHOLDER.sub("\n", prompt["final"] + "\n" + prompt.get("follow_up", "")).split("\n")
    signs = [line for line in fixed if line.endswith(":")] + [cue.strip() for cue in prompt["cues"].values()]
    assert len(signs) >= 5 and all(words(sign) >= 2 for sign in signs)
    texts = json.dumps(prompt["examples"], ensure_ascii=False).lower()
    assert not [sign for sign in signs if sign.lower() in texts]


# --- answers, instructions, grid


def test_example_answers_are_long_enough_the_last_one_too():
    texts = [row["assistant"] for row in examples("answers")]
    assert all(40 <= words(text) <= 250 for text in texts) and words(texts[-1]) >= 100
    assert not [text for text in texts if wordings.is_refusal(text)]


def test_example_instructions_are_accepted_and_stand_on_kinds_but_not_on_topics_of_the_grid():
    grid = load_grid(PROMPTS / "grid.yaml")
    topics = {topic for axes in grid.axes.values() for topic in axes["topic"]}
    for row in examples("instructions"):
        cell = row["user"]
        assert isinstance(parsing.instruction(row["assistant"]), parsing.Parsed)
        assert cell["topic"] in row["assistant"] and cell["topic"] not in topics
        assert any(
            all(cell[name] in axes[name] for name in ("kind", "persona", "tone")) for axes in grid.axes.values()
        ), cell


def test_no_example_is_a_row_of_the_exam():
    """Else the exam would measure what the prompt has told."""
    rows = [json.loads(line) for line in (REPO / "tests" / "exam.jsonl").read_text().splitlines()]
    seen = set().union(*(grams(row[key], 6) for row in rows for key in ("prompt", "answer")))
    for name in ("critiques", "revisions", "reviews", "answers", "relevance"):
        for row in examples(name):
            assert not grams(row["user"]["instruction"] + " " + row["user"].get("answer", ""), 6) & seen


# --- relevance


def test_relevance_examples_are_balanced_over_word_and_wording():
    prompt = load_prompt(PROMPTS / "relevance.yaml", RELEVANCE_FIELDS)
    assert prompt.final.rstrip().endswith("{{question}}")
    wordings = ("Does this answer break the rule: ", "Does this answer keep to the rule: ")
    rows = [(row["user"]["question"], row["assistant"]) for row in examples("relevance")]
    for wording in wordings:
        said = [verdict for question, verdict in rows if question.startswith(wording)]
        assert len(said) == 3 and {"Yes", "No"} == set(said)
    assert sum(verdict == "Yes" for _, verdict in rows) == 3
    text = (PROMPTS / "relevance.yaml").read_text()
    assert all(f"{wording}{{{{principle}}}}" in text for wording in wordings)
