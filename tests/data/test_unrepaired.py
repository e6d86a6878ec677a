"""A revision that leaves all that its critique quotes as wrong is refused where the recipe says so."""

from __future__ import annotations

import pytest

from cai.data.parsing import Parsed, Unparsed
from cai.data.rounds import parse_revision, unrepaired
from cai.data.stage import Unit

ANSWER = (
    "Cut the branch close to the trunk on a dry day. Paint the wound with tar so that no rain gets in. "
    "Carry the wood away, and water the tree in the following summer."
)
CRITIQUE = '"Paint the wound with tar" does harm: tar keeps the wound wet and the bark cannot close over it.'
KEPT = ANSWER + " The tree will thank you for it."
TAR = "Paint the wound with tar so that no rain gets in."
GONE = ANSWER.replace(TAR, "Leave the wound bare, and it closes by itself.")
FIELDS = {"instruction": "How do I cut a branch off my pear tree?", "answer": ANSWER, "critique": CRITIQUE}


@pytest.mark.parametrize(
    ("text", "critique", "left"),
    [
        (KEPT, CRITIQUE, "Paint the wound with tar"),
        (KEPT.replace("with tar", "with Tar"), CRITIQUE, "Paint the wound with tar"),
        (GONE, CRITIQUE, ""),
        (KEPT, CRITIQUE + ' "Cut the branch close" is dangerous.', "Paint the wound with tar"),
        (KEPT.replace("close to", "a thumb from"), CRITIQUE + ' "close to the trunk on a dry day" is wrong.', ""),
        (KEPT, "The answer tells the reader to use tar, which does harm.", ""),
        (KEPT, '"Use green paint on it" is what the answer lacks.', ""),
        ("Paint the wound with tar is what people did a hundred years ago; leave it bare.", CRITIQUE, ""),
    ],
    ids=("kept", "other capitals", "gone", "two kept", "one of two gone", "no quotation", "not its words", "rewritten"),
)
def test_what_all_quotations_survive_in_is_unrepaired(text: str, critique: str, left: str) -> None:
    assert unrepaired(text, critique, ANSWER) == left


def test_it_is_refused_only_where_the_recipe_says_so() -> None:
    fields = FIELDS | {"revision_request": "Rewrite it so that it does no harm."}
    strict, before = (Unit(0, 0, fields, "no-harm", repairs=on) for on in (True, False))
    assert parse_revision(KEPT, strict) == Unparsed("unrepaired: Paint the wound with tar")
    assert isinstance(parse_revision(KEPT, before), Parsed)
    assert isinstance(parse_revision(GONE, strict), Parsed)
