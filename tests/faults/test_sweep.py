"""Every operation on the disk of a run of several waves, hit by every fault, then resumed: the bytes are the same.

The run has held-out items, an SFT arm and the guard on (its stand-in drops pairs, so that slots are tried again). The
sampled sweep is in the slow tier, the whole one in `make test-faults`: three tests of about two minutes.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sweep
from support import rich_run as rich
from support.runs import FAKE

KEYS = ("items=3", "heldout.items=1", "engine.batch_size=2", "guard.enabled=true", 'guard.model="stand-in"',
        "guard.threshold=0.3", "checks.enabled=false", "sft.enabled=true", "dpo.max_steps=2", "rounds=1",
        "evaluation.enabled=false", "instructions.max_tries=2",
        'principles.choice="uniform"', 'pairs.label="always"')  # fmt: skip
ARGV = (*FAKE, "--milestone", "m1", *(word for key in KEYS for word in ("--set", key)))


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """In memory where it can be: a sweep syncs hundreds of thousands of times."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="sweep") as folder:
        (Path(folder) / "project").mkdir()
        yield rich.project(Path(folder) / "project")


@pytest.fixture(scope="module")
def whole(template: Path) -> tuple[list[str], dict[str, str]]:
    """The operations that the run makes, and its bytes."""
    operations, found, said = sweep.measured(template, ARGV)
    assert "try 3 of" in said, "the run must have several waves"
    assert {"_write", "_fdatasync", "_fsync", "_replace", "mkdir", "rename"} <= set(operations)
    return operations, found


@pytest.mark.slow
def test_a_sample_of_operations_hit_by_each_fault_resumes_to_the_same_bytes(
    template: Path, whole: tuple[list[str], dict[str, str]]
) -> None:
    draw = random.Random(5)
    trials = sorted((draw.randint(1, len(whole[0])), fault) for fault in sweep.FAULTS for _ in range(6))
    trials = list(dict.fromkeys(trials))
    wrong = sweep.trials(template, ARGV, trials, whole[1])
    assert not wrong, f"{len(wrong)} of {len(trials)}: " + "\n".join(wrong[:5])


@pytest.mark.faults
@pytest.mark.parametrize("faults", [("kill",), ("torn", "short"), ("ENOSPC", "EIO")], ids=" ".join)
def test_every_operation_hit_by_a_fault_resumes_to_the_same_bytes(
    template: Path, whole: tuple[list[str], dict[str, str]], faults: tuple[str, ...]
) -> None:
    writes_only = "torn" in faults  # anything else is as good as a kill there
    places = [at for at, name in enumerate(whole[0], 1) if name == "_write" or not writes_only]
    trials = [(at, fault) for at in places for fault in faults]
    wrong = sweep.trials(template, ARGV, trials, whole[1])
    assert not wrong, f"{len(wrong)} of {len(trials)}: " + "\n".join(wrong[:5])
