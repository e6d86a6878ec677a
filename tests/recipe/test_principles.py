"""Constitutions of other shapes: read where the meaning is plain, else all faults of an entry in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.errors import CaiError
from cai.recipe.constitution import Constitution, load_constitution
from cai.recipe.principle_lists import requests_for, slug

HARM, RUDE = "Say how it could hurt somebody.", "Name what is rude."
FIX, POLITE = "Rewrite it without the harm.", "Rewrite it politely."
OURS = {"id": "harm", "principle": "No harm.", "critique_request": HARM, "revision_request": FIX}
RUDE_ROW = OURS | {"id": "rude", "critique_request": RUDE, "revision_request": POLITE}


def load(text: str | bytes) -> Constitution:
    return load_constitution("mine", text if isinstance(text, bytes) else text.encode())


def fault(text: str) -> str:
    with pytest.raises(CaiError) as caught:
        load(text)
    assert str(caught.value).startswith("mine: ") and "\n" not in str(caught.value)
    return str(caught.value)


WITH_REQUESTS = {
    "ours as JSON": json.dumps([OURS, RUDE_ROW]),
    "ours as JSON with tabs": json.dumps([OURS, RUDE_ROW], indent="\t"),
    "ours as JSON lines": "\n".join(map(json.dumps, [OURS, RUDE_ROW])),
    "a mapping around": json.dumps({"version": 2, "principles": [OURS, RUDE_ROW]}),
    "LangChain's": f"- {{name: harm, critique_request: {HARM}, revision_request: {FIX}}}\n"
    f"- {{name: rude, critique_request: {RUDE}, revision_request: {POLITE}}}\n",
    "LangChain's in JavaScript": json.dumps(
        [
            {"name": "harm", "critiqueRequest": HARM, "revisionRequest": FIX},
            {"name": "rude", "critiqueRequest": RUDE, "revisionRequest": POLITE},
        ]
    ),
    "pairs by name": json.dumps(
        {
            "harm": {
                "prompt": "x {a}",
                "critique": f"CritiqueRequest: {HARM}\n\nCritique:",
                "edit_request": f"RevisionRequest: {FIX}\n\nRevision:",
            },
            "rude": {"critique": RUDE, "edit_request": POLITE},
        }
    ),
    "pairs in a list": json.dumps(
        {
            "constitutions": [{"critic": HARM, "revision": FIX}, {"critic": RUDE, "revision": POLITE}],
            "system_chat": [["a", "b"]],
        }
    ),
}


@pytest.mark.parametrize("name", WITH_REQUESTS)
def test_shapes_with_requests_of_their_own_are_read(name: str) -> None:
    found = load(WITH_REQUESTS[name]).principles
    assert [(one.critique_request, one.revision_request) for one in found] == [(HARM, FIX), (RUDE, POLITE)]
    assert all(one.principle for one in found) and len({one.id for one in found}) == 2
    if "list" not in name:
        assert [one.id for one in found] == ["harm", "rude"]


SENTENCES = {
    "a list": "- Be kind to readers.\n- Tell the truth.\n",
    "a list as JSON": '["Be kind to readers.", "Tell the truth."]',
    "strings a line": '"Be kind to readers."\n"Tell the truth."\n',
    "text": "Be kind to readers.\nTell the truth.\n",
    "text with a mark": "\ufeffBe kind to readers.\r\nTell the truth.\r\n",
    "a numbered list": "## Principles\n\n1. Be kind to readers.\n2. Tell the truth.\n",
    "bullets": "* Be kind to readers.\n* Tell the truth.\n",
    "a mapping around": "principles:\n  - Be kind to readers.\n  - Tell the truth.\n",
    "under a key": "- principle: Be kind to readers.\n- principle: Tell the truth.\n",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_get_the_default_requests_and_ids_of_their_words(name: str) -> None:
    found = load(SENTENCES[name])
    assert [one.principle for one in found.principles] == ["Be kind to readers.", "Tell the truth."]
    assert [one.id for one in found.principles] == ["kind-readers", "tell-truth"]
    first = found.principles[0]
    assert (first.critique_request, first.revision_request) == requests_for("Be kind to readers.")
    assert "2 of 2 principles are sentences" in found.notes[-1]


def test_a_sentence_with_a_colon_stays_one() -> None:
    assert load("- Be kind: no insults.\n- Be brief: say it once.\n").principles[0].principle == "Be kind: no insults."
    assert load("Be kind: no insults.\nBe brief: say it once.\n").principles[1].principle == "Be brief: say it once."


def test_an_id_is_the_same_wherever_its_sentence_stands() -> None:
    one, other = "Choose the reply that is least harmful.", "Выберите безвредный ответ."
    here = [principle.id for principle in load(f"- {one}\n- {other}\n").principles]
    there = [principle.id for principle in load(f"- {other}\n- Be kind.\n- {one}\n").principles]
    assert here == [there[2], there[0]] and here[1].startswith("principle-")
    long = "words " * 40
    assert slug(long) != slug(long + "more") and len(slug(long)) < 64


def test_pools_and_priority_are_kept() -> None:
    found = load(json.dumps([{**OURS, "pools": ["redteam"], "priority": 3}, {**OURS, "id": "rude"}])).principles
    assert (
        load(json.dumps([{**OURS, "refusal_is_fault": True}])).principles[0].refusal_is_fault,
        found[0].refusal_is_fault,
    ) == (True, False)
    assert (found[0].pools, found[0].priority) == (("redteam",), 3) and (found[1].pools, found[1].priority) == ((), 0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- {id: a}", ["keys 'principle', 'critique_request', 'revision_request' are missing"]),
        ("- {id: a, princple: b, critique_request: c}", ["keys 'principle', 'revision_request' are", "'princple'"]),
        ("- {name: a, critique_request: b, rewrite: c}", ["'revision_request' is missing", "unknown key 'rewrite'"]),
        ("- {foo: a, bar: b}", ["'principle' is missing", "'foo', 'bar'"]),
        ("- {id: no, principle: yes, critique_request: c, revision_request: d}", ["principle: bool", "id: bool"]),
        (
            json.dumps([{**OURS, "principle": "", "critique_request": 3}]),
            ["principle: is empty", "critique_request: int"],
        ),
        (json.dumps([{**OURS, "critique_request": "Say how {answer} hurts."}]), ["placeholder '{answer}'"]),
        (json.dumps([{**OURS, "principle": "{{instruction}} is kind"}]), ["placeholder '{{instruction}}'"]),
        (
            json.dumps(
                [{**OURS, "critique_request": "CritiqueRequest: Say.", "revision_request": "Revision Request: Do."}]
            ),
            ["'CritiqueRequest:'", "'Revision Request:'"],
        ),
        ("Be kind to {user}.\nTell the truth.\n", ["placeholder '{user}'"]),
        (json.dumps([{**OURS, "pools": "redteam", "priority": "high"}]), ["pools: write a list", "priority: str"]),
        (json.dumps([{**OURS, "refusal_is_fault": "yes"}]), ["refusal_is_fault: 'yes' found; write true or false"]),
        (json.dumps([{**OURS, "refusal_is_fault": 1}]), ["refusal_is_fault: '1' found"]),
        (json.dumps([{**OURS, "pools": ["evil"], "priority": True}]), ["pools: write a list", "priority: bool"]),
        ("- Be kind.\n- Be kind!\n", ["id 'kind' is that of principles[0]"]),
        ("version: 1\nauthor: Ann\n", ["no principles found"]),
        ("Intro:\n1. Be kind.\n", ["line 2"]),
        ("- id: harm\n\tprinciple: No harm.\n", ["line 2, column 1: bad YAML"]),
        ("- id: h\n  principle: Keep it: no harm.\n", ["put the text in quotes"]),
        ("PK\x03\x04", ["a zip archive"]),
    ],
)
def test_all_faults_of_an_entry_stand_in_one_line(text: str, wanted: list[str]) -> None:
    message = fault(text)
    assert all(part in message for part in wanted), message


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text", [BOMB, "- &a {id: a}\n- *a\n", "base: &b {x: 1}\nprinciples:\n  - <<: *b\n", "&a [*a]"]
)
def test_an_alias_is_refused_before_it_grows(text: str) -> None:
    began = time.monotonic()
    assert "an alias (*" in fault(text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text",
    ["- !!bool maybe", "- !!int x", "- !!float x", "- !!timestamp x", "- !!python/name:os.system", "- " + "9" * 5000],
)
def test_tags_and_numbers_that_yaml_cannot_make_are_one_line(text: str) -> None:
    assert "bad YAML" in fault(text)


def test_a_constitution_from_a_pipe_is_refused_or_read_but_never_empty(tmp_path: Path) -> None:
    with pytest.raises(CaiError, match="device"):
        load_constitution("/dev/zero")


@pytest.mark.runs
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_a_traceback(data: bytes) -> None:
    try:
        found = load(data)
    except CaiError as error:
        assert "\n" not in str(error)
    else:
        assert all(one.principle and one.critique_request and one.revision_request for one in found.principles)


TOKENS = st.sampled_from(
    [
        "- ",
        "\n",
        ": ",
        "id",
        "principle",
        "critique",
        "{",
        "}",
        "[",
        "]",
        "a",
        '"',
        "  ",
        "principles",
        "&a",
        "*a",
        "name",
        ", ",
        "|",
        "!!int ",
        "1",
    ]
)


@pytest.mark.runs
@given(st.lists(TOKENS, max_size=30))
@settings(max_examples=400, deadline=None)
def test_no_text_of_yamls_own_signs_makes_a_traceback(signs: list[str]) -> None:
    try:
        load("".join(signs))
    except CaiError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000, "[\n" * 5000, "- [{a: " * 500])
def test_deep_nesting_is_refused_before_the_loader_walks_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yaml.load", lambda *_, **__: pytest.fail("the loader was asked"))
    assert "bad YAML: RecursionError" in fault(text)
