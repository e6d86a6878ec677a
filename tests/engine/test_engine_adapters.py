"""Adapters of every kind on the native engine: equal to the model's own forward, on, off and exchanged, or refused."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")

from test_engine import PREFIX, Letters, Loaded, ScoreRequest, complete, requests, tiny  # noqa: E402

from cai.engine.build import make_engine  # noqa: E402
from cai.engine.native.decoder import unsupported  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.native.linears import Group, Shared  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "v and down": peft.LoraConfig(r=4, target_modules=["v_proj", "down_proj"]),
    "second layer": peft.LoraConfig(r=4, target_modules=ALL, layers_to_transform=[1]),
    "head": peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "ranks": peft.LoraConfig(r=4, target_modules=ALL, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 40}),
    "rslora": peft.LoraConfig(r=4, target_modules=ALL, use_rslora=True),
    "dora": peft.LoraConfig(r=4, target_modules=ALL, use_dora=True),
    "bias": peft.LoraConfig(r=4, target_modules=ALL, lora_bias=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"]),
}


def tuned(config):
    """The tiny decoder with an adapter that changes what it says."""
    made = peft.get_peft_model(tiny("llama"), copy.deepcopy(config)).eval()
    return shaken(made)


def shaken(made):
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(kind in name for kind in ("lora_B", "lora_magnitude", "ia3", "hada")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


WANTED = [ScoreRequest(i, (*PREFIX, i, 5), tuple(range(i, i + 9)), len(PREFIX)) for i in range(4)]


def totals(engine):
    return [score.total for score in sorted(engine.score(WANTED), key=lambda score: score.id)]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_on_and_off_equal_the_model_s_own_forward(kind):
    """The shared prefix must follow the adapter, too: one that leaves the first projection alone kept the old one."""
    model = tuned(ADAPTERS[kind])
    native, oracle = NativeEngine(model, Letters(), batch_size=4), ReferenceEngine(model, Letters())
    on = totals(native)
    assert on == pytest.approx(totals(oracle), abs=1e-3)
    assert complete(native, requests(8)) == complete(oracle, requests(8))
    with model.disable_adapter():
        off = totals(native)
        assert off == pytest.approx(totals(oracle), abs=1e-3)
        assert complete(native, requests(8)) == complete(oracle, requests(8))
    assert on != pytest.approx(off, abs=1e-2)
    assert totals(native) == pytest.approx(on, abs=1e-3)


def test_two_adapters_on_different_modules_are_exchanged():
    model = tuned(ADAPTERS["v and down"])
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["o_proj"]))
    native, oracle = NativeEngine(shaken(model), Letters(), batch_size=4), ReferenceEngine(model, Letters())
    seen = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        seen.append(totals(native))
        assert seen[-1] == pytest.approx(totals(oracle), abs=1e-3)
    assert seen[0] != pytest.approx(seen[1], abs=1e-2)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_copy_with_the_adapter_beside_it_equals_the_modules(kind):
    """What a GPU does with bf16 copies: two factors are added beside the copy, anything more is the modules'."""
    model, x = tuned(ADAPTERS[kind]), torch.randn(3, 32)
    layer = model.get_base_model().model.layers[1]
    group = Group([layer.mlp.gate_proj, layer.mlp.up_proj], Shared(lambda tokens: "bf16"))
    group.copy = torch.cat([getattr(module, "base_layer", module).weight for module in group.modules])
    switches = [lambda: None, model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers]
    if kind != "bias":  # a merged bias needs a bias to go into
        switches.append(model.merge_adapter)
    for switch in switches:
        switch()
        group.follow_adapter(torch.float32)
        with torch.no_grad():
            for found, module in zip(group(x), group.modules, strict=True):
                assert torch.allclose(found, module(x), atol=1e-4)


@pytest.mark.parametrize(
    "config,why",
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"]), "norms"),
    ],
)
def test_what_native_would_get_wrong_is_refused(config, why):
    assert why in unsupported(peft.get_peft_model(tiny(), copy.deepcopy(config)))


def test_weights_on_several_devices_go_to_static():
    """A model that was spread over two cards: here its last layer lies on `meta`."""
    model = tiny()
    model.model.layers[1].to("meta")
    assert "several devices (cpu, meta)" in unsupported(model)
    assert make_engine("auto", Loaded(model)).name == "static"
