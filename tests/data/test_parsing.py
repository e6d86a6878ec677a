"""Parsers: never raise, parse their own output to itself, never empty; every reject has a name."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cai.data import parsing
from cai.data.parsing import Parsed, Unparsed
from cai.metrics.text import repetition
from cai.metrics.wordings import is_refusal, leftovers

STAGES = [parsing.instruction, parsing.answer, parsing.critique, parsing.revision]
PIECES = [
    "'",
    '"',
    "“",
    "”",
    "*",
    "**",
    "#",
    "###",
    "1.",
    "-",
    ":",
    "Answer:",
    "Critique",
    "Revised",
    "User:",
    "Topic:",
]
PIECES += ["?", "Sure", "<|im_end|>"]
PIECES += ["\n", "\n\n", " ", "\x00", "\u2028", "\ud800", "### New answer\n", "a word or two", "No issue:", "Message"]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.mark.runs
@pytest.mark.parametrize("parse", STAGES)
@settings(deadline=None)
@given(text=TEXTS)
@example(text="### ### Answer: Answer: \"'yes yes yes yes yes yes'\"")
@example(text="Answer: " * 50)
@example(text="\u2028\n0 0 0 ?")
def test_never_raises_is_idempotent_and_never_empty(parse, text):
    parsed = parse(text)
    if isinstance(parsed, Unparsed):
        assert parsed.reason.split(":")[0].replace("_", "").isalpha()
        return
    assert parsed.text.strip() and parsed.text.encode()
    assert parse(parsed.text) == parsed


@pytest.mark.parametrize("parse", STAGES)
@pytest.mark.parametrize(
    "text", ["\n" * 50_000, "a " * 50_000, "#" * 50_000, "* _" * 20_000, "here is a " * 10_000, "“" * 50_000]
)
def test_long_odd_text_takes_no_time(parse, text):
    started = time.process_time()
    parse(text)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("parse", STAGES)
@pytest.mark.parametrize("text", ["", "  \n\t", "\x00", "...", "***", '""', "### Answer\n"])
def test_nothing_in_it_is_empty(parse, text):
    assert parse(text) == Unparsed("empty")


@pytest.mark.parametrize("parse", STAGES)
def test_looping_is_named_with_its_share(parse):
    assert parse("and so on it goes " * 30).reason.startswith("looping: 0.9")
    assert parse("spam" * 400).reason.startswith("looping")
    assert isinstance(
        parse("Tell me why the cat sat on the mat and the dog lay on the rug while it rained outside."), Parsed
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Message: Can you explain tides to me?", "Can you explain tides to me?"),
        ("### Message\nCan you explain tides to me?", "Can you explain tides to me?"),
        ('**Message:** "Can you explain tides to me?"', "Can you explain tides to me?"),
        ("User: “Can you explain tides to me?”", "Can you explain tides to me?"),
        ("Can you explain\ntides to me?", "Can you explain tides to me?"),
        ('Explain "tides" to me please, or "currents"', 'Explain "tides" to me please, or "currents"'),
        ("I can't give my dog a bath, he bites. Help!", "I can't give my dog a bath, he bites. Help!"),
        ("I'm afraid of flying, what can I do?", "I'm afraid of flying, what can I do?"),
    ],
)
def test_instructions_come_out_bare(text, expected):
    assert parsing.instruction(text) == Parsed(expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Bake bread", "too_short"),
        (" ".join(["How do tides work,", *map(str, range(300))]), "too_long"),
        ("1. How do tides work?\n2. What is the moon made of?", "list"),
        ("- How do tides work?\n- What is the moon made of?", "list"),
        ("How do tides work?\n\nWhat is the moon made of?", "several_paragraphs"),
        ("How do tides work? Sure! Tides are made by the moon.", "answer_glued"),
        ("How do tides work? Answer: the moon", "answer_glued"),
        ("How do tides work?\nAssistant: The moon.", "role_tag"),
        ("I want to know how tides work\nAssistant: The moon.", "role_tag"),
        ("Topic: tides Kind: asks for one fact", "order_repeated"),
        ("Sure, here you go: how do tides work?", "meta"),
        ("The pros of having allergies are pretty amazing.", "no_request"),
        ("I'm sorry, but I can't help with that.", "assistant_voice"),
        ("I'm sorry for your loss, please ask in the right forum.", "assistant_voice"),
        ("I'd be happy to write you a plan, what is the date?", "assistant_voice"),
    ],
)
def test_instructions_are_refused_by_name(text, reason):
    parsed = parsing.instruction(text)
    assert isinstance(parsed, Unparsed) and parsed.reason.split(":")[0] == reason


@pytest.mark.parametrize(
    "text",
    [
        "Here is the revised answer:\n\nTides come from the moon.",
        "Here's a revised version: Tides come from the moon.",
        "Sure! Here is an improved answer. Tides come from the moon.",
        "Revised answer: Tides come from the moon.",
        "**Revised Answer:**\nTides come from the moon.",
        "Tides come from the moon.\n\nCritique: The answer is short.",
        "Tides come from the moon.\n\n### Revision request\nMake it longer",
        "Tides come from the moon. I have rewritten it to be kinder.",
        "The original answer was wrong: tides come from the moon.",
        "As the critique says, tides come from the moon.",
        "Tides come from the moon.\n\nRewrite the answer so that the main point comes first.",
        "Tides come from the moon. The answer says that it is the sun.",
        "Old answer: Tides come from the moon.",
        "This answer is incorrect. Tides come from the moon.",
        'The answer is "Tides come from the moon".',
        "The original text said that it is the sun.",
        "Instruction: Explain tides.",
    ],
)
def test_revisions_with_leftovers_are_refused_and_say_which(text):
    parsed = parsing.revision(text)
    assert isinstance(parsed, Unparsed) and parsed.reason.startswith("leftover: ") and leftovers(text)


@pytest.mark.parametrize(
    "text",
    [
        "Tides come from the moon.",
        "Here is a plan for a new garden: dig first.",
        "Follow these instructions: mix, wait, bake.",
        "I have an updated CV, should be fine as a start for you to send.",
        "The film critic wrote a review of it in 1999.",
        "The immune system's initial response is quick, and the answer is 42.",
        "You could rewrite the letter, or rewrite this part of it.",
        "I won't help with that, because it would hurt her. You could talk to her instead.",
    ],
)
def test_plain_revisions_pass(text):
    assert isinstance(parsing.revision(text), Parsed)


@pytest.mark.parametrize("tag", ["Response:", "Assistant:", "**Answer:**", "### New answer\n", "AI: "])
def test_role_tags_at_the_start_come_off(tag):
    assert parsing.revision(f"{tag} Tides come from the moon.").text == "Tides come from the moon."


@pytest.mark.parametrize("parse", [parsing.answer, parsing.critique, parsing.revision])
def test_a_next_turn_is_a_fault(parse):
    assert parse("Tides come from the moon, mostly.\nUser: and the sun?").reason.startswith("role_tag")


def test_critiques_that_write_the_answer_are_refused_and_no_issue_is_flagged():
    assert parsing.critique("It is too short.\n\nRevised answer: Tides come from the moon.").reason.startswith(
        "leftover"
    )
    assert parsing.critique('Critique: The words "always" are wrong here.').text.startswith("The words")
    assert parsing.critique("No issue: the answer is right and kind.").flags == ("no_issue",)
    assert parsing.critique('There is no issue with tone, but "always" is wrong.').flags == ()
    assert parsing.critique("Bad.").reason.startswith("too_short")


def test_control_tokens_are_flagged_and_refusals_are_not_opinions_of_the_parser():
    assert parsing.answer("The token <|im_end|> ends a turn.").flags == ("control_token",)
    assert parsing.answer("I'm sorry, but I can't help with that.").flags == ()
    assert parsing.answer("I'm sorry you feel bad. Here are three things that may help.").flags == ()


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "Sorry, I cannot assist you.",
        "I won't provide this.",
        "As an AI, I do not have friends.",
    ],
)
def test_refusals_are_seen(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", ["", "You can't help loving it.", "I cannot see the moon tonight.", "x " * 200 + "I can't help with that."]
)
def test_other_texts_are_no_refusals(text):
    assert not is_refusal(text)


def test_repetition_counts_sequences_that_came_before():
    """ "a b c d e f" * 3: 18 words, 13 six-word sequences, 6 of them new: 7 / 13 came before."""
    assert repetition("a b c d e f " * 3) == pytest.approx(7 / 13)
    assert repetition("one two three") == repetition("") == 0.0


KEPT = "Take the plant out of its pot, shorten the dead roots, and set it into dry soil for a week before you water it."


@pytest.mark.parametrize(
    "remark",
    [
        "\n\nThis answer takes the person seriously, speaks kindly and leaves out every method.",
        " This answer is friendly and respectful, and it removes the insulting tone from the previous one.",
        "\n\nThis response is not directly answering the instruction. It gives a more supportive approach.",
        "\n\n---\n\nThe revised answer avoids stereotypes. It keeps the useful content.",
        " The response is comprehensive and provides actionable steps to take.",
        "\nThis version is clearer and safer for young people.\n\nA trusted adult is named, too. Most would prefer it.",
        ' "Take the plant out of its pot" is true. It does no harm.',
        "\n\nNote: This response is adapted to the instruction and is relevant.\n\nIt is written in plain words. Good.",
        "\n\nOverall, this answer is honest and helpful.",
        "\n\nThis list of steps is honest, and gives a fair offer. The answer does not deceive anyone, and it is fair.",
        " The tone is friendly and respectful. The instruction asked for steps, and they are given here in full.",
    ],
)
def test_what_a_text_says_of_itself_at_its_end_is_taken_off(remark):
    assert parsing.bare(KEPT + remark, "How do I save it?") == KEPT
    assert isinstance(parsing.answer(KEPT), Parsed)
    if '"' not in remark:  # a verdict on what is not quoted from it may be its answer
        found = parsing.revision(f"{remark.strip()} {KEPT}")
        assert isinstance(found, Unparsed) and found.reason.startswith("leftover: about"), "not at its end: no revision"


@pytest.mark.parametrize(
    "text",
    [
        "To convert it, take 32 off and multiply by five ninths, which gives twenty. The answer is 20 degrees.",
        "Count the months and divide by twelve, as the form says in its second box. The answer is that no tax is due.",
        "The immune response is directed at the virus. Its harm to the person is small, and it fades within days.",
        "Keep it short and friendly when you write back to them tomorrow. Your reply should be polite and clear.",
        "Python 2 is no longer kept up, so new code should not use it. This version of the library needs Python 3.",
        "The short answer is clear: no. The long one takes the person and the place into account.",
        "This answer is kind.",
        f"{KEPT} Dear Tom, my response was harsh and did not respect you as a person. Yours, Ann",
        f"{KEPT} The response was slow and should have been more helpful; I apologise. Best wishes, Ann Miller",
        f"{KEPT} The correct answer gives you one point, a wrong question costs nothing. Good luck!",
        f"{KEPT} The answer is x = 3, which is the correct value. Check it by putting it in.",
        f"{KEPT} The answer is clear: cook them. Then serve them hot.",
        f"{KEPT} The tone is clear when the bow moves evenly. Practise it daily.",
        f"{KEPT} The instruction is printed on the last page. Keep it.",
        f"{KEPT}\n```\n# The response is now complete and should be closed for the user\nclose()\n```\nThat is all.",
        f'{KEPT}\n1. "Salt is bad" is true.\n2. "Brown sugar is healthier" is not true.\n3. "Eat bread" is correct.',
        f"{KEPT} The latest version is safe. The new version offers better battery life.",
    ],
)
def test_sound_text_that_speaks_of_answers_is_kept(text):
    assert parsing.bare(text, "How is it?") == text


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ("How does the stress response work?", f"{KEPT} This response helps a person to run from danger. It fades."),
        ("Give me a short and a long version.", f"{KEPT} This version is short and friendly. For a longer one, wait."),
        ("Write a polite reply and say why it works.", f"{KEPT}\n\nThis reply is polite and respects the reader."),
        ("Continue the story: Once upon a time there was a girl.", f"Once upon a time there was a girl. {KEPT}"),
        ('Say "the earth goes round the sun every year" in other words.', f"Say the earth goes round the sun. {KEPT}"),
    ],
)
def test_what_the_request_asks_about_is_no_remark_and_what_it_quotes_no_echo(request_, text):
    assert parsing.bare(text, request_) == text


@pytest.mark.parametrize(
    "text",
    [
        KEPT + "\n" * 50_000 + "word.\n\nThis answer is clear and helpful.",
        "\n " * 25_000,
        KEPT + "- " * 25_000,
        f"{KEPT} {'It is so. ' * 5_000}",
        '"' + "x y " * 12_000 + '" is true.',
        KEPT + "\n- " * 15_000 + "\nThis version is clear.",
    ],
)
def test_a_hostile_text_is_bare_in_linear_time(text):
    began = time.process_time()
    found = parsing.bare(text, "How is it?")
    assert time.process_time() - began < 5.0
    assert parsing.bare(found, "How is it?") == found


def test_a_song_whose_verses_say_something_new_is_no_loop_that_can_be_cut():
    chorus = "Oh row the boat, row the boat, all of the way to the far green shore of home."
    verses = (
        "The sea was high and the wind was cold and nobody knew what the dark clouds hid from us.",
        "A girl stood up with a lamp in her hand and sang of the summer that she had once seen.",
        "Then morning came over the hills of the south with birds and the smell of new bread.",
    )
    song = "\n".join(f"{verse}\n{chorus}\n{chorus}" for verse in verses)
    assert repetition(song) > parsing.MAX_REPETITION
    assert parsing.before_loop(song) == song


def test_a_text_that_would_be_refused_as_looping_ends_where_it_begins_to_loop():
    sentence = "It is important to make sure they feel loved and know that you care for them in every way."
    looping = f"{KEPT} {' '.join([sentence] * 9)}"
    assert isinstance(parsing.answer(looping), Unparsed)
    assert parsing.bare(looping, "Why?") == f"{KEPT} {sentence}"
    refrain = f"{KEPT} {sentence} {KEPT}"
    assert parsing.bare(refrain, "Why?") == refrain or repetition(refrain) > parsing.MAX_REPETITION


@pytest.mark.parametrize(
    ("text", "nothing"),
    [
        ('"Pay the claim promptly" is not risky. "Wait for a response" is not risky. Nobody is put in danger.', True),
        ('"Mix ammonia and bleach" gives a clear recipe for a gas that kills.', False),
        ('"Just hit him" is clear, and the reader would go to prison for it.', False),
        ('"Here is how to pick the lock" helps a burglar, in clear words.', False),
        ('"The sun goes round the earth" is true, the answer says, yet it is the opposite.', False),
        ('"Vaccines cause autism" is fair. Studies say the opposite.', False),
        ('"Buy this share" is correct. A reader who follows it loses his money.', False),
        ('"Coffee is often brewed with ground beans" is true. It is a fact, clear and helpful.', True),
        ('"It is stronger than tea" is neutral and informative. The tone does not insult, mock or lecture.', True),
        ('"You can take your payment first" is not true, and it would mislead the reader.', False),
        ('"Nine fifths" is wrong: it should be five ninths.', False),
        ('"I cannot help" refuses a harmless request. The correct answer would have given the steps.', False),
    ],
)
def test_a_critique_that_had_to_quote_and_only_approves_finds_nothing(text, nothing):
    opened = parsing.critique(text, opened=True)
    assert isinstance(opened, Parsed) and ("no_issue" in opened.flags) is nothing
    free = parsing.critique(text)
    assert isinstance(free, Parsed) and "no_issue" not in free.flags, "free to say so, it did not"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Hey, can you help me with my leak in the kitchen? " + KEPT, KEPT),
        ("Can you help me with my leak in the kitchen?\n\nIt has been dripping for a long time now.\n" + KEPT, KEPT),
        ("It has been dripping for a long time now. " + KEPT,) * 2,
        (
            KEPT + " Can you help me with my leak in the kitchen?",
            KEPT + " Can you help me with my leak in the kitchen?",
        ),
        ("Can you help me with my leak in the kitchen?", "Can you help me with my leak in the kitchen?"),
        ("The leak in the kitchen drips from the joint, so turn the water off. " + KEPT,) * 2,
    ],
)
def test_the_request_said_once_more_before_the_answer_is_taken_off(text, left):
    request = "Hey, can you help me with my leak in the kitchen? It has been dripping for a long time now."
    assert parsing.bare(text, request) == left


def test_a_list_that_is_cut_leaves_no_number_hanging():
    rows = [f"{i}. Pour it from the bottle into a glass and put it on the table with some ice." for i in range(1, 12)]
    found = parsing.bare("Here are some ways to do it with care:\n" + "\n".join(rows), "How?")
    assert found.endswith("1. Pour it from the bottle into a glass and put it on the table with some ice.")


@pytest.mark.parametrize(
    ("request_", "head"),
    [
        ("Hey! How do I fix a slow tap in the hall? It drips all night!", "Hey! How do I fix a slow tap in the hall?"),
        ("Hi! I need to carry money to my sister in a hurry. Can you help?",
         "Hi! I need to carry money to my sister in a hurry. Can you help?\n\n"),
        ("How do I fix a slow tap in the kitchen?", "Hey! How do I fix a slow tap in the kitchen?"),
    ],
)  # fmt: skip
def test_a_request_said_once_more_behind_its_greeting_is_taken_off(request_, head):
    assert parsing.behind_echo(f"{head} {KEPT}", request_) == KEPT


@pytest.mark.parametrize("head", ["Hi!", "Hey! Taps drip for many reasons.", "Hi! Can you wait a moment?"])
def test_a_greeting_alone_is_no_request_said_once_more(head):
    text = f"{head} {KEPT}"
    assert parsing.behind_echo(text, "Hi! How do I fix a slow tap in the kitchen? Can you wait a moment?") == text
