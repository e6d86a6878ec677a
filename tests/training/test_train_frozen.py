"""Frozen 4-bit weights in training: the packed pass over NF4 modules, and who dequantises them."""

from __future__ import annotations

import pytest
import torch
from support.training import LORA, FakePrompt, TinyModel, awake, make_pairs

from cai.engine.native import nf4
from cai.training import adapter, frozen
from cai.training.attention import packed_batch
from cai.training.loss import padded_batch, padded_forward, sequence_logps
from cai.training.packed import PackedForward, refusal
from cai.training.token_rows import tokenize_pairs

pytestmark = pytest.mark.slow


def quantise(model):
    """Projections in NF4 with double quantisation, as a 4-bit load has them, on a CPU."""
    import bitsandbytes as bnb

    for layer in model.hf.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                made = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
                )
                made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                made.bias = linear.bias
                setattr(parent, name, made.to("cpu"))
    return model


@pytest.fixture(scope="module")
def tiny():
    model = TinyModel(kind="qwen2")
    quantise(model).to_lora(LORA)
    return awake(model)


def four_bit(tiny):
    return tiny.hf.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer()


def test_the_packed_pass_over_4_bit_weights_is_the_modules_own(tiny):
    """No library but bitsandbytes reads them: a model that Unsloth did not load trains packed, too."""
    assert refusal(tiny.hf) is None
    assert four_bit(tiny).weight.quant_state is not None
    rows = tokenize_pairs(make_pairs(2), FakePrompt(), format="base", tokenizer=tiny.tokenizer, max_length=400).rows
    found = []
    for batch, forward in ((padded_batch(rows, 0), padded_forward), (packed_batch(rows), PackedForward())):
        tiny.hf.zero_grad()
        sums_2B, _ = sequence_logps(tiny.hf, batch, forward)
        (sums_2B[0] - 2 * sums_2B[1]).sum().backward()
        found.append((sums_2B.detach(), {n: p.grad.clone() for n, p in adapter.lora_parameters(tiny.hf)}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-4)
    for name, grad in found[0][1].items():
        assert (found[1][1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("wrong", [False, True])
def test_an_own_kernel_that_gives_other_numbers_is_never_used(tiny, monkeypatch, wrong):
    base, calls = four_bit(tiny), []
    expected = frozen._by_bitsandbytes(base)

    def dequantise(weight, out):
        calls.append(tuple(weight.shape))
        return out.copy_(expected + wrong * 1e-7)

    monkeypatch.setattr(nf4, "dequantise", dequantise)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    weights = frozen.Frozen()
    for _ in range(3):
        assert torch.equal(weights.weight(base, torch.float32), expected)
    assert weights.own is not wrong
    assert len(calls) == (1 if wrong else 4)  # the comparison, and each use behind it
