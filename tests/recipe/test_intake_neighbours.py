"""Files like those that users' reports named, not the same: read rightly where the meaning is plain, else refused."""

from __future__ import annotations

import json
import re

import pytest

from cai.errors import CaiError
from cai.recipe.constitution import load_constitution
from cai.recipe.intake.instructionfile import read

TAP = "How do I descale a kettle?"
POEM = "Write a limerick about a stubborn goat."
BOTH = [TAP, POEM]
TURNS = [{"role": "user", "content": TAP}, {"role": "assistant", "content": "Vinegar."}]


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


READ: dict[str, tuple[str, list[str]]] = {
    "comment lines above a table": (f"# exported\n// today\n\nid,prompt\n1,{TAP}\n2,{POEM}\n", BOTH),
    "a Markdown table without outer bars": (f"id | prompt\n---|:---:\n1 | {TAP}\n2 | {POEM}\n", BOTH),
    "a conversation in a cell": (f"id,messages\n1,{cell(json.dumps(TURNS))}\n", [TAP]),
    "a benchmark's turns in a cell": (f"id,turns\n1,{cell(json.dumps(BOTH))}\n", [TAP]),
    "a conversation under prompt, as text": (rows({"prompt": json.dumps(TURNS[:1])}), [TAP]),
    "LIMA": (rows({"conversations": [TAP, "Vinegar."], "source": "x"}), [TAP]),
    "Self-Instruct": (
        rows({"instruction": "Translate.", "instances": [{"input": "The goat.", "output": "x"}]}),
        ["Translate.\n\nThe goat."],
    ),
    "numbers with a colon": (f"1: {TAP}\n2: {POEM}\n", BOTH),
    "numbers with a dash": (f"1 - {TAP}\n2 - {POEM}\n", BOTH),
    "numbers without a space": (f"1.{TAP}\n2.{POEM}\n", BOTH),
    "numbers in brackets": (f"[1] {TAP}\n[2] {POEM}\n", BOTH),
    "numbers in circles": (f"① {TAP}\n② {POEM}\n", BOTH),
    "numbers of full width": ("１．怎样做馒头？\n２．写一首诗。\n", ["怎样做馒头？", "写一首诗。"]),
    "Chinese numbers": ("九、怎样做馒头？\n", ["九、怎样做馒头？"]),
    "Chinese numbers, two": ("一、怎样做馒头？\n二、写一首诗。\n", ["怎样做馒头？", "写一首诗。"]),
    "letters": (f"a) {TAP}\nb) {POEM}\n", BOTH),
    "Roman numbers": (f"i. {TAP}\nii. {POEM}\n", BOTH),
    "words with numbers": (f"Task 1: {TAP}\nTask 2: {POEM}\n", BOTH),
    "what only looks like numbers": ("1.5 litres of milk: how long?\n2.5 miles: how long?\n",
                                     ["1.5 litres of milk: how long?", "2.5 miles: how long?"]),
    "years are no numbering": ("1848: what happened?\n1849: what happened?\n",
                               ["1848: what happened?", "1849: what happened?"]),
    "bold items": (f"1. **{TAP}**\n2. **{POEM}**\n", BOTH),
    "a YAML list of quoted texts": (f'- "{TAP}"\n- "{POEM}"\n', BOTH),
    "typographic quotes around every line": (f"“{TAP}”\n“{POEM}”\n", BOTH),
    "a request that is a quotation among others": (f"“To be or not to be”: who says it?\n{POEM}\n",
                                                   ["“To be or not to be”: who says it?", POEM]),
    "quoted mail": (f"> {TAP}\n> {POEM}\n", BOTH),
    "line ends of Unicode alone": (f"{TAP}\u2028{POEM}\x85Sing.", [*BOTH, "Sing."]),
    "lines of nothing that is seen": (f"\u200b\n{TAP}\n\ufeff \n{POEM}\n", BOTH),
    "DOS's end of a file": (f"{TAP}\r\n{POEM}\r\n\x1a", BOTH),
    "emoji only": ("👩‍🍳🍞❓\n🚲🔧❓\n", ["👩‍🍳🍞❓", "🚲🔧❓"]),
    "decimal commas": ("Reichen 3,5 Liter?\nReichen 4,5 Liter?\n", ["Reichen 3,5 Liter?", "Reichen 4,5 Liter?"]),
    "files with marks, one behind the other": (f"\ufeff{TAP}\n\ufeff{POEM}\n", BOTH),
    "JSON lines with marks, one behind the other": (f"\ufeff{rows({'prompt': TAP})}\ufeff{rows({'prompt': POEM})}",
                                                    BOTH),
    "arrows": (f"→ {TAP}\n→ {POEM}\n", BOTH),
    "Word's marks": (f"\uf0b7\t{TAP}\n\uf0b7\t{POEM}\n", BOTH),
    "Word's marks of the second level": (f"o\t{TAP}\no\t{POEM}\n", BOTH),
    "marks without a space": (f"-{TAP}\n-{POEM}\n", BOTH),
    "Japanese marks": ("・詩を書いて。\n・歌を書いて。\n", ["詩を書いて。", "歌を書いて。"]),
    "degrees are no list": ("-5 degrees: is it cold?\n-7 degrees: is it cold?\n",
                            ["-5 degrees: is it cold?", "-7 degrees: is it cold?"]),
    "sections": (f"1.1 {TAP}\n1.2 {POEM}\n2.1 Sing.\n", [*BOTH, "Sing."]),
    "labels": (f"P1: {TAP}\nP2: {POEM}\n", BOTH),
    "days are no labels": ("Day 1: plan meals\nDay 2: plan work\n", ["Day 1: plan meals", "Day 2: plan work"]),
    "emoji's keys": (f"1\ufe0f\u20e3 {TAP}\n2\ufe0f\u20e3 {POEM}\n", BOTH),
    "a turn without its list": (rows({"messages": TURNS[0]}), [TAP]),
    "Open Assistant's prompt": (rows({"prompt": {"text": TAP, "role": "prompter"}}), [TAP]),
    "all in capitals": ("HELP ME WITH TAXES\nHOW DO I FIX A TAP\n", ["HELP ME WITH TAXES", "HOW DO I FIX A TAP"]),
    "all with a colon": ("Write about tides:\nTranslate:\n", ["Write about tides:", "Translate:"]),
    "a token that is asked about": (rows({"prompt": "What does </s> mean?"}, {"prompt": "What is <|im_end|>"}),
                                    ["What does </s> mean?", "What is <|im_end|>"]),
    "letters that look twice encoded": ("São Paulo tem Ã?\n", ["São Paulo tem Ã?"]),
    "calls in sentences": ("What does f(a,b) do?\nWhat does g(a,b) do?\n",
                           ["What does f(a,b) do?", "What does g(a,b) do?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_neighbour_whose_meaning_is_plain_is_read(name: str) -> None:
    content, wanted = READ[name]
    assert [row.text for row in read(content.encode(), "mine").requests] == wanted


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "a title above a table": (f"Table 1\nid,prompt\n1,{TAP}\n2,{POEM}\n", "line 2: a table's header, and other lines"),
    "the header twice": (f"id,prompt\n1,{TAP}\nid,prompt\n2,{POEM}\n", "line 3: the header stands here once more"),
    "a header with brackets": (f"id,Prompt (en)\n1,{TAP}\n2,{POEM}\n", "a table .cells: id, Prompt"),
    "cells without a header": (f"{TAP},home\n{POEM},art\n", "a table .cells"),
    "cells parted by ^": (f"id^prompt\n1^{TAP}\n2^{POEM}\n", "line 1: a table whose cells are parted by"),
    "cells parted by ::": (f"id::prompt\n1::{TAP}\n", "line 1: a table whose cells are parted by ':'"),
    "LaTeX's cells": (f"id & prompt \\\\\n1 & {TAP} \\\\\n", "line 1: a table whose cells are parted by '&'"),
    "cells in single quotes": (f"id,prompt\n1,'{TAP}'\n2,'{POEM}'\n", "line 2: single quotes around every cell"),
    "headings with a colon": (f"Cooking:\n{TAP}\nPoems:\n{POEM}\n", "line 1: a heading, or a request .'Cooking:'"),
    "headings in capitals": (f"COOKING\n{TAP}\nPOEMS\n{POEM}\n", "line 1: a heading, or a request .'COOKING'"),
    "comments of other languages": (f"; mine\n{TAP}\n", "line 1: a comment, or a request?"),
    "TeX's comments": (f"{TAP}\n% mine\n", "line 2: a comment, or a request?"),
    "a patch": (f"--- a\n+++ b\n@@ -1 +1 @@\n-{TAP}\n", "line 1: a part of a patch"),
    "a table of reStructuredText": (f"==  ====\nid  what\n==  ====\n1   {TAP}\n", "line 1: a rule"),
    "scissors": (f"-----8<-----\n{TAP}\n", "line 1: a rule"),
    "a tag with attributes": (f"{TAP}\n<svg width='1'></svg>\n", "line 2: a tag or a chat token"),
    "lines that go on behind a backslash": (
        f"Fix it \\\nnow, please.\n{POEM}\n",
        "line 1: a line that ends with a back",
    ),
    "German wrapped before a noun": ("Wie entkalke ich einen Kessel in der\nKüche?\n", "line 2: reads as the rest of"),
    "French wrapped before a name": ("Où est le\nMont Blanc ?\n", "line 2: reads as the rest of the line before"),
    "strings and a key": (json.dumps(BOTH), "line 1: no object, so it has no key 'goal'"),
    "DeepSeek's frame": (
        rows({"prompt": f"<｜begin▁of▁sentence｜><｜User｜>{TAP}"}),
        "line 1: a chat template's frame",
    ),
    "Command R's frame": (rows({"prompt": f"<|START_OF_TURN_TOKEN|>{TAP}"}), "line 1: a chat template's frame"),
    "an end token": (rows({"prompt": f"{TAP}</s>"}), "line 1: a prompt's frame around the request"),
    "Vicuna's frame": (
        rows({"prompt": f"A chat. USER: {TAP} ASSISTANT:"}),
        "line 1: a prompt's frame around the request",
    ),
    "question and open answer": (rows({"prompt": f"Q: {TAP}\nA:"}), "line 1: a prompt's frame around the request"),
    "Japanese in 7 bits": ("やかん?\n".encode("iso2022_jp"), "ISO-2022-JP, not plain text"),
    "Chinese in 7 bits": ("如何修理?\n".encode("hz"), "HZ .Chinese in 7 bits., not plain text"),
    "a mail's text": (b"Wie entkalke ich das Ger=C3=A4t?\n", "quoted-printable"),
    "base64": (b"SG93IGRvIEkgZGVzY2FsZSBhIGtldHRsZT8KV3JpdGUgYSBsaW1lcmljayBh\nYm91dA==\n", "base64, not plain text"),
    "text that was encoded twice": (
        "Wie entkalke ich das Gerät?\n".encode().decode("cp1252").encode(),
        "line 1: .*UTF-8 that was read as Windows-1252",
    ),
    "colours of a terminal": (f"\x1b[31m{TAP}\x1b[0m\n", "line 1: holds the colours of a terminal"),
    "a PDF behind a blank line": (b"\n%PDF-1.4\nx\n", "a PDF. Copy"),
    "a git-annex pointer": (b"/annex/objects/MD5-s1--aa\n", "a git-annex pointer"),
    "a server's answer": (b"404: Not Found", "an answer of a server"),
    "a certificate": (b"-----BEGIN CERTIFICATE-----\nMIIB\n", "a key, a certificate"),
    "columns parted by spaces": (f"id   prompt\n1    {TAP}\n", "columns parted by spaces"),
    "one column of another name": (f"goal\n{TAP}\n{POEM}\n", "column's name .'goal'.*instructions.key=goal"),
    "one column in the plural": (f"Prompts\n{TAP}\n{POEM}\n", "column's name"),
    "a conversation as Python prints it": (f"id,messages\n1,{cell(repr(TURNS))}\n", "line 2: a conversation that is"),
    "a prompt as Python prints it": (rows({"prompt": repr(TURNS)}), "as Python prints it"),
    "JSON encoded twice": (rows(json.dumps({"prompt": TAP})), "encoded twice.*jq -c fromjson"),
    "ChatML around a request": (rows({"prompt": f"<|im_start|>user\n{TAP}<|im_end|>"}), "a chat template's frame"),
    "Llama's frame": (rows({"instruction": f"<s>[INST] {TAP} [/INST]"}), "a chat template's frame"),
    "Alpaca's frame": (
        rows({"prompt": f"Below is an instruction that describes a task.\n\n### Instruction:\n{TAP}"}),
        "a chat template's frame",
    ),
    "a batch of requests to an API": (rows({"custom_id": "1", "body": {"messages": TURNS}}), "key=body.messages"),
    "a tree": (rows({"prompt": {"text": TAP, "replies": []}}), "instructions.key=prompt.text"),
    "TOML": (f'[[instructions]]\nprompt = "{TAP}"\n', "TOML or INI"),
    "INI": (f"[prompts]\na = {TAP}\n", "TOML or INI"),
    "JavaScript": (f'const prompts = ["{TAP}", "{POEM}"];\n', "line 1: code"),
    "a module with a docstring": (f'"""Prompts."""\n{TAP}\n', "a quoted block of code|in quotes"),
    "LaTeX": (f"\\begin{{itemize}}\n\\item {TAP}\n\\end{{itemize}}\n", "LaTeX"),
    "subtitles": (f"1\n00:00:01,000 --> 00:00:02,000\n{TAP}\n", "a subtitle's time"),
    "a dump of a database": (f"INSERT INTO p VALUES (1, '{TAP}');\n", "a database's dump"),
    "one quoted line of mail": (f"> {TAP}\n{POEM}\n", "a quoted line"),
    "headings alone": (f"# {TAP}\n# {POEM}\n", "nothing but headings"),
    "numbers that end in the middle": (f"1: {TAP}\n2: {POEM}\nSing.\n", "line 3: no number"),
    "YAML's quotes within quotes": ("- 'Don''t sing.'\n- 'Don''t dance.'\n", "quotation marks within"),
    "nothing that is seen": ("\u200b\n\u2060\n", "no instruction in it"),
    "a request of nothing that is seen": (rows({"prompt": "\u200b"}), "no text under"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_neighbour_that_is_not_plain_is_one_line(name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(CaiError, match=message) as caught:
        read(content if isinstance(content, bytes) else content.encode(), "mine", key="goal" if "a key" in name else "")
    assert str(caught.value).startswith("mine: ") and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_column_of_any_name_is_read_where_the_key_names_it() -> None:
    for text in (
        f"goal\n{TAP}\n{POEM}\n",
        f"goal,target\n{TAP},x\n{POEM},y\n",
        f"id | goal\n---|---\n1 | {TAP}\n2 | {POEM}\n",
    ):
        assert [row.text for row in read(text.encode(), "mine", key="goal").requests] == BOTH


def test_a_numbered_list_may_have_more_than_999_items() -> None:
    for form in ("{}. Name river {}, please.", "{}: Name river {}, please."):
        text = "\n".join(form.format(i, i) for i in range(1, 1203))
        found = read(text.encode(), "mine").requests
        assert len(found) == 1202 and found[-1].text == "Name river 1202, please."


def test_what_is_worth_a_look_is_told() -> None:
    notes = read(f"???\n{TAP}\nWrite about {{topic}}.\n".encode(), "mine").notes
    assert "1 request(s) without a letter, such as '???'" in notes
    assert "1 request(s) hold a placeholder such as {topic}, taken as it is" in notes
    notes = read(f"{TAP}\nSalt &amp; pepper?\n".encode(), "mine").notes
    assert "1 request(s) hold signs spelt as in HTML, such as &amp;, taken as they are" in notes


def test_a_key_is_the_same_however_its_letters_are_composed() -> None:
    assert read(rows({"Gera\u0308t": TAP}).encode(), "mine", key="Ger\u00e4t").requests[0].text == TAP


def test_the_hint_never_names_what_is_no_request() -> None:
    for row in ({"body": {"role": "user", "text": TAP}}, {"prompt": {"id": "a" * 99, "text": TAP}}):
        with pytest.raises(CaiError, match=r"instructions\.key=\w+\.text"):
            read(rows(row).encode(), "mine")


KIND, SAFE = "The answer must be kind to the reader.", "The answer must not help to hurt anybody."

CONSTITUTIONS = {
    "ids and sentences": f"kind: {KIND}\nsafe: {SAFE}\n",
    "ids and sentences in JSON": json.dumps({"kind": KIND, "safe": SAFE}),
    "CSV": f"name,text\nkind,{KIND}\nsafe,{SAFE}\n",
    "TSV": f"id\tprinciple\nkind\t{KIND}\nsafe\t{SAFE}\n",
    "CSV of semicolons, a mark": f"\ufeffid;principle\nkind;{KIND}\nsafe;{SAFE}\n",
    "two containers": json.dumps({"constitution": {"name": "mine", "principles": [{"id": "kind", "principle": KIND},
                                                                                  {"id": "safe", "principle": SAFE}]}}),
    "titles and descriptions": json.dumps([{"title": "kind", "description": KIND},
                                               {"title": "safe", "description": SAFE}]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTITUTIONS)
def test_a_constitution_of_another_shape_is_read(name: str) -> None:
    found = load_constitution("mine", CONSTITUTIONS[name].encode())
    assert [(one.id, one.principle) for one in found.principles] == [("kind", KIND), ("safe", SAFE)]


def test_a_table_with_all_four_columns_keeps_its_requests() -> None:
    text = f"id,principle,critique_request,revision_request\nkind,{KIND},Say where.,Rewrite it.\n"
    one = load_constitution("mine", text.encode()).principles[0]
    assert (one.critique_request, one.revision_request) == ("Say where.", "Rewrite it.")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f'principles = ["{KIND}", "{SAFE}"]\n', "TOML or a program found"),
        (f'[[principles]]\nid = "kind"\nprinciple = "{KIND}"\n', "TOML or a program found"),
        ('ConstitutionalPrinciple(\n    name="kind",\n)\n', "TOML or a program found"),
        ('"""Be kind.\nBe safe."""\n', "a quoted block of code"),
        (f"name,value\nkind,{KIND}\nsafe,{SAFE}\n", "a table .*name the columns id, principle"),
        ('RULES = {"a": Principle(name="a")}\n', "TOML or a program found"),
        (f"RULE={KIND}\n", "TOML or a program found"),
        (f"- Honesty\n  - {KIND}\n  - {SAFE}\n", "line 2: a list within a list"),
        ("An answer says what it\ndoes not know.\n", "line 2: reads as the rest of the line before"),
        ("1\n2\n3\n", "line 1: no sentence .'1'"),
        ("https://example.org/mine.yaml\n", "line 1: no sentence"),
        ("- id: a\n  principle: 1:60:60\n", "no sentence; write the text"),
        (f"rules:\n  - {KIND}\n", "keys here: 'rules'; those read are 'principles'"),
        ("- id: harm\n\tprinciple: x\n", "a tab is no indentation"),
        *((f"- Check {held} for harm.\n", "holds the placeholder") for held in
          ("{input!r}", "{input:>10}", "<%= x %>", "the <user_input>", "__ANSWER__", "｛answer｝", "<|user|>",
           "the <answer>", "the [ANSWER]", "[INSERT NAME HERE]", "$answer", "%s", "{0}", "{% if x %}it{% endif %}")),
    ],
)  # fmt: skip
def test_a_constitution_that_is_not_understood_is_one_line(text: str, wanted: str) -> None:
    with pytest.raises(CaiError, match=wanted) as caught:
        load_constitution("mine", text.encode())
    assert "\n" not in str(caught.value)


def test_numbers_are_no_part_of_a_principle_also_where_yaml_sees_a_mapping() -> None:
    found = load_constitution("mine", f"1. Kind: {KIND}\n2. Safe: {SAFE}\n".encode()).principles
    assert [one.principle for one in found] == [f"Kind: {KIND}", f"Safe: {SAFE}"]


def test_braces_that_nothing_would_fill_in_may_stand() -> None:
    text = '- Code such as {"a": 1} must be valid.\n- A price such as $5 or 10% must be right.\n'
    text += "- Tags such as <b> are closed.\n"
    assert len(load_constitution("mine", text.encode()).principles) == 3


@pytest.mark.parametrize(
    ("said", "at_fault"), [("true", True), ("TRUE ", True), ("yes", True), ("false", False), ("", False)]
)
def test_a_table_says_what_a_list_says_of_a_principle(said: str, at_fault: bool) -> None:
    """Each cell is text: "true" was refused with "write true or false", and 2 with "write a whole number"."""
    text = f"id,principle,pools,priority,refusal_is_fault\nkind,{KIND},benign;redteam,2,{said}\n"
    one = load_constitution("mine", text.encode()).principles[0]
    assert (one.refusal_is_fault, one.pools, one.priority) == (at_fault, ("benign", "redteam"), 2)


@pytest.mark.parametrize(
    ("column", "cell", "fault"),
    [
        ("refusal_is_fault", "maybe", "refusal_is_fault: 'maybe' found; write true or false"),
        ("priority", "high", "priority: str found; write a whole number"),
        ("pools", "evil", 'pools: write a list of "benign" and "redteam"'),
    ],
)
def test_a_cell_of_another_kind_is_named(column: str, cell: str, fault: str) -> None:
    with pytest.raises(CaiError, match=re.escape(fault)):
        load_constitution("mine", f"id,principle,{column}\nkind,{KIND},{cell}\n".encode())
