"""Every sign of every prompt file is cut, sound text is not, and nothing in front of a sign is touched."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.runs import ROOT
from support.texts import RUN_ON, SOUND

from cai.recipe import ends
from cai.recipe.prompts import FewShotExample, load_prompt
from cai.recipe.turn_signs import TURNS

FILES = sorted(path for path in (ROOT / "tests" / "support" / "transcripts").glob("*.yaml"))
PROMPTS = {
    path.stem: load_prompt(path, re.findall(r"\{\{(\w+)\}\}", path.read_text(encoding="utf-8").split("final:")[-1]))
    for path in FILES
}
SIGNS = {name: ends.signs_of(prompt) for name, prompt in PROMPTS.items()}
WRITING = ("instructions", "answers", "critiques", "revisions", "policy")  # the files whose completions are texts

CAPITALS = (str, str.upper, str.capitalize, str.title)
BEFORE = (
    "The answer is fine.",
    "Is that all?",
    "Take a walk, and sleep on it!",
    'She said "yes".',
    "1. Sand the door.\n2. Paint it.",
    "In this case: keep the receipt.",
    "```python\nprint(1)\n```\nIt prints one.",
)
AFTER = ("", "\n", "\nThe tower was finished in 1925.", "\n\nHow do I patch a tyre?", " What is the capital of Norway?")


@st.composite
def run_ons(draw) -> tuple[str, str, str]:
    """Prompt file, sound text, and a sign of that file in some place and spelling, with something behind it."""
    name = draw(st.sampled_from(sorted(SIGNS)))
    signs = SIGNS[name]
    before = draw(st.sampled_from(BEFORE))
    kind = draw(st.sampled_from(("heading", "label", "turn", "stop")))
    cue = draw(st.sampled_from((signs.user, signs.assistant)))
    spelt = draw(st.sampled_from(CAPITALS))
    after = draw(st.sampled_from(AFTER))
    if kind == "heading":
        known = draw(st.sampled_from((cue, *signs.labels)))
        gap = draw(st.sampled_from(("", " ", "  ", "\n", "\n\n", "\n\n---\n\n", "\n***\n")))
        hashes = "#" * draw(st.integers(2, 6))
        shown = f"{draw(st.sampled_from(('', '**')))}{draw(st.sampled_from((*CAPITALS, str.lower)))(known)}"
        end = draw(st.sampled_from(("", ":", " :", "**", " ###")))
        return name, before, f"{gap}{hashes}{draw(st.sampled_from(('', ' ', '  ')))}{shown}{end}\n{after.lstrip()}"
    if kind == "label" or (kind == "stop" and not signs.literals):
        known = draw(st.sampled_from(signs.labels or (signs.user, signs.assistant)))
        known = re.sub(" ", lambda _: draw(st.sampled_from((" ", "  ", "-"))), known)
        gap = draw(st.sampled_from((" ", "  ", "\n", "\n\n", "\n\n---\n\n", "\n### ", " ### ", "\n\n> ")))
        bold = draw(st.sampled_from(("", "**", "__", "*")))
        colon = draw(st.sampled_from((":", " :", ": ")))
        return name, before, f"{gap}{bold}{spelt(known)}{bold}{colon}{after}"
    if kind == "turn":
        role = draw(st.sampled_from(TURNS))
        return name, before, f"\n\n{draw(st.sampled_from(('', '**', '> ')))}{role}: {after.strip()}"
    return name, before, draw(st.sampled_from(signs.literals)) + after


@pytest.mark.runs
@given(run_ons())
@example(("critiques", "The answer is fine.", " ### Case Instruction: How do I patch a tyre?"))
@example(("critiques", "The answer is fine.", "\nCase\nInstruction: How do I patch a tyre?"))
@example(("critiques", "The answer is fine.", "\n\nCase: Instruction: How do I patch a tyre?"))
@example(("critiques", "The answer is fine.", "\n\n### Case 2\nInstruction: How do I patch a tyre?"))
@example(("critiques", "The answer is fine.", "\n\nCritique\nNo issue."))
@example(("revisions", "The answer is fine.", "\n\n**Revision request:**"))
@example(("revisions", "The answer is fine.", "\n> Critique: it is not."))
@example(("revisions", "The answer is fine.", " ###"))
def test_any_sign_of_any_file_is_cut_in_any_place_and_spelling_and_what_stands_before_is_kept(case):
    name, before, tail = case
    found = ends.cut(before + tail, SIGNS[name])
    assert found.text == before
    assert found.marker or not re.search(r"\w", tail)
    assert ends.has_sign(found.text, SIGNS[name]) is None
    assert not re.search(r"\w", tail) or ends.has_sign(before + tail, SIGNS[name]) == found.marker


PIECES = st.sampled_from(
    (
        *("#", "### ", "Case", "New answer", "Answer", "Critique:", "Instruction:", " ", "\n", ".", "**", "> ", "---"),
        *("Instructions: What?", "the case", "1. ", "Response: ", "```\n", "\u3000", "Human:", "Tone: x", "\r\n", "- "),
    )
)


@pytest.mark.runs
@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=60), st.sampled_from(sorted(SIGNS)))
def test_a_cut_text_has_no_sign_and_is_cut_to_itself(text, name):
    found = ends.cut(text, SIGNS[name])
    assert ends.cut(found.text, SIGNS[name]) == ends.Cut(found.text, None)
    assert ends.has_sign(found.text, SIGNS[name]) is None
    assert found.text in text


@pytest.mark.parametrize("name", WRITING)
def test_text_that_talks_about_cases_and_answers_is_not_cut(name):
    assert len(SOUND) >= 40
    own = ("x = 21", "Answer: 42") if name == "critiques" else ()  # "Answer:" is a field of that file and in its stops
    texts = [text for text in SOUND if not (own and text.endswith(own))]
    wrong = [(text, found) for text in texts if (found := ends.cut(text, SIGNS[name])).text != text]
    assert wrong == []


@pytest.mark.parametrize(("name", "kept", "tail"), RUN_ON)
def test_what_a_base_model_wrote_on_is_cut(name, kept, tail):
    found = ends.cut(kept + tail, SIGNS[name])
    assert (found.text, bool(found.marker)) == (kept, True)


@pytest.mark.parametrize(
    "tail",
    [
        "_instruction: I want to get rid of a lot of clutter. How can I do it?",
        "__Instruction: (continue) I need some pencils as well.",
        " instruction: I want to sing in the choir, where do I begin?",
        " Question: Can you help me write a function that checks for a palindrome?",
        "\n\nQuestion: What is the most popular database type?",
        "\n\n**Question:** Which form do I need?\n\nQuestion: And where?\nSolution:",
        "\n\nAdditional Instructions: I want to make a plan for a party. How do I start?",
        "\n\n**Another instruction:** Tell me how tides work.",
        "\nNew Instruction: My dog barks at night. What helps?",
    ],
)
def test_the_next_case_in_other_spellings_is_cut_with_what_hangs_before_it(tail):
    """All but the neighbours were written by a model of 1.5B behind a finished answer: 8 of 1,046."""
    kept = "The amounts vary. For more, ask the tax office, or read its website."
    found = ends.cut(kept + tail, SIGNS["answers"])
    assert (found.text, bool(found.marker)) == (kept, True)


@pytest.mark.parametrize(
    "kept",
    [
        "Three rules hold.\n\n**Never share your password.**",
        "He said *no.*",
        "What comes after first is:\nmore",
    ],
)
@pytest.mark.parametrize("tail", ["\n\n### Case\nInstruction: How?", "\nInstruction: How do I patch a tyre?"])
def test_marks_that_close_and_words_of_the_text_stay_before_a_cut(kept, tail):
    assert ends.cut(kept + tail, SIGNS["critiques"]).text == kept


@pytest.mark.parametrize(
    "text",
    [
        "Bake it for an hour. Additional instructions: keep the leftovers in the fridge and eat them cold.",
        "FAQ\n\nQuestion: Is it free? Answer it plainly. Question: Is it safe?",
        "Follow each instruction: it is there for a reason.",
        "That is the question: Can you wait?",
        "Here is a riddle for you. Question: What has keys but opens no locks? Answer: A piano.",
        "Ask yourself this each day. Question: What did I learn? Then write it down.",
        "Here is one to practise with.\n\nQuestion: Which planet is nearest to the Sun?\n\nAnswer: Mercury.",
        "A riddle for the children, then.\n\nQuestion: What has keys but opens no locks?",
        "Send him this:\n\nQuestion: When do we leave?",
        "```\nUse the table.\n\nQuestion: {text}\nSQL\n```",
        "Planets.\n\nQuestion: Which is the largest?\nA) Mars\nB) Jupiter",
        "Planets.\n\nQuestion: Which is the largest?\n\nBack: Jupiter",
        "Erst das.\n\nQuestion： Wer?\n\nAnswer： ich",
        "One card for the deck.\n\nQuestion: Which is the largest planet?",
        "\n\nQuestion: Which planet is nearest to the Sun?",
        "The wedding is on Sunday.\n\nAdditional Instructions: Please park behind the barn.",
        "Bring the form.\n\nFurther instructions: I will send them by mail.",
        "Additional Instructions: Preheat the oven. Grease the tin. Mix the flour with the butter.",
    ],
)
def test_words_like_those_in_sound_text_are_kept(text):
    assert ends.cut(text, SIGNS["answers"]).text == text


@pytest.mark.runs
@given(st.sampled_from(sorted(SIGNS)), st.sampled_from(BEFORE), st.sampled_from(AFTER), st.data())
def test_what_holds_an_engine_stop_is_cut_at_it_or_before(name, before, after, data):
    stop = data.draw(st.sampled_from(ends.engine_stops(SIGNS[name])))
    assert ends.cut(before + stop + after, SIGNS[name]).text == before


@pytest.mark.parametrize("name", WRITING)
def test_no_engine_stop_stands_in_a_sound_text(name):
    stops = ends.engine_stops(SIGNS[name])
    assert stops
    assert [
        (stop, text) for text in SOUND for stop in stops if stop in text and ends.cut(text, SIGNS[name]).text == text
    ] == []


def test_a_turn_head_written_again_is_dropped_and_a_new_turn_at_the_start_leaves_nothing():
    signs = SIGNS["critiques"]
    assert ends.cut("### Critique\nThe sum is wrong. ### Case", signs) == ends.Cut("The sum is wrong.", "### Case")
    assert ends.cut("**Critique:** The sum is wrong.", signs) == ends.Cut("The sum is wrong.", None)
    assert ends.has_sign("**Critique:** The sum is wrong.", signs) == "**Critique:**"
    assert ends.cut("### Case\nInstruction:\nAdd 2 and 2.", signs) == ends.Cut("", "### Case")


@pytest.mark.parametrize(
    "heading", ["### Final Answer", "### Final new answer:", "## Summary", "###### **Next steps**"]
)
def test_a_heading_with_nothing_under_it_is_no_end_of_a_text(heading):
    assert ends.cut(f"Ask the clerk first.\n\n{heading}\n", SIGNS["revisions"]) == ends.Cut(
        "Ask the clerk first.", None
    )


@pytest.mark.parametrize(
    "text", ["## My garden", "```md\n## Title\n### End\n", "Run it:\n\nls\n# the end", "Ask.\n\n## Why\nSo."]
)
def test_the_only_line_of_a_text_a_block_of_code_and_a_heading_with_text_stay(text):
    assert ends.cut(text, SIGNS["revisions"]).text == text.rstrip()


def test_signs_are_read_from_the_file_and_not_from_a_list():
    prompt = replace(
        PROMPTS["critiques"],
        user_cue="@@ Fall\n",
        assistant_cue="## Urteil\n",
        examples=(
            FewShotExample("Frage:\nWarum?\n\nZutaten:\nMehl", "Gut."),
            FewShotExample("Frage:\nWie?", "Schlecht."),
        ),
        final="Auftrag an dich:\n{{instruction}}\n\nText: {{answer}}",
        stop=("\nENDE",),
    )
    signs = ends.signs_of(prompt)
    assert signs.labels == ("Auftrag an dich", "Text", "Frage")
    for tail in (" @@ Fall\nText", " ### Urteil", "\n\nAUFTRAG AN DICH: schreibe", " Frage: Wer?", "\nENDE"):
        assert ends.cut("Das stimmt so." + tail, signs).text == "Das stimmt so.", tail
    for text in ("Zutaten:\nMehl", "Das stimmt. ### Case\nInstruction"[:11], "Review request: offen", "Der Text: gut."):
        assert ends.cut(text, signs).text == text


def test_a_file_without_marks_or_words_in_its_cues_still_ends_at_them():
    prompt = replace(PROMPTS["policy"], user_cue="<|user|>", assistant_cue=">>>\n")
    signs = ends.signs_of(prompt)
    assert ends.cut("Yes.<|user|>And?", signs).text == "Yes."
    assert ends.cut("Yes.\n>>>\nNo.", signs).text == "Yes."


def test_a_label_with_a_hyphen_is_a_name_like_others():
    signs = ends.signs_of(replace(PROMPTS["policy"], final="Follow-up question:\n{{instruction}}"))
    assert ends.cut("Yes. Follow-up question: why?", signs).text == "Yes."
    assert ends.cut("Yes.\n\nfollow up question: why?", signs).text == "Yes."
    assert ends.cut("The follow-up question was hard.", signs).marker is None


@pytest.mark.runs
def test_a_hostile_text_is_cut_in_linear_time():
    for piece in (
        "# Case x\n",
        "\n---",
        "> ",
        "- Response: x\n",
        "*",
        " ",
        "```\n# Answer x\n",
        "case ",
        "### Critique\n",
    ):
        started = time.process_time()
        ends.cut(piece * 4000, SIGNS["critiques"])
        assert time.process_time() - started < 3.0, piece  # 0.1 s measured; square growth took 5 s and more


@pytest.mark.parametrize("name", ["answers", "critiques", "revisions", "policy", "judge_pair", "relevance"])
def test_the_shipped_files_own_cues_and_labels_are_cut(name: str) -> None:
    path = ROOT / "prompts" / f"{name}.yaml"
    prompt = load_prompt(path)
    signs = ends.signs_of(prompt)
    for cue in (prompt.user_cue.strip(), prompt.assistant_cue.strip(), *(f"{label}:" for label in signs.labels)):
        found = ends.cut(f"The water boils at a lower heat up there.\n\n{cue}\nAnd so on.", signs)
        assert found.text == "The water boils at a lower heat up there.", cue
        assert found.marker
