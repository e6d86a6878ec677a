"""How a CPU is used: threads that sleep while they wait, no more of them than a quota lets run, lines about both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cai.models import threads


@pytest.fixture
def bare(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def quota(tmp_path, monkeypatch, text, period=""):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    if period:
        (tmp_path / "cpu.cfs_period_us").write_text(period)
    monkeypatch.setattr(threads, "QUOTAS", (path,))


@pytest.mark.parametrize(
    ("text", "period", "cores"),
    [("max 100000\n", "", 8), ("250000 100000\n", "", 3), ("100000 100000\n", "", 1), ("10000 100000", "", 1),
     ("-1\n", "100000\n", 8), ("400000\n", "100000\n", 4), ("", "", 8), ("9 0", "", 8), ("none at all", "", 8)],
)  # fmt: skip
def test_a_containers_quota_bounds_the_threads(tmp_path, monkeypatch, bare, text, period, cores):
    quota(tmp_path, monkeypatch, text, period)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert threads.usable_cores() == cores
    threads.prepare_threads()
    assert os.environ.pop("OMP_WAIT_POLICY") == "PASSIVE"
    assert os.environ.pop("OMP_NUM_THREADS", "8") == str(cores)


def test_what_the_environment_says_holds(tmp_path, monkeypatch, bare):
    quota(tmp_path, monkeypatch, "100000 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    threads.prepare_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("5", "ACTIVE")


def test_busy_cores_and_another_number_of_threads_are_a_line_each():
    assert "OMP_NUM_THREADS=1" in threads.advice(2, 5.0, 2) and "load 5 on 2" in threads.advice(2, 5.0, 2)
    assert threads.advice(2, 1.0, 2) == threads.advice(1, 9.0, 2) == ""
    assert threads.drift(4, 1).endswith("OMP_NUM_THREADS=4")
    assert threads.drift(2, 2) == threads.drift(None, 2) == ""  # None: a run from before it was noted
    assert threads.in_words(2, {"OMP_WAIT_POLICY": "PASSIVE"}) == "2 threads, passive wait"
    assert threads.in_words(2, {}) == "2 threads, default wait" and threads.in_words(1, {}) == "1 thread"


@pytest.mark.runs
@pytest.mark.parametrize("backend", ["embedded", "cpu", "cuda", "fake"])
def test_the_wait_is_chosen_before_torch_is_imported_and_only_where_a_cpu_computes(backend):
    """The library reads it once, when it is loaded; whoever imports torch first would decide."""
    code = (
        "import os, sys\nfrom cai.models import policy\nfrom cai.recipe.settings import ModelSection\n"
        "class Torch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'unsloth'):\n"
        "            os.write(1, str(os.environ.get('OMP_WAIT_POLICY')).encode()); os._exit(0)\n"
        "sys.meta_path.insert(0, Torch())\n"
        f"policy.load(ModelSection(backend={backend!r}, name='fake'), {backend!r}, say=lambda line: None)\n"
        "print('no torch')\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    wanted = {"embedded": "PASSIVE", "cpu": "PASSIVE", "cuda": "None", "fake": "no torch"}
    assert done.stdout.strip() == wanted[backend], done.stderr[-500:]
