"""Further DPO seeds from one data set: their own adapters, the first one untouched, nothing trained twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import read_jsonl

from cai import errors

Runner = Callable[..., tuple[int, Path]]


@pytest.mark.runs
def test_every_seed_has_its_adapter_and_the_first_is_the_runs_own(run_fake: Runner) -> None:
    _, plain = run_fake("--milestone", "m0")
    code, run = run_fake("--milestone", "m0", "--set", "dpo.seeds=[0, 1, 2]")
    assert code == errors.DONE
    weights = {
        name: (run / name / "adapter_model.safetensors").read_bytes()
        for name in ("adapter", "adapter-seed-1", "adapter-seed-2")
    }
    assert len(set(weights.values())) == 3
    assert weights["adapter"] == (plain / "adapter/adapter_model.safetensors").read_bytes()
    figures = json.loads((run / "eval/seeds.json").read_text())["figures"]
    assert {"dpo.last_loss.seed_1", "dpo.last_loss.seed_2"} <= set(figures)
    steps = len([row for row in read_jsonl(run / "events.jsonl") if row["kind"] == "train_step"])
    code, _ = run_fake("--resume", "runs/latest", fake=())
    assert code == errors.DONE
    assert len([row for row in read_jsonl(run / "events.jsonl") if row["kind"] == "train_step"]) == steps
