"""Several processes train together over gloo: what they make is one process's, and none waits for one that fell."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from select import select

import pytest
from support.runs import ROOT

from cai import errors, world
from cai.training import ranks
from cai.training.job import BatchShape

CHILD = ROOT / "tests" / "support" / "ranks_child.py"
slow, faults = pytest.mark.slow, pytest.mark.faults


@lru_cache(maxsize=1)
def starter() -> subprocess.Popen:
    """Forks the processes of every training: the imports are made once, not six times."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    server = subprocess.Popen([sys.executable, str(CHILD)], env=environment, **pipes)
    atexit.register(server.kill)
    assert server.stdout.readline() == "ready\n"
    return server


def train(folder: Path, processes: int, **options) -> tuple[list[int], list[dict]]:
    """(exit codes, what each left), by rank."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    server = starter()
    server.stdin.write(json.dumps([str(folder), processes, options]) + "\n")
    assert select([server.stdout], [], [], 400)[0], "the processes wait for each other"
    codes = json.loads(server.stdout.readline())
    left = [folder / f"{rank}.json" for rank in range(processes)]
    return codes, [json.loads(p.read_text()) if p.exists() else {} for p in left]


def losses(found: dict) -> list[float]:
    return [entry["loss"] for entry in found["log"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    from support import ranks_child

    folder = tmp_path_factory.mktemp("alone")
    return folder, ranks_child.main(folder / "0", {})


@slow
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=faults)])
def test_losses_are_those_of_one_process_and_every_tensor_is_equal_after_each_step(alone, tmp_path, processes):
    """3 processes share 4 micro-batches a step: two of them have one that is empty."""
    codes, found = train(tmp_path, processes)
    assert codes == [0] * processes
    assert len(found[0]["hashes"]) == 6 and all(each["hashes"] == found[0]["hashes"] for each in found)
    assert losses(found[0]) == pytest.approx(losses(alone[1]), abs=1e-6)
    for name in ("grad_norm", "rewards/margins", "logps/chosen"):
        theirs = [entry[name] for entry in alone[1]["log"]]
        assert [entry[name] for entry in found[0]["log"]] == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    reference = Path("0") / "train" / "reference.json"
    assert (tmp_path / reference).read_bytes() == (alone[0] / reference).read_bytes()


@slow
@faults
def test_sft_and_the_best_of_the_held_out_loss_are_those_of_one_process(tmp_path):
    for name, options in (("sft", {"objective": "sft"}), ("best", {"dpo": {"eval_steps": 2, "keep": "best"}})):
        one, two = (train(tmp_path / f"{name}{n}", n, **options)[1][0] for n in (1, 2))
        assert losses(two) == pytest.approx(losses(one), abs=1e-6)
        assert two["kept_step"] == one["kept_step"]
        assert [e["heldout/margin"] for e in two["heldout_log"]] == pytest.approx(
            [e["heldout/margin"] for e in one["heldout_log"]], abs=1e-5
        )


@slow
@faults
@pytest.mark.parametrize("fault", ["stop", "kill"])
def test_stopped_or_killed_one_and_three_processes_go_on_to_the_same_losses(alone, tmp_path, fault):
    codes, found = train(tmp_path / "two", 2, fault=fault, rank=1, step=4)
    assert codes == ([errors.RESUMABLE] * 2 if fault == "stop" else [errors.RESUMABLE, -signal.SIGKILL])
    for processes in (1, 3):
        shutil.copytree(tmp_path / "two", tmp_path / str(processes))
        codes, found = train(tmp_path / str(processes), processes)
        assert codes == [0] * processes and found[0]["resumed_from"] >= 2
        assert losses(found[0]) == pytest.approx(losses(alone[1]), abs=1e-6)


@slow
@faults
def test_a_loss_that_is_no_number_in_one_process_ends_all_before_the_step(tmp_path):
    codes, found = train(tmp_path, 2, fault="nan")
    assert codes == [errors.QUALITY] * 2 and all("step 3" in each["error"] for each in found)


@slow
@faults
def test_where_the_memory_of_one_process_ends_all_go_on_with_smaller_micro_batches(alone, tmp_path):
    codes, found = train(tmp_path, 2, fault="memory")
    assert codes == [0, 0] and [each["smaller"] for each in found] == [1, 1]
    assert losses(found[0]) == pytest.approx(losses(alone[1]), abs=1e-5)


def test_the_longest_go_first_to_whoever_has_least_and_counts_are_equal():
    assert ranks.deal([9, 8, 5, 4], 2, 2) == [[0, 3], [1, 2]]
    assert ranks.deal([9, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]]  # three to one would be even, and one too many
    assert ranks.deal([3, 2, 1], 3, 1) == [[0], [1], [2]]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_micro_batch_is_one_process_s_and_empty_ones_fill_the_step(monkeypatch, processes):
    order, tokens = list(range(16)), [20 - i for i in range(16)]
    dealt = []
    for rank in range(processes):
        monkeypatch.setattr(world, "_here", world.World(rank, processes, rank))
        dealt.append(ranks.Dealt.of(order, tokens, 2, 4))
    for step in range(2):
        each = dealt[0].each_step
        parts = [part for one in dealt for part in one.micro_batches[step * each : (step + 1) * each]]
        assert sorted(i for part in parts for i in part) == order[step * 8 : step * 8 + 8]
        assert len(parts) == each * processes and [len(part) for part in parts if part] == [2] * 4


@pytest.mark.parametrize(("processes", "micro", "expected"), [(2, 4, 4), (4, 4, 2), (8, 4, 1), (16, 4, 1), (3, 2, 2)])
def test_the_micro_batch_shrinks_until_there_is_one_for_each_process(monkeypatch, processes, micro, expected):
    monkeypatch.setattr(world, "_here", world.World(0, processes, 0))
    shape = ranks.spread(BatchShape(micro, 8 // micro, False))
    assert (shape.micro_batch, shape.accumulation) == (expected, 8 // expected)
