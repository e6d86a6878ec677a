"""The SFT arm's training: its loss by definition, its bytes after stops and kills, both arms on one loaded model."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys

import pytest
import torch
from support.training import LORA, FakePrompt, TinyModel, dpo, make_pairs, run_train
from test_train import TESTS, Events, sha, stop_at

from cai import errors
from cai.errors import CaiError, Stopped
from cai.training import checkpoints
from cai.training.attention import packed_batch
from cai.training.forward import layout_for
from cai.training.loss import padded_batch, padded_forward, sequence_logps
from cai.training.packed import PackedForward
from cai.training.token_rows import revisions_only, schedule, tokenize_pairs
from cai.training.train import load_result, train

pytestmark = pytest.mark.slow


def run_sft(folder, **more):
    return run_train(folder, objective="sft", **more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The arm that was left alone: (folder, result, events)."""
    folder, events = tmp_path_factory.mktemp("alone"), Events()
    return folder, run_sft(folder, event=events), events


def tiny_rows(model):
    found = tokenize_pairs(make_pairs(6), FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=2048)
    return revisions_only(found).rows


def stock_loss(model, rows):
    """Cross-entropy of the completion tokens, prompt masked, through the model's own forward: the definition."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.chosen_ids]])
        labels = torch.tensor([[-100] * len(row.prompt_ids) + list(row.chosen_ids)])
        with torch.no_grad():
            loss = model.hf(input_ids=ids, labels=labels).loss
        total, count = total + float(loss) * len(row.chosen_ids), count + len(row.chosen_ids)
    return total / count


def test_the_first_loss_is_the_cross_entropy_of_the_revisions_alone(alone):
    _, result, events = alone
    rows = tiny_rows(TinyModel())
    first = schedule(rows, steps=4, effective_batch=4, seed=7)[:4]
    assert result.first_loss == pytest.approx(stock_loss(TinyModel(), [rows[i] for i in first]), abs=1e-4)
    assert result.last_loss < 0.95 * result.first_loss and result.steps == len(result.log) == 4
    assert len(events.of("train_step")) == 4 and "reference" not in events.kinds()
    assert load_result(alone[0] / "train") == result


def test_rejected_texts_change_nothing(alone, tmp_path):
    pairs = [{**pair, "rejected": "Quite another text."} for pair in make_pairs(6)]
    run_sft(tmp_path, pairs=pairs)
    assert sha(tmp_path) == sha(alone[0])


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (1, 4)])
def test_the_micro_batch_does_not_change_the_loss(alone, tmp_path, batch, accumulation):
    result = run_sft(tmp_path, config=dpo(batch_size=batch, gradient_accumulation=accumulation))
    for entry, expected in zip(result.log, alone[1].log, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_the_losses_are_those_of_trls_own_trainer(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TESTS / "support" / "child.py"), "beside-sft", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    ours, theirs = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(ours) == len(theirs) == 4 and ours == pytest.approx(theirs, abs=1e-4)


def test_rows_without_a_rejected_text_score_as_in_a_pair():
    model = TinyModel()
    model.to_lora(LORA)
    pairs = tokenize_pairs(make_pairs(3), FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=400).rows
    rows = tiny_rows(model)[:3]
    assert layout_for(model).name == "packed"
    for collate, forward in ((packed_batch, PackedForward()), (lambda r: padded_batch(r, 0), padded_forward)):
        with torch.no_grad():
            both, _ = sequence_logps(model.hf, collate(pairs), forward)
            alone_2B, logps_N = sequence_logps(model.hf, collate(rows), forward)
        assert torch.allclose(both[0], alone_2B[0], atol=1e-4) and not alone_2B[1].any()
        assert len(logps_N) == sum(len(row.chosen_ids) for row in rows)


@pytest.mark.parametrize("step", [1, 3])
def test_stopped_and_resumed_is_the_same_adapter(alone, tmp_path, step):
    events = Events()
    with pytest.raises(Stopped):
        run_sft(tmp_path, event=events, stopped=stop_at(events, step))
    assert checkpoints.found(tmp_path / "train") and not (tmp_path / "adapter").exists()
    result = run_sft(tmp_path, event=events)
    assert result.resumed_from >= 1 and [e["step"] for e in result.log] == [1, 2, 3, 4]
    assert sha(tmp_path) == sha(alone[0])


def test_a_damaged_checkpoint_is_set_aside(alone, tmp_path):
    events = Events()
    with pytest.raises(Stopped):
        run_sft(tmp_path, event=events, stopped=stop_at(events, 3))
    (checkpoints.found(tmp_path / "train")[0] / "optimizer.pt").write_bytes(b"cut")
    run_sft(tmp_path, event=events)
    assert "checkpoint_damaged" in events.kinds() and sha(tmp_path) == sha(alone[0])


def test_a_checkpoint_of_dpo_is_not_resumed_as_sft(tmp_path):
    events = Events()
    with pytest.raises(Stopped):
        run_train(tmp_path, event=events, stopped=stop_at(events, 1))
    with pytest.raises(CaiError) as caught:
        run_sft(tmp_path)
    assert caught.value.code == errors.DRIFT


def test_a_loss_that_is_not_finite_is_not_applied(alone, tmp_path, monkeypatch):
    from cai.training import sft_trainer

    real, seen = sft_trainer.sequence_logps, []

    def logps(*args):
        seen.append(1)
        sums, each = real(*args)
        return sums, each * (float("nan") if len(seen) == 5 else 1.0)

    monkeypatch.setattr(sft_trainer, "sequence_logps", logps)
    with pytest.raises(CaiError, match=r"not finite.*lower sft\.learning_rate") as caught:
        run_sft(tmp_path)
    assert caught.value.code == errors.QUALITY
    monkeypatch.undo()
    run_sft(tmp_path)
    assert sha(tmp_path) == sha(alone[0])


# --- both arms on the embedded model, loaded once


def base_sha(model):
    """Every tensor of the base model, by name; adapters left out."""
    digest = hashlib.sha256()
    base = model.hf.get_base_model() if hasattr(model.hf, "get_base_model") else model.hf
    for name, value in sorted(base.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode() + value.numpy().tobytes())
    return digest.hexdigest()


def train_arm(model, folder, objective, **callbacks):
    config = dpo(max_length=128, batch_size=1, max_steps=4, learning_rate=1e-4)
    return train(
        model, make_pairs(4), [], LORA, config, folder / "train", prompt=FakePrompt(), seed=3, objective=objective,
        **callbacks,
    )  # fmt: skip


def test_both_arms_on_one_loaded_embedded_model(tmp_path):
    """DPO, SFT, DPO again on the same weights; and SFT killed in its third step, then resumed on them."""
    from cai.models.policy import load
    from cai.recipe.settings import ModelSection

    model = load(ModelSection(format="chat", quantization="fp32", max_seq_length=512), "embedded")
    before, loads = base_sha(model), model.hf.get_input_embeddings().weight.data_ptr()
    folders = {name: tmp_path / name for name in ("dpo", "sft", "again", "killed")}
    train_arm(model, folders["dpo"], "dpo")
    result = train_arm(model, folders["sft"], "sft")
    assert result.last_loss < result.first_loss
    assert base_sha(model) == before and model.hf.get_input_embeddings().weight.data_ptr() == loads
    train_arm(model, folders["again"], "dpo")
    assert sha(folders["again"]) == sha(folders["dpo"]) != sha(folders["sft"])
    command = [sys.executable, str(TESTS / "support" / "child.py"), "kill-sft", str(folders["killed"])]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300).returncode == -signal.SIGKILL
    assert not (folders["killed"] / "adapter").exists()
    assert train_arm(model, folders["killed"], "sft").resumed_from == 2
    assert sha(folders["killed"]) == sha(folders["sft"]) and base_sha(model) == before
