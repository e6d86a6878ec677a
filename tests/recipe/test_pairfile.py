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


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({**PLAIN, "prompt": f"<|im_start|>user\n{P}<|im_end|>\n<|im_start|>assistant\n"}, "chat template's frame"),
        ({**PLAIN, "prompt": f"USER: {P} ASSISTANT:"}, "a prompt's frame around the prompt"),
        ({**PLAIN, "chosen": f"{C}</s>"}, "ends with the token '</s>'"),
        ({**PLAIN, "rejected": f"{R}<|im_end|>"}, "ends with the token"),
        ({**PLAIN, "rejected": "a\0b"}, r"holds the control character U\+0000"),
        ({**PLAIN, "chosen": "[{'role': 'assistant', 'content': 'x'}]"}, "a value as Python prints it"),
        ({**PLAIN, "Chosen": "Another."}, "two keys say 'chosen'"),
        ({**PLAIN, "split": "5"}, 'split: .5. is unknown. Write "train" or "heldout"'),
        ({**PLAIN, "margin": "much"}, "margin: .much. is no finite number"),
        ({**PLAIN, "margin": True}, "margin: .True. is no finite number"),
        ({**PLAIN, "chosen": f"Assistant: {C}", "rejected": f"Assistant: {R}"}, "both answers begin with the cue"),
        ({"prompt": P * 2, "chosen": P * 2 + C, "rejected": P * 2 + R}, "both answers begin with the prompt once more"),
    ],
)
def test_texts_that_are_not_the_pairs_alone_are_refused(row: dict[str, Any], why: str) -> None:
    with pytest.raises(CaiError, match=f"mine: line 1: .*{why}") as caught:
        read(lines(row), "mine")
    assert "\n" not in str(caught.value)


def test_an_infinite_margin_is_refused_and_a_cell_with_a_number_is_one() -> None:
    with pytest.raises(CaiError, match="no finite number"):
        read(b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}\n', "mine")
    table = f"prompt,chosen,rejected,margin\n{P},{C},{R},0.5\n{P},{C},{R},\n".encode()
    assert [row.margin for row in read(table, "mine").rows] == [0.5, None]


def test_conversations_in_a_tables_cells_are_read() -> None:
    def cell(value: Any) -> str:
        return '"' + orjson.dumps(value).decode().replace('"', '""') + '"'

    table = f"prompt,chosen,rejected\n{P},{cell([USER, GOOD])},{cell([USER, BAD])}\n"
    assert texts(read(table.encode(), "mine")) == [(P, C, R)]


@pytest.mark.parametrize("split", ["holdout", "held-out", "test_prefs", "eval_set", "validation"])
def test_what_is_held_out_is_held_out_under_any_common_name(split: str) -> None:
    assert read(lines({**PLAIN, "split": split}), "mine").splits


def test_keys_that_are_not_read_and_scores_that_say_otherwise_are_told_once() -> None:
    rows = [{**PLAIN, "source": "x", "chosen_score": 1, "rejected_score": 9}] * 2
    notes = read(lines(*rows), "mine").notes
    assert "keys ignored: source (2), chosen_score (2), rejected_score (2)" in notes
    assert "2 row(s) score the rejected text higher than the chosen one: are the two swapped?" in notes


def test_one_pair_of_several_that_repeats_its_prompt_is_told_and_kept() -> None:
    found = read(lines(PLAIN, PLAIN, {"prompt": P * 2, "chosen": P * 2 + C, "rejected": P * 2 + R}), "mine")
    assert len(found.rows) == 3 and any("begin with the prompt" in note for note in found.notes)


def test_a_prompt_of_nothing_that_is_seen_is_empty() -> None:
    assert read(lines({**PLAIN, "prompt": "\u200b"}), "mine").rows[0].fault == "empty_prompt"
