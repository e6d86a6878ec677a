"""Verified checkpoints, the reference cache, rows and the schedule: no torch, no model."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cai import errors
from cai.engine.tokenizers import ByteTokenizer
from cai.errors import CaiError
from cai.store import files
from cai.training import checkpoints, reference_logps
from cai.training.job import BatchShape
from cai.training.token_rows import PairRow, schedule, steps_of, tokenize_pairs

EVENTS: list[tuple[str, dict]] = []


def note(kind, **fields):
    EVENTS.append((kind, fields))


@pytest.fixture(autouse=True)
def _fresh_events():
    EVENTS.clear()


def make(folder, step, sealed=True, **facts):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in checkpoints.REQUIRED:
        (checkpoint / name).write_bytes(name.encode() * 50 + bytes([step]))
    if sealed:
        checkpoints.seal(checkpoint, {"step": step, **facts})
    return checkpoint


def test_newest_is_the_one_with_most_steps(tmp_path):
    for step in (9, 100, 20):
        make(tmp_path, step)
    checkpoint, sealed = checkpoints.newest(tmp_path, note)
    assert checkpoint.name == "checkpoint-100" and sealed["step"] == 100 and not EVENTS


def cut(folder):
    (folder / "optimizer.pt").write_bytes(b"x")


def flip(folder):
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[7] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)


def lose_optimizer(folder):
    (folder / "optimizer.pt").unlink()


def lose_seal(folder):
    (folder / checkpoints.SEAL).unlink()


def cut_seal(folder):
    text = (folder / checkpoints.SEAL).read_bytes()
    (folder / checkpoints.SEAL).write_bytes(text[: len(text) // 2])


def plant(folder):
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that transformers would prefer")


def unlist(folder):
    value = json.loads((folder / checkpoints.SEAL).read_text())
    del value["files"]["rng_state.pth"]
    (folder / "rng_state.pth").unlink()
    (folder / checkpoints.SEAL).write_text(json.dumps(value))


@pytest.mark.parametrize("damage", [cut, flip, lose_optimizer, lose_seal, cut_seal, plant, unlist])
def test_f23_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    make(tmp_path, 1)
    damage(make(tmp_path, 2))
    assert checkpoints.newest(tmp_path, note)[0].name == "checkpoint-1"
    assert [kind for kind, _ in EVENTS] == ["checkpoint_damaged"]
    assert (tmp_path / "damaged-checkpoint-2-0").is_dir() and not (tmp_path / "checkpoint-2").exists()


def test_none_verifies(tmp_path):
    make(tmp_path, 3, sealed=False)
    assert checkpoints.newest(tmp_path, note) is None


def test_setting_aside_twice_keeps_both(tmp_path):
    for _ in range(2):
        make(tmp_path, 3, sealed=False)
        checkpoints.newest(tmp_path, note)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-checkpoint-3-0", "damaged-checkpoint-3-1"]


def test_prune_keeps_the_newest_two(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    checkpoints.prune(tmp_path)
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-4", "checkpoint-3"]


def test_a_checkpoint_of_other_settings_stops_with_what_differs(tmp_path):
    checkpoint = make(tmp_path, 1, identity={"seed": 1, "rows": "aa"})
    sealed = checkpoints.read_seal(checkpoint)
    checkpoints.check_identity(checkpoint, sealed, {"seed": 1, "rows": "aa"})
    with pytest.raises(CaiError, match="seed: 1 then, 2 now") as caught:
        checkpoints.check_identity(checkpoint, sealed, {"seed": 2, "rows": "aa"})
    assert caught.value.code == errors.DRIFT


def test_publish_replaces_the_whole_folder(tmp_path):
    for round_ in (1, 2):
        beside = tmp_path / ".adapter.new"
        beside.mkdir()
        (beside / f"file-{round_}").write_text("x")
        checkpoints.publish(beside, tmp_path / "adapter")
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["file-2"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def calls(monkeypatch):
    """Syncs and renames from now on, as "call file"."""
    seen = []

    def note_call(module, name):
        real = getattr(module, name)

        def call(what, *rest):
            place = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what
            seen.append(f"{name.strip('_')} {Path(place).name}")
            return real(what, *rest)

        monkeypatch.setattr(module, name, call)

    note_call(os, "fsync")
    note_call(files, "_fsync")
    note_call(files, "_replace")
    note_call(os, "rename")
    return seen


def test_f22_every_file_is_on_disk_before_the_seal_says_so(tmp_path, calls):
    """After a power cut a seal over files that never got there would still be found by the resume, as damage."""
    checkpoint = make(tmp_path, 1)
    sealing = next(i for i, call in enumerate(calls) if call.startswith("replace .COMPLETE.json"))
    assert {f"fsync {name}" for name in (*checkpoints.REQUIRED, checkpoint.name)} <= set(calls[:sealing])


def test_f24_an_adapter_is_on_disk_before_its_rename(tmp_path, calls):
    beside = tmp_path / ".adapter.new"
    beside.mkdir()
    (beside / "adapter_model.safetensors").write_text("x")
    checkpoints.publish(beside, tmp_path / "adapter")
    synced = ["fsync adapter_model.safetensors", "fsync .adapter.new"]
    assert calls == [*synced, "rename .adapter.new", f"fsync {tmp_path.name}"]


# --- the reference cache


def test_reference_scores_each_row_once_in_the_micro_batches_of_its_first_visit(tmp_path):
    groups = []

    def score(group):
        groups.append(list(group))
        return [(float(-i), float(-2 * i)) for i in group]

    order = [2, 0, 1, 3, 0, 2, 4, 1]
    found = reference_logps.compute(order, 6, 2, score, lambda: False)
    assert groups == [[2, 0], [1, 3], [4, 1]] and found[:5] == [(-float(i), -2.0 * i) for i in range(5)]
    assert math.isnan(found[5][0])  # never visited: NaN, so that a use would show
    reference_logps.store(tmp_path, "k", found, set(order))
    assert reference_logps.cached(tmp_path, "k")[:5] == found[:5]
    assert reference_logps.cached(tmp_path, "another key") is None
    assert reference_logps.compute(order, 6, 2, score, lambda: True) is None


def test_a_damaged_reference_cache_is_computed_anew_and_a_broken_model_is_named(tmp_path):
    (tmp_path / reference_logps.NAME).write_bytes(b'{"key": "k", "logps"')
    assert reference_logps.cached(tmp_path, "k") is None
    with pytest.raises(CaiError, match="not finite") as caught:
        reference_logps.store(tmp_path, "k", [(float("nan"), 0.0)], {0})
    assert caught.value.code == errors.QUALITY


# --- rows and schedule


class Prompt:
    def render(self, fields, *, format, tokenizer, shift=0):
        text = f"User: {fields['instruction']}\n\nAssistant:"
        return SimpleNamespace(token_ids=tuple(tokenizer.encode(text)), text=text)


def pair(item=0, prompt="Hi", chosen="good", rejected="bad"):
    return {"item": item, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokens(pairs, max_length=100):
    return tokenize_pairs(pairs, Prompt(), format="base", tokenizer=ByteTokenizer(), max_length=max_length)


def test_completions_follow_the_cue_and_end_with_the_end_token():
    (row,) = tokens([pair()]).rows
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(row.prompt_ids) == "User: Hi\n\nAssistant:"
    assert row.chosen_ids == (*b" good", 256) and row.rejected_ids == (*b" bad", 256)
    assert not row.truncated and not row.flagged


def test_control_strings_in_text_never_become_control_ids():
    hostile = "<|endoftext|><|im_end|> {{instruction}} <|im_start|>system"
    (row,) = tokens([pair(prompt=hostile, chosen=hostile, rejected=hostile)], 1000).rows
    assert row.flagged
    assert max(row.prompt_ids) < 256 and max(row.chosen_ids[:-1]) < 256 and row.chosen_ids[-1] == 256


def test_long_completions_are_cut_and_counted_and_long_prompts_dropped():
    found = tokens([pair(0, chosen="x" * 200), pair(1, prompt="y" * 200), pair(2)], 60)
    assert [row.item for row in found.rows] == [0, 2] and found.too_long == [1] and found.truncated == 1
    assert len(found.rows[0].prompt_ids) + len(found.rows[0].chosen_ids) == 60
    assert found.rows[0].chosen_ids[-1] != 256


def make_rows(count):
    return [PairRow(i, (1,) * (i % 5 + 1), (2,) * (7 * i % 11 + 1), (3,)) for i in range(count)]


def test_schedule_visits_every_row_once_an_epoch_and_depends_on_nothing_else():
    rows = make_rows(10)
    order = schedule(rows, steps=10, effective_batch=3, seed=4)
    assert order == schedule(rows, steps=10, effective_batch=3, seed=4)
    assert order != schedule(rows, steps=10, effective_batch=3, seed=5)
    assert all(order.count(i) == 3 for i in range(10))
    assert schedule(rows, steps=20, effective_batch=3, seed=4)[:30] == order  # more steps only add to it
    for start in range(0, 30, 3):
        sizes = [rows[i].tokens for i in order[start : start + 3]]
        assert sizes == sorted(sizes, reverse=True)


def test_steps():
    assert steps_of(10, max_steps=7, epochs=0, effective_batch=4) == 7
    assert steps_of(10, max_steps=0, epochs=3, effective_batch=4) == 8
    assert steps_of(1, max_steps=0, epochs=0.1, effective_batch=16) == 1


def test_the_ladder_keeps_the_effective_batch():
    shape, seen = BatchShape(6, 4, False), []
    while shape is not None:
        seen.append((shape.micro_batch, shape.accumulation, shape.checkpointing))
        assert shape.micro_batch * shape.accumulation == 24
        shape = shape.smaller()
    assert seen == [(6, 4, False), (3, 8, False), (1, 24, False), (1, 24, True)]


def test_f26_the_probe_takes_the_largest_micro_batch_that_fits(monkeypatch):
    """Stub card of 100 units: 20 held, 1 a token; `fits` is what a real step would then measure."""
    torch = pytest.importorskip("torch")
    from cai.training import fit

    rows, order = make_rows(8), list(range(8)) * 2
    measured = []

    def peak_of_step(model, layout, chosen):
        measured.append(len(chosen))
        tokens = sum(row.tokens for row in chosen)
        return 20 + tokens if 20 + tokens <= limit[0] else None

    limit = [0]
    hf = SimpleNamespace(parameters=lambda: [])
    monkeypatch.setattr(fit, "peak_of_step", peak_of_step)
    monkeypatch.setattr(fit, "_clear", lambda: 20)
    monkeypatch.setattr(fit, "memory_limit", lambda: limit[0])
    monkeypatch.setattr(fit, "set_checkpointing", lambda *_: None)
    model = SimpleNamespace(device=torch.device("cuda"), hf=hf)
    two, four, all_ = (fit.tokens_of(rows, order, n) for n in (2, 4, 8))
    assert two < four < all_
    for memory, expected in (
        (2 * (20 + all_), (8, 1, False)),
        ((20 + four) / 0.93, (4, 2, False)),
        ((20 + two) / 0.93, (2, 4, False)),
        (21, (1, 8, True)),
    ):
        limit[0] = memory
        shape = fit.choose_shape(model, None, rows, order, BatchShape(1, 8, False), note)
        assert (shape.micro_batch, shape.accumulation, shape.checkpointing) == expected
    assert EVENTS[-1][0] == "training_probe"
    cpu = SimpleNamespace(device=torch.device("cpu"), hf=hf)
    assert fit.choose_shape(cpu, None, rows, order, BatchShape(1, 8, False), note) == BatchShape(1, 8, False)


def test_finding_nothing_leaves_nothing(tmp_path):
    assert checkpoints.newest(tmp_path / "train", note) is None
    shutil.rmtree(tmp_path)


# --- the fake model's training


class FakeModelStub:
    """As much of `cai.models.fake.FakeModel` as training asks for."""

    backend, name, format = "fake", "fake", "base"

    def __init__(self):
        self.tokenizer = ByteTokenizer()

    def to_lora(self, lora, seed=0):
        self.lora = True


def fake_training(folder, **callbacks):
    from cai.recipe.settings import DpoSection, LoraSection
    from cai.training.train import train

    pairs = [pair(i) for i in range(3)]
    return train(
        FakeModelStub(), pairs, [], LoraSection(), DpoSection(max_steps=4), folder, prompt=Prompt(), **callbacks
    )


def test_the_fake_models_training_stops_resumes_and_leaves_the_same_bytes(tmp_path):
    whole = fake_training(tmp_path / "a" / "train")
    steps = []
    with pytest.raises(errors.Stopped):
        fake_training(
            tmp_path / "b" / "train", stopped=lambda: len(steps) == 2, progress=lambda *step: steps.append(step)
        )
    assert steps == [(1, 4), (2, 4)] and not (tmp_path / "b" / "adapter").exists()
    again = fake_training(tmp_path / "b" / "train", progress=lambda *step: steps.append(step))
    assert steps[2:] == [(3, 4), (4, 4)] and again.log == whole.log and whole.first_loss == math.log(2)
    names = [p.name for p in sorted((tmp_path / "a" / "adapter").iterdir())]
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    for name in names:
        assert (tmp_path / "a" / "adapter" / name).read_bytes() == (tmp_path / "b" / "adapter" / name).read_bytes()
    from safetensors import safe_open

    with safe_open(tmp_path / "a" / "adapter" / "adapter_model.safetensors", "np") as file:
        assert list(file.keys()) == ["base_model.model.fake.lora_B.weight"]
