"""A revision that says its critique's judgement word for word is no answer; the matter of a critique may stand."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from support.runs import ROOT

from cai.data import parsing
from cai.data.pairs import find_faults
from cai.data.parsing import Parsed, Unparsed
from cai.data.stage import Unit
from cai.data.stages import REVISIONS
from cai.recipe.settings import PairsSection

ANSWER = "Cats eat twice a day. Keep it in a cool place, not in the bedroom."
CRITIQUE = (
    "The reader would wrongly rely on this claim. The food must be fresh and the bowl must be clean every day. "
    '"Keep it in a cool place, not in the bedroom" is not true for dry food. The answer leaves out water.'
)
SOUND = "Cats eat twice a day. The food must be fresh and the bowl must be clean every day. Put water beside it."


def test_what_a_critique_says_of_the_matter_may_stand_in_the_new_answer() -> None:
    assert parsing.revision(SOUND, CRITIQUE, ANSWER) == Parsed(SOUND, ())


@pytest.mark.parametrize(
    "copied",
    [
        "The reader would wrongly rely on this claim.",
        "the reader would wrongly rely on this claim!",
        '"Keep it in a cool place, not in the bedroom" is not true for dry food.',
    ],
)
def test_its_judgement_may_not(copied: str) -> None:
    found = parsing.revision(f"{SOUND} {copied} Call a vet.", CRITIQUE, ANSWER)
    assert isinstance(found, Unparsed)
    assert found.reason.startswith("copied_critique: ")
    assert copied[:20] in found.reason


@pytest.mark.parametrize(
    "judged",
    [
        "The fake note is not true because it is not a sick note.",
        "The person would be harmed by believing it, and you could get in trouble.",
        "The advice to raise your voice carefully is the best advice.",
        "Cheating in an exam is false.",
        "The advice leaves out a dose and a date.",
        "Nothing of this is the best advice for a child.",
        "Many people were misled by believing the old label.",
        "A child would be deceived if it took this to heart.",
        "That story of the moon isn't true at all.",
        "This number of grams a day is incorrect.",
        "What it gives of the dose was misleading.",
    ],
)
def test_what_is_true_and_who_is_hurt_is_a_judgement_too(judged: str) -> None:
    """Each closed a revision of a 1.5B model."""
    assert isinstance(parsing.revision(f"{SOUND} {judged}", f"It is vague. {judged}", ANSWER), Unparsed)
    assert parsing.verdict_of_critique(f"{SOUND} {judged}", "It is vague.", ANSWER) == ""


def test_what_harms_is_the_matter() -> None:
    said = "Children can be harmed by lead paint."
    assert parsing.verdict_of_critique(f"{SOUND} {said}", f"It is vague. {said}", ANSWER) == ""


@pytest.mark.parametrize(
    ("sentence", "critique", "case"),
    [
        ("The reader would wrongly rely on this claim.", "It is vague.", ANSWER),  # its own words
        ("The answer leaves out water.", CRITIQUE, ANSWER),  # too short to be known again
        ("You can file the claim within thirty days.", 'It should say "You can file the claim within thirty days."',
         ANSWER),  # what the critique wants to stand there
        ("Readers of this letter should reply by Monday.", "Readers of this letter should reply by Monday.",
         "Write: Readers of this letter should reply by Monday."),
    ],
)  # fmt: skip
def test_words_of_its_own_or_of_the_case_are_no_copy(sentence: str, critique: str, case: str) -> None:
    assert parsing.verdict_of_critique(f"{SOUND} {sentence}", critique, case) == ""


def test_no_example_of_the_prompts_is_one() -> None:
    examples = yaml.safe_load((ROOT / "prompts" / "revisions.yaml").read_text())["examples"]
    assert len(examples) >= 4
    for one in examples:
        case = f"{one['user']['instruction']}\n{one['user']['answer']}"
        assert parsing.verdict_of_critique(one["assistant"], one["user"]["critique"], case) == ""


def test_no_pair_is_made_of_one_that_was_drawn_before_the_rule() -> None:
    example: Any = {
        "instruction": "How often do cats eat?", "initial_answer": ANSWER, "pool": "benign",
        "revised_answer": f"{SOUND} The reader would wrongly rely on this claim.", "rounds": [{"critique": CRITIQUE}],
        "flags": {"ran_to_limit": [], "revision_refuses": False},
    }  # fmt: skip
    config = PairsSection()
    assert find_faults(example, config)[0] == (
        "leftovers",
        "of its critique: The reader would wrongly rely on this claim.",
    )
    assert find_faults(example | {"revised_answer": SOUND}, config) == []


@pytest.mark.parametrize("heading", ["### Conclusion", "## Final New Answer", "###### Why"])
def test_a_cut_leaves_no_heading_without_its_text(heading: str) -> None:
    text = f"{SOUND}\n\n{heading}\n\nThis answer takes the reader seriously and explains what to do."
    assert parsing.bare(text, "How often do cats eat?") == SOUND


@pytest.mark.parametrize("heading", ["### Start of new answer:", "## Final New Answer", "### The revised answer"])
def test_a_heading_that_announces_the_new_answer_is_refused(heading: str) -> None:
    assert isinstance(parsing.revision(f"{SOUND}\n\n{heading}\nCats eat twice."), Unparsed)
    assert parsing.revision(f"{SOUND}\n\n### A new way to answer\nAsk it.") == Parsed(
        f"{SOUND}\n\n### A new way to answer\nAsk it.", ()
    )


def test_the_wording_of_its_request_is_no_answer() -> None:
    request = "Rewrite the answer. Decline that part in a sentence, say why, and offer what can be given safely."
    fields = {"instruction": "How?", "answer": ANSWER, "critique": CRITIQUE, "revision_request": request}
    assert REVISIONS.parse is not None
    found = REVISIONS.parse(f"{SOUND} Decline that part in a sentence, say why, and offer tea.", Unit(0, 0, fields))
    assert found == Unparsed("copied_request: decline that part in a sentence say why and offer")
    assert REVISIONS.parse(f"{SOUND} Decline that part in a sentence.", Unit(0, 0, fields)) == Parsed(
        f"{SOUND} Decline that part in a sentence.", ()
    )
    quoted = fields | {"instruction": "Explain: decline that part in a sentence, say why, and offer"}
    found = REVISIONS.parse(f"{SOUND} Decline that part in a sentence, say why, and offer tea.", Unit(0, 0, quoted))
    assert isinstance(found, Parsed)
