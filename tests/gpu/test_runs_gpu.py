"""Whole milestones on a CUDA GPU through the command line: real text from the embedded model, and the shapes of 32B.

pytest -m gpu tests/gpu/test_runs_gpu.py -s            CAI_GPU_SHAPE=7b for a smaller card
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from support.runs import ROOT, read_jsonl

pytestmark = pytest.mark.gpu
CAP_GIB = 80e9 / 2**30


@pytest.fixture(scope="module", autouse=True)
def gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.fail("the gpu tier needs a CUDA GPU")


def flat(table, prefix=""):
    """TOML tables as `a.b = value` pairs."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def run(root, milestone, sets, *more, program="runner.py"):
    """One run of runner.py; gives its folder, its output and the seconds from process start to report."""
    words = [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, program, "cai.toml", "--milestone", milestone, "--set", f'runs="{root}"', *words]
    began = time.monotonic()
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=560)
    seconds = time.monotonic() - began
    print(f"\n--- {milestone}, {seconds:.0f} s, exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-2500:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(os.path.realpath(root / "latest")), done.stdout, seconds


def small_model():
    """The recipe's settings for the embedded model, which here runs on the GPU under its own folder's name."""
    from cai.models import embedded

    recipe = tomllib.loads((ROOT / "cai.toml").read_text())["embedded"]
    recipe.pop("milestones")
    return dict(flat(recipe)) | {"model.name": str(embedded.folder()), "model.quantization": "bf16"}


def check_memory(path):
    """Every phase of the run stayed below an 80 GB card, and the weights were there once."""
    memory = json.loads((path / "manifest.json").read_text())["memory"]
    print(json.dumps(memory, indent=1))
    assert {"answers", "train", "preflight model"} <= set(memory)
    assert all(found.get("peak_gpu_gib", 0) < CAP_GIB for found in memory.values())
    loaded = next(e for e in read_jsonl(path / "events.jsonl") if e["kind"] == "model_loaded")
    assert max(f.get("peak_gpu_used_gib", 0) for f in memory.values()) > loaded["weights_gib"]
    return memory, loaded


@pytest.mark.parametrize("milestone", ["m0", "m1"])
def test_milestone_on_the_embedded_model(milestone, tmp_path):
    path, _, _ = run(tmp_path, milestone, small_model(), "--override-gate", "a small model on a GPU")
    pairs = read_jsonl(path / "dataset" / "examples.jsonl")
    print(json.dumps(pairs[:3], indent=1)[:5000])
    assert len(pairs) == {"m0": 1, "m1": 10}[milestone]
    result = json.loads((path / "train" / "result.json").read_text())
    assert abs(result["first_loss"] - 0.693147) < 1e-3
    assert (path / "report.html").is_file() and (path / "adapter" / "adapter_model.safetensors").is_file()
    check_memory(path)
    before = (path / "records.jsonl").read_bytes()
    again = [sys.executable, "runner.py", "cai.toml", "--resume", path.name, "--set", f'runs="{tmp_path}"']
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model:" not in done.stdout  # nothing left to do: nothing is loaded
    assert (path / "records.jsonl").read_bytes() == before


def test_m0_at_the_shapes_of_32b(tmp_path):
    """Process start to report < 5 min; no second copy of the weights in any phase."""
    import torch

    sys.path.insert(0, str(ROOT / "bench"))
    import make_model

    shape = os.environ.get("CAI_GPU_SHAPE", "32b")
    folder = Path(os.environ.get("CAI_RANDOM_MODEL", tmp_path / f"random-{shape}"))
    if not folder.is_dir():
        make_model.write(make_model.SHAPES[shape], folder)
        torch.cuda.empty_cache()
    sets = {"model.name": str(folder), "gates.m0": [], "engine.max_gpu_gb": 80.0}
    path, said, seconds = run(tmp_path, "m0", sets, program="bench/noise.py")
    assert "the recipe sets no gate for it" in said
    memory, loaded = check_memory(path)
    weights = loaded["weights_gib"]
    for phase in ("train", "preflight model"):
        assert memory[phase]["peak_gpu_used_gib"] < 2 * weights + 20, f"{phase}: a second copy of {weights} GiB?"
    assert seconds < 300
