"""DPO that starts from an SFT stage: one adapter in the end, the stage as reference, the same bytes after a stop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from support.training import LORA, FakePrompt, TinyModel, dpo, make_pairs, run_train
from test_train import TESTS, Events, sha

from cai.errors import CaiError, Stopped
from cai.recipe.settings_sft import SftSection
from cai.training import adapter
from cai.training.train import load_result, train

pytestmark = pytest.mark.slow
FROM_SFT = dpo(start="sft")
STAGE = SftSection(learning_rate=5e-3).recipe(FROM_SFT)


def two_stages(folder, *, model=None, pairs=None, config=FROM_SFT, stage=STAGE, lora=LORA, **callbacks):
    """What a run does: the SFT stage unless it is finished, then DPO from its adapter."""
    model, pairs = model or TinyModel(), make_pairs(6) if pairs is None else pairs
    shared = {"prompt": FakePrompt(), "seed": 7, **callbacks}
    start = folder / "adapter-sft"
    if load_result(folder / "train" / "sft") is None:
        train(model, pairs, [], lora, stage, folder / "train" / "sft", adapter=start, objective="sft", **shared)
    return train(
        model, pairs, make_pairs(2, 100), lora, config, folder / "train", adapter=folder / "adapter", start=start,
        **shared,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that was left alone: (folder, DPO's result, events of both stages)."""
    folder, events = tmp_path_factory.mktemp("alone"), Events()
    return folder, two_stages(folder, event=events), events


def weights(folder):
    return adapter._tensors(folder)


def test_the_first_dpo_loss_is_log_two_with_the_sft_adapter_as_the_reference(alone):
    folder, result, events = alone
    assert abs(result.first_loss - math.log(2)) < 1e-6 and result.log[0]["rewards/margins"] == 0.0
    assert result.last_loss < 0.4 and [e["loss"] for e in events.of("first_loss")] == [result.first_loss]
    stage = load_result(folder / "train" / "sft")
    assert stage.last_loss < 0.95 * stage.first_loss


def test_dpo_goes_on_with_the_very_weights_of_the_stage(alone, tmp_path):
    """One small step moves every tensor by less than Adam's step, and by something."""
    before = weights(alone[0] / "adapter-sft")
    two = FROM_SFT.model_copy(update={"max_steps": 1, "learning_rate": 1e-4})
    two_stages(tmp_path, config=two)
    after = weights(tmp_path / "adapter")
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    assert all((after[name] - before[name]).abs().max() <= 1.01e-4 for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert any(bool(before[name].any()) for name in before if "lora_B" in name)


def test_held_out_pairs_are_scored_against_the_stage_not_the_base(alone, tmp_path):
    """After one tiny step the policy is still the SFT model, far from the base."""
    from cai.training.train import pair_logps, pair_rows, preference

    model = TinyModel()
    result = two_stages(
        tmp_path, model=model, config=FROM_SFT.model_copy(update={"max_steps": 1, "learning_rate": 1e-7})
    )
    against_base = preference(pair_logps(model, pair_rows(model, make_pairs(2, 100), FakePrompt(), 400)), 0.1)
    assert abs(result.heldout["margin"]) < 1e-3 < abs(against_base["margin"])
    assert abs(result.heldout["chosen_logp_change_a_token"]) < 1e-3 < against_base["chosen_logp_change_a_token"]


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_stopped_in_either_stage_and_resumed_is_the_same_adapter(alone, tmp_path, steps):
    """Four steps of SFT, then four of DPO; after the fourth the stop is seen between them."""
    events = Events()
    with pytest.raises(Stopped):
        two_stages(tmp_path, event=events, stopped=lambda: len(events.of("train_step")) >= steps)
    assert not (tmp_path / "adapter").exists()
    two_stages(tmp_path)
    assert sha(tmp_path) == sha(alone[0])


def test_another_stage_is_another_training(tmp_path):
    events = Events()
    with pytest.raises(Stopped):
        two_stages(tmp_path, event=events, stopped=lambda: len(events.of("train_step")) >= 6)
    (tmp_path / "train" / "sft" / "result.json").unlink()
    for checkpoint in (tmp_path / "train" / "sft").glob("checkpoint-*"):
        checkpoint.rename(checkpoint.with_name("x" + checkpoint.name))
    with pytest.raises(CaiError, match=r"other conditions .*start: "):
        two_stages(tmp_path, stage=STAGE.model_copy(update={"learning_rate": 1e-3}))


def test_a_start_that_the_recipe_does_not_name_and_one_that_is_missing(tmp_path):
    with pytest.raises(CaiError, match=r'dpo\.start = "sft", but no adapter was handed'):
        run_train(tmp_path, config=FROM_SFT)
    with pytest.raises(CaiError, match=r'dpo\.start = "base", but training was handed'):
        run_train(tmp_path, start=tmp_path / "adapter-sft")
    with pytest.raises(CaiError, match=r"lora\.dropout"):
        two_stages(tmp_path, lora=LORA.model_copy(update={"dropout": 0.1}))


def test_an_adapter_of_another_rank_or_a_cut_one_is_no_start(alone, tmp_path):
    model = TinyModel()
    model.to_lora(LORA.model_copy(update={"rank": 2}))
    with pytest.raises(CaiError, match="does not fit the recipe's"):
        adapter.restore(model.hf, alone[0] / "adapter-sft")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CaiError, match="cannot be read"):
        adapter.restore(model.hf, tmp_path)


def test_dpo_that_left_the_stage_as_it_was_exports_nothing(tmp_path):
    config = FROM_SFT.model_copy(update={"learning_rate": 0.0, "max_steps": 1})
    with pytest.raises(CaiError, match="left adapter-sft as it was"):
        two_stages(tmp_path, config=config)
    assert not (tmp_path / "adapter").exists()


def test_killed_anywhere_on_the_embedded_model_the_adapters_keep_their_bytes(tmp_path):
    """SIGKILL in the SFT stage, after it, in DPO before its first checkpoint and after that; then a plain resume."""
    command = [sys.executable, str(TESTS / "support" / "child.py"), "kill-stages", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["codes"] == [-signal.SIGKILL] * 4 and told["resumed_from"] == 2
    assert abs(told["first_loss"] - math.log(2)) < 1e-6
    for name in ("adapter", "adapter-sft"):
        weights = [(tmp_path / way / name / "adapter_model.safetensors").read_bytes() for way in ("alone", "killed")]
        assert weights[0] == weights[1], name
