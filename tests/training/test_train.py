"""Training end to end on a tiny random model: the guards, each by the fault it is there for, and exact resumes.

Expected values: the first DPO loss is -log sigmoid(0) = ln 2 = 0.693147.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.training import LORA, FakePrompt, TinyModel, dpo, make_pairs, run_train

from cai import errors
from cai.errors import CaiError, Stopped
from cai.recipe.settings import HealthSection
from cai.training import adapter, checkpoints
from cai.training.train import PairLogps, load_result, pair_logps, pair_rows, preference

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


class Events(list):
    def __call__(self, kind, **fields):
        self.append((kind, fields))

    def kinds(self):
        return [kind for kind, _ in self]

    def of(self, kind):
        return [fields for name, fields in self if name == kind]


def sha(folder):
    digest = hashlib.sha256()
    for path in sorted((folder / "adapter").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that was left alone: (folder, result, events)."""
    folder, events = tmp_path_factory.mktemp("alone"), Events()
    return folder, run_train(folder, event=events), events


def test_first_loss_is_log_two_and_the_loss_falls(alone):
    folder, result, events = alone
    assert abs(result.first_loss - math.log(2)) < 1e-6 and result.last_loss < 0.3
    assert result.steps == len(result.log) == 4 and result.log[0]["rewards/margins"] == 0.0
    assert len(events.of("train_step")) == 4 and all(math.isfinite(v) for e in result.log for v in e.values())
    assert result.heldout["n"] == 2 and load_result(folder / "train") == result


