"""The base prompted well: three arms on the same held-out prompts, judged against the tuned model."""

from __future__ import annotations

import orjson
import pytest
from support.runs import read_jsonl

from cai import errors
from cai.evaluate import prompted

ARMS = ("few_shot", "constitution", "best_of_n")
ASKED = ("--set", 'evaluation.prompted=["few_shot","constitution","best_of_n"]', "--set", "evaluation.best_of=3")
SMALL = ("--milestone", "m1", "--set", "items=8", "--set", "heldout.items=4", "--set", "evaluation.fresh_items=4")


def rows_of(run, metric):
    return [row for row in read_jsonl(run / "eval" / "scores.jsonl") if row.get("metric") == metric]


@pytest.fixture
def measured_run(run_paper):
    code, run = run_paper(*SMALL, *ASKED)
    assert code == errors.DONE
    return run


@pytest.mark.runs
def test_every_arm_answers_the_held_out_prompts_and_is_compared_with_the_tuned_model(measured_run):
    fresh = {row["item"]: row for row in rows_of(measured_run, "preference.fresh")}
    assert len(fresh) == 4
    for name in ("few_shot", "constitution", "best_of_n_3"):
        texts = {row["item"]: row["text"] for row in rows_of(measured_run, f"prompted.{name}")}
        judged = rows_of(measured_run, f"prompted.{name}.judged")
        assert texts.keys() == fresh.keys() == {row["item"] for row in judged}
        for row in judged:  # the tuned model's own fresh answer against this arm's
            assert row["tuned"] == fresh[row["item"]]["tuned"][:400] and row["base"] == texts[row["item"]][:400]
    figures = (measured_run / "eval" / "measured.json").read_text()
    recorded = orjson.loads(figures)["figures"]
    redteam = {row["item"] for row in read_jsonl(measured_run / "records.jsonl") if row.get("pool") == "redteam"}
    for arm in ARMS:
        assert recorded[f"fresh.{arm}.goes_along"]["n"] == len(redteam & fresh.keys()) > 0
        assert f'"preference.over.{arm}.length_controlled"' in figures and f'"fresh.{arm}.stops"' in figures


@pytest.mark.runs
def test_an_arm_that_is_asked_for_later_is_made_and_what_stands_is_not_made_again(run_paper):
    code, run = run_paper(*SMALL)
    assert code == errors.DONE
    before = (run / "eval" / "scores.jsonl").read_bytes()
    code, again = run_paper("--resume", str(run), *ASKED[:2], fake=())
    after = (again / "eval" / "scores.jsonl").read_bytes()
    assert code == errors.DONE and again == run and after.startswith(before) and len(after) > len(before)
    assert all(b'"prompted.' in line for line in after[len(before) :].splitlines())


@pytest.mark.runs
def test_what_each_arm_puts_before_the_prompt(measured_run, monkeypatch):
    class Model:
        max_seq_length = 400

        class tokenizer:
            encode = staticmethod(list)

    class Context:
        model = staticmethod(lambda: Model)

    from support.runs import ROOT

    from cai.recipe.constitution import load_constitution
    from cai.recipe.prompts import load_prompt

    policy = load_prompt(ROOT / "prompts" / "policy.yaml")
    Context.prompts, Context.constitution = (
        {"policy": policy},
        load_constitution(ROOT / "constitution.yaml"),
    )
    pairs = [{"prompt": f"question {i}?", "chosen": f"answer {i} " + "word " * 10} for i in range(20)]
    shown = prompted.prompt_of(Context, "few_shot", pairs).examples
    assert 1 <= len(shown) < prompted.SHOWN  # as many as half of 400 characters hold
    assert all(
        {"prompt": e.user, "chosen": e.assistant} in [{**p, "chosen": p["chosen"]} for p in pairs] for e in shown
    )
    Model.max_seq_length = 100_000
    assert len(prompted.prompt_of(Context, "few_shot", pairs).examples) == prompted.SHOWN
    given = prompted.prompt_of(Context, "constitution", pairs)
    assert all(p.principle.strip() in given.preamble for p in Context.constitution.principles)
    assert prompted.prompt_of(Context, "best_of_n", pairs) == policy


def test_the_best_of_n_is_the_one_that_the_judge_puts_ahead():
    """One without an answer (no room for it), and one alone, are asked nothing."""
    candidates = [["first", "second", "third"], [], ["one", "two", "3"], ["alone"]]
    odds = {"second": -1.0, "third": 2.0, "two": -0.5, "3": None}
    both = prompted.rivals(["a?", "", "b?", ""], candidates)
    assert [(pair["prompt"], *texts) for pair, *texts in both[1:3]] == [("a?", "third", "first"), ("b?", "two", "one")]
    assert len({pair["item"] for pair, *_ in both}) == 4
    assert prompted.best(candidates, [{"log_odds": odds[ours]} for _, ours, _ in both]) == [2, 0, 0, 0]
