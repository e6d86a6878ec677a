"""What a text says of the task that made it: announcements in a model's words, ordinary promises, odd texts in time."""

from __future__ import annotations

import time

import pytest

from cai.metrics.objections import goes_along
from cai.metrics.wordings import leftovers

ODD = {
    "line ends": "b" + "\n" * 20_000 + "a",
    "lines of a space": "b" + "\n " * 10_000 + "a",
    "lines of a mark": "b" + "\n#" * 10_000 + "a",
    "spaces": "b." + " " * 20_000 + "a",
    "no word ends": "no" * 50_000,
    "one word": "is " * 30_000,
    "one script": "的" * 50_000,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_are_searched_in_a_moment(name: str) -> None:
    """The signs of a label went over 5,000 line ends 5,000 times: 7.5 s; of 100,000 nobody saw the end."""
    began = time.process_time()
    assert leftovers(ODD[name]) == ""
    assert goes_along(ODD[name])
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        "I'll provide you with a rewritten version of the answer.",
        "I’ll provide you with a more respectful, rewritten version.",
        "I can offer a revised text of my first answer.",
        "I'll give a corrected version:",
        "I will now write the improved answer",
    ],
)
def test_an_announcement_of_the_rewritten_text_is_one(text: str) -> None:
    assert leftovers(text).startswith("announced: I")


@pytest.mark.parametrize(
    "text",
    [
        "I can give you a new version of the recipe if you tell me who is coming.",
        "I have written a revised budget for you.",
        "I can offer you an updated text of the contract.",
        "I will write a new reply to your landlord.",
        "I can provide a revised version of your letter.",
        "I have provided new sentences for the poem.",
    ],
)
def test_what_somebody_is_promised_is_no_announcement(text: str) -> None:
    assert leftovers(text) == ""


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Yes.\n \n> # Revised answer: no.", "label"),
        ("Yes.\n\n\t Human: and?", "role tag"),
        ("Yes.\n\n-- Rewrite the answer.", "about the task"),
    ],
)
def test_marks_and_empty_lines_before_a_leftover_hide_none(text: str, kind: str) -> None:
    assert leftovers(text).startswith(f"{kind}: ")
