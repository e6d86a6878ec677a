"""One run on two GPUs: a kill in generation, a kill in training, the end on one GPU; and that all hold one model.

torchrun and two CUDA GPUs: pytest -m gpu tests/gpu/test_ranks_gpu.py -s; speeds: bench/ranks_gpu.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import ROOT, read_jsonl

sys.path.insert(0, str(Path(__file__).parent))
from test_runs_gpu import small_model

pytestmark = pytest.mark.gpu
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module", autouse=True)
def two_gpus():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


def start(root, *words, processes=2, device=None):
    log = (root / "log").open("ab")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    program = [sys.executable, *(TORCHRUN if processes > 1 else []), "runner.py", "cai.toml", *words]
    return subprocess.Popen(program, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def workers(launcher):
    """Process ids of torchrun's children, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                variables = dict(v.partition("=")[::2] for v in (entry / "environ").read_text().split("\0"))
                found[int(variables["RANK"])] = int(entry.name)
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return found


def wait_for(run_is_there, what, child, seconds=240):
    """Until `what(run)` holds; the child must not end before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert child.poll() is None, f"ended with {child.returncode} before it was killed"
        run = run_is_there()
        if run and what(run):
            return run
        time.sleep(0.02)
    raise AssertionError("it did not come that far")


def events(run, kind):
    path = run / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [e for e in map(json.loads, lines) if e["kind"] == kind]


def test_killed_twice_on_two_gpus_an_m1_ends_on_one_with_nothing_lost(tmp_path):
    runs = tmp_path / "runs"
    sets = small_model() | {"runs": str(runs), "dpo.save_steps": 2, "evaluation.critic_items": 4}
    keys = [word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    def latest():
        return (runs / "latest").resolve() if (runs / "latest").exists() else None

    first = start(tmp_path, "--milestone", "m1", *keys, "--override-gate", "a small model on a GPU")
    run = wait_for(latest, lambda r: any(e["stage"] == "answers" for e in events(r, "stage")), first)
    os.kill(workers(first)[1], signal.SIGKILL)
    began = time.monotonic()
    assert first.wait(60) != 0
    print(f"one of two killed: the other ended {time.monotonic() - began:.1f} s later")
    answered = (run / "records.jsonl").read_bytes()
    again = [
        "--resume",
        str(run),
        "--set",
        f"runs={json.dumps(str(runs))}",
        "--override-gate",
        "a small model on a GPU",
    ]
    second = start(tmp_path, *again)
    wait_for(latest, lambda r: any(e["step"] >= 5 for e in events(r, "train_step")), second)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait(60)
    generated = (run / "records.jsonl").read_bytes()
    assert generated.startswith(answered)
    third = start(tmp_path, *again, processes=1, device="0")
    code = third.wait(300)
    print((tmp_path / "log").read_text()[-4000:])
    assert code == 0
    assert (run / "records.jsonl").read_bytes().startswith(generated)
    result = json.loads((run / "train" / "result.json").read_text())
    assert abs(result["first_loss"] - 0.693147) < 1e-3 and len(read_jsonl(run / "dataset" / "examples.jsonl")) == 10
    assert (run / "adapter" / "adapter_model.safetensors").is_file() and (run / "report.html").is_file()
    verified = subprocess.run(
        [sys.executable, "runner.py", "--verify", str(run)], cwd=ROOT, capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stdout[-2000:]


def test_gradients_and_trained_tensors_are_equal_on_both_and_the_losses_are_one_process_s(tmp_path):
    from cai.models import embedded

    bench = ["bench/ranks_gpu.py", str(embedded.folder()), "--to", str(tmp_path), "--leg"]
    small = ["--steps", "4", "--pairs", "8", "--tokens", "500"]
    found = []
    for processes in (1, 2):
        program = [sys.executable, *(TORCHRUN if processes > 1 else []), *bench, *small]
        one = {} if processes > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **one})
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / f"dpo-{processes}.json").read_text()))
    one, two = found
    assert two["equal"] and two["hashed"] == 4
    assert one["losses"][0] == pytest.approx(0.693147, abs=1e-3) and two["losses"][0] == pytest.approx(
        0.693147, abs=1e-3
    )
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-2)
