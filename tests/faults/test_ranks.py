"""Runs of several processes on the fake model, killed where a row is in a shard and not yet in the log.

The end is always that of one process left alone: every committed row there once, byte for byte, whatever number of
processes went on. Training's own faults are in tests/training/test_train_ranks.py.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from select import select

import pytest
from whole import ROOT, Project, digest, events, wait_for

from cai import errors
from cai.commands import verify
from cai.store.records import read

pytestmark = [pytest.mark.faults, pytest.mark.slow]
PAIRS = ("--milestone", "m1", "--until", "pairs")
SMALL = ("engine.batch_size=3",)
ENDS = ("records.jsonl", "dataset")
CHILD = ROOT / "tests" / "support" / "ranks_run.py"
GOING_ON = ("--resume", "runs/latest", "--until", "pairs")


@lru_cache(maxsize=1)
def starter() -> subprocess.Popen[str]:
    """Forks the processes of every run: the imports are made once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, str(CHILD)], text=True, bufsize=1, env=environment, **pipes)  # type: ignore[call-overload]
    atexit.register(server.kill)
    assert server.stdout.readline() == "ready\n"
    return server


def together(project: Project, processes: int, *argv: str, **kill: object) -> list[int]:
    """Exit codes by rank."""
    arguments = project.command(*argv, sets=SMALL * ("--resume" not in argv))[2:]
    asked = {"folder": str(project.folder), "arguments": arguments, "processes": processes, **kill}
    server = starter()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(asked) + "\n")
    assert select([server.stdout], [], [], 300)[0], (project.folder / "said").read_text()[-2000:]
    return json.loads(server.stdout.readline())


def torchrun(project: Project, *argv: str, processes: int = 2, sets: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *starter, *project.command(*argv, sets=sets)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The run of one process."""
    import shutil

    folder = tmp_path_factory.mktemp("alone")
    for name in ("cai.toml", "constitution.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    made = Project(folder)
    assert made.go(*PAIRS, sets=SMALL).code == errors.DONE
    return made


def is_that_of(run: Path, other: Path) -> None:
    assert digest(run, ENDS) == digest(other, ENDS)
    keys = Counter((row["stage"], row["item"], row["round"]) for row in read(run / "records.jsonl"))
    assert set(keys.values()) == {1}
    for shard in (run / "shards").rglob("*.jsonl"):  # killed behind the merge: it goes at the end of the whole run
        assert {(row["stage"], row["item"], row["round"]) for row in read(shard)} <= set(keys)


@pytest.mark.parametrize(
    ("point", "after", "rank"),
    [
        ("put", 0, 1),
        ("put", 2, -1),
        ("unmerged", 1, 0),
        ("merging", 1, 0),
        ("merging", 1, -1),
        ("merged", 1, 0),
        ("merged", 1, -1),
    ],
)
def test_killed_anywhere_one_or_three_processes_go_on_to_the_bytes_of_one(
    project: Path, alone: Project, point: str, after: int, rank: int
) -> None:
    made = Project(project)
    codes = together(made, 2, *PAIRS, point=point, after=after, rank=rank)
    fell = [0, 1] if rank == -1 else [rank]
    assert [codes[number] for number in fell] == [-signal.SIGKILL] * len(fell)
    assert all(code == errors.RESUMABLE for number, code in enumerate(codes) if number not in fell)
    committed = read(made.run / "records.jsonl")
    for processes, copy in ((1, project / "one"), (3, project)):
        resumed = Project(copy)
        if copy != project:
            subprocess.run(["cp", "-a", str(project), f"{project}-one"], check=True)
            resumed = Project(Path(f"{project}-one"))
        assert together(resumed, processes, *GOING_ON) == [errors.DONE] * processes
        assert read(resumed.run / "records.jsonl")[: len(committed)] == committed
        is_that_of(resumed.run, alone.run)
        assert verify.sound(verify.verify(resumed.run))


def test_the_first_process_alone_says_that_a_gate_failed(project: Path) -> None:
    """torchrun ends the others at the first code that is not 0: while the report is being written."""
    made = Project(project)
    codes = together(made, 2, "--milestone", "m1", "--set", "gates.enforce=true", "--set", "items=4")
    assert codes == [errors.GATE, errors.DONE]
    assert (made.run / "report.html").exists() and [e["code"] for e in events(made.run, "end")] == [errors.DONE]


def test_sigterm_to_torchrun_ends_all_with_75_and_a_resume_goes_on(project: Path) -> None:
    made = Project(project, sets=("model.backend=fake", "model.name=fake:slow"))
    process = torchrun(made, *PAIRS)
    wait_for(process, lambda: list((made.folder / "runs").glob("*/shards/*/*/*.jsonl")), 120)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and "This is a bug" not in said
    assert [event["code"] for event in events(made.run, "end")] == [errors.RESUMABLE]
    process = torchrun(made, *GOING_ON)
    assert process.communicate(timeout=200) and process.returncode == 0


def test_supervise_restarts_torchrun_by_what_the_first_process_ended_with(project: Path) -> None:
    """torchrun ends with 1, whatever happened: a killed run goes on, and a refused one is not tried again."""
    made = Project(project)
    assert together(made, 2, *PAIRS, point="put", after=1, rank=0)[0] == -signal.SIGKILL
    runner = [*shlex.split("-m cai.commands.supervise --torchrun"), "--standalone --nproc-per-node=2"]
    command = [sys.executable, *runner, str(project / "cai.toml"), *GOING_ON]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"cwd": project, "capture_output": True, "text": True, "env": environment, "timeout": 300}
    done = subprocess.run(command, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr[-2000:]
    drifted = subprocess.run([*command, "--set", "seed=9"], **options)  # type: ignore[call-overload]
    assert drifted.returncode != 0 and "resuming in" not in drifted.stderr
