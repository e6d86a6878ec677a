"""Scores under heads that do more than one product: adapted, scaled (Cohere, Granite), capped (Gemma 2)."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from cai.engine import ScoreRequest  # noqa: E402
from cai.engine.generate import score_batch  # noqa: E402

pytestmark = pytest.mark.slow
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "llama": {},
}


@pytest.mark.parametrize("kind", HEADS)
def test_scores_are_those_of_the_model_s_own_logits(kind):
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **HEADS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # large logits, so that a cap or a scale is felt
    request = ScoreRequest(0, (1, 5, 9), (7, 3, 11))
    with torch.no_grad():
        logps = model(torch.tensor([[1, 5, 9, 7, 3]])).logits[0, 2:].float().log_softmax(-1)
    expected = [logps[place, token].item() for place, token in enumerate(request.continuation_ids)]
    (score,) = score_batch(model, [request], "cpu")
    assert list(score.logps) == pytest.approx(expected, abs=1e-4)
