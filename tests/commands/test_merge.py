"""The merge on the embedded model: what the adapter says is what is published, or nothing is."""

from __future__ import annotations

import pytest
from support.pages import make_run, recipe

from cai.commands import export as exporting
from cai.commands import merge
from cai.errors import QUALITY, CaiError
from cai.recipe.settings import LoraSection, ModelSection

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
LORA = LoraSection(rank=4, alpha=8)
CONVERTER = (
    "import pathlib, sys; pathlib.Path(sys.argv[3]).write_text(str(len(list(pathlib.Path(sys.argv[1]).iterdir()))))"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose adapter moves the embedded model's words: random, and large enough to be seen."""
    import torch

    from cai.models.policy import load
    from cai.training import adapter

    folder = tmp_path_factory.mktemp("runs")
    section = ModelSection(format="chat", quantization="fp32", max_seq_length=512)
    path = make_run(folder, recipe=recipe(model=section, lora=LORA))
    model = load(section, "embedded")
    model.to_lora(LORA, seed=1)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
    adapter.export(model.hf, path / "adapter", "SmolLM2-135M-Instruct")
    (folder / exporting.CONVERTER).write_text(CONVERTER)
    return path


def test_a_merge_is_checked_converted_and_loads(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(run.parent))
    said = []
    to = exporting.export(run, tmp_path / "out", said.append, merged=True)
    names = {p.name for p in (to / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert int((to / "merged.gguf").read_text()) == len(names)
    text = "\n".join(said)
    assert "merged against adapter: mean gap 0.0" in text
    assert f"vllm serve {to}/merged" in text
    assert f"echo 'FROM {to}/merged.gguf' > Modelfile" in text


def test_a_damaged_merge_is_not_published(run, tmp_path, monkeypatch):
    write = merge._write

    def damaged(name, adapter, target):
        from safetensors.torch import load_file, save_file

        write(name, adapter, target)
        weights = load_file(str(target / "model.safetensors"))
        weights["model.layers.3.mlp.down_proj.weight"] *= -1.0
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "_write", damaged)
    monkeypatch.setenv("LLAMA_CPP", str(run.parent))
    with pytest.raises(CaiError, match="the merged model is not the adapter's") as fault:
        exporting.export(run, tmp_path / "out", lambda line: None, merged=True)
    assert fault.value.code == QUALITY
    assert not (tmp_path / "out" / "merged").exists()
    assert not (tmp_path / "out" / "merged.gguf").exists()
