"""Rows of a streaming engine, finished in any order: the bytes of fixed slices, whatever is killed on the way."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import FAKE

import runner
from cai import errors
from cai.data import stage_loop
from cai.data import stage_loop as released
from cai.engine import Completion, Request, Sampling, never
from cai.models.fake import FakeEngine
from cai.run import sharing
from cai.store.records import RecordLog, read

Run = Callable[..., tuple[int, Path]]
PAIRS = ("--milestone", "m1", "--until", "pairs", "--set", "engine.batch_size=5")
KEPT = 2


def in_any_order(engine: FakeEngine, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
    """Rows finish as their lengths and neighbours have it; what joins while others run may be done before them."""
    draw = random.Random(4)
    while engine._queue and not stopped():
        yield engine._complete(engine._queue.pop(draw.randrange(min(len(engine._queue), 7))))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "streams", True)
    monkeypatch.setattr(FakeEngine, "completions", in_any_order)
    monkeypatch.setattr(stage_loop, "streaming", lambda context: True)
    monkeypatch.setattr(stage_loop, "KEPT_AT_ONCE", KEPT)


@pytest.fixture
def whole(run_fake: Run) -> bytes:
    """The records of fixed slices."""
    code, run = run_fake(*PAIRS)
    assert code == errors.DONE
    return (run / "records.jsonl").read_bytes()


@pytest.mark.runs
def test_a_streamed_run_has_the_records_of_fixed_slices_and_leaves_no_shard(whole: bytes, streams: None, run_fake: Run):
    waited: list[int] = []
    put = sharing.Shared.put

    def watched(self: Any, rows: Any) -> None:
        rows = list(rows)
        waited.append(len(rows))
        put(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing.Shared, "put", watched)
        code, run = run_fake(*PAIRS)
    assert code == errors.DONE and sum(waited) > 10
    assert (run / "records.jsonl").read_bytes() == whole
    assert not (run / sharing.FOLDER).exists()


@pytest.mark.runs
def test_rows_that_several_processes_streamed_go_into_the_log_in_order(
    whole: bytes, streams: None, run_fake: Run, monkeypatch: pytest.MonkeyPatch
):
    """Through the shards of several processes, of which there is one."""
    monkeypatch.setattr(stage_loop, "world", lambda: SimpleNamespace(several=True))
    monkeypatch.setattr(sharing, "begin", sharing.Shared)
    code, run = run_fake(*PAIRS)
    assert code == errors.DONE
    assert (run / "records.jsonl").read_bytes() == whole


def killed(argv: list[str], trace: Path, after: int) -> int:
    """A run in a process of its own that is killed when it has passed `after` points: a row made, kept or committed."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    passed = [0]

    def here() -> None:
        passed[0] += 1
        if passed[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    taken, put, append = stage_loop._taken, sharing.Shared.put, RecordLog.append

    def noted(context: Any, draws: Any, rows: Any, completion: Completion) -> Any:
        draw = draws[completion.id]
        if (again := taken(context, draws, rows, completion)) is None:
            with trace.open("a") as file:
                file.write(f"{draw.stage.name} {draw.unit.item} {draw.unit.round}\n")
            here()
        return again

    def after_put(self: Any, rows: Any) -> None:
        put(self, rows)
        here()

    def after_append(self: Any, rows: Any) -> None:
        append(self, rows)
        if self.path.name == "records.jsonl" and rows:
            here()

    stage_loop._taken, sharing.Shared.put, RecordLog.append = noted, after_put, after_append  # type: ignore[assignment]
    code = 70
    try:  # whatever happens, the child never goes on with the test session of its parent
        code = runner.main(argv)
    finally:
        os._exit(code)


@pytest.mark.runs
@pytest.mark.parametrize("after", [9, 17, 40, 41, 42, 75])
@pytest.mark.parametrize("resumed_by", ["streams", "slices"])
def test_killed_anywhere_a_resume_ends_with_the_same_bytes(
    whole: bytes,
    run_fake: Run,
    project: Path,
    tmp_path: Path,
    monkeypatch: Any,
    request: Any,
    after: int,
    resumed_by: str,
):
    request.getfixturevalue("streams")
    trace = tmp_path / "trace"
    assert killed([str(project / "cai.toml"), *FAKE, *PAIRS], trace, after) == -signal.SIGKILL
    run = (project / "runs" / "latest").resolve()
    committed = read(run / "records.jsonl")
    kept = [row for path in (run / sharing.FOLDER).rglob("*.jsonl") for row in read(path)]
    durable = {(row["stage"], row["item"], row["round"]) for row in (*committed, *kept)}
    made = [tuple(line.split()) for line in trace.read_text().splitlines()]
    assert len([key for key in made if (key[0], int(key[1]), int(key[2])) not in durable]) <= KEPT
    if resumed_by == "slices":
        monkeypatch.setattr(stage_loop, "streaming", lambda context: False)
    argv = [str(project / "cai.toml"), "--resume", str(run), "--until", "pairs"]
    assert killed(argv, trace, after=10**9) == errors.DONE
    assert (run / "records.jsonl").read_bytes() == whole
    assert Counter(Counter(trace.read_text().splitlines()).values())[2] <= KEPT or resumed_by == "slices"


def test_rows_are_released_in_the_order_of_their_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Shard:
        spare: dict[Any, Any] = {("answers", 3, 0): {"stage": "answers", "item": 3, "round": 0}}  # noqa: RUF012

        def __init__(self, *_: Any) -> None:
            self.kept: list[int] = []

        def put(self, rows: Any) -> None:
            self.kept += [row["item"] for row in rows]

        def done(self) -> None:
            self.kept.clear()

    monkeypatch.setattr(released.sharing, "Shared", Shard)
    units: Any = [SimpleNamespace(item=item, round=0) for item in (1, 2, 3, 4)]
    context: Any = SimpleNamespace(log=None)
    found = released.Released(context, SimpleNamespace(name="answers"), units, 0)  # type: ignore[arg-type]
    assert [unit.item for unit in found.missing] == [1, 2, 4]

    def take(*items: int) -> list[int]:
        return [row["item"] for row in found.take([{"item": item} for item in items])]  # type: ignore[typeddict-item]

    assert take(2, 4) == [] and found._shard.kept == [2, 4]  # type: ignore[attr-defined]
    assert take(1) == [1, 2, 3, 4] and found._shard.kept == [2, 4]  # type: ignore[attr-defined]
    found.end()


class Noted:
    """An engine that finishes what it is asked at once, and keeps the requests."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.queue: list[Request] = []
        self.most = 0

    def submit(self, request: Request) -> None:
        self.asked.append(request)
        self.queue.append(request)
        self.most = max(self.most, len(self.queue))

    def completions(self, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        while self.queue:
            yield Completion(self.queue.pop(0).id, (1,), "", "eos")


def test_units_go_by_the_order_of_their_examples_and_a_redraw_goes_first(monkeypatch: pytest.MonkeyPatch):
    refused = {4}

    def judged(context: Any, draw: Any, completion: Completion) -> Any:
        bad = draw.unit.item in refused and draw.number == 0
        return {"item": draw.unit.item, "status": "rejected" if bad else "ok", "finish": "eos"}

    @dataclass(frozen=True)
    class Draw:
        stage: Any
        unit: Any
        number: int = 0

    monkeypatch.setattr(stage_loop, "first_draw", lambda context, stage, unit: Draw(stage, unit))
    monkeypatch.setattr(
        stage_loop, "asked", lambda context, draw: Request(draw.unit.item, (1, 2), Sampling(0.7, 3), draw.number)
    )
    monkeypatch.setattr(stage_loop, "judged", judged)
    monkeypatch.setattr(stage_loop, "_redraws", lambda context, stage: 2)
    nothing = lambda *_, **__: None  # noqa: E731
    engine, stage = Noted(), SimpleNamespace(name="answers", prompt="p", redraws_limit=False)
    context: Any = SimpleNamespace(
        engine=engine, stopped=never, check_stop=nothing, progress=SimpleNamespace(step=nothing),
        recipe=SimpleNamespace(pairs=SimpleNamespace(reject_limit=False)),
        prompts={"p": SimpleNamespace(order=lambda shift: shift % 3)},
    )  # fmt: skip
    units: Any = [SimpleNamespace(item=item, round=0, shift=item) for item in range(9)]
    made = [row["item"] for rows in stage_loop._stream(context, stage, units, 4) for row in rows]  # type: ignore[arg-type]
    assert sorted(made) == list(range(9)) and engine.most == 4
    firsts = [request.id for request in engine.asked if request.seed == 0]
    assert firsts == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert [(request.id, request.first) for request in engine.asked if request.seed] == [(4, True)]
