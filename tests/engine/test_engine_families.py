"""Every family of decoders that the native engine runs, against transformers on small random checkpoints of its shape.

Norms and windows are such that leaving one out changes the text; windows are shorter than the rows.
"""

from __future__ import annotations

import copy
import random

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")

from test_engine import PREFIX, VOCAB, Letters, Loaded, complete, requests  # noqa: E402

from cai.engine import ScoreRequest, build  # noqa: E402
from cai.engine.native import families  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402
from cai.errors import CaiError  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 64, "rope_theta": 5e5},
}
TYPED = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
SIGHT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
KINDS = {
    "llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "mistral with a window": ("MistralConfig", {"sliding_window": 24}),
    "mistral with a window as long as it reads": ("MistralConfig", {"sliding_window": 256}),
    "qwen2 with windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3 with biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 24, "rope_parameters": TYPED}),
    "olmo3 within its window": ("Olmo3Config", {"sliding_window": 4096, "num_key_value_heads": 4}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 24, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3},
    ),
}


def checkpoint(kind):
    name, more = KINDS[kind]
    return shaken(getattr(transformers, name)(**{**SMALL, **copy.deepcopy(more)}))


def shaken(config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 0.0 if "norm" not in name else 0.3 if config.model_type.startswith("gemma") else 1.3
            parameter.normal_(centre, 0.4 if "norm" in name else 0.1 if "bias" in name else 0.3)
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return checkpoint(request.param)


def test_texts_are_those_of_transformers(model):
    for temperature in (0.0, 0.7):
        wanted = requests(temperature=temperature)
        assert complete(NativeEngine(model, Letters(), batch_size=5), wanted) == complete(
            ReferenceEngine(model, Letters()), wanted
        )


def test_log_probs_are_those_of_transformers(model):
    draw = random.Random(2)
    wanted = []
    for i in range(6):
        context = (PREFIX if i % 3 else ()) + tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 40)))
        wanted.append(ScoreRequest(i, context, tuple(draw.randrange(VOCAB) for _ in range(9)), len(PREFIX)))
    for score in NativeEngine(model, Letters(), batch_size=4).score(wanted):
        request = wanted[score.id]
        with torch.no_grad():
            logps = model(torch.tensor([request.context_ids + request.continuation_ids])).logits[0].log_softmax(-1)
        start = len(request.context_ids)
        expected = [logps[start + k - 1, token].item() for k, token in enumerate(request.continuation_ids)]
        assert score.logps == pytest.approx(expected, abs=2e-4)


def test_a_gemma_that_sees_is_read_at_its_text_part():
    text = transformers.Gemma3TextConfig(**SMALL, **KINDS["gemma3"][1])
    config = transformers.Gemma3Config(text_config=text, vision_config={**SIGHT, "patch_size": 14})
    torch.manual_seed(1)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    assert build.make_engine("auto", Loaded(model)).name == "native"
    ids = tuple(range(5, 60))
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    (score,) = NativeEngine(model, Letters()).score([ScoreRequest(0, ids[:50], ids[50:])])
    assert score.logps == pytest.approx([logps[49 + k, ids[50 + k]].item() for k in range(5)], abs=2e-4)


@pytest.mark.parametrize("kind", ["mistral with a window", "olmo3", "gemma3"])
def test_a_window_changes_the_text(kind, monkeypatch):
    """What the tests above compare is not equal without it."""
    model, wanted = checkpoint(kind), requests(temperature=0.0)
    expected = complete(NativeEngine(model, Letters()), wanted)
    monkeypatch.setattr(families, "window", lambda config, kind: families.WIDE)
    assert complete(NativeEngine(model, Letters()), wanted) != expected


REFUSED = {
    "a family nobody compared": ("GraniteConfig", {}, "model type 'granite'"),
    "capped logits": ("Gemma3TextConfig", {"final_logit_softcapping": 30.0}, "capped logits"),
    "both directions": ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "both directions"),
    "another gelu": ("Gemma3TextConfig", {"hidden_activation": "gelu"}, "activation 'gelu'"),
    "chunks": ("Qwen3Config", {"layer_types": ["chunked_attention"] * 4}, "attention of type 'chunked_attention'"),
    "odd heads": ("Qwen3Config", {"head_dim": 24}, "head dimension 24"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_native_does_not_know_runs_in_static_batches_and_says_the_price(kind):
    name, more, why = REFUSED[kind]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SMALL, **more}))
    engine = build.make_engine("auto", Loaded(model))
    said = engine.stats.extra["engine"]
    assert engine.name == "static" and why in said and "13.5 times slower" in said and "\n" not in said
    with pytest.raises(CaiError, match="native cannot run this model"):
        build.make_engine("native", Loaded(model))


def test_a_norm_of_heads_that_an_adapter_trains_is_seen():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["q_norm"])
    assert families.unsupported(peft.get_peft_model(checkpoint("qwen3"), config)) == "an adapter that trains norms"
