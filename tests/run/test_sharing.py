"""Steps that several processes share: the deal, what an earlier attempt left, and one short run of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import FAKE, ROOT

from cai import errors, world
from cai.errors import CaiError
from cai.run import replica, sharing
from cai.store.records import read

Run = Callable[..., tuple[int, Path]]
PAIRS = ("--milestone", "m1", "--until", "pairs", "--set", "engine.batch_size=3")


def test_without_torchrun_a_process_is_alone() -> None:
    assert world.of_environment({}) == world.World() and not world.world().several
    assert world.of_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == world.World()
    assert world.gather(b"row", "anything") == [b"row"] and world.any_of(True, "anything") is True


def test_torchruns_environment_is_read_and_nonsense_is_one_line() -> None:
    here = world.of_environment({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"})
    assert (here.rank, here.size, here.local_rank, here.first) == (9, 16, 1, False)
    with pytest.raises(CaiError, match="WORLD_SIZE='two'"):
        world.of_environment({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(CaiError, match="RANK=2"):
        world.of_environment({"RANK": "2", "WORLD_SIZE": "2"})


def test_each_process_sees_one_gpu_of_those_that_are_lent() -> None:
    assert [world.own_device(None, rank) for rank in (0, 3)] == ["0", "3"]
    assert [world.own_device("4,6", rank) for rank in (0, 1, 2)] == ["4", "6", ""]
    assert world.own_device("GPU-a,GPU-b", 1) == "GPU-b"


@pytest.mark.runs
def test_what_a_shard_of_an_earlier_attempt_holds_is_not_made_again(run_fake: Run, project: Path) -> None:
    """One process goes on from rows of two: taken from the shard, in the log in order, and the shard is gone."""
    code, whole = run_fake(*PAIRS)
    assert code == errors.DONE
    rows = read(whole / "records.jsonl")
    answers = [row for row in rows if row["stage"] == "answers"][:3]
    before = rows[: rows.index(answers[0])]
    code, run = run_fake(*PAIRS, "--until", "instructions")
    assert read(run / "records.jsonl") == before
    shard = run / "shards" / "records" / "answers-0" / "0001-1.jsonl"
    shard.parent.mkdir(parents=True)
    marked = [{**row, "text": f"{row['text']} From a shard."} for row in answers]
    shard.write_bytes(b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in marked))
    code, run = run_fake("--resume", str(run), "--until", "answers", fake=())
    found = [row for row in read(run / "records.jsonl") if row["stage"] == "answers"]
    assert [row["text"] for row in found[:3]] == [row["text"] for row in marked]
    assert [row["item"] for row in found] == [row["item"] for row in rows if row["stage"] == "answers"]
    assert not shard.exists()


@pytest.mark.runs
def test_a_shard_that_cannot_be_read_is_made_again(run_fake: Run) -> None:
    _, whole = run_fake(*PAIRS)
    _, run = run_fake(*PAIRS, "--until", "instructions")
    shard = run / "shards" / "records" / "answers-0" / "0001-1.jsonl"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b'{"stage":\n{"v":1,"stage":"answers","item":0,"round":0}\n')
    code, run = run_fake("--resume", str(run), "--until", "pairs", fake=())
    assert code == errors.DONE
    assert (run / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert "shard_unread" in (run / "events.jsonl").read_text()


def test_a_copy_has_no_lock_no_shards_and_no_checkpoints() -> None:
    for name in (".lock", "status.json", sharing.FOLDER, "checkpoint-*", "quarantine"):
        assert name in replica.NOT_COPIED


@pytest.mark.slow
def test_two_processes_make_the_records_and_the_data_set_of_one(run_fake: Run, project: Path) -> None:
    _, alone = run_fake(*PAIRS)
    child = ROOT / "tests" / "support" / "ranks_run.py"
    asked = {"folder": str(project), "arguments": [str(project / "cai.toml"), *FAKE, *PAIRS], "processes": 2}
    done = subprocess.run(
        [sys.executable, str(child)], input=json.dumps(asked) + "\n", capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [errors.DONE] * 2, (project / "said").read_text()[-2000:]
    run = (project / "runs" / "latest").resolve()
    assert run != alone
    for name in ("records.jsonl", "records.sum", "dataset/examples.jsonl"):
        assert (run / name).read_bytes() == (alone / name).read_bytes()
