"""--next-round: a run whose answers the adapter of another run writes, trained on from it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support.runs import read_jsonl

from cai import errors
from cai.commands.tensors import safetensors_fp32
from cai.commands.verify import verify
from cai.data import on_policy
from cai.metrics.stats import difference
from cai.recipe.settings_rounds import OnPolicySection
from cai.report.rounds import verdict
from cai.run.manifest import read_manifest

SMALL = ("--milestone", "m1", "--set", "items=3", "--set", "heldout.items=2", "--set", "evaluation.fresh_items=2")
SMALL += ("--set", "evaluation.critic_items=0", "--set", "evaluation.judge_items=1", "--set", "evaluation.probes=")
NAMES = ("records.jsonl", "dataset/examples.jsonl", "adapter/adapter_model.safetensors", "eval/measured.json")
P3 = "preference.p3.length_controlled"


def texts(run, stage):
    return [row["text"] for row in read_jsonl(run / "records.jsonl") if row["stage"] == stage]


def weight(folder):
    return float(next(iter(safetensors_fp32(folder / on_policy.WEIGHTS).values())).ravel()[0])


@pytest.mark.runs
def test_the_adapter_answers_the_same_instructions_and_dpo_goes_on_from_it_through_a_kill(run_paper, capsys):
    """The tuned fake writes "why the" for "how the"; its adapter is one number, to which a training adds its own."""
    _, one = run_paper(*SMALL)
    assert run_paper("--next-round", one.name, fake=())[0] == errors.DONE
    two = one.parent / (one.parent / "latest").readlink()
    assert texts(two, "instructions") == texts(one, "instructions")
    assert all("why the" in text for text in texts(two, "answers"))
    assert not any("why the" in text for text in texts(one, "answers") + texts(two, "revisions"))
    manifest = read_manifest(two / "manifest.json")
    assert manifest["parent"] == one.name and [of["round"] for of in manifest["rounds"]] == [1]
    assert (two / on_policy.FOLDER / on_policy.WEIGHTS).read_bytes() == (
        one / "adapter" / on_policy.WEIGHTS
    ).read_bytes()
    assert np.isclose(weight(two / "adapter"), 2 * weight(one / "adapter"))
    assert all(check.verdict != "FAIL" for check in verify(two))
    assert "## Rounds" in (two / "report.md").read_text() and "adds nothing" in (two / "report.md").read_text()

    whole = {name: (two / name).read_bytes() for name in NAMES}
    for folder in ("dataset", "eval", "train", "adapter"):
        shutil.rmtree(two / folder)
    cut = whole["records.jsonl"].index(b'"stage":"answers"') + 700
    (two / "records.jsonl").write_bytes(whole["records.jsonl"][:cut])
    (two / "records.sum").unlink()
    assert run_paper("--resume", two.name, fake=())[0] == errors.DONE
    assert {name: (two / name).read_bytes() for name in NAMES} == whole

    capsys.readouterr()
    assert run_paper("--next-round", two.name, fake=())[0] == errors.QUALITY  # the fake's P3 is what it was
    assert f"round 2 adds nothing: {P3}" in capsys.readouterr().err
    run_paper("--fork", two.name, "--set", "dpo.beta=0.3", fake=())
    fork = one.parent / (one.parent / "latest").readlink()
    assert texts(fork, "answers") == texts(two, "answers") and read_manifest(fork / "manifest.json")["rounds"]
    (fork / on_policy.FOLDER / on_policy.WEIGHTS).write_bytes(b"another")
    on_policy._sha.cache_clear()
    assert run_paper("--resume", fork.name, fake=())[0] == errors.CORRUPT
    assert "adapter-start" in capsys.readouterr().err


def test_a_tuned_critic_is_asked_for_by_its_key():
    assert [on_policy.writes(stage, "base") for stage in ("answers", "critiques", "labels")] == [True, False, False]
    assert [on_policy.writes(stage, "tuned") for stage in ("answers", "critiques", "labels")] == [True, True, False]


def rounds(*values):
    figures = [{} if value is None else {P3: {"value": value}} for value in values]
    return [{"round": n, "run": f"r{n}", "figures": found} for n, found in enumerate(figures, 1)]


@pytest.mark.parametrize(
    ("values", "changes", "may", "said"),
    [
        ((0.4,), {}, True, ""),
        ((0.5, 0.6), {}, True, "adds"),
        ((0.5, 0.5), {}, False, "adds nothing"),
        ((0.5, 0.55), {"min_gain": 0.1}, False, "adds nothing"),
        ((0.9, 0.5, 0.6), {}, True, "adds"),
        ((0.5, None), {}, False, "not measured in round 2"),
        ((None, 0.5), {}, False, "not measured in round 1"),
        ((0.5, 0.4), {"metric": ""}, True, ""),
    ],
)
def test_the_rule_compares_the_last_two_rounds_and_open_is_not_passed(values, changes, may, said):
    found = verdict(rounds(*values), OnPolicySection(**changes))
    assert found[0] is may and said in found[1] and bool(found[1]) is bool(said)


def with_interval(*figures):
    found = [{P3: dict(zip(("value", "low", "high"), figure, strict=True))} for figure in figures]
    return [{"round": n, "run": f"r{n}", "figures": of} for n, of in enumerate(found, 1)]


@pytest.mark.parametrize(
    ("before", "now", "min_gain", "may", "said"),
    [
        # gain 0.1; lower end 0.1 - sqrt(0.08^2 + 0.06^2) = 0.0, upper 0.1 + sqrt(0.06^2 + 0.08^2) = 0.2
        ((0.5, 0.42, 0.56), (0.6, 0.52, 0.66), 0.0, False, "adds nothing"),
        ((0.5, 0.42, 0.56), (0.61, 0.53, 0.67), 0.0, True, "adds:"),
        ((0.5, 0.42, 0.56), (0.61, 0.53, 0.67), 0.05, False, "adds nothing"),
        ((0.5, 0.42, 0.56), (0.5, 0.42, 0.56), 0.0, False, "adds nothing"),
        ((0.5, 0.42, 0.56), (0.9, None, None), 0.0, True, "adds:"),
        ((0.5, 0.0945, 0.905), (1.0, 0.342, 1.0), 0.0, False, "adds nothing"),
    ],
)
def test_where_the_figure_has_an_interval_the_whole_gain_must_be_above_the_bar(before, now, min_gain, may, said):
    found = verdict(with_interval(before, now), OnPolicySection(min_gain=min_gain))
    assert found[0] is may and said in found[1]
    assert ("a lower end above" in found[1]) is (now[1] is not None)


def test_the_interval_of_a_gain_by_hand():
    low, high = difference((0.5, (0.42, 0.56)), (0.6, (0.52, 0.66)))
    assert (low, high) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.2))
    assert difference((1.0, (1.0, 1.0)), (3.0, (3.0, 3.0))) == (2.0, 2.0)


def test_a_run_without_an_adapter_has_no_next_round(run_fake, capsys):
    _, run = run_fake("--milestone", "m0", "--until", "answers")
    assert run_fake("--next-round", run.name, fake=())[0] == errors.USAGE
    assert "no finished adapter" in capsys.readouterr().err


def test_the_keys_of_a_round_are_the_commands(run_fake, capsys):
    assert run_fake("--set", "on_policy.round=2")[0] == errors.USAGE
    assert "--next-round" in capsys.readouterr().err
    assert run_fake("--set", "dpo.start=adapter")[0] == errors.USAGE
    assert "--next-round" in capsys.readouterr().err


@pytest.mark.runs
def test_the_preview_of_a_round_after_an_sft_stage_counts_what_the_round_makes(run_paper, capsys):
    """It goes on with the adapter: no SFT stage, no answers to further requests, and no row of them is made again."""
    _, one = run_paper(*SMALL, "--set", "dpo.start=sft", "--set", "sft.answers=4", "--set", "dpo.max_steps=1")
    assert texts(one, "sft_answers")
    capsys.readouterr()
    assert run_paper("--next-round", one.name, "--dry-run", fake=())[0] == errors.DONE
    told = capsys.readouterr().out
    assert "others go, which this recipe does not ask for" in told and "sft_" not in told
    assert "  answers: 5 again" in told
