"""Held-out pairs watched while DPO trains, the best weights kept, checkpoints by time: none changes the training."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from support.training import LORA, FakePrompt, TinyModel, dpo, make_pairs, run_train
from test_train import Events, sha

from cai.errors import CaiError, Stopped
from cai.training import adapter, checkpoints, heldout
from cai.training.token_rows import tokenize_pairs
from cai.training.train import train

pytestmark = pytest.mark.slow
WATCHED = dpo(max_steps=5, eval_steps=2, save_steps=2)
BEST = WATCHED.model_copy(update={"keep": "best"})


def swapped(count):
    """Held-out pairs of the training's own kind, told the wrong way round: their loss only rises."""
    return [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in make_pairs(count)]


def run(folder, config=WATCHED, pairs=None, model=None, **callbacks):
    model, pairs = model or TinyModel(), swapped(3) if pairs is None else pairs
    return train(
        model, make_pairs(6), pairs, LORA, config, folder / "train", prompt=FakePrompt(), seed=7, **callbacks
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """With the best kept: (folder, result, events, the adapter's tensors when the step of the best was measured)."""
    folder, events, model, seen = tmp_path_factory.mktemp("alone"), Events(), TinyModel(), {}

    def event(kind, **fields):
        events(kind, **fields)
        if kind == "heldout" and fields["step"] == 2:
            seen.update({name: p.detach().clone() for name, p in adapter.lora_parameters(model.hf)})

    return folder, run(folder, BEST, model=model, event=event), events, seen


def test_held_out_loss_is_logged_each_so_many_steps_and_at_the_end(alone):
    _, result, events, _ = alone
    assert [entry["step"] for entry in result.heldout_log] == [2, 4, 5]
    losses = [entry["heldout/loss"] for entry in result.heldout_log]
    assert losses == sorted(losses) and losses[0] > math.log(2)
    told = events.of("heldout")
    assert [e["loss"] for e in told] == losses and told[0]["n"] == 3 and told[-1]["accuracy"] == 0.0
    assert all("heldout/loss" not in entry for entry in result.log) and len(result.log) == 5


def test_the_last_entry_is_the_figure_of_the_finished_adapter(tmp_path):
    """The loss against the reference of the start is the one against the base: of the same pairs, the same weights."""
    result = run(tmp_path)
    last = result.heldout_log[-1]
    assert last["heldout/loss"] == pytest.approx(result.heldout["loss"], abs=1e-5)
    assert last["heldout/margin"] == pytest.approx(result.heldout["margin"], abs=1e-4)


def test_ends_count_in_it_as_they_do_in_training(tmp_path):
    """Mean NLL of N tokens is T / N; with ends of weight w, here one of NLL E, (T + (w - 1) E) / (N + w - 1)."""
    pairs, model = swapped(1), TinyModel()
    rows = tokenize_pairs(pairs, FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=2048).rows
    count = len(rows[0].chosen_ids)
    seen, first = {}, {}
    for weight in (1.0, 3.0, 5.0):
        config = dpo(max_steps=1, eval_steps=1, loss_type=("sigmoid", "sft"), learning_rate=1e-12, end_weight=weight)
        found = run(tmp_path / str(weight), config, pairs)
        seen[weight], first[weight] = found.heldout_log[-1]["heldout/loss"] - math.log(2), found.log[0]["loss"]
    total = seen[1.0] * count
    end = (seen[3.0] * (count + 2) - total) / 2
    assert abs(first[5.0] - first[1.0]) > 1e-3 and abs(seen[5.0] - seen[1.0]) > 1e-3
    assert seen[5.0] == pytest.approx((total + 4 * end) / (count + 4), abs=1e-3)


def test_watching_changes_nothing(alone, tmp_path):
    run(tmp_path / "off", dpo(max_steps=5))
    run(tmp_path / "on")
    assert sha(tmp_path / "on") == sha(tmp_path / "off") != sha(alone[0])


def test_the_best_weights_become_the_adapter(alone):
    folder, result, events, seen = alone
    found = adapter._tensors(folder / "adapter")
    assert result.kept_step == 2 and events.of("best_kept") == [{"step": 2, "of": 5}]
    assert len(seen) == len(found)
    assert all(torch.equal(found[name.replace(".default.", ".")], value) for name, value in seen.items())


def test_where_the_last_weights_are_the_best_they_stay(tmp_path):
    result = run(tmp_path, BEST, pairs=make_pairs(3))
    run(tmp_path / "plain", dpo(max_steps=5))
    assert result.kept_step == 0 and sha(tmp_path) == sha(tmp_path / "plain")


@pytest.mark.parametrize("step", [1, 3, 4])
def test_stopped_and_resumed_the_same_best_is_kept(alone, tmp_path, step):
    events = Events()
    with pytest.raises(Stopped):
        run(tmp_path, BEST, event=events, stopped=lambda: len(events.of("train_step")) >= step)
    result = run(tmp_path, BEST)
    assert result.heldout_log == alone[1].heldout_log and sha(tmp_path) == sha(alone[0])


@pytest.mark.parametrize("config", [BEST, BEST.model_copy(update={"batch_size": 4, "gradient_accumulation": 1})])
def test_a_stop_while_held_out_pairs_are_measured_is_made_up_by_the_resume(tmp_path, monkeypatch, config):
    """The checkpoint of that step lacks the entry; the resume measures before it trains on."""
    from cai.training import trainers

    before, now = run(tmp_path / "alone", config), []
    real = trainers.PairTrainer._heldout_entry
    monkeypatch.setattr(trainers.PairTrainer, "_heldout_entry", lambda self, held: now.append(1) or real(self, held))
    with pytest.raises(Stopped, match="after step 2 of 5"):
        run(tmp_path / "cut", config, stopped=lambda: bool(now))
    sealed = checkpoints.newest(tmp_path / "cut" / "train", lambda *a, **k: None)
    assert sealed[1]["step"] == 2
    result = run(tmp_path / "cut", config)
    assert sorted(result.heldout_log, key=lambda e: e["step"]) == before.heldout_log
    assert sha(tmp_path / "cut") == sha(tmp_path / "alone")


def test_a_resume_from_the_older_checkpoint_still_has_its_best(alone, tmp_path):
    """The newest is damaged: the older one's log names a best whose weights must still be there."""
    shutil.copytree(alone[0], tmp_path / "copy")
    folder = tmp_path / "copy" / "train"
    (folder / "result.json").unlink()
    (checkpoints.found(folder)[0] / "optimizer.pt").unlink()
    assert run(tmp_path / "copy", BEST).resumed_from == 4
    assert sha(tmp_path / "copy") == sha(alone[0])


def test_damaged_best_weights_are_not_exported(alone, tmp_path):
    shutil.copytree(alone[0], tmp_path / "copy")
    folder = tmp_path / "copy" / "train"
    (folder / "result.json").unlink()
    shutil.rmtree(tmp_path / "copy" / "adapter")
    data = bytearray((folder / "best-2" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "best-2" / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(CaiError, match="changed after it was saved"):
        run(tmp_path / "copy", BEST)
    assert not (tmp_path / "copy" / "adapter").exists()


def test_best_weights_that_no_kept_checkpoint_names_are_removed(tmp_path):
    history = [{"step": n, heldout.LOSS: loss} for n, loss in ((2, 0.6), (4, 0.5), (6, 0.55), (8, 0.4))]
    for step in (2, 4, 8, 9):
        (tmp_path / f"best-{step}").mkdir()
    heldout.prune(tmp_path, history, [8, 6])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-4", "best-8"]
    assert heldout.best_step(history, 7) == 4 and heldout.best_step([]) is None


def test_the_best_needs_pairs_to_choose_by(tmp_path):
    with pytest.raises(CaiError, match=r"Set heldout\.items"):
        run(tmp_path, BEST, pairs=[])
    assert run(tmp_path, WATCHED, pairs=[]).heldout_log == []


# --- checkpoints by time


def saves(folder, monkeypatch, minutes, **callbacks):
    """Steps of the checkpoints of a training whose every step takes four minutes."""
    from cai.training import callbacks as watching

    events, now = Events(), [0.0]

    def event(kind, **fields):
        events(kind, **fields)
        now[0] += 240.0 * (kind == "train_step")

    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    run_train(folder, config=dpo(max_steps=7, save_steps=1, save_minutes=minutes), event=event)
    return [e["step"] for e in events.of("checkpoint")]


def test_a_checkpoint_when_ten_minutes_have_passed_and_at_the_end(tmp_path, monkeypatch):
    """The clock is read before a step is logged: at 0, 4, 8, 12 | 4, 8, 12 minutes since the last checkpoint."""
    assert saves(tmp_path / "a", monkeypatch, 10.0) == [4, 7]
    assert saves(tmp_path / "b", monkeypatch, 0.0) == [1, 2, 3, 4, 5, 6, 7]
    assert sha(tmp_path / "a") == sha(tmp_path / "b")


def test_a_stop_between_two_of_them_loses_no_step(tmp_path):
    config = dpo(max_steps=7, save_minutes=10.0)
    run_train(tmp_path / "alone", config=config)
    events = Events()
    with pytest.raises(Stopped):
        run_train(tmp_path / "cut", config=config, event=events, stopped=lambda: len(events.of("train_step")) >= 3)
    assert run_train(tmp_path / "cut", config=config).resumed_from == 3
    assert sha(tmp_path / "cut") == sha(tmp_path / "alone")
