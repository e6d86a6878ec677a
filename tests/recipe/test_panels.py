"""Which examples a review is shown: those of its principle's topic, of the request's own pool last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cai.engine.tokenizers import ByteTokenizer
from cai.errors import CaiError
from cai.recipe.constitution import load_constitution
from cai.recipe.panels import panel, without_panel
from cai.recipe.principle_lists import Principle, requests_for
from cai.recipe.prompts import FewShotExample, Prompt, load_prompt, load_reviews

REPO = Path(__file__).parents[2]
FILES = ("constitution.yaml", "docs/examples/constitution-helpful-only.yaml")
CRITIQUES, REVISIONS = (load_prompt(REPO / f"prompts/{name}.yaml") for name in ("critiques", "revisions"))
BY_ID = {principle.id: principle for name in FILES for principle in load_constitution(REPO / name).principles}
JOINT = load_reviews(
    REPO / "prompts/reviews.yaml",
    {"instruction", "answer", "critique_request"},
    {"instruction", "answer", "critique", "revision_request"},
)


def shown(prompt: Prompt, principle: Principle, pool: str, count: int = 4) -> list[FewShotExample]:
    order = replace(prompt, few_shot=count).order(panel(prompt.examples, principle, pool))
    return [prompt.examples[place] for place in order]


@pytest.mark.parametrize("prompt", [CRITIQUES, REVISIONS, *JOINT], ids=lambda prompt: prompt.name)
def test_every_shipped_principle_names_a_topic_that_the_examples_have(prompt: Prompt) -> None:
    topics = {example.topic for example in prompt.examples}
    assert all(principle.topic in topics and principle.topic for principle in BY_ID.values())


@pytest.mark.parametrize("prompt", [CRITIQUES, REVISIONS, *JOINT], ids=lambda prompt: prompt.name)
def test_a_harmful_request_under_harm_sees_harmful_ones_and_a_harmless_one_ends_with_harmless_ones(
    prompt: Prompt,
) -> None:
    harmful = shown(prompt, BY_ID["no-dangerous-help"], "redteam")
    assert [(one.topic, one.pool) for one in harmful] == [("harm", "redteam")] * 4
    harmless = shown(prompt, BY_ID["no-dangerous-help"], "benign")
    assert [one.pool for one in harmless[-2:]] == ["benign"] * 2 and {one.topic for one in harmless} == {"harm"}


def test_helpful_only_never_sees_an_example_that_declines() -> None:
    for principle in load_constitution(REPO / FILES[1]).principles:
        for prompt in (CRITIQUES, REVISIONS):
            assert {one.topic for one in shown(prompt, principle, "redteam", -1)} <= {"help", ""}


def test_one_example_is_the_last_and_most_telling_one_and_none_is_none() -> None:
    (one,) = shown(REVISIONS, BY_ID["privacy"], "redteam", 1)
    assert (one.topic, one.pool) == ("harm", "redteam")
    assert shown(CRITIQUES, BY_ID["uncertainty"], "benign", 1)[0].topic == "truth", "not the one that finds nothing"
    assert shown(REVISIONS, BY_ID["privacy"], "redteam", 0) == []


def test_a_principle_without_a_topic_has_that_of_the_example_it_is_most_like_or_none() -> None:
    for id_, topic in (("no-manipulation", "harm"), ("honesty", "truth"), ("no-over-refusal", "help")):
        bare = replace(BY_ID[id_], topic="")
        assert {one.topic for one in shown(CRITIQUES, bare, "benign")} - {""} == {topic}
        assert panel(CRITIQUES.examples, replace(bare, topic="of-another-file"), "benign") == panel(
            CRITIQUES.examples, bare, "benign"
        )
    strange = Principle("haiku", "It is a haiku.", "Zähle die Silben.", "Schreibe siebzehn Silben.")
    assert panel(CRITIQUES.examples, strange, "benign") == ()
    assert panel([replace(one, topic="") for one in CRITIQUES.examples], BY_ID["no-harm"], "redteam") == ()


def test_there_are_few_prefixes_for_a_whole_constitution() -> None:
    orders = {
        replace(REVISIONS, few_shot=4).order(panel(REVISIONS.examples, principle, pool))
        for principle in load_constitution(REPO / FILES[0]).principles
        for pool in ("benign", "redteam")
    }
    assert len(orders) == 4


def test_renders_of_one_panel_share_their_prefix_and_differ_from_another() -> None:
    ids = []
    for id_, text in (("privacy", "one"), ("protect-minors", "another"), ("honesty", "one")):
        shots = panel(REVISIONS.examples, BY_ID[id_], "redteam")
        fields = dict.fromkeys(REVISIONS.fields, text)
        prompt = replace(REVISIONS, few_shot=4)
        rendered = prompt.render(fields, format="base", tokenizer=ByteTokenizer(), shift=shots)
        ids.append(rendered.token_ids[: rendered.prefix_len])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pool: harmful", "examples[0].pool: 'harmful' is no pool; write benign or redteam"),
        ("topic: 3", "examples[0].topic: int found"),
        ("topics: harm", "examples[0]: unknown key"),
    ],
)
def test_a_wrong_word_about_an_example_is_one_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "critiques.yaml"
    text = (REPO / "prompts/critiques.yaml").read_text()
    path.write_text(
        text.replace("  - topic: harm  # red-team: the answer helps\n    pool: redteam\n", f"  - {line}\n", 1)
    )
    with pytest.raises(CaiError) as error:
        load_prompt(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_topic_of_a_constitution_is_text(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("- id: kind\n  topic: [harm]\n  principle: It is kind to whoever reads it.\n")
    with pytest.raises(CaiError, match="topic: list found; write the topic of examples"):
        load_constitution(path)


def of_topics(tmp_path: Path, *about: str, name: str = "critiques") -> Prompt:
    """A prompt file whose examples are texts, each with these lines about it."""
    path = tmp_path / f"{name}.yaml"
    rows = "".join(f"  - user: a case\n    assistant: said {i}\n{lines}" for i, lines in enumerate(about))
    path.write_text(
        "preamble: p\ncues: {user: 'Case:', assistant: 'Said:'}\nfinal: 'Look at {{answer}}'\n"
        f"examples:{chr(10) + rows if rows else ' []'}\n",
        encoding="utf-8",
    )
    return load_prompt(path)


@pytest.mark.parametrize("written", ["harm", " Harm ", "HARM", "'harm  '"])
def test_a_topic_is_the_same_in_other_case_and_with_spaces(tmp_path: Path, written: str) -> None:
    """Otherwise the examples were chosen by words, and nothing was said."""
    prompt = of_topics(tmp_path, f"    topic: {written}\n", "    topic: help\n")
    path = tmp_path / "own.yaml"
    path.write_text("- {id: one, topic: 'Harm', principle: It hurts nobody at all.}\n")
    (own,) = load_constitution(path).principles
    assert panel(prompt.examples, own, "benign") == (0,)
    assert without_panel([prompt], [own]) == []


def test_topics_are_any_text_and_one_of_two_forms_of_a_letter(tmp_path: Path) -> None:
    prompt = of_topics(tmp_path, "    topic: Höflichkeit\n", "    topic: 礼\n", "    pool: redteam\n")
    polite = Principle("a", "Sei höflich.", "c", "r", topic="höflichkeit")
    assert [prompt.examples[place].topic for place in panel(prompt.examples, polite, "redteam")] == ["", polite.topic]


def test_what_has_no_panel_is_told_once_a_file(tmp_path: Path) -> None:
    one, two = Principle("a", "p", "c", "r", topic="haiku"), Principle("b", "p", "c", "r", topic="harm")
    (line,) = without_panel(JOINT, [one, two])
    assert "reviews.yaml has the topic 'haiku' (its topics: harm, help, truth)" in line
    (line,) = without_panel([of_topics(tmp_path, "", "")], [two])
    assert "no example of " in line and "has a topic, so the first ones are shown" in line
    assert without_panel([of_topics(tmp_path)], [two]) == [] == without_panel(JOINT, [two, replace(two, topic="")])


ODD = {  # lines about each example -> what a principle of the topic "harm" is shown to a red-team request
    (): (),
    ("",): (),
    ("    pool: redteam\n",): (),
    ("    topic: harm\n",): (0,),
    ("    topic: harm\n    pool: redteam\n", "    topic: harm\n", "    pool: benign\n"): (2, 1, 0),
    ("    topic: harm\n",) * 200: tuple(range(200)),
}


@pytest.mark.parametrize("about", ODD, ids=[str(len(about)) + "".join(about)[:30].strip() for about in ODD])
@pytest.mark.parametrize("count", [-1, 0, 1, 3, 10_000])
def test_odd_files_render_whatever_number_is_shown(tmp_path: Path, about: tuple[str, ...], count: int) -> None:
    prompt = replace(of_topics(tmp_path, *about), few_shot=count)
    shots = panel(prompt.examples, BY_ID["no-harm"], "redteam")
    assert shots == ODD[about]
    rendered = prompt.render({"answer": "x"}, format="base", tokenizer=ByteTokenizer(), shift=shots or 0)
    shown_here = min(len(shots or about), count if count >= 0 else 10_000)
    assert rendered.text.count("said ") == shown_here


def test_a_revision_request_of_an_example_is_text(tmp_path: Path) -> None:
    with pytest.raises(CaiError, match=r"examples\[0\]\.revision_request: list found; write text"):
        of_topics(tmp_path, "    revision_request: [a, b]\n")


@pytest.mark.parametrize(
    ("sentence", "topic"),
    [
        ("Schreibe freundlich.", ""),
        ("Be gentle.", ""),
        ("An answer is a haiku about autumn leaves.", ""),
        ("It protects privacy and personal data.", ""),
        ("An answer does not help anybody to hurt people.", "harm"),
        ("It never refuses what is harmless.", "help"),
        ("An answer invents no facts and says how sure it is.", "truth"),
    ],
)
def test_a_sentence_has_its_topic_by_its_own_words(sentence: str, topic: str) -> None:
    """By "falls short of this principle, and quote the words that do", which all have, short ones were about truth."""
    own = Principle("own", sentence, *requests_for(sentence))
    assert topic or panel(REVISIONS.examples, own, "benign") == ()
    assert {CRITIQUES.examples[place].topic for place in panel(CRITIQUES.examples, own, "benign")} - {""} == (
        {topic} - {""}
    )
