"""How many calls lie between `runner.main` and what asks the model, read from the stack of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cai import errors
from cai.models.fake import FakeEngine
from cai.training import fake_training

DEEPEST = {"submit": 6, "score": 6, "run": 5}  # a ratchet: the engine's and the trainer's own call is the last of them


def way() -> tuple[str, ...]:
    """`module.function` of every frame from main to the wrapped call, outermost first: lambdas and generators too."""
    frame, found = sys._getframe(2), []
    while frame is not None and frame.f_code.co_name != "main":
        found.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return tuple(found[::-1])


def watched(real: Callable[..., Any], seen: set[tuple[str, ...]]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        seen.add((*way(), real.__name__))
        return real(*args, **more)

    return call


@pytest.mark.runs
@pytest.mark.parametrize("milestone", ["m0", "m1"])
def test_from_main_to_engine_scoring_and_trainer_are_at_most_six_calls(
    run_fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, milestone: str
) -> None:
    seen: dict[str, set[tuple[str, ...]]] = {name: set() for name in DEEPEST}
    for name in ("submit", "score"):
        monkeypatch.setattr(FakeEngine, name, watched(getattr(FakeEngine, name), seen[name]))
    monkeypatch.setattr(fake_training, "run", watched(fake_training.run, seen["run"]))
    assert run_fake("--milestone", milestone)[0] == errors.DONE
    for name, ways in seen.items():
        deepest = max(ways, key=len)
        assert len(deepest) <= DEEPEST[name], " > ".join(("main", *deepest))
        assert len(deepest) == DEEPEST[name], f"{name}: only {len(deepest)} now. Lower DEEPEST to it."
