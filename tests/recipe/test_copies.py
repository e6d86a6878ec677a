"""Eight words in a row out of an example are found, unless the item, the preamble or a request holds them too."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.runs import ROOT

from cai.metrics.text import words
from cai.recipe.copies import RUN, copied, shots_of
from cai.recipe.prompts import FewShotExample, load_prompt

STAGES = ("instructions", "answers", "critiques", "revisions")
PROMPTS = {name: load_prompt(ROOT / "prompts" / f"{name}.yaml") for name in STAGES}
SHOTS = {name: shots_of(prompt) for name, prompt in PROMPTS.items()}
PLACES = [
    (name, part, at)
    for name, prompt in PROMPTS.items()
    for example in prompt.examples
    for part in (example.user, example.assistant)
    for at in range(len(words(part)) - RUN + 1)
]
BOX = "put it in a box and close the lid tightly"


def made(assistant: str = BOX, preamble: str = ""):
    prompt = replace(PROMPTS["answers"], examples=(FewShotExample("Where to?", assistant),), preamble=preamble)
    return shots_of(prompt)


@given(st.sampled_from(PLACES), st.integers(RUN, 14), st.sampled_from((str, str.upper, str.title)))
def test_any_eight_words_of_any_example_are_found_in_other_capitals_and_marks(place, length, spelt):
    name, part, at = place
    run = words(part)[at : at + length]
    assume(all("'" not in word for word in run))  # title() would write "Don'T"
    text = f"I think so. {spelt(' — '.join(run))}, and that is all."
    found = copied(text, SHOTS[name], ("Some question?",))
    assert found is not None and " ".join(run) in found
    assert copied(text, SHOTS[name], ("Some question?", " ".join(run))) is None or len(found.split()) > len(run)


@given(st.sampled_from(PLACES), st.integers(1, RUN - 1))
def test_seven_words_in_a_row_are_no_copy(place, length):
    name, part, at = place
    run = words(part)[at : at + length]
    assume(sum(len(word.split("'")) for word in run) < RUN)
    assert copied(f"qqq {' '.join(run)} qqq", SHOTS[name], ()) is None


def test_a_contraction_is_two_words_and_a_stock_refusal_nobodys_copy():
    """A revision of a real model had "is something I won't help with. It" of an example: seven words, and no copy."""
    shots = made("To open her letters is something I won't help with. It would hurt her.")
    assert copied("Selling it is something I won’t help with. It is not yours.", shots, ()) is not None
    assert copied("Selling it is something I won't help with, dear.", shots, ()) is None
    shots = made("I'm sorry, but I can't help with that request, since it would hurt her.")
    assert copied("I'm sorry, but I can't help with that request.", shots, ()) is None
    assert copied("I can't help with that request, since it would.", shots, ()) is not None
    shots = made("I'm sorry, but I can't help you with that. I'm sorry, but I can't do that for you.")
    assert copied("I'm sorry, but I can't help you with that.", shots, ()) is None
    assert copied("I'm sorry, but I can't do that for you.", shots, ()) is None


@pytest.mark.parametrize("said", ["I can't help with that request.", "I can't assist you with that request."])
def test_a_stock_refusal_of_two_sentences_is_nobodys_copy(said):
    """The second, six words and an end, was "a whole sentence of an example": each decline would have been refused."""
    shots = made(f"I'm sorry. {said} It would hurt her.")
    assert copied(f"I am so sorry. {said} Ask a friend.", shots, ()) is None
    longer = said.replace("I can't", "I'm sorry, but I can't")
    assert copied(longer, made(f"{longer} It would hurt her."), ()) is None


def test_a_short_sentence_within_a_longer_one_of_the_preamble_is_nobodys_copy():
    shots = made("Whole numbers and decimals both work.", "Say that whole numbers and decimals both work.")
    assert copied("Whole numbers and decimals both work.", shots, ()) is None
    assert (
        copied("Whole numbers and decimals both work.", made("Whole numbers and decimals both work."), ()) is not None
    )


@given(
    st.lists(
        st.sampled_from(["it", "won't", "rock'n'roll", "l\u2019\u00e9t\u00e9", "dogs'", "'tis", "\u732b", "o'", "\n"]),
        max_size=24,
    )
)
def test_a_copy_holds_eight_parts_in_a_row_of_an_example(run):
    """Apostrophes at the ends of words, several in one, other scripts: what is found is in the text and the example."""
    example = "'Tis the rock'n'roll of l'été, dogs' bowls won't o' nights: it won't, it won't, 猫 won't rock'n'roll it."
    found = copied(" ".join(run), made(example), ())
    if found is not None:
        parts = re.split(r"[ ']", found)
        shown = [part for word in words(example) for part in word.split("'")]
        assert len(parts) >= RUN
        assert all(
            parts[at : at + RUN] in [shown[n : n + RUN] for n in range(len(shown))]
            for at in range(len(parts) - RUN + 1)
        )


@given(st.text(max_size=200), st.sampled_from(STAGES))
def test_what_is_found_stands_in_the_text_and_an_input_that_holds_the_text_excuses_it(text, name):
    part = PROMPTS[name].examples[0].assistant
    for whole in (text, f"{text} {part}"):
        found = copied(whole, SHOTS[name], ())
        assert found is None or (found in " ".join(words(whole)) and len(re.split(r"[ ']", found)) >= RUN)
        assert copied(whole, SHOTS[name], (whole,)) is None


def test_the_longest_run_is_given():
    text = "Put it in a box and close the lid. Or: put it in a box, and close the lid tightly!"
    assert copied(text, made(), ()) == BOX


def test_words_of_an_input_the_preamble_or_a_request_are_nobodys_copy():
    assert copied(f"Just {BOX}.", made(), ()) == BOX
    assert copied(f"Just {BOX}.", made(), (f"May I {BOX}?",)) is None
    assert copied(f"Just {BOX}.", made(preamble=f"Always {BOX}."), ()) is None
    prompt = replace(PROMPTS["answers"], examples=(FewShotExample("Where to?", BOX),))
    assert copied(BOX, shots_of(prompt, [f"See whether they {BOX}."]), ()) is None


def test_a_run_is_broken_by_words_that_the_item_brought():
    found = copied(BOX, made(), ("it in a box and close the lid",))
    assert found == "put it in a box and close the" or found == "in a box and close the lid tightly"


@pytest.mark.parametrize("name", STAGES)
def test_a_text_in_other_words_copies_nothing(name):
    text = "Warm the milk slowly, stir in the cocoa, and stop before it boils over the rim of the pan."
    assert copied(text, SHOTS[name], ("How do I make cocoa?",)) is None


def test_a_prompt_without_examples_has_nothing_to_copy():
    shots = shots_of(load_prompt(ROOT / "prompts" / "policy.yaml"))
    assert copied(BOX, shots, ()) is None


SHORT = "Whole numbers and decimals both work."


@pytest.mark.parametrize(
    "text", [SHORT, f"So. {SHORT}", f"- Yes\n- {SHORT.lower()}\n- No", f'It said: "{SHORT}" Good.']
)
def test_a_whole_sentence_of_six_or_seven_words_is_a_copy_too(text):
    shots = made(f"Take the mean. {SHORT} Round it.")
    assert copied(text, shots, ("What is a mean?",)) == "whole numbers and decimals both work"
    assert copied(text, shots, (f"Is it true that {SHORT}",)) is None


@pytest.mark.parametrize("text", ["Whole numbers and decimals both work here.", "Both work.", "Take the mean."])
def test_a_shorter_one_and_a_part_of_one_are_none(text):
    assert copied(text, made(f"Take the mean. {SHORT} Round it."), ()) is None


def test_a_sentence_of_the_preamble_is_none():
    assert copied(SHORT, made(f"Take the mean. {SHORT}", preamble=SHORT), ()) is None


def test_beside_a_run_that_the_item_brought_a_short_sentence_is_still_one():
    shots = made(f"{SHORT} Or else {BOX}.")
    assert copied(f"So {BOX}. {SHORT}", shots, (f"May I {BOX}?",)) == "whole numbers and decimals both work"


def test_a_sentence_of_five_words_is_an_idiom():
    assert copied("Ask a doctor about it.", made(f"Ask a doctor about it. {SHORT}"), ("x",)) is None


def test_shots_of_several_prompts_are_all_of_theirs():
    both = made(f"Now {BOX}.") | made(f"Take the mean. {SHORT}")
    assert copied(f"So {BOX}.", both, ("x",)) == BOX and copied(SHORT, both, ("x",)) is not None


def test_what_has_no_inputs_and_an_example_of_short_sentences_alone_are_looked_at_too():
    assert copied(f"So. {SHORT}", made(SHORT), ()) == "whole numbers and decimals both work"


def test_six_signs_of_a_script_without_spaces_are_no_sentence():
    shots = made("我想喝一杯茶\n你呢")
    assert copied("好\n我想喝一杯茶", shots, ()) is None
