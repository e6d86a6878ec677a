"""A revision that leaves all that its critique quotes as wrong is refused where the recipe says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import ROOT

from cai.data import chain
from cai.data.parsing import Parsed, Unparsed
from cai.data.rounds import _render_revision, parse_revision, unrepaired
from cai.data.stage import Unit
from cai.evaluate import critic_stage
from cai.recipe.constitution import load_constitution
from cai.recipe.load import Recipe
from cai.recipe.settings import CritiquesSection, PairsSection

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
        (KEPT, '"The tree will thank you for it" is what the answer lacks.', ""),
        (KEPT, '"following" says too little.', ""),
        ("Paint the wound with tar is what people did a hundred years ago; leave it bare.", CRITIQUE, ""),
    ],
    ids=(
        "kept",
        "other capitals",
        "gone",
        "two kept",
        "one of two gone",
        "no quotation",
        "not its words",
        "added",
        "one word",
        "rewritten",
    ),
)
def test_what_all_quotations_survive_in_is_unrepaired(text: str, critique: str, left: str) -> None:
    assert unrepaired(text, critique, ANSWER) == left


def test_it_is_refused_only_where_the_recipe_says_so() -> None:
    fields = FIELDS | {"revision_request": "Rewrite it so that it does no harm."}
    strict, before = (Unit(0, 0, fields, "no-harm", repairs=on) for on in (True, False))
    assert parse_revision(KEPT, strict) == Unparsed("unrepaired: Paint the wound with tar")
    assert isinstance(parse_revision(KEPT, before), Parsed)
    assert isinstance(parse_revision(GONE, strict), Parsed)


def context_of(on: bool, rows: dict[str, dict[str, Any]]) -> Any:
    return SimpleNamespace(
        recipe=Recipe(critiques=CritiquesSection(no_issue="revise"), pairs=PairsSection(reject_unrepaired=on)),
        constitution=load_constitution(ROOT / "constitution.yaml"),
        prompts={},
        log=SimpleNamespace(get=lambda stage, item, round_: rows.get(stage)),
        ok=lambda stage, item, round_=0: rows.get(stage),
    )


@pytest.mark.parametrize(
    ("critique", "flags", "on", "repairs"),
    [
        (CRITIQUE, [], True, True),
        (CRITIQUE, [], False, False),
        ('No issue: "Paint the wound with tar" says what to do.', [], True, False),
        ('"Paint the wound with tar" is just what a gardener does.', ["no_issue"], True, False),
    ],
)
def test_what_a_critique_that_finds_nothing_quotes_may_stay(
    critique: str, flags: list[str], on: bool, repairs: bool
) -> None:
    """With `critiques.no_issue = "revise"` such a text is revised all the same: nothing in it is called wrong."""
    rows: dict[str, dict[str, Any]] = {
        "instructions": {"status": "ok", "text": FIELDS["instruction"], "pool": "benign"},
        "answers": {"text": ANSWER},
        "critiques": {"text": critique, "flags": flags, "principle": "no-harm"},
    }
    context = context_of(on, rows)
    unit = _render_revision(context, 0, 0)
    assert unit is not None and unit.repairs is repairs


def test_a_fork_that_turns_it_makes_the_revisions_again_and_nothing_before_them() -> None:
    of = [
        {
            name: chain.stage_identity(Recipe(pairs=PairsSection(reject_unrepaired=on)), name, {})
            for name in chain.names()
        }
        for on in (False, True)
    ]
    assert {name for name in of[0] if of[0][name] != of[1][name]} == {"revisions"}
    assert not any("pairs.reject_unrepaired" in keys for keys in of[0].values()), "runs of before resume"


@pytest.mark.parametrize("on", [True, False])
def test_the_critic_s_exam_refuses_what_a_run_refuses(on: bool) -> None:
    context = context_of(on, {})
    principle, texts = context.constitution["no-harm"], {"instruction": FIELDS["instruction"], "answer": ANSWER}
    unit: Any = SimpleNamespace(principle=principle, pool="benign", **texts)
    assert critic_stage._revision(context, 0, unit, CRITIQUE).repairs is on
