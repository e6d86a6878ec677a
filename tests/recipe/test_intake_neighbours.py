"""Files like those that users' reports named, not the same: read rightly where the meaning is plain, else refused."""

from __future__ import annotations

import json

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
    "calls in sentences": ("What does f(a,b) do?\nWhat does g(a,b) do?\n",
                           ["What does f(a,b) do?", "What does g(a,b) do?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_neighbour_whose_meaning_is_plain_is_read(name: str) -> None:
    content, wanted = READ[name]
    assert [row.text for row in read(content.encode(), "mine").requests] == wanted


REFUSED: dict[str, tuple[str, str]] = {
    "a title above a table": (f"Table 1\nid,prompt\n1,{TAP}\n2,{POEM}\n", "line 2: a table's header, and other lines"),
    "the header twice": (f"id,prompt\n1,{TAP}\nid,prompt\n2,{POEM}\n", "line 3: the header stands here once more"),
    "a header with brackets": (f"id,Prompt (en)\n1,{TAP}\n2,{POEM}\n", "a table .cells: id, Prompt"),
    "cells without a header": (f"{TAP},home\n{POEM},art\n", "a table .cells"),
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
        read(content.encode(), "mine")
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
        (f"rules:\n  - {KIND}\n", "keys here: 'rules'; those read are 'principles'"),
        ("- id: harm\n\tprinciple: x\n", "a tab is no indentation"),
        *((f"- Check {held} for harm.\n", "holds the placeholder") for held in
          ("the <answer>", "the [ANSWER]", "[INSERT NAME HERE]", "$answer", "%s", "{0}", "{% if x %}it{% endif %}")),
    ],
)  # fmt: skip
def test_a_constitution_that_is_not_understood_is_one_line(text: str, wanted: str) -> None:
    with pytest.raises(CaiError, match=wanted) as caught:
        load_constitution("mine", text.encode())
    assert "\n" not in str(caught.value)


def test_braces_that_nothing_would_fill_in_may_stand() -> None:
    text = '- Code such as {"a": 1} must be valid.\n- A price such as $5 or 10% must be right.\n'
    text += "- Tags such as <b> are closed.\n"
    assert len(load_constitution("mine", text.encode()).principles) == 3
