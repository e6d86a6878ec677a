"""Training on a CUDA GPU: 4-bit weights, bf16 compute, fp32 LoRA; the packed pass against the model's own modules."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random NF4 model (1024 wide, 8 layers) through the pipeline's own loader, in LoRA mode."""
    if not torch.cuda.is_available():
        pytest.fail("the gpu tier needs a CUDA GPU")
    sys.path.insert(0, str(ROOT / "bench"))
    import make_model

    from cai.models.policy import load
    from cai.recipe.settings import LoraSection, ModelSection

    folder = tmp_path_factory.mktemp("model") / "small"
    tokenizer = ROOT / ".whl" / "tokenizer"
    make_model.write(make_model.SHAPES["small"], folder, tokenizer=tokenizer if tokenizer.is_dir() else None)
    loaded = load(ModelSection(name=str(folder), format="base"), "cuda")
    loaded.to_lora(LoraSection(), 3)
    return loaded


def rows(count=4):
    sys.path.insert(0, str(ROOT / "bench"))
    import dpo

    return dpo.make_rows(count, 300, 40)


def test_kernels_equal_their_definitions_on_the_gpu():
    from cai.training import kernels as k

    torch.manual_seed(0)
    x, g, r = (torch.randn(37, 5120, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    w = torch.rand(5120, device="cuda", dtype=torch.bfloat16) + 0.5
    heads, angles = torch.randn(37, 42, 128, device="cuda", dtype=torch.bfloat16)[:, :40], torch.randn(37, 64).cuda()

    def values():
        found = [
            k.rms_norm(x, w, 1e-5),
            k.rms_norm_backward(g, x, w, 1e-5, r),
            k.rms_norm_backward(g, x, w, 1e-5, None),
        ]
        dg, du = torch.empty_like(x), torch.empty_like(x)
        found += [k.swiglu(x, g), k.swiglu_backward(r, x, g, dg, du), dg, du]
        found.append(k.rotate(heads, angles.cos(), angles.sin()))
        found += k.softmax_rows(x.float(), torch.arange(37, device="cuda"), torch.bfloat16)
        room = torch.empty(37, 2 * 5120 + 64, device="cuda", dtype=torch.bfloat16)
        places = room[:, :5120], room[:, 5120:-64]
        found += [k.swiglu_backward(r, x, g, *places), *places]
        return [*found, k.rotate(heads, angles.cos(), angles.sin(), inverse=True)]

    fused = values()
    was, k.triton = k.triton, None
    try:
        for a, b in zip(fused, values(), strict=True):
            torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-2)
    finally:
        k.triton = was


def test_packed_equals_the_models_own_modules(model):
    """Log-probability sums to 0.1% and gradients to 5% in bf16, the rounding of two orders of the same sums."""
    from cai.training import adapter
    from cai.training.attention import packed_batch
    from cai.training.forward import layout_for, set_checkpointing
    from cai.training.loss import padded_batch, padded_forward, sequence_logps
    from cai.training.packed import PackedForward, refusal
    from cai.training.scoring import to_device

    assert refusal(model.hf) is None
    adapter.reset(model.hf, 1)
    generator = torch.Generator("cuda").manual_seed(1)
    for name, parameter in adapter.lora_parameters(model.hf):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    model.mode("train")
    set_checkpointing(model.hf, layout_for(model), False)
    results = []
    for batch, forward in ((padded_batch(rows(), 0), padded_forward), (packed_batch(rows()), PackedForward())):
        model.hf.zero_grad()
        sums_2B, _ = sequence_logps(model.hf, to_device(batch, "cuda"), forward)
        (sums_2B[0] - sums_2B[1]).sum().backward()
        grads = torch.cat([p.grad.flatten() for _, p in adapter.lora_parameters(model.hf)])
        results.append((sums_2B.detach(), grads.clone()))
    (a, ga), (b, gb) = results
    print("sums", a.flatten()[:3].tolist(), b.flatten()[:3].tolist(), "gradient", ((ga - gb).norm() / ga.norm()).item())
    assert ((a - b).abs() / a.abs()).max() < 1e-3
    assert (ga - gb).norm() < 0.05 * ga.norm()


def test_training_starts_at_log_two_in_fp32_and_resumes(model, tmp_path):
    from cai.recipe.settings import DpoSection, LoraSection
    from cai.training import adapter
    from cai.training.job import Job

    dpo = DpoSection(max_steps=3, batch_size=2, gradient_accumulation=1, save_steps=1, learning_rate=1e-4)
    events = []
    stop_after = [1]  # asked for while step 2 runs

    def event(kind, **fields):
        events.append({"kind": kind, **fields})

    def stopped():
        return sum(e["kind"] == "train_step" for e in events) >= stop_after[0]

    from cai.errors import Stopped

    with pytest.raises(Stopped):
        Job(model, rows(), LoraSection(), dpo, tmp_path, 5, event, stopped, lambda *_: None).run()
    stop_after[0] = 99
    trainer, shape, resumed = Job(model, rows(), LoraSection(), dpo, tmp_path, 5, event, stopped, lambda *_: None).run()
    assert resumed == 2 and trainer.state.global_step == 3 and not shape.checkpointing
    first = next(e for e in events if e["kind"] == "first_loss")
    assert abs(first["loss"] - 0.6931472) < 1e-6  # the same kernels: exact
    assert next(e["name"] for e in events if e["kind"] == "layout") == "packed"
    adapter.require_fp32(model.hf)
    adapter.require_sound(model.hf)
    assert json.loads((tmp_path / "checkpoint-3" / "COMPLETE.json").read_text())["step"] == 3


def test_the_heads_logits_are_the_fp32_accumulators():
    """Rounded to bf16 logits near 30 are 0.125 apart; the product's accumulators keep what fp32 can hold."""
    from cai.engine.generate import logits_fp32, mm_gives_fp32
    from cai.training.loss import TokenLogps

    generator = torch.Generator("cuda").manual_seed(0)
    hidden = (torch.randn(64, 512, generator=generator, device="cuda") * 2).bfloat16()
    weight = (torch.randn(1000, 512, generator=generator, device="cuda") * 0.5).bfloat16()
    assert mm_gives_fp32(torch.bfloat16)
    exact = hidden.double() @ weight.double().T
    assert (logits_fp32(hidden, weight, None) - exact).abs().max() < 1e-3
    assert ((hidden @ weight.T) - exact).abs().max() > 0.02
    target = torch.arange(64, device="cuda")
    expected = torch.log_softmax(exact, -1).gather(1, target[:, None]).squeeze(1)
    assert (TokenLogps.apply(hidden, weight, None, target, 16) - expected).abs().max() < 1e-3
