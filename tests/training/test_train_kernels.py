"""The packed forward pass and its kernels against their definitions: stock modules, autograd, Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.training import LORA, FakePrompt, TinyModel, awake, make_pairs

from cai.training import adapter, attention, kernels
from cai.training.attention import packed_batch
from cai.training.loss import TokenLogps, padded_batch, padded_forward, sequence_logps
from cai.training.packed import PackedForward, refusal
from cai.training.token_rows import tokenize_pairs

pytestmark = pytest.mark.slow
WEIGHTS = (1.0, -2.0, 0.5)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "llama3", "yarn", "linear"])
def tiny(request):
    """A tiny model whose adapter does something: B is not zero."""
    model = TinyModel(kind=request.param)
    model.to_lora(LORA)
    return awake(model)


def rows_of(model, count=3):
    return tokenize_pairs(
        make_pairs(count), FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=400
    ).rows


def test_the_packed_pass_serves_every_one_of_them(tiny):
    assert refusal(tiny.hf) is None


def test_a_rotary_embedding_that_hangs_on_the_length_is_refused():
    model = TinyModel()
    model.hf.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in refusal(model.hf)


def run(model, batch, forward):
    model.hf.zero_grad()
    sums_2B, _ = sequence_logps(model.hf, batch, forward)
    ((sums_2B[0] - sums_2B[1]) * torch.tensor(WEIGHTS)).sum().backward()
    return sums_2B.detach(), {name: p.grad.clone() for name, p in adapter.lora_parameters(model.hf)}


def test_packed_equals_padded_in_values_and_gradients(tiny):
    rows = rows_of(tiny)
    sums, grads = run(tiny, padded_batch(rows, 0), padded_forward)
    packed_sums, packed_grads = run(tiny, packed_batch(rows), PackedForward())
    torch.testing.assert_close(packed_sums, sums, rtol=1e-6, atol=1e-4)
    for name, grad in grads.items():
        assert (packed_grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_recomputed_layers_give_the_same_bits(tiny):
    rows = rows_of(tiny)
    sums, grads = run(tiny, packed_batch(rows), PackedForward())
    recompute = PackedForward()
    recompute.checkpoint_layers = 2
    again, again_grads = run(tiny, packed_batch(rows), recompute)
    assert torch.equal(sums, again)
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)


def test_adapter_off_is_the_base_model(tiny):
    rows = rows_of(tiny)
    with tiny.hf.disable_adapter(), torch.no_grad():
        off, _ = sequence_logps(tiny.hf, packed_batch(rows), PackedForward())
        stock, _ = sequence_logps(tiny.hf, padded_batch(rows, 0), padded_forward)
    torch.testing.assert_close(off, stock, rtol=1e-6, atol=1e-4)
    with torch.no_grad():
        on, _ = sequence_logps(tiny.hf, packed_batch(rows), PackedForward())
    assert (on - off).abs().max() > 0.1


def test_another_adapter_under_the_same_model_is_the_one_that_is_computed_with():
    model, forward = TinyModel(), PackedForward()
    for rank in (4, 6):
        model.to_lora(LORA.model_copy(update={"rank": rank}))
        awake(model)
        rows = rows_of(model, 1)
        with torch.no_grad():
            found, _ = sequence_logps(model.hf, packed_batch(rows), forward)
            stock, _ = sequence_logps(model.hf, padded_batch(rows, 0), padded_forward)
        torch.testing.assert_close(found, stock, rtol=1e-6, atol=1e-4)


def test_a_model_of_another_shape_is_refused(tiny):
    config = tiny.hf.get_base_model().config
    was = config.model_type
    config.model_type = "gemma2"
    try:
        assert refusal(tiny.hf) == "model type gemma2"
    finally:
        config.model_type = was
    assert refusal(tiny.hf) is None


def test_head_in_chunks_equals_log_softmax_in_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (37, 101))
    target, scale = torch.randint(0, 101, (37,), generator=generator), torch.randn(37, generator=generator)
    hidden.requires_grad_(True)
    expected = torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None]).squeeze(1)
    (expected * scale).sum().backward()
    grad, hidden.grad = hidden.grad, None
    found = TokenLogps.apply(hidden, weight, None, target, 8)
    (found * scale).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, grad, rtol=1e-5, atol=1e-5)


def autograd_of(function, *inputs, grad):
    inputs = [t.clone().requires_grad_(True) for t in inputs]
    out = function(*inputs)
    out.backward(grad)
    return out.detach(), [t.grad for t in inputs]


def test_backward_formulas_equal_autograd():
    torch.manual_seed(0)
    x, weight, grad, residual = torch.randn(5, 24), torch.rand(24) + 0.5, torch.randn(5, 24), torch.randn(5, 24)
    _, (dx,) = autograd_of(lambda t: kernels.rms_norm(t, weight, 1e-5), x, grad=grad)
    torch.testing.assert_close(kernels.rms_norm_backward(grad, x, weight, 1e-5, residual), dx + residual)
    g, u, dm = torch.randn(5, 24), torch.randn(5, 24), torch.randn(5, 24)
    m, (dg, du) = autograd_of(lambda a, b: torch.nn.functional.silu(a) * b, g, u, grad=dm)
    places = torch.empty_like(g), torch.empty_like(u)
    for found, expected in zip((kernels.swiglu_backward(dm, g, u, *places), *places), (m, dg, du), strict=True):
        torch.testing.assert_close(found, expected)
    heads = torch.randn(5, 3, 8)
    angles = torch.randn(5, 4)
    turned = kernels.rotate(heads, angles.cos(), angles.sin())
    torch.testing.assert_close(kernels.rotate(turned, angles.cos(), angles.sin(), inverse=True), heads)


INTERPRETED = """
import torch
from cai.training import kernels as k
torch.manual_seed(0)
x, w, g, r = torch.randn(5, 24), torch.rand(24) + 0.5, torch.randn(5, 24), torch.randn(5, 24)
heads, angles = torch.randn(5, 6, 8)[:, :5], torch.randn(5, 4)
def back(dm, g, u, room):
    dg, du = room[:, 24:48], room[:, :24]
    return [k.swiglu_backward(dm, g, u, dg, du), dg, du]
