"""Training killed for real: SIGKILL spread over a whole training and inside each file of a checkpoint save."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from support.training import run_train
from test_train import TESTS, alone, sha  # noqa: F401  (a fixture)
from test_train_start import two_stages

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def train_and_kill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """`train_and_kill(how, folder, number)`: the exit code of a training in a forked child."""
    command = [sys.executable, str(TESTS / "support" / "child.py"), "serve", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, text=True, bufsize=1, **pipes)  # type: ignore[call-overload]
    assert server.stdout.readline() == "ready\n"

    def ask(how: str, folder: Path, number: float) -> int:
        server.stdin.write(f"{how} {folder} {number}\n")
        while not (line := server.stdout.readline()).strip().lstrip("-").isdigit():
            assert line, "the children's parent has ended"
        return int(line)

    yield ask
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of SFT, then DPO, that was left alone."""
    folder = tmp_path_factory.mktemp("stages")
    two_stages(folder)
    return sha(folder)


@pytest.mark.parametrize("attempt", range(8))
def test_f22_killed_at_any_moment_resumes_to_the_same_bytes(alone, train_and_kill, tmp_path, attempt):  # noqa: F811
    """SIGKILL at a moment spread over the whole training, saves included; then a plain resume."""
    train_and_kill("kill-after", tmp_path, 0.05 + 0.25 * attempt)
    run_train(tmp_path)
    assert sha(tmp_path) == sha(alone[0])


def test_f22_killed_inside_each_file_of_a_save(alone, train_and_kill, tmp_path):  # noqa: F811
    """The child kills itself at the n-th file operation of a checkpoint save, for every n until it survives."""
    for n in count():
        folder = tmp_path / str(n)
        folder.mkdir()
        code = train_and_kill("kill-in-save", folder, n)
        run_train(folder)
        assert sha(folder) == sha(alone[0]), n
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert n >= 5


@pytest.mark.parametrize("attempt", range(6))
def test_killed_in_either_stage_of_sft_and_dpo_resumes_to_the_same_bytes(train_and_kill, tmp_path, stages, attempt):
    """SIGKILL at a moment spread over the SFT stage, what is between, and DPO."""
    train_and_kill("kill-start-after", tmp_path, 0.1 + 0.5 * attempt)
    two_stages(tmp_path)
    assert sha(tmp_path) == stages
