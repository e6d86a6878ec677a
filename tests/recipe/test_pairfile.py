"""pairs.file: the shapes in which people have preference pairs are read rightly, all else is one line with a remedy."""

from __future__ import annotations

import gzip
from typing import Any

import orjson
import pytest

from cai.commands.export_pairs import messages
from cai.errors import CaiError
from cai.recipe.intake.pairfile import OwnPair, PairIntake, read

P, C, R = "Which bolt fits?", "An M6 of 20 mm.", "Any."
PLAIN = {"prompt": P, "chosen": C, "rejected": R}
USER, GOOD, BAD = ({"role": "user", "content": P}, {"role": "assistant", "content": C},
                   {"role": "assistant", "content": R})  # fmt: skip


def lines(*rows: Any) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def texts(found: PairIntake) -> list[tuple[str, str, str]]:
    return [(row.prompt, row.chosen, row.rejected) for row in found.rows]


SHAPES: dict[str, Any] = {
    "TRL, plain strings": PLAIN,
    "TRL, conversations": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, the prompt within both": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "the prompt as a string, the rest as conversations": {"prompt": P, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "LLaMA-Factory, Alpaca": {"instruction": P, "input": "", "chosen": C, "rejected": R},
    "LLaMA-Factory, two outputs": {"instruction": P, "input": "", "output": [C, R]},
    "LLaMA-Factory, ShareGPT": {
        "conversations": [{"from": "human", "value": P}],
        "chosen": {"from": "gpt", "value": C},
        "rejected": {"from": "gpt", "value": R},
    },
    "HH-RLHF": {"chosen": f"\n\nHuman: {P}\n\nAssistant: {C}", "rejected": f"\n\nHuman: {P}\n\nAssistant: {R}"},
    "HH-RLHF with its prompt": {"prompt": f"\n\nHuman: {P}\n\nAssistant:", "chosen": f" {C}", "rejected": R},
    "a run's pairs": {**PLAIN, "item": 3, "pool": "benign"},
    "a run's conversational pairs": messages({**PLAIN, "item": 3, "pool": "benign"}),
    "a run's examples": {
        "instruction": P,
        "initial_answer": R,
        "revised_answer": C,
        "preference_pair": PLAIN,
        "item": 3,
    },
    "keys in another case": {"Prompt": P, "Chosen": C, "Rejected": R},
    "text parts": {
        "prompt": P,
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": C}]}],
        "rejected": R,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_is_read_from_every_common_shape(shape: str) -> None:
    found = read(lines(SHAPES[shape]), "mine.jsonl")
    assert texts(found) == [(P, C, R)]
    assert found.rows[0].fault == "" and found.rows[0].line == 1


@pytest.mark.parametrize(
    "data",
    [
        orjson.dumps([PLAIN, PLAIN]),
        orjson.dumps({"data": [PLAIN, PLAIN]}),
        lines(PLAIN, PLAIN).replace(b"\n", b"\r\n"),
        gzip.compress(lines(PLAIN, PLAIN)),
        "\ufeff".encode() + lines(PLAIN, PLAIN),
        f'prompt,chosen,rejected\n"{P}","{C}",{R}\n{P},{C},{R}\n'.encode(),
    ],
    ids=["array", "object", "line ends", "gzip", "mark", "CSV"],
)
def test_the_file_around_the_pairs_is_read_too(data: bytes) -> None:
    assert texts(read(data, "mine")) == [(P, C, R)] * 2


def test_a_context_belongs_to_its_prompt_and_a_system_prompt_is_told() -> None:
    found = read(
        lines({"instruction": P, "input": "It is metal.", "chosen": C, "rejected": R, "system": "Be kind."}), "m"
    )
    assert found.rows[0].prompt == f"{P}\n\nIt is metal."
    assert any("system prompt" in note for note in found.notes) and any("joined" in note for note in found.notes)


def test_pool_split_and_margin_are_taken_and_a_row_without_pool_takes_the_recipes() -> None:
    rows = [{**PLAIN, "pool": "redteam", "split": "test", "margin": 1.5}, {**PLAIN, "split": "train"}]
    one, two = read(lines(*rows), "m").rows
    assert (one.pool, one.heldout, one.margin) == ("redteam", True, 1.5)
    assert (two.pool, two.heldout, two.margin) == ("benign", False, None)
    assert read(lines(PLAIN), "m", pool="redteam").rows[0].pool == "redteam"


ASIDE = {
    "more_turns": {"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": [BAD]},
    "empty_prompt": {**PLAIN, "prompt": " "},
    "empty_chosen": {**PLAIN, "chosen": ""},
    "empty_rejected": {**PLAIN, "rejected": "\n"},
}


@pytest.mark.parametrize("why", ASIDE)
def test_a_row_that_cannot_be_trained_on_is_set_aside_with_its_reason(why: str) -> None:
    found = read(lines(PLAIN, ASIDE[why]), "m").rows
    assert [row.fault for row in found] == ["", why]


def test_conversations_of_several_turns_are_set_aside_wherever_they_part() -> None:
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    other = {"chosen": "\n\nHuman: a\n\nAssistant: z\n\nHuman: c\n\nAssistant: d", "rejected": talk + "e"}
    found = read(lines({"chosen": talk + "d", "rejected": talk + "e"}, other), "m").rows
    assert [row.fault for row in found] == ["more_turns", "more_turns"]


FAULTS = {
    b"just text\nand more\n": "plain text holds no pairs",
    b"": "no pair in it",
    b"[]": "no pair in it",
    lines({"prompt": P, "chosen": C}): 'no "rejected"',
    lines({"chosen": C, "rejected": R}): 'no "prompt"',
    lines(PLAIN, 7): "line 2: int where a pair should be",
    lines(PLAIN) + b"{'prompt': 1}": "line 2: not",
    lines({**PLAIN, "chosen": 7}): '"chosen" is no text',
    lines({**PLAIN, "chosen": [USER]}): "ends with a turn of the user",
    lines({**PLAIN, "chosen": [{"role": "user", "content": "Else?"}, GOOD]}): "does not begin with the prompt",
    lines({**PLAIN, "chosen": [{"role": "tool", "content": C}]}): "a turn of 'tool'",
    lines({**PLAIN, "instruction": "Another?"}): "both hold text",
    lines({**PLAIN, "pool": "mixed"}): "pool: 'mixed' is unknown",
    b"prompt,chosen\na,b\n": 'no "rejected"',
    b"PAR1....": "Parquet",
    orjson.dumps([PLAIN]) + b"\n{}": "text follows the JSON array",
}


@pytest.mark.parametrize("data", FAULTS, ids=list(FAULTS.values()))
def test_what_is_no_pair_ends_with_one_line(data: bytes) -> None:
    with pytest.raises(CaiError) as caught:
        read(data, "mine.jsonl")
    said = str(caught.value)
    assert FAULTS[data].lower() in said.lower() and said.startswith("mine.jsonl: ") and "\n" not in said


def test_a_pair_says_where_it_stood() -> None:
    found = read(b"\n" + lines(PLAIN) + b"\n" + lines({**PLAIN, "prompt": "b"}), "m").rows
    assert [row.line for row in found] == [2, 4]
    assert found[0] == OwnPair(P, C, R, "benign", 2)
