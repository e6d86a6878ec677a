"""The dress rehearsal on the fake model: three kills, in pieces of time, resumed; and that faults are told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.benchmarks import FILES, write_files
from support.runs import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from rehearsal_facts import Leg, arms_of, losses, worn_faults

from cai import errors
from cai.evaluate.benchmarks.sources import OFFICIAL

SETS = (
    "model.backend=fake", "model.name=fake:slow", "benchmarks.checksum=false", "heldout.items=4",
    "engine.batch_size=4", "dpo.gradient_accumulation=1", "evaluation.neutral_passages=2", "evaluation.kl_passages=1",
    "evaluation.likelihood_items=2", "evaluation.judge_items=1", "evaluation.fresh_items=2", "evaluation.train_pairs=2",
    "evaluation.critic_items=4",
)  # fmt: skip


def rehearse(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    write_files(folder)
    for name, file in FILES.items():
        (folder / OFFICIAL[name].file).write_bytes((folder / file).read_bytes())
    sets = [word for key in SETS for word in ("--set", key)]
    command = [sys.executable, str(ROOT / "bench" / "rehearsal.py"), "--data", str(folder), "--run-dir", "out"]
    command += ["--items", "10", "--epochs", "150", *sets, *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)


@pytest.mark.faults
def test_three_kills_are_sent_and_resumed_and_the_table_says_what_was_measured(tmp_path: Path) -> None:
    first = rehearse(tmp_path, "--compare-memory", "5", "--only-until", "21")
    assert first.returncode == errors.RESUMABLE, first.stdout + first.stderr
    done = rehearse(tmp_path, "--compare-memory", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    main = result["main"]
    assert set(main["kills"]) == {"generation", "training", "benchmark"}
    killed = [attempt for attempt in main["attempts"] if attempt["code"] == -9]
    assert [attempt["killed_in"] for attempt in killed] == ["generation", "training", "benchmark"]
    assert all(attempt["resumed"] for attempt in main["attempts"][1:]) and not main["attempts"][0]["resumed"]
    assert main["kills"]["training"]["stage"] == "train"
    assert main["kills"]["generation"]["logs"]["records.jsonl"]["rows"] > 0
    assert result["faults"] == [] and main["losses"] == [] and main["verify"]["code"] == 0
    assert {"answers", "guard", "train", "evaluation", "xstest answers", "judge mtbench"} <= set(main["phases"])
    assert sum(row["wall_s"] for row in main["phases"].values()) == pytest.approx(main["seconds"], abs=0.5)
    assert all(attempt["peak_host_mib"] > 20 for attempt in main["attempts"]) and result["memory_ratio"] < 1.3
    assert any("STAND-IN" in name for name in main["judges"])
    other = rehearse(tmp_path, "--rounds", "1")
    assert other.returncode == 1 and "another --rounds" in other.stderr


def test_a_row_that_is_lost_or_stands_twice_is_told(tmp_path: Path) -> None:
    run = tmp_path / "latest"
    run.mkdir()
    log = run / "records.jsonl"
    row = b'{"stage":"answers","item":1,"round":0}\n'
    log.write_bytes(row)
    from rehearsal import heads

    leg = Leg("main", 1, (), tmp_path, {"attempts": [], "kills": {"generation": {"logs": heads(run)}}})
    assert losses(leg) == []
    (run / "eval").mkdir()
    exam = run / "eval" / "critic.jsonl"
    exam.write_bytes(b'{"metric":"critic.critiques","item":1,"round":0}\n')
    assert losses(leg) == []
    exam.unlink()
    log.write_bytes(row + row)
    assert losses(leg) == ["records.jsonl: 1 keys stand twice, first ('answers', 1, 0)"]
    log.write_bytes(row.replace(b"1,", b"2,"))
    assert losses(leg) == ["records.jsonl: its 1 rows of the kill in generation are not what it begins with"]


@pytest.mark.runs
def test_a_missing_benchmark_file_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "rehearsal.py"), "--data", str(tmp_path), "--run-dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "harmbench_behaviors_text_val.csv is missing" in done.stderr


def test_an_adapter_that_was_not_on_after_the_kill_is_told(tmp_path: Path) -> None:
    run = tmp_path / "latest"
    log = run / "eval" / "benchmarks" / "xstest.jsonl"
    log.parent.mkdir(parents=True)
    rows = [{"arm": "fingerprint", "item": 0, "round": 0}]
    for arm in ("base", "tuned"):
        mine = [{"arm": arm, "item": item, "round": 0, "status": "ok", "text": f"{item}"} for item in range(7)]
        rows += [{**row, "text": "other"} if arm == "tuned" and row["item"] < 2 else row for row in mine]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    log.write_bytes(b"".join(lines[:10]))  # two tuned answers stood when the kill fell
    from rehearsal import heads

    leg = Leg("main", 1, (), tmp_path, {"attempts": [], "kills": {"benchmark": {"logs": heads(run)}}})
    log.write_bytes(b"".join(lines))
    arms = arms_of(leg)
    assert arms == {"xstest": {"tuned": 7, "same_as_base": 5, "after_kill": 5, "same_after_kill": 5}}
    assert worn_faults(arms) == [
        "xstest: all 5 answers of the tuned model after the kill are the base's word for word: no adapter was on"
    ]
    leg.state["kills"] = {}
    assert arms_of(leg)["xstest"]["after_kill"] == 0 and worn_faults(arms_of(leg)) == []


@pytest.mark.slow
def test_what_does_not_stop_at_the_deadline_is_killed_and_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rehearsal

    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    monkeypatch.setattr(rehearsal, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(rehearsal, "LEAST_PIECE", 0.0)
    monkeypatch.setattr(rehearsal, "command_for", lambda leg, sets: [sys.executable, "-c", deaf])
    leg = Leg("main", 1, (), tmp_path / "runs", {"attempts": [], "kills": {}})
    began = time.monotonic()
    assert rehearsal.go_on(leg, {}, began + 0.5, lambda: None) == errors.RESUMABLE
    assert leg.state["attempts"][0]["code"] == -9 and time.monotonic() - began < 10
