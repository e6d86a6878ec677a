"""Pairs of two sampled answers: which one is chosen, what is no pair, and a whole run of both kinds."""

from __future__ import annotations

import math
import shutil

import pytest
from support.runs import read_jsonl

from cai import errors
from cai.commands.verify import verify
from cai.data import chain, kinds, sampled, slots
from cai.data.pairs import PairPlan
from cai.engine import Score
from cai.recipe.settings import DpoSection, PairsSection
from cai.training.token_rows import PairRow, pair_weights

PLAN = PairPlan(rounds=1, principles={"p1": "Be honest."})
FIRST = "Vitamin C cures every cold within a day, so take ten grams each morning and skip the doctor."
SECOND = "Vitamin C does not cure a cold. Rest, drink enough, and see a doctor if the fever lasts for days."
CHOOSING = ("--milestone", "m1", "--set", "model.name=fake:choosing", "--set", "items=6", "--set", "heldout.items=2")
CHOOSING += ("--set", "evaluation.critic_items=0", "--set", "evaluation.judge_items=1", "--set", "evaluation.probes=")


def row(stage: str, text: str = "x", round_: int = 0, **extra) -> dict:
    base = {"v": 1, "stage": stage, "item": 0, "round": round_, "principle": None, "text": text, "status": "ok"}
    return base | {"reason": None, "finish": "eos", "tokens": 3, "seed": 1, "prompt_sha": "0" * 16} | extra


def rows(first: float | None, second: float | None, **extra) -> list:
    margin = None if first is None or second is None else (first - second) / 2
    return [
        row("instructions", "Does vitamin C cure colds?", pool="benign", split="train"),
        row("answers", FIRST),
        row("second_answers", extra.pop("text", SECOND), **extra),
        row("comparisons", "", first=first, second=second, margin=margin, used=["p1"]),
    ]


def built(found: list, **config):
    return kinds.build(found, PLAN, PairsSection(kind="sampled", **config))


@pytest.mark.parametrize(
    ("first", "second", "chosen", "label"),
    [(1.5, -0.5, FIRST, (1.5, -0.5)), (-2.0, 1.0, SECOND, (1.0, -2.0))],
)
def test_the_preferred_answer_is_chosen_and_the_margin_is_for_it(first, second, chosen, label):
    """Swapping the answers swaps the two orders and negates the margin: (1 - -2) / 2 = 1.5."""
    example = built(rows(first, second)).examples[0]
    pair = built(rows(first, second)).kept[0]
    assert pair["chosen"] == chosen and {pair["chosen"], pair["rejected"]} == {FIRST, SECOND}
    assert pair["margin"] == pytest.approx(abs(first - second) / 2) and pair["kind"] == "sampled"
    assert (example["label"]["first"], example["label"]["second"]) == label
    assert slots.drawn_item(pair["item"]) == 0 and slots.split_of(pair["item"]) == "train"


@pytest.mark.parametrize(
    ("first", "second", "label", "reason"),
    [
        (0.5, 0.25, "judge", "undecided"),  # the letter A is preferred whatever stands there
        (0.0, 0.0, "always", "undecided"),
        (None, 1.0, "always", "undecided"),
        (0.5, 0.25, "always", None),
        (0.5, -0.25, "judge", None),
    ],
)
def test_what_the_judge_cannot_order_is_no_pair(first, second, label, reason):
    found = built(rows(first, second), label=label)
    assert [reject["reason"] for reject in found.rejects] == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("extra", "reason"),
    [({"text": FIRST}, "identical"), ({"finish": "length"}, "ran_to_limit"), ({"status": "rejected"}, "missing_stage")],
)
def test_the_rules_over_texts_hold_for_sampled_pairs(extra, reason):
    assert built(rows(1.0, -1.0, **extra)).rejects[0]["reason"] == reason


def test_a_guard_refuses_one_kind_of_an_items_pairs_alone():
    whole = [*rows(1.0, -1.0), row("critiques", "It is false.", principle="p1")]
    whole += [row("revisions", "No: rest and drink enough, and see a doctor after three days.", principle="p1")]
    refused = row("guard", round_=sampled.GUARD_ROUND, status="rejected") | {"reason": "unsafe"}
    both = kinds.build([*whole, refused], PLAN, PairsSection(kind="both"))
    assert [pair.get("kind") for pair in both.kept] == [None]  # the plan here knows one kind; its pair stands
    assert [(reject["item"] >= slots.SAMPLED, reject["reason"]) for reject in both.rejects] == [(True, "guard")]


def test_a_comparison_reads_both_orders_under_each_principle():
    """d(first) is +2 and +1 under two principles, d(second) -1 and 0: first 1.5, second -0.5, margin 1."""
    from cai.data import labels
    from cai.data.stage import Unit

    odds = {("p1", 0): 2.0, ("p2", 0): 1.0, ("p1", 1): -1.0, ("p2", 1): 0.0}
    scores = {(7, id_, "j4", order, "A"): Score(0, (value,)) for (id_, order), value in odds.items()}
    scores |= {(7, id_, "j4", order, "B"): Score(0, (0.0,)) for id_, order in odds}
    found = labels.verdict(scores, Unit(7, 0, {}, extra={"used": ("p1", "p2")}), None)
    assert found == {"first": 1.5, "second": -0.5, "margin": 1.0}


