"""A guard of 8B shapes beside the policy of 32B shapes on a card of 80 GB: placement, memory, and the policy's texts.

pytest -m gpu tests/gpu/test_guard_gpu.py -s           CAI_GPU_SHAPE=7b for a smaller card
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.guards import QWEN_GEN
from support.runs import ROOT

from cai.engine import Request, Sampling, never
from cai.models import auxiliary
from cai.models import policy as model
from cai.models.guard import Exchange, make_guard
from cai.recipe.settings import EngineSection, ModelSection
from cai.recipe.settings_benchmarks import GuardSection

pytestmark = pytest.mark.gpu
CARD = 80e9
EXCHANGES = [Exchange(f"Tell me about the number {i}.", "It is a number. " * (1 + i % 60)) for i in range(128)]


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.fail("the gpu tier needs a CUDA GPU")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
    yield torch
    torch.cuda.set_per_process_memory_fraction(1.0)


def weights(variable, shape, quantization, folder):
    """The folder that the environment names, else random weights of the shape."""
    sys.path.insert(0, str(ROOT / "bench"))
    import make_model

    path = Path(os.environ.get(variable, folder / f"random-{shape}"))
    if not path.is_dir():
        make_model.write(make_model.SHAPES[shape], path, quantization=quantization)
        if variable == "CAI_RANDOM_GUARD":  # its tokenizer is a small model's: give it a guard's template
            (path / "chat_template.jinja").write_text(QWEN_GEN)
    return str(path)


def texts(policy, section):
    """Greedy draws of 64 rows; the engine's caches and graphs exist afterwards."""
    engine = policy.engine(section)
    for i in range(64):
        engine.submit(Request(i, tuple(range(1000 + i, 1200 + i)), Sampling(0.0, 12), seed=i))
    return {done.id: done.token_ids for done in engine.completions()}


def test_a_guard_of_8b_beside_the_policy_stays_below_80_gb(torch, tmp_path):
    name = weights("CAI_RANDOM_MODEL", os.environ.get("CAI_GPU_SHAPE", "32b"), "nf4", tmp_path)
    guard_name = weights("CAI_RANDOM_GUARD", "8b", "bf16", tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    section, events = EngineSection(max_gpu_gb=CARD / 1e9), []
    policy = model.load(ModelSection(name=name), "cuda", say=print)
    policy.mode("generate")
    before = texts(policy, section)
    held = SimpleNamespace(model=policy)
    context = SimpleNamespace(
        model=held,
        recipe=SimpleNamespace(engine=section),
        run=SimpleNamespace(event=lambda kind, **facts: events.append((kind, facts)), events=lambda kind: []),
        stopped=never,
    )
    with auxiliary.loaded(context, guard_name, "guard.model") as loaded:
        both = torch.cuda.memory_allocated()
        guard = make_guard(loaded, GuardSection(model=guard_name, style="qwen3guard"))
        said = guard.judge(EXCHANGES, context)
    assert held.model is policy and events == [("auxiliary_loaded", {**loaded.facts, "placement": "beside"})]
    assert all(j.unsafe is not None and 0.0 <= j.unsafe <= 1.0 for j in said)
    del loaded, guard
    torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated()
    peak = torch.cuda.max_memory_reserved()
    figures = {"both loaded": both, "guard gone": after, "highest reserved": peak}
    print({key: f"{value / 1e9:.1f} GB" for key, value in figures.items()}, policy.facts["weights_gib"])
    assert peak < CARD
    assert both > 16e9 + policy.facts["weights_gib"] * 2**30  # both were really there
    assert after < both - 15e9  # and the guard is gone
    again = texts(policy, section)
    assert sum(again[i] == before[i] for i in before) >= 60  # bf16 may round one near tie another way