def test_adapter_loads_with_plain_peft_and_gives_the_trained_log_probs(alone):
    from peft import PeftModel

    folder, _, _ = alone
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "example/tiny-random"
    assert {p.name for p in (folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    fresh = TinyModel()
    fresh.hf = PeftModel.from_pretrained(fresh.hf, str(folder / "adapter"))
    scores = pair_logps(fresh, pair_rows(fresh, make_pairs(6), FakePrompt(), 400))
    assert preference(scores, 0.1)["accuracy"] == 1.0 and preference(scores, 0.1)["margin"] > 1.0
    alone_on = pair_logps(fresh, pair_rows(fresh, make_pairs(6), FakePrompt(), 400), reference=False)
    assert [(s.chosen, s.rejected) for s in alone_on] == [(s.chosen, s.rejected) for s in scores]
    assert all(math.isnan(s.ref_chosen) and math.isnan(s.ref_rejected) for s in alone_on)


def test_result_is_none_until_the_adapter_is_there(alone, tmp_path):
    assert load_result(tmp_path) is None
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "result.json").write_bytes((alone[0] / "train" / "result.json").read_bytes())
    assert load_result(tmp_path / "train") is None


def stop_at(events, step):
    """`stopped` turns true while the step after `step` logged ones runs."""
    return lambda: len(events.of("train_step")) >= step


@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopped_and_resumed_is_the_same_adapter(alone, tmp_path, step):
    """Optimizer, scheduler, data order and RNG all come back: the bytes are those of the run left alone."""
    events = Events()
    with pytest.raises(Stopped) as caught:
        run_train(tmp_path, event=events, stopped=stop_at(events, step))
    assert caught.value.code == errors.RESUMABLE
    assert checkpoints.found(tmp_path / "train") and not (tmp_path / "adapter").exists()
    result = run_train(tmp_path, event=events)
    assert result.resumed_from >= 1 and [e["step"] for e in result.log] == [1, 2, 3, 4]
    assert sha(tmp_path) == sha(alone[0])


@pytest.mark.parametrize("step", [1, 3])
def test_a_stop_at_the_end_of_a_step_keeps_its_log_entry(alone, tmp_path, step):
    """Where a step is one batch, the stop is seen at its end: the first loss must not become the second step's."""
    events, done = Events(), []
    whole = dpo(gradient_accumulation=1, batch_size=4)
    before = run_train(tmp_path / "alone", config=whole)
    with pytest.raises(Stopped, match=f"after step {step} of 4"):
        run_train(
            tmp_path / "cut",
            config=whole,
            event=events,
            stopped=lambda: step in done,
            progress=lambda s, n: done.append(s),
        )
    result = run_train(tmp_path / "cut", config=whole)
    assert (result.resumed_from, result.log) == (step, before.log)
    assert sha(tmp_path / "cut") == sha(tmp_path / "alone")


def test_stopped_between_micro_batches_leaves_the_last_whole_step(alone, tmp_path):
    events, calls = Events(), []

    def stopped():
        calls.append(1)
        return len(events.of("train_step")) == 2 and len(calls) % 2 == 0

    with pytest.raises(Stopped):
        run_train(tmp_path, event=events, stopped=stopped)
    run_train(tmp_path)
    assert sha(tmp_path) == sha(alone[0])


def test_the_grace_period_waits_while_a_checkpoint_is_saved(tmp_path, monkeypatch):
    depths = []

    class Switch:
        depth = 0

        def __call__(self):
            return False

        @contextmanager
        def hold(self):
            self.depth += 1
            yield
            self.depth -= 1

    switch, real = Switch(), checkpoints.seal
    monkeypatch.setattr(checkpoints, "seal", lambda *args: (depths.append(switch.depth), real(*args)))
    run_train(tmp_path, stopped=switch)
    assert depths and set(depths) == {1} and switch.depth == 0


def test_stopped_before_the_first_step(alone, tmp_path):
    with pytest.raises(Stopped):
        run_train(tmp_path, stopped=lambda: True)
    run_train(tmp_path)
    assert sha(tmp_path) == sha(alone[0])


def test_f24_killed_before_the_adapters_rename(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_train(tmp_path)
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    result = run_train(tmp_path)
    assert result.resumed_from == 4 and sha(tmp_path) == sha(alone[0])


def test_f23_resume_skips_a_damaged_checkpoint(alone, tmp_path):
    events = Events()
    with pytest.raises(Stopped):
        run_train(tmp_path, event=events, stopped=stop_at(events, 3))
    (checkpoints.found(tmp_path / "train")[0] / "optimizer.pt").unlink()
    result = run_train(tmp_path, event=events)
    assert (result.resumed_from == 2 and events.of("checkpoint_damaged")[0]["checkpoint"] == "checkpoint-4") or (
        result.resumed_from in (2, 3)
    )
    assert sha(tmp_path) == sha(alone[0])


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb-went-off",))


def test_a_malicious_optimizer_is_refused_even_under_a_valid_seal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = Events()
    with pytest.raises(Stopped):
        run_train(tmp_path, event=events, stopped=stop_at(events, 1))
    checkpoint = checkpoints.found(tmp_path / "train")[0]
    sealed = checkpoints.read_seal(checkpoint)
    with (checkpoint / "optimizer.pt").open("wb") as file:
        torch.save({"state": Bomb(), "param_groups": []}, file, pickle_module=pickle)
    (checkpoint / checkpoints.SEAL).unlink()
    checkpoints.seal(checkpoint, {k: v for k, v in sealed.items() if k not in ("v", "files")})
    with pytest.raises(CaiError, match="holds code") as caught:
        run_train(tmp_path)
    assert caught.value.code == errors.CORRUPT and not (tmp_path / "bomb-went-off").exists()


def test_checkpoints_hold_no_pickle_that_nothing_verifies(alone):
    names = {p.name for p in checkpoints.found(alone[0] / "train")[0].iterdir()}
    assert "training_args.bin" not in names and "adapter_model.bin" not in names


def test_a_resume_with_another_learning_rate_is_drift(tmp_path):
    events = Events()
    with pytest.raises(Stopped):
        run_train(tmp_path, event=events, stopped=stop_at(events, 1))
    with pytest.raises(CaiError, match="learning_rate") as caught:
        run_train(tmp_path, config=dpo(learning_rate=1e-4))
    assert caught.value.code == errors.DRIFT


def test_f19_a_resume_under_another_library_version_is_drift(tmp_path, monkeypatch):
    from cai.training import job

    events, installed = Events(), job.versions()
    with pytest.raises(Stopped):
        run_train(tmp_path, event=events, stopped=stop_at(events, 1))
    monkeypatch.setattr(job, "versions", lambda: {**installed, "trl": "1.14.0"})
    with pytest.raises(CaiError, match=r"versions: .*'trl': '1\.14\.0'") as caught:
        run_train(tmp_path)
    assert caught.value.code == errors.DRIFT


# --- faults in the arithmetic


def poison(monkeypatch, when, value=float("nan")):
    """The loss of micro-batch number `when` becomes `value`."""
    from cai.training import trainers

    real, seen = trainers.pair_loss, []

    def loss(*args, **kwargs):
        seen.append(1)
        result = real(*args, **kwargs)
        return result * value if len(seen) == when else result

    monkeypatch.setattr(trainers, "pair_loss", loss)


@pytest.mark.parametrize(("when", "value"), [(1, float("nan")), (6, float("nan")), (7, float("inf"))])
def test_f25_a_non_finite_step_is_not_applied_and_the_last_checkpoint_is_sound(
    alone, tmp_path, monkeypatch, when, value
):
    poison(monkeypatch, when, value)
    model = TinyModel()
    with pytest.raises(CaiError, match="not finite") as caught:
        run_train(tmp_path, model=model)
    assert caught.value.code == errors.QUALITY
    assert all(bool(torch.isfinite(p).all()) for _, p in adapter.lora_parameters(model.hf))
    monkeypatch.undo()
    run_train(tmp_path)
    assert sha(tmp_path) == sha(alone[0])


def test_f25_a_non_finite_gradient_under_a_finite_loss(tmp_path, monkeypatch):
    from cai.training import trainers

    real = trainers.pair_loss

    def loss(logps_2B, *args, **kwargs):
        value = real(logps_2B, *args, **kwargs)
        zero = (logps_2B.sum() - logps_2B.sum().detach()).sqrt()  # 0 with an infinite slope
        return value + zero

    monkeypatch.setattr(trainers, "pair_loss", loss)
    with pytest.raises(CaiError, match=r"gradient norm (nan|inf)"):
        run_train(tmp_path)


WATCHED = HealthSection(window=2, max_chosen_fall=0.05)


@pytest.fixture
def displaced(monkeypatch):
    """A loss of the right value whose gradient lowers all texts, chosen and rejected."""
    from cai.training import trainers

    real = trainers.pair_loss

    def loss(logps_2B, *args, **kwargs):
        total = logps_2B.sum()
        return real(logps_2B, *args, **kwargs) + 5.0 * (total - total.detach())

    monkeypatch.setattr(trainers, "pair_loss", loss)


def test_a_sign_of_ill_health_is_told_once_and_the_training_goes_on(displaced, tmp_path):
    told = []
    result = run_train(tmp_path, event=lambda kind, **facts: told.append((kind, facts)), health=WATCHED)
    signs = [facts for kind, facts in told if kind == "health"]
    (sign,) = [facts for facts in signs if facts["sign"] == "displacement"]
    assert result.steps == 4 and len(signs) == len({facts["sign"] for facts in signs})
    assert sign["value"] > 0.05 and "loss_type" in sign["text"]
    fall = [entry["logps/chosen_fall"] for entry in result.log]
    assert fall[0] == pytest.approx(0.0, abs=1e-6) and fall[-1] > 0.05


def test_a_sign_that_the_recipe_names_stops_resumably(displaced, tmp_path):
    """Exit 6 with a sealed checkpoint; a resume stops again; one that no longer names the sign ends like any other."""
    stopping = WATCHED.model_copy(update={"stop": ("displacement",)})
    for step in (3, 4):
        with pytest.raises(CaiError, match=r"health\.stop names it") as caught:
            run_train(tmp_path / "a", config=dpo(max_steps=6), health=stopping)
        assert caught.value.code == errors.QUALITY
        assert checkpoints.newest(tmp_path / "a" / "train", lambda *a, **k: None)[1]["step"] == step
    run_train(tmp_path / "a", config=dpo(max_steps=6), health=WATCHED)
    run_train(tmp_path / "b", config=dpo(max_steps=6), health=WATCHED)
    assert sha(tmp_path / "a") == sha(tmp_path / "b")


def test_truncated_pairs_stop_before_the_first_step_where_the_recipe_says_so(tmp_path):
    pairs = [{**pair, "chosen": "so it goes on and on. " * 40} for pair in make_pairs(4)]
    health = HealthSection(stop=("truncation",))
    with pytest.raises(CaiError, match=r"100.0% of the pairs were truncated .* nothing was trained"):
        run_train(tmp_path, pairs=pairs, config=dpo(max_length=128), health=health)
    told = []
    run_train(tmp_path, pairs=pairs, config=dpo(max_length=128), event=lambda kind, **_: told.append(kind))
    assert told.count("health") == 1


def test_a_wrong_first_loss_stops(tmp_path, monkeypatch):
    from cai.training import job

    real = job.reference_logps.compute
    monkeypatch.setattr(job.reference_logps, "compute", lambda *a: [(c - 3.0, r) for c, r in real(*a)])
    with pytest.raises(CaiError, match="first DPO loss is") as caught:
        run_train(tmp_path)
    assert caught.value.code == errors.QUALITY


def test_the_first_loss_tolerance_grows_with_the_sums():
    from cai.training.job import first_loss_tolerance

    long = [(-6000.0, -6000.0)]
    assert first_loss_tolerance(dpo(), [(-50.0, -60.0)], [0], "torch.bfloat16") == 0.01
    assert first_loss_tolerance(dpo(), long, [0], "torch.float32") == 0.01
    assert 0.1 < first_loss_tolerance(dpo(), long, [0], "torch.bfloat16") < 0.2


# --- facts about TRL and PEFT


def test_fact_6_no_copy_of_the_adapter_is_left(alone, tmp_path, monkeypatch):
    from cai.training import trainers

    seen = []
    real = trainers.PairTrainer.train

    def train(self, *args, **kwargs):
        seen.append(set(self.model.peft_config))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainers.PairTrainer, "train", train)
    run_train(tmp_path)
    assert seen == [{"default"}]
    assert not any("ref" in p.name for p in checkpoints.found(tmp_path / "train")[0].iterdir())


def test_fact_7_bf16_lora_weights_are_refused():
    model = TinyModel()
    model.to_lora(LORA)
    adapter.reset(model.hf, 1)
    adapter.require_fp32(model.hf)
    _, parameter = next(adapter.lora_parameters(model.hf))
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(CaiError, match="is bfloat16"):
        adapter.require_fp32(model.hf)
    adapter.reset(model.hf, 1)
    adapter.require_fp32(model.hf)


def test_fact_7_training_undoes_trls_cast_of_a_quantised_models_adapter(tmp_path, monkeypatch):
    model = TinyModel()
    model.hf.is_loaded_in_4bit = True  # what makes TRL 1.15 cast the adapter to bf16
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_validate_args", lambda self: None)
    run_train(tmp_path, model=model)
    assert {p.dtype for _, p in adapter.lora_parameters(model.hf)} == {torch.float32}


def test_only_the_adapter_trains():
    model = TinyModel()
    model.to_lora(LORA)
    adapter.reset(model.hf, 1)
    model.hf.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(CaiError, match="would train"):
        adapter.require_fp32(model.hf)


def test_the_start_depends_on_the_seed_alone():
    values = []
    for torch_seed, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(torch_seed)
        model = TinyModel()
        model.to_lora(LORA)
        adapter.reset(model.hf, seed)
        values.append(torch.cat([p.flatten() for _, p in adapter.lora_parameters(model.hf)]))
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_an_adapter_that_is_not_finite_or_did_not_move_is_not_exported(tmp_path):
    model = TinyModel()
    model.to_lora(LORA)
    adapter.reset(model.hf, 1)
    with pytest.raises(CaiError, match="every lora_B is zero"):
        adapter.require_sound(model.hf)
    _, parameter = list(adapter.lora_parameters(model.hf))[1]
    parameter.data.fill_(1.0)
    adapter.require_sound(model.hf)
    parameter.data[0, 0] = float("inf")
    with pytest.raises(CaiError, match="not finite"):
        adapter.require_sound(model.hf)


def test_a_training_that_moved_nothing_leaves_no_adapter(tmp_path):
    config = dpo(max_steps=1).model_copy(update={"learning_rate": 0.0})
    with pytest.raises(CaiError, match="training moved nothing") as caught:
        run_train(tmp_path, config=config)
    assert caught.value.code == errors.QUALITY and not (tmp_path / "adapter").exists()


def test_generation_finds_the_model_as_it_was(alone):
    model = TinyModel()
    before = type(model.hf).forward
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run_train(Path(folder), model=model)
    base = model.hf.get_base_model()
    assert "forward" not in base.__dict__ and type(base).forward is before  # TRL's fused head is taken off again
    assert not model.hf.training


# --- memory


def out_of_memory(monkeypatch, more_than):
    from cai.training import trainers

    real = trainers.sequence_logps

    def logps(hf, batch, *how):
        if len(batch["lengths_S"]) // 2 > more_than:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(hf, batch, *how)

    monkeypatch.setattr(trainers, "sequence_logps", logps)


def test_f26_out_of_memory_halves_the_micro_batch_at_the_same_effective_batch(alone, tmp_path, monkeypatch):
    out_of_memory(monkeypatch, 1)
    events = Events()
    result = run_train(tmp_path, config=dpo(batch_size=4, gradient_accumulation=1), event=events)
    assert (result.micro_batch, result.accumulation) == (1, 4)
    assert [(e["micro_batch"], e["accumulation"]) for e in events.of("out_of_memory")] == [(2, 2), (1, 4)]
    for entry, expected in zip(result.log, alone[1].log, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_f26_at_the_last_rung_one_line_says_what_to_change(tmp_path, monkeypatch):
    out_of_memory(monkeypatch, 0)
    with pytest.raises(CaiError, match=r"Lower dpo\.max_length"):
        run_train(tmp_path)


def test_f26_a_resume_starts_with_the_micro_batch_that_fitted(tmp_path, monkeypatch):
    out_of_memory(monkeypatch, 1)
    events = Events()
    with pytest.raises(Stopped):
        run_train(tmp_path, event=events, stopped=stop_at(events, 1))
    again = Events()
    assert run_train(tmp_path, event=again).micro_batch == 1 and "out_of_memory" not in again.kinds()


# --- inputs


def test_no_pair_that_fits_is_quality(tmp_path):
    with pytest.raises(CaiError, match=r"dpo\.max_length"):
        run_train(
            tmp_path,
            pairs=[{"item": 0, "prompt": "x" * 100, "chosen": "a", "rejected": "b"}],
            config=dpo(max_length=64),
        )


@pytest.mark.parametrize("loss_type", [("sigmoid", "sft"), ("ipo",), ("hinge",), ("sft",)])
def test_other_losses_train(tmp_path, loss_type):
    result = run_train(tmp_path, config=dpo(loss_type=loss_type, max_steps=2))
    assert result.steps == 2


def test_preference_counts_ties_as_half():
    tie = PairLogps(0, -1.0, -2.0, -1.0, -2.0, 3, 4)
    win = PairLogps(1, -1.0, -2.5, -2.0, -2.0, 3, 4)
    found = preference([tie, win], beta=0.1)
    assert found["accuracy"] == 0.75 and found["margin"] == pytest.approx(0.075)
    assert found["loss"] == pytest.approx((math.log(2) + math.log1p(math.exp(-0.15))) / 2)
    assert preference([], 0.1) == {}


def test_losses_equal_trls_own(tmp_path):
    """Our loss against TRL 1.15's DPOTrainer on the same rows, order and start: every step within 1e-4."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "support" / "child.py"), "trl", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(ours) == len(theirs) == 4
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4, (ours, theirs)
