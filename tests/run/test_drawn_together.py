"""How many texts an evaluation draws between two writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cai.run import loop
from cai.world import World


def context(backend: str) -> Any:
    return SimpleNamespace(run=SimpleNamespace(manifest={"backend": backend}))


@pytest.mark.parametrize("backend", ["embedded", "cpu", "fake"])
def test_on_a_cpu_slices_stay_as_they_are_whose_bytes_hang_on_them(backend: str) -> None:
    assert loop.together(context(backend), 16, 200) == 16


def test_on_a_gpu_an_arm_is_drawn_in_one_go_by_as_many_processes_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop.together(context("cuda"), 16, 200) == 200
    assert loop.together(context("cuda"), 16, 5000) == loop.DRAWN_AT_ONCE
    assert loop.together(context("cuda"), 16, 3) == 16
    monkeypatch.setattr(loop, "world", lambda: World(1, 4, 1))
    assert loop.together(context("cuda"), 16, 200) == 50
