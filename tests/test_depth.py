"""How deep the calls are from `runner.main` to engine, scoring and trainer, read from the stack of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cai import errors
from cai.models.fake import FakeEngine
from cai.training import fake_training

CAI = str(Path(__file__).resolve().parents[1] / "cai")
DEEPEST = {"submit": 9, "score": 11, "run": 3}  # a ratchet: lower a number when a level goes (6 is the aim), raise none


def way() -> tuple[str, ...]:
    """`module.function` of the frames of cai between runner.main and the wrapped call, outermost first; no lambdas."""
    frame, found = sys._getframe(2), []
    while frame is not None and frame.f_code.co_name != "main":
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(CAI) and not name.startswith("<"):
            found.append(f"{Path(path).stem}.{name}")
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return tuple(found[::-1])


def watched(real: Callable[..., Any], seen: set[tuple[str, ...]]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        seen.add(way())
        return real(*args, **more)

    return call


def test_calls_from_main_to_the_model_are_no_deeper_than_they_were(
    run_fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[str, ...]]] = {name: set() for name in DEEPEST}
    for name in ("submit", "score"):
        monkeypatch.setattr(FakeEngine, name, watched(getattr(FakeEngine, name), seen[name]))
    monkeypatch.setattr(fake_training, "run", watched(fake_training.run, seen["run"]))
    assert run_fake("--milestone", "m0")[0] == errors.DONE
    for name, ways in seen.items():
        deepest = max(ways, key=len)
        assert len(deepest) <= DEEPEST[name], " > ".join(deepest)
        assert len(deepest) == DEEPEST[name], f"{name}: only {len(deepest)} now. Lower DEEPEST to it."
