"""What is taken off a completion before it is judged: also off one that was cut, and what finish it then has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cai.data import chain, stages
from cai.data.stage import Draw, Stage, Unit, judged
from cai.engine import Completion
from cai.recipe.prompts import load_prompt
from tests.conftest import ROOT

KEPT = "Take the plant out of its pot, shorten the dead roots, and set it into dry soil for a week before you water it."
REMARK = "\n\nThis answer is friendly and respectful, and it avoids the insulting tone."
LOOP = " It is important to make sure they feel loved and know that you care for them in every way." * 9
CASE = {"answers": "\n\nInstruction: How do I patch a tyre?", "revisions": "\n\n### Case\nInstruction: How?"}
FIELDS = {"instruction": "How do I save it?", "answer": "Water it.", "critique": "c", "revision_request": "r"}
FIELDS["critique_request"] = "Is it kind?"


def row(stage: Stage, text: str, **changed: str) -> Any:
    names = ("answers", "critiques", "revisions")
    files = {name: ROOT / "prompts" / f"{name}.yaml" for name in names}
    prompts = {name: load_prompt(path, chain.fields_of(name), path.read_bytes()) for name, path in files.items()}
    context: Any = SimpleNamespace(prompts=prompts, recipe=SimpleNamespace(seed=0))
    rendered: Any = SimpleNamespace(sha="0")
    fields = {name: FIELDS[name] for name in sorted(stage.fields)} | changed
    completion = Completion(0, (1,), text, "length")
    return judged(context, Draw(stage, Unit(0, 0, fields), rendered), completion)


@pytest.mark.parametrize("stage", [stages.ANSWERS, stages.REVISIONS], ids=lambda stage: stage.name)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("more", [REMARK, LOOP])
def test_a_remark_or_a_loop_comes_off_whether_the_next_case_followed_or_not(stage: Stage, cut: bool, more: str) -> None:
    found = row(stage, KEPT + more + (CASE[stage.name] if cut else ""))
    assert (found["status"], found["finish"]) == ("ok", "stop"), found["reason"]
    assert found["text"].startswith(KEPT) and "This answer" not in found["text"]
    assert found["text"].count("It is important") == (more == LOOP)
    assert ("cut_at_marker" in found.get("flags", ())) is cut


def test_a_text_that_lost_only_the_request_before_it_still_ran_to_its_limit() -> None:
    request = "How do I save my old plant in the kitchen?"
    found = row(stages.ANSWERS, f"{request} {KEPT}", instruction=request)
    assert (found["text"], found["finish"]) == (KEPT, "length")


CRITIQUE = '"Water it" harms a plant whose roots are drowning, and it would be dead in a week. The pot had to dry.'


@pytest.mark.parametrize("more", ["\n\n### Conclusion\nThe answer had to be declined.", "\n# Solution\nEmpty the pot."])
def test_a_heading_ends_a_critique(more: str) -> None:
    """Of 232 examples of a 1.5B model two had one; a review is prose."""
    found = row(stages.CRITIQUES, CRITIQUE + more)
    assert (found["text"], found["status"], found["finish"]) == (CRITIQUE, "ok", "stop")


def test_a_number_sign_within_a_critique_is_no_heading() -> None:
    said = CRITIQUE + " Rule #1 of the list says so, and #2 as well."
    assert row(stages.CRITIQUES, said)["text"] == said
