"""The data gates on made-up rows of the kinds that a real small model wrote: all FAIL, and each says where to look."""

from __future__ import annotations

import re

import pytest
from support.runs import ROOT

from cai.data import chain
from cai.data.pairs import PairSet
from cai.evaluate import advice, data_checks
from cai.evaluate.gates import decide_all
from cai.metrics.figure import Figure
from cai.recipe import load as recipes
from cai.recipe.constitution import load_constitution

SOUND = "Water the roots in the morning and let the soil dry before you water again."
GRUMBLE = "The answer tells the reader to water daily, which drowns the roots of this plant."
RUN_ON = (  # what stood in 129 of 149 examples
    f"{SOUND}\n\n### Case to revise\nInstruction: How do I bake bread?",
    f"{SOUND}\n\nInstruction: Name three rivers.\n\nResponse: The Nile.",
    f"{SOUND}\n\nHuman: And what about roses?\nAssistant: They like sun.",
)


def example(item: int, *, answer: str = SOUND, revised: str = SOUND + " Less is more.", critique: str = GRUMBLE):
    entry = {"critique": critique, "revised_answer": revised}
    texts = {"instruction": "How do I water a fern?", "initial_answer": answer, "revised_answer": revised}
    return {"item": item, **texts, "critique": critique, "rounds": [entry]}


def label(item: int, first: float | None, second: float | None):
    margin = None if first is None or second is None else (first - second) / 2
    row = {"first": first, "second": second, "margin": margin, "used": ["p"], "fallen": None, "risen": None}
    return {"stage": "labels", "status": "ok", "item": item, **row}


@pytest.fixture(scope="module")
def shipped():
    recipe = recipes.resolve(recipes.read(ROOT / "cai.toml"), milestone="m2")
    files = {name: (ROOT / "prompts" / f"{name}.yaml") for name in chain.prompt_files(recipe)}
    prompts = chain.read_prompts({name: (path, path.read_bytes()) for name, path in files.items()}, recipe)
    return recipe, prompts, load_constitution(ROOT / "constitution.yaml")


def measured(shipped, examples, rows=()) -> dict[str, Figure]:
    _, prompts, constitution = shipped
    return data_checks.measure(PairSet(examples, [], []), rows, prompts, constitution)


def verdicts(shipped, examples, rows=()):
    gates = [gate for gate in shipped[0].gates.of("m2", False) if gate.metric.startswith(("data.", "labels."))]
    assert {gate.metric for gate in gates} >= {"data.scaffolding", "data.copied", "data.nothing_found", "labels.better"}
    return {v.gate.metric: v for v in decide_all(measured(shipped, examples, rows), gates)}


def test_rows_as_a_real_small_model_wrote_them_fail_every_data_gate_and_name_their_texts(shipped):
    shot = next(prompt for name, prompt in shipped[1].items() if name == "revisions").examples[0].assistant
    examples = [example(i, answer=text) for i, text in enumerate(RUN_ON)]
    examples += [example(3, revised=shot), example(4, critique="No issue: the answer is fine as it is.")]
    rows = [label(i, -0.5, 0.4) for i in range(15)] + [label(i, 0.5, -0.4) for i in range(15, 20)]
    found = verdicts(shipped, examples, rows)
    assert {v.status for v in found.values()} == {"FAIL"}
    for metric, items in (("data.scaffolding", [0, 1, 2]), ("data.copied", [3]), ("data.nothing_found", [4])):
        assert found[metric].measured.value == len(items)
        first, *_ = advice.lines(found[metric])
        assert [int(item) for item in re.findall(r"item (\d+)", first)] == items
    assert found["labels.better"].measured.value == 0.25
    assert len(re.findall(r"item \d+", advice.lines(found["labels.better"])[0])) == 3


def test_sound_rows_pass_the_same_gates_and_are_given_no_advice(shipped):
    found = verdicts(shipped, [example(i) for i in range(20)], [label(i, 0.5, -0.4) for i in range(20)])
    assert {v.status for v in found.values()} == {"PASS"}
    assert not any(advice.lines(verdict) for verdict in found.values())


def test_text_that_only_talks_about_cases_and_answers_is_no_scaffolding(shipped):
    talk = "In that case, my answer to the instruction would be: water it less. Case closed."
    assert measured(shipped, [example(0, answer=talk)])["data.scaffolding"].value == 0


def test_a_label_without_a_number_is_unscored_and_neither_better_nor_worse(shipped):
    found = measured(shipped, [example(0)], [label(0, 0.5, -0.4), label(1, None, None), label(2, None, 0.3)])
    assert (found["labels.better"].value, found["labels.better"].n) == (1.0, 1)
    assert found["labels.better"].facts["unscored"] == 2


def test_no_pair_at_all_is_unmeasured_and_passes_nothing(shipped):
    found = verdicts(shipped, [])
    assert {v.status for v in found.values()} == {"UNMEASURED"}


def test_a_round_that_found_nothing_in_whatever_words_counts_as_one_in_every_figure() -> None:
    """Its critique says "not risky" and not "no issue": the chain kept the text, and the figures know it by `found`."""
    from cai.evaluate import cases, critiques
    from cai.recipe.settings_evaluation import EvaluationSection

    entry = {"principle_id": "p", "principle": "p", "critique": '"Wait for it" is not risky.', "round": 0}
    kept = {
        "item": 0,
        "instruction": "How?",
        "initial_answer": "Wait for it.",
        "pool": "benign",
        "critique": "c",
        "flags": {},
    }
    for found in (False, True):
        example: dict = kept | {"rounds": [entry | {"revised_answer": "Wait for it.", "found": found}]}
        (case,) = cases.from_examples([example])
        assert case.nothing is not found
        row = critiques.gate_row(case, [], [], EvaluationSection(), critiques.weights([case]))
        assert row["finds_nothing"] is not found
        assert data_checks.nothing_found([example]).value == int(not found)
