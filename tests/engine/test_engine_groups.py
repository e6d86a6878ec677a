"""The ways of the linears group by group, and what is known of an adapter: by its weights, with its graphs kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")
pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")

from test_engine import Letters, complete, requests, tiny  # noqa: E402
from test_engine_adapters import ADAPTERS, totals, tuned  # noqa: E402
from test_engine_fp8 import card, decoder, groups_of  # noqa: E402, F401  (a fixture)

from cai.engine import Rules  # noqa: E402
from cai.engine.native import adapters, cache, linears, nf4, prefixes, tuning  # noqa: E402
from cai.engine.native.cache import KVShape  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.native.graphs import Graphs  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402
from cai.errors import CaiError  # noqa: E402

right_weights = tuning.right_weights


# -- group by group


@pytest.fixture
def some_in_16_bits(card, monkeypatch):  # noqa: F811
    """A twin whose first layer keeps k_proj, and whose second keeps down_proj, in 16 bits."""
    model = tiny("qwen2")
    first, second = model.model.layers
    kept = {first.self_attn.k_proj, second.mlp.down_proj}
    monkeypatch.setattr(tuning, "is_nf4", lambda module: module not in kept)
    monkeypatch.setattr(tuning, "copy_layers", lambda *a: 0)
    return model


def test_what_is_not_nf4_stays_as_loaded_and_the_rest_is_fast(some_in_16_bits):
    engine = NativeEngine(some_in_16_bits, Letters(), batch_size=4)
    said = tuning.choose(engine.decoder, "auto")
    assert "<=1: dequant" in said and said.endswith("; 2 groups are not NF4, as loaded")
    first, second = engine.decoder.layers
    assert [len(group.modules) for group in first.linears.groups] == [2, 1, 1, 2, 1]
    assert [group.nf4 is None for group in first.linears.groups] == [False, True, False, False, False]
    assert [group.nf4 is None for group in second.linears.groups] == [False, False, False, True]
    expected = complete(ReferenceEngine(some_in_16_bits, Letters()), requests())
    assert complete(engine, requests()) == expected


def test_outputs_of_a_mixed_group_stand_in_the_modules_order(some_in_16_bits):
    engine, x = NativeEngine(some_in_16_bits, Letters(), batch_size=4), torch.randn(3, 32)
    tuning.choose(engine.decoder, "auto")
    qkv, attention = engine.decoder.layers[0].linears.qkv, some_in_16_bits.model.layers[0].self_attn
    with torch.no_grad():
        for found, module in zip(qkv(x), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            assert torch.allclose(found, module(x), atol=1e-5)


def test_8_bit_drawing_rounds_what_is_nf4_alone(some_in_16_bits):
    engine = NativeEngine(some_in_16_bits, Letters(), batch_size=4)
    assert tuning.choose(engine.decoder, "fp8").startswith("drawing: fp8")
    attention, x = some_in_16_bits.model.layers[0].self_attn, torch.randn(3, 32)
    linear = engine.decoder.layers[0].linears
    with linear.groups[0].shared.draws(), torch.no_grad():
        q, k, _ = linear.qkv(x)
        assert torch.allclose(k, attention.k_proj(x), atol=1e-5) and not torch.allclose(
            q, attention.q_proj(x), atol=1e-3
        )


@pytest.mark.parametrize("wrong", [False, True])
def test_weights_that_are_not_bitsandbytes_own_to_the_bit_are_not_used(card, monkeypatch, wrong):  # noqa: F811
    monkeypatch.setattr(tuning, "copy_layers", lambda *a: 0)
    monkeypatch.setattr(tuning, "right_weights", right_weights)
    monkeypatch.setattr(tuning, "bitsandbytes_weight", lambda module: module.weight.data)
    monkeypatch.setattr(nf4, "dequantise", lambda module, out: read(module, out, wrong))
    made = decoder()
    said = tuning.choose(made, "auto")
    assert ("own dequantisation differs from bitsandbytes' on this card" in said) == wrong and "\n" not in said
    assert all((group.nf4 is None) == wrong for group in groups_of(made))
    assert (groups_of(made)[0].shared.choose(1) == "module") == wrong


def read(module, out, wrong):
    """The last group of the first layer has one element too large by one step of the type."""
    out.copy_(module.weight.data)
    if wrong and module.in_features == 48:
        out[-1, -1] = torch.nextafter(out[-1, -1], torch.tensor(9.0))
    return out


# -- adapters


def test_new_weights_under_an_old_name_are_another_adapter():
    """Training goes on without `release`: prefixes that were saved before are of the old weights."""
    model = tuned(ADAPTERS["v and down"])
    native, oracle = NativeEngine(model, Letters(), batch_size=4), ReferenceEngine(model, Letters())
    before = totals(native)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-2.0)
    after = totals(native)
    assert after == pytest.approx(totals(oracle), abs=1e-3)
    assert after != pytest.approx(before, abs=1e-2)


def test_an_adapter_that_comes_back_finds_its_factors_where_they_were():
    model = tuned(ADAPTERS["v and down"])
    module = adapters.tuned_module(model)
    layer = model.get_base_model().model.layers[1]
    groups = [linears.Group([layer.mlp.down_proj]), linears.Group([layer.self_attn.v_proj])]
    attached = adapters.AttachedAdapter(module, torch.float32)
    on = adapters.adapter_signature(module)
    assert attached.follow(on, groups) == []
    first = [group.lora for group in groups]
    assert attached.follow((), groups) == [] and attached.follow(on, groups) == []
    assert all(group.lora is lora for group, lora in zip(groups, first, strict=True))
    assert attached.follow(("another",), groups) == [] and attached.follow(("a fourth",), groups) == [()]
    assert list(attached.kept) == [on, ("another",), ("a fourth",)]


def test_graphs_are_kept_for_each_adapter_and_go_with_its_factors(monkeypatch):
    attached = SimpleNamespace(signature=())
    engine = SimpleNamespace(stats=SimpleNamespace(batch_size=4), groups=[], rules=Rules(), attached=attached)
    graphs, captured = Graphs(engine), []

    def capture(bucket):
        captured.append(attached.signature)
        return SimpleNamespace(replay=lambda: None), len(captured)

    monkeypatch.setattr(graphs, "_capture", capture)
    for attached.signature in ((), ("on",), (), ("on",)):
        graphs.run(4)
    assert captured == [(), ("on",)]
    graphs.forget([("on",)])
    for attached.signature in ((), ("on",)):
        graphs.run(4)
    assert captured == [(), ("on",), ("on",)]


@pytest.mark.parametrize("times", [0, 1, 2])
def test_memory_that_runs_out_over_the_factors_is_given_back_once_then_named(times):
    failures, said = [torch.OutOfMemoryError("injected")] * times, []

    def follow(signature, groups):
        if failures:
            raise failures.pop()
        return ["gone"]

    attached = SimpleNamespace(follow=follow, forget=lambda: said.append("forget"), tuned=None, signature=("on",))
    graphs = SimpleNamespace(forget=said.append)
    engine = SimpleNamespace(
        gpu=True, attached=attached, groups=[], graphs=graphs, memory_ran_out=lambda: said.append("freed")
    )
    if times == 2:
        with pytest.raises(CaiError, match="out of memory for the adapter's factors"):
            prefixes.follow_adapter(engine)
    else:
        prefixes.follow_adapter(engine)
        assert said == (["forget", "freed"] if times else []) + [["gone"]]


def test_the_cache_leaves_room_for_what_comes_later(monkeypatch):
    shape = KVShape(layers=4, kv_heads=2, dim=64, dtype=torch.bfloat16)
    monkeypatch.setattr(cache, "reserve_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(cache, "free_gpu_bytes", lambda device: 9 << 30)
    block = shape.bytes_per_token * cache.GPU_BLOCK_TOKENS
    assert cache.gpu_blocks(shape, "cuda", 1 << 40) == (8 << 30) // block
    assert cache.gpu_blocks(shape, "cuda", 1 << 40, 1 << 29) == ((8 << 30) - (1 << 29)) // block
    assert cache.gpu_blocks(shape, "cuda", 1 << 40, 8 << 30) == (7 << 30) // block  # an eighth at most
    assert cache.gpu_blocks(shape, "cuda", 4096, 1 << 29) == 4096 // cache.GPU_BLOCK_TOKENS


def test_the_engine_counts_the_factors_of_its_adapters():
    plain, model = tiny("llama"), tuned(ADAPTERS["v and down"])
    factors = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert factors and NativeEngine(model, Letters()).beside == NativeEngine(plain, Letters()).beside + 4 * factors


def test_the_store_has_room_for_a_stage_and_less_on_a_small_card(monkeypatch):
    shape = KVShape(layers=4, kv_heads=2, dim=64, dtype=torch.bfloat16)
    monkeypatch.setattr(prefixes, "reserve_bytes", lambda device: 0)
    monkeypatch.setattr(prefixes, "PrefixStore", lambda shape, tokens, device: tokens)
    for free_tokens, expected in ((1 << 20, prefixes.SAVED_TOKENS), (8 * 3000, 3000), (8 * 100, 1024), (-5, 1024)):
        free = free_tokens * shape.bytes_per_token
        monkeypatch.setattr(prefixes, "free_gpu_bytes", lambda device, free=free: free)
        assert prefixes.new_store(shape, torch.device("cuda"), 4096) == expected
    assert prefixes.new_store(shape, torch.device("cuda"), 64) == 64  # a context shorter than that
