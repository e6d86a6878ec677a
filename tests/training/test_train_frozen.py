"""Frozen 4-bit weights in training: the packed pass over NF4 modules, and who dequantises them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def quantise(model, but=""):
    """Projections but that of one name in NF4 with double quantisation, as a 4-bit load has them, on a CPU."""
    import bitsandbytes as bnb

    for layer in model.hf.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if name == but or not isinstance(linear, torch.nn.Linear):
                    continue
                made = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
                )
                made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                made.bias = linear.bias
                setattr(parent, name, made.to("cpu"))
    return model


@pytest.fixture(scope="module", params=["qwen2", "llama", "qwen3", "mistral"])
def tiny(request):
    """Four-bit, an adapter that does something, and biases that are not zero where the family has them."""
    model = TinyModel(kind=request.param)
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
    quantise(model).to_lora(LORA)
    return awake(model)


def four_bit(tiny):
    return tiny.hf.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer()


def rows_of(tiny, count=2):
    return tokenize_pairs(make_pairs(count), FakePrompt(), format="base", tokenizer=tiny.tokenizer, max_length=400).rows


def run(tiny, batch, forward):
    tiny.hf.zero_grad()
    sums_2B, _ = sequence_logps(tiny.hf, batch, forward)
    (sums_2B[0] - 2 * sums_2B[1]).sum().backward()
    return sums_2B.detach(), {n: p.grad.clone() for n, p in adapter.lora_parameters(tiny.hf)}


def alike(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-4)
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_packed_pass_over_4_bit_weights_is_the_modules_own(tiny, pairs):
    """No library but bitsandbytes reads them: a model that Unsloth did not load trains packed, too."""
    assert refusal(tiny.hf) is None
    assert four_bit(tiny).weight.quant_state is not None
    rows = rows_of(tiny, pairs)
    expected, forward = run(tiny, padded_batch(rows, 0), padded_forward), PackedForward()
    found = run(tiny, packed_batch(rows), forward)
    alike(found, expected)
    forward.checkpoint_layers = 1
    again = run(tiny, packed_batch(rows), forward)
    assert torch.equal(again[0], found[0]) and all(torch.equal(again[1][n], g) for n, g in found[1].items())


def test_with_the_adapter_off_it_is_the_base_model(tiny):
    rows = rows_of(tiny)
    with torch.no_grad():
        on, _ = sequence_logps(tiny.hf, packed_batch(rows), PackedForward())
        with tiny.hf.disable_adapter():
            off, _ = sequence_logps(tiny.hf, packed_batch(rows), PackedForward())
            stock, _ = sequence_logps(tiny.hf, padded_batch(rows, 0), padded_forward)
    torch.testing.assert_close(off, stock, rtol=1e-6, atol=1e-4)
    assert (on - off).abs().max() > 0.1


def test_a_changed_adapter_is_seen_by_the_next_pass(tiny):
    """Copies of the factors are made anew."""
    rows, forward = rows_of(tiny), PackedForward()
    kept = {name: p.detach().clone() for name, p in adapter.lora_parameters(tiny.hf)}
    run(tiny, packed_batch(rows), forward)
    try:
        with torch.no_grad():
            for _, parameter in adapter.lora_parameters(tiny.hf):
                parameter.mul_(1.5)
        alike(run(tiny, packed_batch(rows), forward), run(tiny, padded_batch(rows, 0), padded_forward))
    finally:
        for name, parameter in adapter.lora_parameters(tiny.hf):
            parameter.data.copy_(kept[name])


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
    for stride in (0, 0, 64):
        out = torch.empty(expected.shape[0], expected.shape[1] + stride)[:, : expected.shape[1]]
        assert torch.equal(weights.write(base, out), expected)
    assert weights.own is not wrong
    assert len(calls) == (1 if wrong else 5)  # the comparison of both layouts, and each use behind it


INTERPRETED = """
import sys
import torch
from support.training import LORA, TinyModel, awake
from training.test_train_frozen import alike, quantise, rows_of, run
from cai.training import kernels
from cai.training.attention import packed_batch
from cai.training.loss import padded_batch, padded_forward
from cai.training.packed import PackedForward
kernels.FORCE_TRITON = True
tiny = TinyModel(kind=sys.argv[1])
quantise(tiny, *sys.argv[2:]).to_lora(LORA)
awake(tiny)
rows = rows_of(tiny, 1)
alike(run(tiny, packed_batch(rows), PackedForward()), run(tiny, padded_batch(rows, 0), padded_forward))
print("equal")
"""


@pytest.mark.parametrize("case", [("qwen2",), ("qwen3", "up_proj")])
def test_the_triton_kernels_in_their_places_are_the_modules_own_in_the_interpreter(case):
    """Every stride of a folded pass as a GPU has it; a 16-bit linear beside a 4-bit one of the same input, too."""
    pytest.importorskip("triton")
    tests = Path(__file__).parents[1]
    where = f"{tests.parent}{os.pathsep}{tests}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": where, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, *case], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]
