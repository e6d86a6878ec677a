"""What a gate that did not pass says next: worst texts by item, and keys that exist."""

from __future__ import annotations

import re

import pytest
from support.runs import ROOT

from cai.evaluate import advice
from cai.evaluate.gates import decide
from cai.metrics.figure import Figure
from cai.recipe import load as recipes
from cai.recipe.settings_evaluation import GateSpec

GATES = [
    gate
    for milestone in ("m0", "m1", "m2", "m3")
    for gate in recipes.resolve(recipes.read(ROOT / "cai.toml"), milestone=milestone).gates.of(milestone, True)
]


@pytest.mark.parametrize("metric", sorted({gate.metric for gate in GATES}))
def test_every_shipped_gate_has_advice_of_its_own(metric: str) -> None:
    assert advice.to_change(metric) != advice.to_change("no figure of this name")


def test_advice_names_keys_and_files_that_exist() -> None:
    leaves = set(recipes._leaf_paths(recipes.Recipe))
    text = " ".join(line for _, line in advice.ADVICE)
    keys = {key.rstrip(".") for key in re.findall(r"(?<![\w/.])[a-z_]+\.[a-z_.]*[a-z_*]+", text)}
    for key in keys - {"records.jsonl"}:
        parts = key.split(".")
        if parts[-1] in ("yaml", "jsonl"):
            continue
        assert any(leaf == key or re.fullmatch(key.replace("*", r"\w+"), leaf) for leaf in leaves), key
    for file in re.findall(r"prompts/\w+\.yaml", text):
        assert (ROOT / file).exists(), file


def test_a_failed_gate_names_three_worst_texts_and_one_that_lacks_numbers_asks_for_more() -> None:
    worst = tuple({"item": i, "text": "long " * 200} for i in range(5))
    failed = decide(Figure("data.copied", 5.0, n=9, worst=worst), GateSpec(metric="data.copied", at_most=0.0))
    first, second = advice.lines(failed)
    assert first == "  to read first: item 0, item 1, item 2" and second.startswith("  to change: ")
    twice = tuple({"item": 3, "round": round_} for round_ in (0, 1))
    assert advice.to_read(twice) == "item 3, item 3 (round 2)"
    few = decide(Figure("preference.p1", 0.9, n=2), GateSpec(metric="preference.p1", above=0.8, minimum_n=20))
    assert advice.lines(few) == ["  to decide it: more items (items, heldout.items), or a lower minimum_n of this gate"]
