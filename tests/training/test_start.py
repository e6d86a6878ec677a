"""The stages of a run whose DPO starts from SFT, on the fake model: what is trained once, from what, to where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai import errors
from cai.errors import CaiError
from cai.models.fake import FakeModel
from cai.recipe.load import read, resolve
from cai.recipe.settings import ModelSection
from cai.training import arms
from cai.training.fake_training import _value
from cai.training.train import train
from tests.conftest import ROOT

PAIRS = [{"item": i, "prompt": f"Say {i}.", "chosen": f"Well, {i}.", "rejected": f"No {i}!"} for i in range(4)]
SOUND = [{"item": 9, "prompt": "Say nine.", "chosen": "Nine."}]


class Prompt:
    sha = "0" * 16

    def render(self, fields: dict[str, str], *, format: str, tokenizer: Any, shift: int = 0) -> Any:
        text = f"User: {fields['instruction']}\n\nAssistant:"
        return SimpleNamespace(token_ids=tuple(tokenizer.encode(text)), text=text)


def context_of(folder: Path, *sets: str) -> Any:
    """A run's context as the stages use it; `told` collects its events."""
    told: list[tuple[str, dict[str, Any]]] = []
    (folder / "eval").mkdir(exist_ok=True)
    model = FakeModel(ModelSection(name="fake"))
    return SimpleNamespace(
        recipe=resolve(read(ROOT / "cai.toml"), milestone="m1", sets=["dpo.start=sft", "sft.max_steps=3", *sets]),
        run=SimpleNamespace(
            path=folder, eval=folder / "eval", train=folder / "train", adapter=folder / "adapter",
            sft_train=folder / "train" / "sft",
            sft_adapter=folder / "adapter-sft", event=lambda kind, **fields: told.append((kind, fields)),
        ),
        prompts={"policy": Prompt()}, model=lambda: model, stopped=lambda: False, check_stop=lambda where: None,
        progress=SimpleNamespace(begin=lambda *a, **k: None, end=lambda: None, training=lambda *a: None), told=told,
    )  # fmt: skip


def stage_of(context: Any, sound: Any = SOUND) -> Path | None:
    """The adapter that DPO would start from, trained; None: the base."""
    arm = arms.dpo_arm(context, PAIRS, [], sound)
    return arms.trained(context, arm.start) if arm.start else None


def trained(context: Any) -> list[str]:
    return [fields.get("arm", "") for kind, fields in context.told if kind == "trained"]


def test_dpo_begins_at_the_adapter_of_the_stage_which_is_trained_once(tmp_path: Path) -> None:
    """A fake adapter is seed + steps, DPO's on top of its start: 3 from SFT, 3 + 10 from both."""
    context = context_of(tmp_path)
    start = stage_of(context)
    assert start == stage_of(context) == tmp_path / "adapter-sft" and trained(context) == ["sft"]
    train(
        context.model(), PAIRS, [], context.recipe.lora, context.recipe.dpo, tmp_path / "train", prompt=Prompt(),
        start=start,
    )  # fmt: skip
    assert (_value(tmp_path / "adapter-sft"), _value(tmp_path / "adapter")) == (3.0, 13.0)


def test_a_run_from_the_base_has_no_stage(tmp_path: Path) -> None:
    context = context_of(tmp_path, "dpo.start=base")
    assert stage_of(context) is None and not context.told


def test_sound_answers_are_read_and_other_ones_are_drift(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    stage_of(context)
    (pairs,) = [fields["pairs"] for kind, fields in context.told if kind == "trained"]
    assert pairs == 5
    with pytest.raises(CaiError, match=r"sound: [0-9a-f]{16} then, None now") as caught:
        stage_of(context, ())
    assert caught.value.code == errors.DRIFT


def test_every_further_seed_has_a_stage_of_its_own(tmp_path: Path) -> None:
    context = context_of(tmp_path, "dpo.seeds=[0, 4]")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"the run's own")
    arms.train_seeds(context, PAIRS, [], SOUND)
    assert (_value(tmp_path / "adapter-sft-seed-4"), _value(tmp_path / "adapter-seed-4")) == (7.0, 21.0)
    assert not (tmp_path / "adapter-sft").exists() and context.model().attached == tmp_path / "adapter"


def test_held_out_pairs_are_told_of_on_the_fake_model_too(tmp_path: Path) -> None:
    context = context_of(tmp_path, "dpo.start=base", "dpo.eval_steps=4")
    result = train(
        context.model(), PAIRS, PAIRS[:2], context.recipe.lora, context.recipe.dpo, tmp_path / "train",
        prompt=Prompt(), event=context.run.event,
    )  # fmt: skip
    told = [fields["step"] for kind, fields in context.told if kind == "heldout"]
    assert told == [entry["step"] for entry in result.heldout_log] == [4, 8, 10]
