"""What the comparisons of two texts under several principles compute once: the texts, in either order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai.data.comparisons import PAIR_FIELDS, comparison_asks
from cai.engine import ScoreRequest
from cai.engine.asks import Ask, Scorer
from cai.engine.native.nesting import by_prefix
from cai.engine.tokenizers import ByteTokenizer
from cai.errors import CaiError
from cai.recipe.prompts import Prompt, load_prompt

SHIPPED = load_prompt(Path(__file__).parents[2] / "prompts/judge_pair.yaml")
PARTS = {"principle": "Principle:", "first": "A:", "second": "B:"}


def ordered(*names: str) -> Prompt:
    """The comparison with its fields in this order, behind the instruction."""
    final = "\n\n".join(["Instruction:\n{{instruction}}", *(f"{PARTS[name]}\n{{{{{name}}}}}" for name in names)])
    return replace(SHIPPED, final=final, _prefixes={})


NONE: Any = None
SCORER = Scorer(NONE, ByteTokenizer(), "base", limit=4000)
TEXTS = (
    "How do I sharpen a knife?",
    "Draw it over the stone, heel to tip. " * 4,
    "A stone and some water will do. " * 5,
)


def asks_under(prompt: Prompt, *principles: str) -> list[Ask]:
    instruction, ours, theirs = TEXTS
    return [
        ask
        for place, principle in enumerate(principles)
        for ask in comparison_asks(SCORER, prompt, (place,), instruction, principle, ours, theirs)
    ]


def test_both_texts_stand_in_what_all_principles_share_and_no_principle_does() -> None:
    asks = asks_under(
        ordered("first", "second", "principle"), "It is kind.", "", "It is honest and says how sure it is."
    )
    begun = {ask.context[: ask.shared] for ask in asks}
    assert len(begun) == 2, "one beginning an order, whatever the principle"
    for ids in begun:
        text = ByteTokenizer().decode(ids)
        assert all(part.strip() in text for part in TEXTS) and "It is" not in text.rpartition("### Case")[2]
    assert len({ask.context[: ask.head] for ask in asks}) == 1 and all(0 < ask.head < ask.shared for ask in asks)
    assert all(ask.shared < len(ask.context) for ask in asks)


@pytest.mark.parametrize("prompt", [SHIPPED, ordered("principle", "first", "second")])
def test_where_the_principle_stands_before_the_texts_all_cases_share_the_head_and_no_case_has_a_pass_of_its_own(
    prompt: Prompt,
) -> None:
    head = len(prompt.render(dict.fromkeys(PAIR_FIELDS, "x"), format="base", tokenizer=ByteTokenizer()).token_ids)
    asks = comparison_asks(SCORER, prompt, (0,), TEXTS[0], "It is kind.", *TEXTS[1:])
    assert {(ask.shared, ask.head) for ask in asks} == {(asks[0].shared, 0)} and 0 < asks[0].shared < head
    assert "knife" not in ByteTokenizer().decode(asks[0].context[: asks[0].shared]), "not the case's instruction"


@pytest.mark.parametrize(
    "names",
    [("first", "second", "principle"), ("principle", "first", "second"), ("principle", "first", "principle", "second")],
)
@pytest.mark.parametrize("principle", ["?", "? Is it", "It is kind.", "Être poli. 礼"])
def test_wherever_the_principle_stands_what_is_shared_is_never_the_whole_and_begins_every_ask(
    names: tuple[str, ...], principle: str
) -> None:
    """`?` stands for another principle; one that is it shares all but its last token, and the engine's groups hold."""
    asks = asks_under(ordered(*names), principle, "", "It is honest.")
    requests = [ScoreRequest(i, ask.context, ask.continuation, ask.shared, ask.head) for i, ask in enumerate(asks)]
    groups = list(by_prefix(requests))
    assert sorted(request.id for _, group in groups for request in group) == list(range(len(asks)))
    for prefix, group in groups:
        for request in group:
            assert request.context_ids[: len(prefix.token_ids)] == prefix.token_ids != request.context_ids


def test_a_file_without_the_principle_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "judge_pair.yaml"
    text = (Path(__file__).parents[2] / "prompts/judge_pair.yaml").read_text()
    path.write_text(text.replace("  Principle:\n  {{principle}}\n\n", ""))
    with pytest.raises(CaiError, match=r"placeholder \{\{principle\}\} is not used; add it to the text"):
        load_prompt(path, PAIR_FIELDS)