def cut_and_resumed(run_fake, run, *shares):
    """The run's files before and after kills that leave the log up to a share of its bytes, and nothing derived."""
    names = ("records.jsonl", "dataset/examples.jsonl", "dataset/pairs/train.jsonl", "eval/measured.json")
    whole = {name: (run / name).read_bytes() for name in names}
    for share in shares:
        for folder in ("dataset", "eval", "train", "adapter"):
            shutil.rmtree(run / folder)
        (run / "records.jsonl").write_bytes(whole["records.jsonl"][: int(len(whole["records.jsonl"]) * share)])
        (run / "records.sum").unlink()
        assert run_fake("--resume", run.name, fake=())[0] == errors.DONE
        yield whole, {name: (run / name).read_bytes() for name in names}


@pytest.mark.runs
def test_a_run_makes_both_kinds_with_margins_that_weigh_and_resumes_to_the_same_bytes(run_fake):
    code, run = run_fake(*CHOOSING, "--set", "pairs.kind=both", "--set", "dpo.weight=margin")
    assert code == errors.DONE
    pairs = read_jsonl(run / "dataset" / "pairs" / "train.jsonl")
    assert {pair["kind"] for pair in pairs} == {"revision", "sampled"}
    assert len({pair["item"] for pair in pairs}) == len(pairs)
    assert all(check.verdict != "FAIL" for check in verify(run))
    report = (run / "report.md").read_text()
    assert "Kinds of pairs" in report and "pairs.yield.sampled" in report
    examples = read_jsonl(run / "dataset" / "examples.jsonl")
    margins = [example["margin"] for example in examples if example["split"] == "train"]
    rows = [PairRow(item, (1,), (2,), (3,), margin=margin) for item, margin in enumerate(margins)]
    weights = pair_weights(rows, DpoSection(max_steps=1, weight="margin"))
    assert weights is not None and math.isclose(sum(weights) / len(weights), 1.0) and len(set(weights)) > 1
    assert all(before == after for before, after in cut_and_resumed(run_fake, run, 0.35, 0.9))


@pytest.mark.runs
def test_a_run_of_sampled_pairs_alone_makes_no_revision_and_resumes_to_the_same_bytes(run_fake):
    code, run = run_fake(*CHOOSING, "--set", "pairs.kind=sampled")
    assert code == errors.DONE
    assert not {row["stage"] for row in read_jsonl(run / "records.jsonl")} & {"critiques", "revisions", "labels"}
    assert {pair["kind"] for pair in read_jsonl(run / "dataset" / "pairs" / "train.jsonl")} == {"sampled"}
    assert all(before == after for before, after in cut_and_resumed(run_fake, run, 0.6))


@pytest.mark.runs
def test_a_fork_to_another_kind_keeps_what_it_shares_and_drops_what_it_has_not(run_fake):
    _, run = run_fake(*CHOOSING, "--set", "items=3")
    run_fake("--fork", run.name, "--set", "pairs.kind=both", fake=())
    both = run.parent / (run.parent / "latest").readlink()
    assert {r["stage"] for r in read_jsonl(both / "records.jsonl")} >= {"answers", "critiques", "revisions", "labels"}
    assert run_fake("--resume", both.name, "--until", "comparisons", fake=())[0] == errors.DONE
    run_fake("--fork", both.name, "--set", "pairs.kind=sampled", fake=())
    alone = run.parent / (run.parent / "latest").readlink()
    kept = {r["stage"] for r in read_jsonl(alone / "records.jsonl")}
    assert {"answers", "second_answers", "comparisons"} <= kept and not kept & {"critiques", "revisions", "labels"}


def test_two_answers_at_temperature_0_are_refused(run_fake, capsys):
    asked = ("--set", "pairs.kind=both", "--set", "sampling.answers.temperature=0.0")
    assert run_fake(*asked)[0] == errors.USAGE
    assert "pairs.kind" in capsys.readouterr().err


@pytest.mark.runs
def test_a_run_of_before_forks_whole_though_it_knows_nothing_of_the_new_stages(run_fake, project):
    """Its manifest has no such stage: nothing counts as changed, so later tries stay, too."""
    import orjson

    from cai.commands.fork import plan_fork

    _, run = run_fake("--milestone", "m0")
    manifest = orjson.loads((run / "manifest.json").read_bytes())
    then = {name: keys for name, keys in manifest["stages"].items() if name in chain.names()}
    assert not then["second_answers"] and not then["comparisons"]
    manifest["stages"] = {name: keys for name, keys in then.items() if keys}
    del manifest["sums"]
    (run / "manifest.json").write_bytes(orjson.dumps(manifest))
    assert not plan_fork(run, manifest["identity"], then).changed


def test_a_prompt_with_both_kinds_of_pairs_is_asked_once():
    both = [{"item": 3}, {"item": slots.sampled_item(3)}, {"item": slots.sampled_item(4)}]
    assert [pair["item"] for pair in kinds.one_a_prompt(both)] == [3, slots.sampled_item(4)]


def test_progress_counts_comparisons_where_nothing_is_revised():
    assert chain.whole_items(rows(1.0, -1.0), 1, "sampled") == {0}
    assert chain.whole_items(rows(1.0, -1.0), 1) == set()
