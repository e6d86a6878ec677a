"""Two processes over gloo train on halves of a step: their gradients meet because the loss goes through the wrapper."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from support.ranks_child import one_step
from support.training import run_train
from test_train import TESTS

from cai.errors import CaiError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes leaves, in order of rank."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "ranks_child.py"), str(folder)],
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], told[0][-3000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_gradients_and_adapters_of_two_processes_are_equal_and_those_of_one(two, tmp_path):
    first, second = (rank["through"] for rank in two)
    assert same(first["grads"], second["grads"]) and same(first["weights"], second["weights"])
    for name, grad in one_step(tmp_path, 1, "through")["grads"].items():
        torch.testing.assert_close(first["grads"][name], grad, rtol=1e-4, atol=1e-6)


def test_a_loss_beside_the_wrapper_leaves_each_process_to_itself(two):
    """What the test above is there for: the same step without the redirection, and no error says so."""
    first, second = (rank["beside"] for rank in two)
    assert not same(first["grads"], second["grads"])


def test_several_processes_are_refused_until_all_of_training_knows_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CaiError, match="one process"):
        run_train(tmp_path)
