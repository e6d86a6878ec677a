"""How many texts an evaluation draws between two writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cai.evaluate import scores
from cai.evaluate.scores import DRAWN_AT_ONCE, Evaluation
from cai.world import World


def evaluation(backend: str) -> Evaluation:
    context: Any = SimpleNamespace(run=SimpleNamespace(manifest={"backend": backend}))
    return Evaluation(context, None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["embedded", "cpu", "fake"])
def test_on_a_cpu_slices_stay_as_they_are_whose_bytes_hang_on_them(backend: str) -> None:
    assert evaluation(backend).together(16, 200) == 16


def test_on_a_gpu_an_arm_is_drawn_in_one_go_by_as_many_processes_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluation("cuda").together(16, 200) == 200
    assert evaluation("cuda").together(16, 5000) == DRAWN_AT_ONCE
    assert evaluation("cuda").together(16, 3) == 16
    monkeypatch.setattr(scores, "world", lambda: World(1, 4, 1))
    assert evaluation("cuda").together(16, 200) == 50
