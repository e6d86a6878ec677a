"""The one loaded model in its second mode: a fresh LoRA replaces an earlier one on the same weights object."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.slow


def test_a_second_lora_replaces_the_first_on_the_same_weights():
    """The preflight wraps the model before training does."""
    from cai.models.policy import load
    from cai.recipe.settings import LoraSection, ModelSection

    model = load(ModelSection(format="chat", quantization="fp32", max_seq_length=512), "embedded")
    weights = model.hf.get_input_embeddings().weight.data_ptr()
    counts = []
    for rank in (8, 8, 4):
        model.to_lora(LoraSection(rank=rank, alpha=2 * rank), seed=1)
        found = [p for name, p in model.hf.named_parameters() if "lora_" in name]
        assert all(str(p.dtype) == "torch.float32" for p in found)
        counts.append(sum(p.numel() for p in found))
    assert counts[0] == counts[1] == 2 * counts[2] > 0
    assert model.hf.get_input_embeddings().weight.data_ptr() == weights
