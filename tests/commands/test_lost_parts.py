"""Parts of a run that are gone, or stand in another kind's place: told, and never a better verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import orjson
import pytest

from cai import errors
from cai.commands.verify import verify
from cai.errors import CaiError
from cai.evaluate.benchmarks import plans

Runner = Callable[..., tuple[int, Path]]
pytestmark = pytest.mark.runs
GUARDED = (
    "--milestone", "m1", "--override-gate", "tried",
    *(t for s in ("items=4", "guard.enabled=true", 'guard.model="stand-in"', "checks.kappa=0.3",
                  "checks.sensitivity=0.3",
                  "evaluation.critic_items=0", "principles.choice=uniform", "critiques.found=drawn",
                  "critiques.no_issue=revise", "pairs.label=always") for t in ("--set", s)),
)  # fmt: skip


def failures(run: Path) -> list[str]:
    return [check.found for check in verify(run) if check.verdict == "FAIL"]


@pytest.mark.parametrize("left", [22, 0])
def test_a_guard_s_check_that_lost_rows_is_made_again_and_proves_nothing_by_the_rest(
    left: int, run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake(*GUARDED)
    log, made = run / "eval" / "checks" / "guard.jsonl", run / "eval" / "checks.json"
    before = made.read_bytes()
    rows = log.read_bytes().splitlines(keepends=True)
    assert len(rows) == 41 and orjson.loads(before)["checks"]["guard"]["proven"] is False
    log.write_bytes(b"".join(rows[:left]))
    if not left:
        log.unlink()
        log.with_suffix(".sum").unlink()
    capsys.readouterr()
    code, _ = run_fake("--resume", run.name, fake=())
    assert (code, made.read_bytes(), len(log.read_bytes().splitlines())) == (0, before, 41)
    assert "n=40" in (said := capsys.readouterr().out) and ", proven" not in said
    assert failures(run) == []


def test_a_log_that_was_emptied_with_its_sums_gone_is_damage(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m0")
    for name in ("eval/scores.jsonl", "eval/critic.jsonl"):
        path = run / name
        if not path.is_file():
            continue
        kept, sums = path.read_bytes(), path.with_suffix(".sum").read_bytes()
        path.write_bytes(b"")
        path.with_suffix(".sum").unlink()
        assert [found for found in failures(run) if path.name in found and "are missing" in found], name
        path.write_bytes(kept)
        path.with_suffix(".sum").write_bytes(sums)
    assert failures(run) == []


@pytest.mark.parametrize("name", ["train", "dataset", "eval"])
def test_a_file_in_a_folder_s_place_is_one_line(
    name: str, run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake("--milestone", "m0")
    (run / name).rename(run.parent / "aside")
    (run / name).write_bytes(b"")
    capsys.readouterr()
    code, _ = run_fake("--resume", run.name, fake=())
    told = capsys.readouterr().err
    assert "Traceback" not in told and "bug in the program" not in told
    assert code in (0, errors.CORRUPT, errors.IO) and (not code or len(told.strip().splitlines()) == 1), told


def test_no_run_is_made_inside_a_run(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    import runner

    _, run = run_fake("--milestone", "m0")
    there = sorted(path.name for path in run.iterdir())
    for inside in (run, run / "dataset"):
        code = runner.main(["cai.toml", "--set", f"runs={json.dumps(str(inside))}", "--milestone", "m0", "--dry-run"])
        told = capsys.readouterr().err
        assert code == errors.USAGE and f"lies inside the run {run.name}" in told
    assert sorted(path.name for path in run.iterdir()) == there


def test_no_benchmark_asks_an_arm_s_adapter_that_is_not_the_trained_one(
    run_fake: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_result` reads the adapter's bytes (tests/training); the fake model's results hold no sums."""
    _, run = run_fake("--milestone", "m0", "--set", "sft.enabled=true", "--override-gate", "tried")
    place = Fake(adapter=run / "adapter", sft_adapter=run / "adapter-sft", sft_train=run / "train" / "sft", path=run)
    parts = Fake(sft=Fake(enabled=True), dpo=Fake(also_from_base=False), benchmarks=Fake(prompted=[]))
    context: Any = Fake(run=place, recipe=parts)
    assert [policy.name for policy in plans.policies(context)] == ["", "sft"]
    monkeypatch.setattr(plans, "load_result", lambda folder: None)
    with pytest.raises(CaiError, match="adapter-sft: is not the adapter that was trained") as told:
        plans.policies(context)
    assert told.value.code == errors.CORRUPT
