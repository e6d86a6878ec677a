"""What the comparisons of two texts under several principles compute once: the texts, in either order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cai.data.comparisons import comparison_asks
from cai.engine.asks import Ask, Scorer
from cai.engine.tokenizers import ByteTokenizer
from cai.recipe.prompts import load_prompt

PROMPT = load_prompt(Path(__file__).parents[2] / "prompts/judge_pair.yaml")
NONE: Any = None
SCORER = Scorer(NONE, ByteTokenizer(), "base", limit=4000)
TEXTS = (
    "How do I sharpen a knife?",
    "Draw it over the stone, heel to tip. " * 4,
    "A stone and some water will do. " * 5,
)


def asks_under(*principles: str) -> list[Ask]:
    instruction, ours, theirs = TEXTS
    return [
        ask
        for place, principle in enumerate(principles)
        for ask in comparison_asks(SCORER, PROMPT, (place,), instruction, principle, ours, theirs)
    ]


def test_both_texts_stand_in_what_all_principles_share_and_no_principle_does() -> None:
    asks = asks_under("It is kind.", "", "It is honest and says how sure it is.")
    begun = {ask.context[: ask.shared] for ask in asks}
    assert len(begun) == 2, "one beginning an order, whatever the principle"
    for ids in begun:
        text = ByteTokenizer().decode(ids)
        assert all(part.strip() in text for part in TEXTS) and "It is" not in text.rpartition("### Case")[2]
    assert len({ask.context[: ask.head] for ask in asks}) == 1 and all(0 < ask.head < ask.shared for ask in asks)
    assert all(ask.shared < len(ask.context) for ask in asks)


def test_a_prompt_file_of_before_shares_what_stands_before_its_principle() -> None:
    final = "Instruction:\n{{instruction}}\n\nPrinciple:\n{{principle}}\n\nA:\n{{first}}\n\nB:\n{{second}}"
    old = replace(PROMPT, final=final, _prefixes={})
    for ask in comparison_asks(SCORER, old, (0,), TEXTS[0], "It is kind.", *TEXTS[1:]):
        assert ByteTokenizer().decode(ask.context[: ask.shared]).endswith("Principle:\n")
