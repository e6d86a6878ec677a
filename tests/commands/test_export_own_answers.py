"""What the cards of exported adapters say of the own answers that an SFT stage was shown."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.pages import REPO, make_run

from cai.commands.export_arm import ExportedArm
from cai.commands.export_base import base_of
from cai.commands.export_card import model_card
from cai.commands.export_prompt import asking
from cai.report.snapshot import read_story

TOLD = "its own answers to further benign requests"


def cards(path: Path, start: str, answers: int, file: str = "") -> dict[str, str]:
    """Arm -> its card, line breaks taken for blanks."""
    story = read_story(path)
    dpo = story.recipe.dpo.model_copy(update={"start": start})
    sft = story.recipe.sft.model_copy(update={"answers": answers, "enabled": True})
    pairs = story.recipe.pairs.model_copy(update={"file": file})
    told = replace(story, recipe=story.recipe.model_copy(update={"dpo": dpo, "sft": sft, "pairs": pairs}))
    arms = [ExportedArm(name, path / f"adapter-{name}", path / "train" / name) for name in ("", "sft", "from-base")]
    made = {arm.name: model_card(told, base_of(told), asking(told), arm) for arm in arms}
    return {name: " ".join(card.split()) for name, card in made.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = make_run(tmp_path / "runs")
    shutil.copytree(REPO / "prompts", made / "prompts")
    return made


def test_a_card_says_that_an_sft_stage_was_shown_the_models_own_answers(path: Path) -> None:
    found = cards(path, "sft", 4)
    assert f"after a critique under a written principle, and {TOLD}. It is the arm" in found["sft"]
    assert f"trained with supervised fine-tuning on the revisions and {TOLD}, then DPO on " in found[""]
    assert TOLD not in found["from-base"] and "trained with DPO on " in found["from-base"]


@pytest.mark.parametrize(("start", "answers", "file"), [("sft", 0, ""), ("base", 4, ""), ("sft", 4, "mine.jsonl")])
def test_a_card_says_nothing_of_answers_that_nobody_was_shown(path: Path, start: str, answers: int, file: str) -> None:
    found = cards(path, start, answers, file)
    assert not [name for name, card in found.items() if TOLD in card]
    whole = "the chosen ones of a user's file. It" if file else "after a critique under a written principle. It"
    assert whole in found["sft"]
