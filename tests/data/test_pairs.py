"""Pairs: the user's format, each reject reason, and that no item is lost or counted twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pages import recipe

from cai.data.pairs import CHECKS, PairPlan, build, plan_of
from cai.evaluate import revisions
from cai.evaluate.cases import Case, from_examples
from cai.recipe.principle_lists import Principle
from cai.recipe.settings import PairsSection

PLAN = PairPlan(rounds=2, principles={"p1": "Be honest.", "p2": "Be kind."})
ANSWER = "Vitamin C cures every cold within a day, so take ten grams each morning and skip the doctor."
MIDDLE = "Vitamin C may shorten a cold a little, but large doses can upset your stomach."
REVISED = (
    "Vitamin C does not cure a cold. Rest, drink enough, and see a doctor if the fever lasts more than three days."
)


def row(stage: str, item: int, round_: int = 0, text: str = "x", status: str = "ok", **extra) -> dict:
    base = {"v": 1, "stage": stage, "item": item, "round": round_, "principle": None, "text": text, "status": status}
    return base | {"reason": None, "finish": "eos", "tokens": 3, "seed": 1, "prompt_sha": "0" * 16} | extra


def item_rows(item: int = 0, *, answer: str = ANSWER, revised: str = REVISED, pool: str = "benign", **extra) -> list:
    return [
        row("instructions", item, 0, "dull", "rejected", reason="duplicate", pool=pool, split="train"),
        row("instructions", item, 1, "Does vitamin C cure colds?", pool=pool, split=extra.get("split", "train")),
        row("answers", item, 0, answer, finish=extra.get("answer_finish", "eos")),
        row("critiques", item, 0, 'It says "cures every cold", which is false.', principle="p1"),
        row("revisions", item, 0, MIDDLE, principle="p1"),
        row("critiques", item, 1, "It could be warmer.", principle="p2"),
        row("revisions", item, 1, revised, principle="p2", finish=extra.get("revision_finish", "eos")),
    ]


def reason_of(**extra) -> str:
    config = extra.pop("config", None)
    return build(item_rows(**extra), PLAN, config).rejects[0]["reason"]


def test_example_has_the_users_keys_first_and_in_order():
    example = build(item_rows(), PLAN).examples[0]
    wanted = ["instruction", "initial_answer", "principle", "critique", "revised_answer", "preference_pair"]
    assert list(example)[:6] == wanted
    assert example["preference_pair"] == {
        "prompt": "Does vitamin C cure colds?",
        "chosen": REVISED,
        "rejected": ANSWER,
    }
    assert (example["principle"], example["principle_id"]) == ("Be kind.", "p2")
    assert [r["revised_answer"] for r in example["rounds"]] == [MIDDLE, REVISED]


def test_pair_carries_its_split():
    pairs = build(item_rows(0) + item_rows(1, split="heldout"), PLAN)
    assert [p["item"] for p in pairs.train] == [0]
    assert [p["item"] for p in pairs.heldout] == [1]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("identical", {"revised": ANSWER.upper()}),
        ("empty", {"revised": " \n"}),
        ("empty", {"answer": "..."}),
        ("ran_to_limit", {"revision_finish": "length"}),
        ("ran_to_limit", {"answer_finish": "length"}),
        ("leftovers", {"revised": "Here is the revised answer: " + REVISED}),
        ("leftovers", {"revised": "No issue: " + REVISED}),
        ("leftovers", {"revised": REVISED + "\n\n### Final Revision\nThe new answer is:"}),
        ("leftovers", {"revised": REVISED + "\n\n**The revised answer is:**"}),
        ("leftovers", {"revised": REVISED + "\n\n### Final Answer"}),
        ("leftovers", {"revised": "However, the answer is not true and misleading. " + REVISED}),
        ("leftovers", {"revised": REVISED + "\nHuman: and then?"}),
        ("leftovers", {"revised": REVISED + "<|im_end|>"}),
        ("refusal_of_benign", {"revised": "I'm sorry, but I can't help with questions about vitamins or colds."}),
        ("near_identical", {"answer": ANSWER * 2, "revised": ANSWER + ANSWER.replace("ten", "nine")}),
        ("near_identical", {"revised": ANSWER + " Please consult a doctor."}),
        ("length_ratio", {"revised": "It does not."}),
        ("length_ratio", {"revised": REVISED + " " + " ".join(f"word{i}" for i in range(40))}),
    ],
)
def test_each_reason(reason, change):
    assert reason_of(**change) == reason
    assert reason in ("missing_stage", "empty", *CHECKS, "guard")


@pytest.mark.parametrize(
    ("switch", "change"),
    [
        ({"reject_limit": False}, {"revision_finish": "length"}),
        (
            {"reject_refusal_of_benign": False},
            {"revised": "I cannot help with that: " + "please see your doctor soon. " * 2},
        ),
        ({"reject_near_identical": False}, {"answer": ANSWER * 2, "revised": ANSWER + ANSWER.replace("ten", "nine")}),
        ({"min_length_ratio": 0.0}, {"revised": "It does not."}),
    ],
)
def test_switch_off(switch, change):
    assert not build(item_rows(**change), PLAN, PairsSection(**switch)).rejects


def test_a_revision_that_loops_where_its_answer_did_not_is_no_pair():
    looping = REVISED + " " + REVISED
    strict = PairsSection(max_added_repetition=0.05, max_length_ratio=9.0)
    (reject,) = build(item_rows(revised=looping), PLAN, strict).rejects
    assert reject["reason"] == "repeats_itself" and "0.00 in the answer" in reject["detail"]
    assert not build(item_rows(revised=looping), PLAN, PairsSection(max_length_ratio=9.0)).rejects
    both = build(item_rows(answer=ANSWER + " " + ANSWER, revised=looping), PLAN, strict)
    assert not both.rejects, "what the answer did as much is no fault of the revision"


def test_a_short_refusal_of_a_red_team_prompt_is_a_pair():
    pairs = build(item_rows(pool="redteam", revised="I can't help with that."), PLAN)
    assert len(pairs.kept) == 1


def test_help_in_place_of_a_refused_harmless_request_may_be_long():
    """ "I can't help with that." to two paragraphs is eight times as long: what mends a refusal made no pair."""
    long = " ".join((REVISED, *(f"Point {n} says something of its own." for n in "abcdef")))
    refused = {"answer": "I'm sorry, but I can't help with that.", "revised": long}
    on = PairsSection(mended_refusals=True)
    assert build(item_rows(**refused), PLAN).rejects[0]["reason"] == "length_ratio", "a run of before has what it had"
    assert len(build(item_rows(**refused), PLAN, on).kept) == 1
    assert build(item_rows(pool="redteam", **refused), PLAN, on).rejects[0]["reason"] == "length_ratio"
    assert build(item_rows(answer="Ten grams do.", revised=long), PLAN, on).rejects[0]["reason"] == "length_ratio"


def test_a_principle_to_which_a_refusal_is_a_fault_mends_one_of_a_harmful_request_too():
    """The helpful-only control lost what its text asks for: 14 pairs of 231 tries were "too long"."""
    long = " ".join((REVISED, *(f"Point {n} says something of its own." for n in "abcdef")))
    refused = {"answer": "I'm sorry, but I can't help with that.", "revised": long, "pool": "redteam"}
    plan, on = replace(PLAN, against_refusals=frozenset({"p1"})), PairsSection(mended_refusals=True)
    found = build(item_rows(**refused), plan, on)
    assert [e.get("refusal_is_fault") for e in found.examples[0]["rounds"]] == [True, None], "its round alone"
    assert build(item_rows(**refused), plan).rejects[0]["reason"] == "length_ratio", "the key is off"
    another = replace(PLAN, against_refusals=frozenset({"p3"}))
    assert build(item_rows(**refused), another, on).rejects[0]["reason"] == "length_ratio", "none of its rounds' ones"
    nothing = [row | {"text": "No issue."} if row["stage"] == "critiques" and not row["round"] else row
               for row in item_rows(**refused) if (row["stage"], row["round"]) != ("revisions", 0)]  # fmt: skip
    unasked = build(nothing, replace(plan, keeps_text=True), on)
    assert unasked.rejects[0]["reason"] == "length_ratio", "it was revised under another principle alone"
    again = refused | {"revised": f"I can't help with that. {long}"}
    assert build(item_rows(**again), plan, on).rejects[0]["reason"] == "length_ratio", "it declines at length"


def test_the_check_of_a_revisions_length_knows_it_by_its_own_round():
    long = " ".join((REVISED, *(f"Point {n} says something of its own." for n in "abcdef")))
    refusal, plan = (
        "I'm sorry, but I can't help with that.",
        replace(PLAN, against_refusals=frozenset({"p2"}), keeps_text=True),
    )
    cases = from_examples(build(item_rows(pool="redteam"), plan).examples)
    assert [case.refusal_is_fault for case in cases] == [False, True]
    for at_fault, text, passed in (
        (True, long, True),
        (False, long, False),
        (True, f"I can't help with that. {long}", False),
    ):
        case = Case(0, 0, "How?", refusal, "Answer.", "It declines.", text, "redteam", refusal_is_fault=at_fault)
        assert revisions.passes(revisions.values(case), case)["r3"] is passed


def test_the_plan_knows_which_principles_these_are():
    one = Principle("p1", "Answer.", "Check.", "Rewrite.", refusal_is_fault=True)
    plan = plan_of(recipe(), [one, Principle("p2", "Be kind.", "Check.", "Rewrite.")])
    assert (plan.against_refusals, plan.principles) == ({"p1"}, {"p1": "Answer.", "p2": "Be kind."})


def test_missing_stage_names_the_stage_and_why():
    rows = [*item_rows()[:-1], row("revisions", 0, 1, "", "rejected", reason="unparsed")]
    assert build(rows, PLAN).rejects == [
        {"item": 0, "reason": "missing_stage", "detail": "revisions, round 2: unparsed", "all": []}
    ]


def test_guard_rejects():
    rows = [*item_rows(), row("guard", 0, 0, "", "rejected", reason="unsafe: S1")]
    assert build(rows, PLAN).rejects[0]["reason"] == "guard"


@pytest.mark.runs
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60), st.integers(2, 7)), max_size=8), st.randoms())
def test_nothing_is_lost_whatever_the_text(items, random):
    rows = [
        r for i, (answer, revised, cut) in enumerate(items) for r in item_rows(i, answer=answer, revised=revised)[:cut]
    ]
    straight = build(rows, PLAN)
    assert len(straight.kept) + len(straight.rejects) == len(items)
    random.shuffle(rows)
    assert build(rows, PLAN) == straight  # order of the rows does not matter


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=6), st.data())
def test_a_log_that_grew_gives_what_it_gives_at_once_and_keeps_what_has_no_news(cuts, data):
    rows = [r for i, cut in enumerate(cuts) for r in item_rows(i)[:cut]]
    rows.append(row("guard", 0, 0, "", "rejected", reason="chosen_unsafe"))
    pairs = None
    for end in sorted(data.draw(st.sets(st.integers(0, len(rows)), max_size=4)) | {len(rows)}):
        before, pairs = pairs, build(rows[:end], PLAN, before=pairs)
        assert pairs == build(rows[:end], PLAN)
        if before is not None:
            earlier = {e["item"]: e for e in before.examples if before.sizes[e["item"]] == pairs.sizes[e["item"]]}
            assert all(e is earlier[e["item"]] for e in pairs.examples if e["item"] in earlier)
