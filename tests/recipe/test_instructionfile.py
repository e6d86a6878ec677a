"""A user's file of instructions: what is plain is read, the rest is refused in one line; nothing else becomes text."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cai.errors import USAGE, CaiError
from cai.recipe.intake.entries import LONGEST
from cai.recipe.intake.instructionfile import read

TAP = "How do I descale a kettle?"
POEM = "Write a limerick about a stubborn goat."
BOTH = [TAP, POEM]


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def one(**keys: object) -> str:
    return rows(keys)


def turns(*texts: str, human: str = "user", other: str = "assistant") -> list[dict[str, str]]:
    return [{"role": other if i % 2 else human, "content": text} for i, text in enumerate(texts)]


READ: dict[str, tuple[str | bytes, list[str]]] = {
    # JSON
    "an object a line": (rows({"instruction": TAP}, {"instruction": POEM}), BOTH),
    "a prompt key": (one(prompt=TAP), [TAP]),
    "a question key": (one(question=TAP), [TAP]),
    "another case of the key": (one(Instruction=TAP), [TAP]),
    "shouted": (one(PROMPT=TAP), [TAP]),
    "an array of strings over lines": (json.dumps(BOTH, indent=2), BOTH),
    "an array of strings on one line": (json.dumps(BOTH), BOTH),
    "an array of objects over lines": (json.dumps([{"instruction": TAP}, {"prompt": POEM}], indent=1), BOTH),
    "an array of objects on one line": (json.dumps([{"instruction": TAP}, {"instruction": POEM}]), BOTH),
    "a list of one string a line": (rows([TAP], [POEM]), BOTH),
    "a list of one object a line": (rows([{"prompt": TAP}], [{"prompt": POEM}]), BOTH),
    "a string a line": (rows(TAP, POEM), BOTH),
    "one object over lines": (json.dumps({"instruction": TAP}, indent=2), [TAP]),
    "objects over lines": ("\n".join(json.dumps({"prompt": text}, indent=2) for text in BOTH), BOTH),
    "objects without a line end between": ("".join(json.dumps({"prompt": text}) for text in BOTH), BOTH),
    "an object around a list": (one(prompts=BOTH), BOTH),
    "an object around rows, with other keys": (one(version=2, data=[{"prompt": TAP}, {"prompt": POEM}]), BOTH),
    "an object a name": (one(a={"prompt": TAP}, b={"prompt": POEM}), BOTH),
    "columns": (one(prompt=BOTH, id=[1, 2]), BOTH),
    "columns by index": (one(prompt={"0": TAP, "1": POEM}), BOTH),
    "comment lines among objects": (f"// mine\n{one(prompt=TAP)}# and\n{one(prompt=POEM)}", BOTH),
    "plain lines among objects": (one(prompt=TAP) + POEM, BOTH),
    # other people's rows
    "Alpaca's input": (
        one(instruction="Translate.", input="The goat sleeps.", output="x"),
        ["Translate.\n\nThe goat sleeps."],
    ),
    "Alpaca's empty input": (one(instruction=TAP, input="", output="x"), [TAP]),
    "Alpaca's <noinput>": (one(instruction=TAP, input="<noinput>"), [TAP]),
    "Dolly's context": (one(instruction="Who?", context="Ann came.", response="Ann"), ["Who?\n\nAnn came."]),
    "messages": (one(messages=turns(TAP, "Boil vinegar.")), [TAP]),
    "messages with a system prompt and more turns": (
        one(messages=[{"role": "system", "content": "Rhyme."}, *turns(TAP, "Vinegar.", "How long?")]),
        [TAP],
    ),
    "messages of parts": (one(messages=[{"role": "user", "content": [{"type": "text", "text": TAP}]}]), [TAP]),
    "ShareGPT": (one(conversations=[{"from": "human", "value": TAP}, {"from": "gpt", "value": "x"}]), [TAP]),
    "ShareGPT that begins with the model": (
        one(conversations=[{"from": "gpt", "value": "x"}, {"from": "human", "value": TAP}]),
        [TAP],
    ),
    "HH pairs": (one(chosen=f"\n\nHuman: {TAP}\n\nAssistant: a", rejected=f"\n\nHuman: {TAP}\n\nAssistant: b"), [TAP]),
    "a transcript under instruction": (
        one(instruction=f"Human: {TAP}\n\nAssistant: a\n\nHuman: b\n\nAssistant:"),
        [TAP],
    ),
    "a prompt of turns": (one(prompt=turns(TAP), chosen=turns("", "a")[1:]), [TAP]),
    "turns of a benchmark": (one(question_id=1, turns=BOTH), [TAP]),
    "an array that is one conversation": (json.dumps(turns(TAP, "a", POEM)), [TAP]),
    "an array of conversations": (json.dumps([turns(TAP, "a"), turns(POEM, "b")]), BOTH),
    "a text that begins with User:": (
        one(instruction="User: root. What does it mean?"),
        ["User: root. What does it mean?"],
    ),
    # tables
    "CSV": (
        'id,prompt,kind\n1,"Boil, rinse: how?",a\n2,"Write a limerick\nabout a goat.",b\n',
        ["Boil, rinse: how?", "Write a limerick\nabout a goat."],
    ),
    "CSV of Windows": ('id,prompt\r\n1,"Two\r\nlines?"\r\n', ["Two\nlines?"]),
    "CSV with doubled quotes": ('prompt,id\n"Say ""hi"" to Ann.",1\n', ['Say "hi" to Ann.']),
    "CSV with semicolons": (f"id;Prompt\n1;{TAP}\n2;{POEM}\n", BOTH),
    "CSV with Excel's first line": (f"sep=;\nid;Prompt\n1;{TAP}\n", [TAP]),
    "CSV with spaces": (f'id, prompt\n1, "{TAP}"\n', [TAP]),
    "CSV with Alpaca's columns": (
        "instruction,input,output\nTranslate.,The goat.,x\nSing.,,y\n",
        ["Translate.\n\nThe goat.", "Sing."],
    ),
    "TSV": (f"instruction\tpool\n{TAP}\tbenign\n", [TAP]),
    "one column": ('prompt\n"Boil, rinse: how?"\nSing, now.\n', ["Boil, rinse: how?", "Sing, now."]),
    # plain text
    "plain lines": (f"{TAP}\n{POEM}\n", BOTH),
    "plain lines of Windows, a mark": (b"\xef\xbb\xbf" + f"{TAP}\r\n{POEM}\r\n".encode(), BOTH),
    "line ends of old Macs": (f"{TAP}\r{POEM}\r", BOTH),
    "CSV of old Macs": (f"id,prompt\r1,{TAP}\r2,{POEM}\r", BOTH),
    "UTF-16": (f"{TAP}\n{POEM}\n".encode("utf-16"), BOTH),
    "UTF-16 without a mark": (f"{TAP}\n{POEM}\n".encode("utf-16-le"), BOTH),
    "UTF-16, the other order, not Latin": ("घर पर रोटी\nकैसे बनाऊँ\n".encode("utf-16-be"), ["घर पर रोटी", "कैसे बनाऊँ"]),
    "UTF-16 as Excel saves it": (f"id\tprompt\n1\t{TAP}\n".encode("utf-16"), [TAP]),
    "a Markdown list under a heading": (f"# Kitchen\n\n1. {TAP}\n2. {POEM}\n", BOTH),
    "bullets of both kinds": (f"## Things\n- {TAP}\n* {POEM}\n", BOTH),
    "numbers with a bracket": (f"1) {TAP}\n2) {POEM}\n", BOTH),
    "numbered questions": (f"Q1: {TAP}\nQ2: {POEM}\n", BOTH),
    "boxes to tick": (f"- [ ] {TAP}\n- [x] {POEM}\n", BOTH),
    "an item over two lines": (
        "- Write a limerick\n  about a goat.\n- Sing.\n",
        ["Write a limerick about a goat.", "Sing."],
    ),
    "comment lines before text": (f"// mine\n# all mine\n{TAP}\n", [TAP]),
    "wrapped paragraphs": (
        f"{TAP}\n\nWrite a limerick about\na stubborn goat\nand its bell.\n",
        [TAP, "Write a limerick about a stubborn goat and its bell."],
    ),
    "a blank line between all": (f"{TAP}\n\n{POEM}\n", BOTH),
    "all in lower case": ("how do i descale it\nwhat is rust\nsing\n", ["how do i descale it", "what is rust", "sing"]),
    "an ordinal": ("2. Weltkrieg: wann begann er?", ["2. Weltkrieg: wann begann er?"]),
    "sentences with as many commas": ("Sing, please\nDance, please\n", ["Sing, please", "Dance, please"]),
    "Thai": ("ทำไมแมวของฉันไม่ยอมกินอาหาร\nช่วยเขียนจดหมาย\n", ["ทำไมแมวของฉันไม่ยอมกินอาหาร", "ช่วยเขียนจดหมาย"]),
    "gzip of JSON lines": (gzip.compress(rows({"prompt": TAP}, {"prompt": POEM}).encode()), BOTH),
    "gzip of CSV": (gzip.compress(f"id,prompt\n1,{TAP}\n".encode()), [TAP]),
    "two gzips in a row": (gzip.compress(f"{TAP}\n".encode()) + gzip.compress(POEM.encode()), BOTH),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_plain_is_read(name: str) -> None:
    content, wanted = READ[name]
    data = content if isinstance(content, bytes) else content.encode()
    assert [row.text for row in read(data, "mine").requests] == wanted


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "no instruction in it"),
    "blank lines": ("\n\n \n", "no instruction in it"),
    "an empty array": ("[]", "no instruction in it"),
    # JSON
    "NaN": ('{"instruction": "Sing.", "w": NaN}', "line 1: NaN is no JSON value"),
    "Infinity in the second row": (one(prompt=TAP) + '{"prompt": "Sing.", "w": Infinity}', "line 2: Infinity is no"),
    "a trailing comma": ('{"instruction": "Sing.",}', "line 1: not a JSON object: a comma before the closing"),
    "a trailing comma in an array": ('["Sing.",]', "line 1: not JSON: a comma before the closing bracket"),
    "commas behind objects": (
        one(prompt=TAP).strip() + ",\n" + one(prompt=POEM),
        "line 1: a comma between the objects",
    ),
    "quoted texts without brackets": ('"Sing, now.",\n"Dance.",\n', "quoted texts with commas|a table"),
    "Python's quotes": ("['Sing.', 'Dance.']", "single quotes"),
    "Python's None": ('{"instruction": "Sing.", "x": None}', "a Python value"),
    "a cut object": ('{"instruction": "Sing."}\n{"instruction": "Dan', "line 2: not a JSON object"),
    "a number": ('{"instruction": 5}', 'no text under "instruction"'),
    "null": ('{"instruction": null}', 'no text under "instruction"'),
    "an empty text": (one(prompt=" "), 'no text under "prompt"'),
    "two strings a line": (rows(["Sing.", "Dance."], ["Jump.", "Run."]), "line 1: a list of several"),
    "numbers": ("[1, 2]", "line 1: int '1' where a request should be"),
    "a key twice": ('{"prompt": "Sing.", "prompt": "Dance."}', "given twice"),
    "one key in two cases": (one(Prompt="Sing.", prompt="Dance."), "say the same: keep one"),
    "two keys that hold text": (one(instruction="Sing.", prompt="Dance."), "instructions.key=instruction"),
    "no known key": (one(goal="Sing.", target="La."), "keys here: goal, target.*instructions.key=goal"),
    "two lists in an object": (one(train=["Sing."], test=["Dance."]), "lists under train, test"),
    "an unknown pool": (one(prompt="Sing.", pool="red-team"), 'pool: .red-team. is unknown. Write "benign"'),
    "a null pool": (one(prompt="Sing.", pool=None), "pool: None is unknown"),
    "input and context": (one(instruction="Sing.", input="a", context="b"), '"input" and "context" both'),
    "an input that is no text": (one(instruction="Sing.", input=["a", "b"]), '"input" is no text'),
    "a picture": (one(messages=[{"role": "user", "content": [{"type": "image"}]}]), "not all text"),
    "a conversation without a user": (one(messages=[{"role": "system", "content": "x"}]), "no turn of a user"),
    "a turn a line": (rows(*turns("Sing.", "La.")), "line 1: a turn of a conversation on a line of its own"),
    "a deep array": ("[" * 100_000, "line 1: nested too deeply"),
    "a deep field": ('{"prompt": "Sing.", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "a number of 5,000 digits": ('{"prompt": "Sing.", "x": ' + "9" * 5000 + "}", "line 1: Exceeds the limit"),
    "a line that no model reads": (one(prompt="x" * (LONGEST + 1)), "line 1: 1,000,001 characters"),
    "a plain line that no model reads": ("x" * (LONGEST + 1), "line 1: 1,000,001 characters"),
    # tables
    "a table with other columns": ("goal,target\nSing.,La\n", "cells: goal, target.*instructions.key=COLUMN"),
    "a table without a header": ('1,"Sing, now.",a\n2,Dance.,b\n', "a table .*give a header line"),
    "tabs without a header": ("1\tSing.\n2\tDance.\n", "a table"),
    "a row with too many cells": ("id,prompt\n1,Sing, now\n", "line 2: 3 cells, the header has 2"),
    "a quote that is not closed": ('id,prompt\n1,"Sing\n2,Dance.\n', "line 2: bad quoting"),
    "an empty cell": ("id,prompt\n1,Sing.\n2,\n", 'line 3: no text under "prompt"'),
    "a column twice": ("prompt,prompt\nSing.,Dance.\n", "named twice in the header"),
    # plain text
    "Windows-1252": (
        "Bake a crème brûlée.".encode("cp1252"),
        "not UTF-8 at byte 9, line 1 .*'è' in Windows-1252.*iconv",
    ),
    "Shift JIS": ("猫はなぜ鳴く".encode("shift-jis"), "not UTF-8 at byte 0"),
    "a control character": ("Sing\0 now.\n", "control character U[+]0000"),
    "an introduction and a list": ("Here they are:\n1. Sing.\n2. Dance.\n", "line 2: a list item among other lines"),
    "a list and a remark": ("- Sing.\n- Dance.\n\nThat is all.\n", "line 4: neither an item of the list"),
    "a list within a list": ("- Kitchen\n  - Boil it.\n", "line 2: a list within a list"),
    "a wrapped text without blank lines": (
        "Write a limerick about\na goat\nand its bell.\n",
        "line 2: reads as the rest",
    ),
    "groups of lines": ("Sing.\nDance.\n\nJump.\n", "line 2: blank lines stand between groups"),
    "a comment or not": ("#mine\nSing.\n", "line 1: a comment, or a request"),
    "a transcript": ("Human: Sing.\n\nAssistant: La.\n", "line 1: a turn of a transcript"),
    "Alpaca's frame": ("### Instruction:\nSing.\n\n### Response:\nLa.\n", "line 1: a frame around"),
    "a Markdown table": ("| id | prompt |\n|----|----|\n| 1 | Sing. |\n", "line 1: a Markdown table"),
    "a code fence": ("```\nSing.\n```\n", "line 1: a code fence"),
    "rules between requests": ("Sing.\n---\nDance.\n", "line 2: a rule"),
    "YAML": ("- prompt: Sing.\n- prompt: Dance.\n", "line 1: a key of YAML"),
    "a program": ('prompts = [\n"Sing.",\n"Dance."\n]\n', "line 1: code"),
    "braces that are no JSON": ("Sing.\n{name} asks: why?\n", "line 2: not a JSON object"),
    "quotes around one line of several": ('"Sing."\nDance.\n', "line 1: in quotes, and other lines are not"),
    "chat tokens": ("<|im_start|>user\nSing.\n", "line 1: a tag or a chat token"),
    # binaries
    "zip": (b"PK\x03\x04data", "a zip archive. Unpack it"),
    "Excel": (b"PK\x03\x04..xl/workbook.xml", "an Excel workbook. Save the sheet as CSV"),
    "Parquet": (b"PAR1\x15\x04", "a Parquet file.*read_parquet"),
    "PDF": (b"%PDF-1.7\n", "a PDF"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office file"),
    "bzip2": (b"BZh91AY", "bzip2 archive"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", "zstd archive"),
    "SQLite": (b"SQLite format 3\x00", "SQLite database"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    "a web page": (b"<!DOCTYPE html>\n<html>", "HTML or XML page"),
    "a cut gzip": (gzip.compress(b"Sing.\n" * 99)[:-7], "a gzip that is cut off"),
    "a damaged gzip": (gzip.compress(b"Sing.")[:10] + b"\xff" * 20, "a damaged gzip"),
    "a gzip of a tar": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\x0000"), "a tar archive"),
    "a gzip of a zip": (gzip.compress(b"PK\x03\x04data"), "a zip archive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_in_one_line_with_place_and_remedy(name: str) -> None:
    content, message = REFUSED[name]
    data = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(CaiError, match=message) as caught:
        read(data, "mine")
    text = str(caught.value)
    assert text.startswith("mine: ") and "\n" not in text and caught.value.code == USAGE and len(text) < 500


def test_a_gzip_that_unpacks_to_gigabytes_is_refused_without_unpacking_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.recipe.intake.decoding.MOST_BYTES", 1 << 20)
    with pytest.raises(CaiError, match="a gzip of more than 1 MB"):
        read(gzip.compress(b"x" * (1 << 21)), "mine")


def test_lines_of_requests_are_those_of_the_file() -> None:
    array = read(json.dumps([{"prompt": TAP}, {"prompt": POEM}], indent=1).encode(), "mine")
    assert [row.line for row in array.requests] == [2, 5]
    table = read(b'id,prompt\n1,"Two\nlines?"\n2,Sing.\n', "mine")
    assert [row.line for row in table.requests] == [2, 4]
    assert [row.line for row in read(b"\nSing.\n\nDance.\n", "mine").requests] == [2, 4]


def test_keys_that_are_not_read_are_named_once_with_how_often() -> None:
    found = read(
        rows({"instruction": TAP, "category": "a", "id": 1}, {"instruction": POEM, "category": "b"}).encode(), "mine"
    )
    assert "keys ignored: category (2), id (1)" in found.notes
    assert not read(one(instruction=TAP, pool="benign").encode(), "mine").notes


def test_a_system_prompt_more_turns_and_joined_inputs_are_told() -> None:
    messages = [{"role": "system", "content": "Rhyme."}, *turns(TAP, "Vinegar.", "How long?")]
    notes = " | ".join(read(one(messages=messages).encode(), "mine").notes)
    assert "a system prompt is not read (1 rows)" in notes and "1 row(s) have more turns" in notes
    assert (
        "a system prompt is not read (1 rows)" in read(one(system="Rhyme.", instruction=TAP).encode(), "mine").notes[0]
    )
    assert "joined to the request: input (1)" in read(one(instruction=TAP, input="x").encode(), "mine").notes


@pytest.mark.parametrize(
    ("content", "key", "wanted"),
    [
        (one(goal=TAP, target="x"), "goal", [TAP]),
        (one(row={"text": TAP}), "row.text", [TAP]),
        ("goal,target\nSing.,La\n", "goal", ["Sing."]),
        ("Goal;target\nSing.;La\n", "goal", ["Sing."]),
        (one(text=f"### Human: {TAP}### Assistant: a### Human: b"), "text", [TAP]),
        (one(dialog=turns(TAP, "a")), "dialog", [TAP]),
        (one(instruction="Sing.", prompt=TAP), "prompt", [TAP]),
    ],
)
def test_a_key_of_the_users_own_holds_the_request(content: str, key: str, wanted: list[str]) -> None:
    assert [row.text for row in read(content.encode(), "mine", key=key).requests] == wanted


def test_a_key_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(CaiError, match=r"line 1: no key 'goal' \(instructions.key\); keys here: prompt"):
        read(one(prompt=TAP).encode(), "mine", key="goal")
    with pytest.raises(CaiError, match="plain text has no key 'goal'"):
        read(TAP.encode(), "mine", key="goal")


def test_rows_without_a_pool_take_the_recipes_and_rows_with_one_keep_it() -> None:
    content = rows({"instruction": TAP}, {"instruction": POEM, "pool": "benign"}).encode()
    assert read(content, "mine").by_pool == {"benign": 2, "redteam": 0}
    assert read(content, "mine", pool="redteam").by_pool == {"benign": 1, "redteam": 1}
    assert read(b"Sing.\nDance.\n", "mine", pool="redteam").by_pool == {"benign": 0, "redteam": 2}
    assert read(b"prompt,pool\nSing.,RedTeam\nDance.,benign\n", "mine").by_pool == {"benign": 1, "redteam": 1}


@pytest.mark.runs
@given(st.binary(max_size=300))
@example(b"{" * 5000)
@example(b'{"a":' * 3000)
@example(b"\xff\xfe\x00")
@example(b"sep=\n")
@example(b'sep="\nprompt"x\n')
@example(b'{"messages":[{"role":null,"content":1}]}')
@example(b'{"prompt":{"a":[]}}')
@example(b"prompt\n\x1fx\n")
@settings(max_examples=400, deadline=None)
def test_no_bytes_make_a_traceback(data: bytes) -> None:
    for pack in (bytes, gzip.compress):
        try:
            found = read(pack(data), "mine")
        except CaiError as error:
            assert "\n" not in str(error)
        else:
            assert found.requests and all(row.text.strip() for row in found.requests)


SIGNS = st.sampled_from(
    [
        '{"',
        '":',
        '"',
        "[",
        "]",
        "{",
        "}",
        ",",
        "\n",
        "\r",
        "\t",
        ";",
        "|",
        "- ",
        "1. ",
        "# ",
        "prompt",
        "instruction",
        "pool",
        "messages",
        "role",
        "content",
        "user",
        "Human:",
        "\n\nAssistant:",
        "input",
        " ",
        "Sing.",
        "a",
        "é",
        "\ud83d",
        "null",
        "5",
    ]
)


@pytest.mark.runs
@given(st.lists(SIGNS, max_size=40), st.sampled_from(["", "prompt", "a.b"]))
@settings(max_examples=600, deadline=None)
def test_no_text_of_the_formats_own_signs_makes_a_traceback(signs: list[str], key: str) -> None:
    try:
        read("".join(signs).encode("utf-8", "surrogatepass"), "mine", key=key)
    except CaiError as error:
        assert "\n" not in str(error)
