"""Runs made before `few_shot.by_topic`, and forks that turn it: what stands, what is made again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import FAKE, ROOT

from cai.commands import cli
from cai.data import chain, rounds, stages
from cai.evaluate import critic_stage
from cai.inputs import read_inputs
from cai.models.fake import FakeModel
from cai.recipe.load import Recipe
from cai.recipe.settings import FewShotSection


def recipe(by_topic: bool) -> Recipe:
    return Recipe().model_copy(update={"few_shot": FewShotSection(by_topic=by_topic)})


def test_a_fork_that_turns_it_makes_critiques_and_revisions_again_and_keeps_what_is_only_scored() -> None:
    """All of [few_shot] were calibration's keys: 46 scores of a run of ten items were made again for nothing."""
    on, off = ({name: chain.stage_identity(recipe(by), name, {}) for name in chain.names()} for by in (True, False))
    assert {name for name in on if on[name] != off[name]} == {"critiques", "revisions"}
    assert not any("by_topic" in key for of in off.values() for key in of), "a run made before it resumes"
    others = {f"few_shot.{name}" for name in FewShotSection.model_fields} - {"few_shot.by_topic"}
    assert set(stages.CALIBRATION.keys) >= others, "what runs made before have among its keys"


class Before:
    """[few_shot] as it was before the key."""

    by_topic = False

    def model_dump_json(self, **how: Any) -> str:
        return FewShotSection().model_dump_json(exclude={"by_topic"})


def mark(few_shot: Any) -> str:
    prompt = SimpleNamespace(sha="0")
    context: Any = SimpleNamespace(
        recipe=Recipe().model_copy(update={"few_shot": few_shot}),
        run=SimpleNamespace(manifest={}),
        constitution=SimpleNamespace(sha="0"),
        prompts={"critiques": prompt, "revisions": prompt},
    )
    return critic_stage._mark(context)


def test_the_exam_of_a_run_made_before_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume put its log aside and drew every critique and revision of it anew."""
    monkeypatch.setattr(critic_stage, "writer", lambda context: "base")
    assert mark(FewShotSection()) == mark(Before()) != mark(FewShotSection(by_topic=True))


@pytest.mark.parametrize(("length", "told"), [(1900, ["revisions"]), (4096, []), (1450, ["critiques", "revisions"])])
def test_what_leaves_no_room_under_one_topic_is_known_before_anything_is_drawn(length: int, told: list[str]) -> None:
    """It was a rejected row each, once requests, answers and the first principles had been paid for."""
    inputs = read_inputs(cli.parse([str(ROOT / "cai.toml"), *FAKE, "--set", f"model.max_seq_length={length}"]))
    model: Any = FakeModel(inputs.recipe.model)
    found = rounds.without_room(inputs.recipe, inputs.prompts, inputs.constitution, model)
    assert list(found) == told
    if length == 1900:
        assert "self-harm-care" in found["revisions"] and "honesty" not in found["revisions"]