def values():
    room, gu = torch.full((5, 400), 7.0), torch.cat([x, g, r], 1)
    turned = room[:, 100:140].unflatten(1, (5, 8))
    return [k.rms_norm(x, w, 1e-5), k.rms_norm(x, w, 1e-5, room[:, 200:224]),
            k.rms_norm_backward(g, x, w, 1e-5, r), k.rms_norm_backward(g, x, w, 1e-5, None),
            k.swiglu(x, g), k.swiglu(gu[:, :24], gu[:, 24:48], room[:, 300:324]), *back(r, x, g, room),
            *back(r, gu[:, :24], gu[:, 24:48], torch.full((5, 64), 7.0)), k.rotate(heads, angles.cos(), angles.sin()),
            k.rotate(heads, angles.cos(), angles.sin(), turned, inverse=True), room,
            *softmax(torch.float32), softmax(None)[0]]
def softmax(dtype):
    logits = torch.cat([x * 9, torch.full((5, 2), -1e4)], 1)
    logits[0, 3] = 300.0
    return k.softmax_rows(logits, torch.tensor([3, 0, 7, 25, 11]), dtype)
expected = values()
k.FORCE_TRITON = True
for found, wanted in zip(values(), expected, strict=True):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
k.softmax_rows.__globals__["min"] = lambda *sizes: 8  # blocks, and a last one that is not full
for found, wanted in zip(values()[-3:], expected[-3:], strict=True):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
print("equal")
"""


def test_triton_kernels_equal_their_definitions_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_padded_batch_marks_exactly_the_completion_tokens(tiny):
    rows = rows_of(tiny, 2)
    batch = partial(padded_batch, pad_id=0)(rows)
    width = batch["input_ids_ST"].shape[1]
    completions = [*rows[0].chosen_ids, *rows[1].chosen_ids, *rows[0].rejected_ids, *rows[1].rejected_ids]
    assert batch["target_N"].tolist() == completions
    shifted = batch["input_ids_ST"].flatten()[batch["hidden_index_N"] + 1]
    assert shifted.tolist() == completions and int(batch["attention_mask_ST"].sum()) == sum(r.tokens for r in rows)
    assert width == max(len(r.prompt_ids) + max(len(r.chosen_ids), len(r.rejected_ids)) for r in rows)


@pytest.mark.parametrize("rejected", [True, False])
def test_the_gradient_of_keys_is_that_of_index_select(tiny, rejected):
    """Prompts' keys count twice, once a completion; a row may lack its rejected text."""
    rows = [row if rejected or i else replace(row, rejected_ids=()) for i, row in enumerate(rows_of(tiny, 3))]
    batch = packed_batch(rows)
    torch.manual_seed(0)
    k, v = (torch.randn(len(batch["ids_T"]), 2, 4, requires_grad=True) for _ in range(2))
    expected = [t.index_select(0, batch["key_index_M"]) for t in (k, v)]
    found = attention._Keys.apply(k, v, *(batch[n] for n in ("key_index_M", "first_T", "again_P", "second_P")))
    grads = [torch.randn_like(t) for t in expected]
    for a, b in zip(
        torch.autograd.grad(found, (k, v), grads), torch.autograd.grad(expected, (k, v), grads), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
