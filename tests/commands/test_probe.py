"""The probe of an export: bounds and wording by hand, then a wrong scaling and a penalty on a small random model."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from support.runs import ROOT

from cai.commands import probe
from cai.commands.export_prompt import Asking
from cai.commands.probe import COARSE, FINE, Answer, Compared
from cai.errors import QUALITY, CaiError
from cai.recipe.prompts import load_prompt

POLICY = load_prompt(ROOT / "prompts" / "policy.yaml", frozenset({"instruction"}))
ASKING = Asking(POLICY, "base", "<|endoftext|>", 256, ("\nInstruction:",), None)


def row(text: str = "a", other: str = "a", finish: str = "eos", off: float = 0.0, parted=None, gap: float = 0.0):
    return Compared(Answer(text, "eos", (1,), (0.0,)), Answer(other, finish, (1,)), off, parted, gap)


@pytest.mark.parametrize(
    ("found", "bounds", "told"),
    [
        ([row(), row(off=0.11)], COARSE, "off by 0.1100 nats a token"),
        ([row(off=0.002)], FINE, "off by 0.0020 nats a token"),
        ([row(off=math.nan)], COARSE, "is not the one that was measured"),
        ([row(other="b", parted=3, gap=1.4)], COARSE, "are 1.400 nats apart"),
        ([row(other="b", parted=3, gap=0.02)], FINE, "are 0.020 nats apart"),
    ],
)
def test_what_rounding_cannot_do_ends_the_export(found, bounds, told):
    with pytest.raises(CaiError, match=told) as error:
        probe.check(found, bounds, Path("out/adapter"))
    assert error.value.code == QUALITY


def test_the_line_says_what_was_compared_and_how_many_end():
    found = [row(), row(other="b", finish="length", off=0.012, parted=17, gap=0.031), row(finish="stop"), row()]
    probe.check(found, COARSE, Path("out"))
    line = probe.summary(ASKING, found, COARSE, 600, 600, 0)
    assert "as likely under the exported adapter to 0.0120 nats a token (0.1 at most)" in line
    assert "the measured ones for 3 of 4 (the others part at near ties, from token 18: 0.031 nats, 1 at most)" in line
    assert line.endswith("3 of 4 end within 600 tokens (2 by <|endoftext|>, 1 by a stop string)")
    short = probe.summary(ASKING, [row(finish="length")] * 4, FINE, 32, 600, 0)
    assert short.endswith("32 tokens of 600 were drawn, too few to tell whether they end") and "near ties" not in short


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model with an adapter, snapshot, asking, exported folder) of a base that asks for a repetition penalty."""
    torch = pytest.importorskip("torch")
    from support.models import save_tiny

    from cai.commands.export_prompt import write_prompt_files
    from cai.models.policy import load
    from cai.recipe.settings import EngineSection, LoraSection, ModelSection
    from cai.recipe.settings_evaluation import EvaluationSection
    from cai.training import adapter

    folder, lora = save_tiny(tmp_path_factory.mktemp("m") / "Tiny", "qwen2", template=""), LoraSection(rank=4, alpha=8)
    path = folder / "generation_config.json"
    values = orjson.loads(path.read_bytes()) if path.is_file() else {}
    path.write_bytes(orjson.dumps(values | {"repetition_penalty": 1.6}))
    section = ModelSection(name=str(folder), backend="cpu", max_seq_length=512)
    model = load(section, "cpu")
    model.to_lora(lora, seed=1)
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.mode("generate")
    target = tmp_path_factory.mktemp("out") / "adapter"
    adapter.export(model.hf, target, "Tiny")
    asking = Asking(POLICY, "base", "<|endoftext|>", 256, ("\nInstruction:",), folder)
    write_prompt_files(asking, target)
    recipe = SimpleNamespace(engine=EngineSection(), evaluation=EvaluationSection())
    snapshot = SimpleNamespace(
        recipe=recipe, backend="cpu", pairs=SimpleNamespace(heldout=[]), cleaned=SimpleNamespace(kept=[])
    )
    return model, snapshot, asking, target


def tried(made) -> str:
    return probe.through_template(*made)


@pytest.mark.slow
def test_an_export_in_float32_is_the_measured_model(made):
    line = tried(made)
    assert "give the measured tokens" in line and "the measured ones for 4 of 4" in line, line
    assert made[0].hf.active_adapter == "default" and set(made[0].hf.peft_config) == {"default"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("adapter_config.json", {"lora_alpha": 4}, "is not the one that was measured"),
        ("generation_config.json", {"repetition_penalty": 1.6}, "draw otherwise than was measured"),
        ("generation_config.json", {"repetition_penalty": None}, "draw otherwise than was measured"),
    ],
)
def test_a_wrong_scaling_and_a_penalty_are_found(made, file, changes, told):
    path = made[3] / file
    before = path.read_bytes()
    values = {k: v for k, v in (orjson.loads(before) | changes).items() if v is not None}
    path.write_bytes(orjson.dumps(values))
    try:
        with pytest.raises(CaiError, match=told):
            tried(made)
    finally:
        path.write_bytes(before)
    assert made[0].hf.active_adapter == "default"
