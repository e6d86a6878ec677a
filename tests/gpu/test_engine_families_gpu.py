"""What of families, groups, int8 and adapters only a GPU shows: compiled kernels, graphs, bitsandbytes' own weights.

pytest -m gpu tests/gpu/test_engine_families_gpu.py -s                    (some 3 minutes, compilation included)
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cai.engine import ScoreRequest  # noqa: E402
from cai.engine.native import tuning  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.native.scoring import divergence  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402
from tests.gpu.test_engine_gpu import VOCAB, Numbers, complete, quantised, requests  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
KINDS = {
    "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "mistral with a window": ("MistralConfig", {"sliding_window": 70}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 70}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 64, "query_pre_attn_scalar": 48, "sliding_window": 70}),
}


def model(kind, dtype=torch.float32, **more):
    name, own = KINDS[kind]
    config = getattr(transformers, name)(**SMALL, **{**own, **more})
    torch.manual_seed(1)
    with torch.device("cuda"):
        made = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            centre = 0.0 if "norm" not in name else 0.3 if kind == "gemma3" else 1.3
            parameter.normal_(centre, 0.2 if "norm" in name else 0.05)
    return made


SCORED = [ScoreRequest(i, tuple(range(i + 1, i + 140)), tuple(range(150, 190)), 100) for i in range(6)]


def totals(engine):
    return [score.total for score in sorted(engine.score(SCORED), key=lambda score: score.id)]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_every_family_equal_hf_in_fp32(kind):
    loaded = model(kind)
    for temperature in (0.0, 0.7):
        native = NativeEngine(loaded, Numbers(), device="cuda", batch_size=16)
        wanted = requests(12, temperature)
        assert complete(native, wanted) == complete(ReferenceEngine(loaded, Numbers(), device="cuda"), wanted)
        native.close()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_every_family_are_near_hf_in_bf16(kind):
    loaded = model(kind, torch.bfloat16, **({"head_dim": 256} if kind == "gemma3" else {}))
    found = totals(NativeEngine(loaded, Numbers(), device="cuda", batch_size=8))
    assert found == pytest.approx(totals(ReferenceEngine(loaded, Numbers(), device="cuda")), rel=1e-2)


def test_own_dequantisation_is_bitsandbytes_to_the_bit():
    loaded = quantised()
    engine = NativeEngine(loaded, Numbers(), device="cuda", batch_size=8)
    assert "by tokens" in engine.stats.extra["linears"]  # and not the modules, since weights differed
    assert tuning.right_weights(engine.groups)
    engine.close()


def test_int8_drawing_is_near_and_scores_stay_exact():
    loaded, wanted, scores = quantised(), requests(), []
    for linears in ("fused", "int8"):
        engine = NativeEngine(loaded, Numbers(), device="cuda", batch_size=16, linears=linears)
        assert len(complete(engine, wanted)) == len(wanted)
        scores.append(totals(engine))
        nats, same = divergence(engine, tuple(range(10, 210)))
        print(linears, engine.stats.extra["linears"], f"KL {nats:.4f}, same {same:.3f}")
        engine.close()
    assert 1e-6 < nats < 0.1 and same > 0.4
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


def test_projections_in_16_bits_stay_and_the_rest_is_fast():
    loaded = quantised()
    for layer in loaded.model.layers[:2]:
        for parent, name in ((layer.self_attn, "k_proj"), (layer.mlp, "down_proj")):
            four = getattr(parent, name)
            plain = torch.nn.Linear(four.in_features, four.out_features, bias=four.bias is not None)
            with torch.no_grad():
                plain.weight.normal_(0, 0.05)
            setattr(parent, name, plain.to("cuda", torch.bfloat16).requires_grad_(False))
    found = {}
    for linears in ("bnb", "auto", "int8"):
        engine = NativeEngine(loaded, Numbers(), device="cuda", batch_size=8, linears=linears)
        found[linears], said = totals(engine), engine.stats.extra["linears"]
        assert len(complete(engine, requests(8))) == 8
        engine.close()
        assert linears == "bnb" or said.endswith("4 groups are not NF4, as loaded")
    assert found["auto"] == pytest.approx(found["bnb"], rel=1e-2)
    assert found["int8"] == pytest.approx(found["bnb"], rel=1e-2)


def test_graphs_of_both_states_of_an_adapter_are_kept():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(quantised(), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    engine = NativeEngine(tuned.eval(), Numbers(), device="cuda", batch_size=16)
    wanted, captured, texts = requests(16), [], []
    for _ in range(2):
        texts.append(complete(engine, wanted))
        with tuned.disable_adapter():
            texts.append(complete(engine, wanted))
        captured.append(dict(engine.graphs.captured))
    assert captured[0] == captured[1] and len({key[2] for key in captured[0]}) == 2
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    assert complete(engine, wanted) != texts[0]  # new weights under the old name
