"""How full a streaming engine is over a stage: the pipeline's own loop and scheduler, a clock in place of the GPU.

Units of bench/shapes.py's lengths go through `cai.data.stage_loop` into the engine's own `Scheduler`; a decode step and
a prefilled token take what was measured on an H200 (docs/engine.md). Nothing is drawn: a row's length is given. Printed
by stage: decode steps, mean rows in a step, seconds, and how many finished rows a kill would lose at most.

    python bench/streams.py --items 5200                    (a minute and a half; no GPU, no torch)
    python bench/streams.py --items 5200 --card 80
    python bench/streams.py --items 5200 --one              (rows of one prefix at a time)
    python bench/streams.py --pool                          (two rounds and their waves: stage by stage, or one pool)
"""

from __future__ import annotations

import argparse
import bisect
import json
import random
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import APART, SEED, STAGES, StageShape

from cai.data import stage_loop
from cai.engine import Completion, EngineStats, Request, Sampling
from cai.engine.native.nesting import Part
from cai.engine.native.scheduler import Running, Scheduler

BLOCK = 32
ROTATIONS = {"instructions": 6, "answers": 3, "critiques": 4, "revisions": 4}  # as cai.toml asks for
# rows and milliseconds of a decode step, own tokens that the cache holds, prompt tokens a second; measured on an H200
# (up to 256 rows under 80 GB; 512 from the growth of a row)
CARDS = {
    "whole": ((1, 18.6), (16, 18.6), (64, 20.8), (256, 36.8), (512, 67.4), 524_288, 9300.0),
    "80": ((1, 29.9), (16, 29.9), (64, 36.5), (256, 52.1), (512, 82.7), 157_248, 9000.0),
}


@dataclass(eq=False)
class Row:
    """What the scheduler reads of a row."""

    request: Request
    length: int
    ids: list[int] = field(default_factory=list)


class Blocks:
    """Numbers of blocks without memory."""

    by_slot = False

    def __init__(self, tokens: int) -> None:
        self.free = list(range(tokens // BLOCK))

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK)

    def take(self, count: int, slot: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self.free += blocks


class Clocked:
    """An engine that only keeps time. `length(request)`: how many tokens the row draws."""

    name, streams = "clocked", True

    def __init__(self, card: str, length: Any, several: bool = True) -> None:
        *self.steps_ms, tokens, self.prompt_rate = CARDS[card]
        self.scheduler, self.length = Scheduler(Blocks(tokens), 512, 4096, several=several), length
        self.stats = EngineStats(batch_size=512)
        self.seconds = self.prefill_seconds = 0.0
        self.steps = self.row_steps = self.prefixes = 0
        self.seen: set[tuple[int, ...]] = set()

    def submit(self, request: Request) -> None:
        self.scheduler.add(Row(request, self.length(request)), getattr(request, "first", False))

    def milliseconds(self, rows: int) -> float:
        place = max(1, bisect.bisect_left([count for count, _ in self.steps_ms], rows))
        (low, below), (high, above) = self.steps_ms[place - 1 : place + 1]
        return below + (above - below) * (rows - low) / (high - low)

    def completions(self, stopped: Any = None) -> Iterator[Completion]:
        scheduler = self.scheduler
        while not scheduler.idle:
            if admitted := scheduler.admit(self._place, self.seen.__contains__):
                self._prefilled(sum(running.tokens for running in admitted))
                drawn = admitted
            else:
                _, preempted = scheduler.grow()
                for running in preempted:
                    scheduler.add(running.row, first=True)
                drawn = list(scheduler.active.values())
                self.steps += 1
                self.row_steps += len(drawn)
                self.seconds += self.milliseconds(max(1, len(drawn))) / 1e3
                for running in drawn:
                    running.tokens += 1
            yield from self._land(drawn)

    def _place(self, prefix: tuple[int, ...]) -> Part:
        if prefix and prefix not in self.seen:
            self.seen.add(prefix)
            self.prefixes += 1
            self._prefilled(len(prefix))
        return Part(len(self.seen), len(prefix))

    def _prefilled(self, tokens: int) -> None:
        self.seconds += tokens / self.prompt_rate
        self.prefill_seconds += tokens / self.prompt_rate

    def _land(self, drawn: list[Running]) -> Iterator[Completion]:
        for running in drawn:
            running.launched += 1
            row: Any = running.row
            row.ids.append(0)
            if len(row.ids) >= row.length:
                self.scheduler.release(running)
                yield Completion(row.request.id, tuple(row.ids), "", "eos")


def run(shape: StageShape, items: int, card: str, several: bool = True) -> dict[str, Any]:
    """One stage of so many units through the loop."""
    draws = [random.Random(f"{SEED}-{shape.name}-{item}") for item in range(items)]
    own = [round(draw.uniform(*shape.inputs)) for draw in draws]
    lengths = [draw.randint(*shape.outputs) for draw in draws]
    rotations = ROTATIONS.get(shape.name, 1)
    prefixes = [tuple(range(turn * shape.prefix, (turn + 1) * shape.prefix)) for turn in range(rotations)]
    engine = Clocked(card, lambda request: lengths[request.id], several)
    waits = {"rows": 0, "most": 0}

    def asked(context: Any, draw: Any) -> Request:
        item = draw.unit.item
        ids = prefixes[item % rotations] + (0,) * own[item]
        return Request(item, ids, Sampling(0.7, shape.outputs[1]), draw.number, len(prefixes[0]))

    def judged(context: Any, draw: Any, completion: Completion) -> dict[str, Any]:
        refused = shape.again(draw.unit.item, draw.number)
        waits["rows"] += not refused
        return {"item": draw.unit.item, "status": "rejected" if refused else "ok", "finish": "eos"}

    stubs = {"asked": asked, "judged": judged, "_redraws": lambda context, stage: 2}
    stubs["first_draw"] = lambda context, stage, unit: Draw(stage, unit)
    for name, stub in stubs.items():
        setattr(stage_loop, name, stub)
    stage: Any = SimpleNamespace(name=shape.name, prompt="p", redraws_limit=False)
    units: Any = [SimpleNamespace(item=item, round=0, shift=item) for item in range(items)]
    nothing = lambda *_, **__: None  # noqa: E731
    context: Any = SimpleNamespace(
        engine=engine, stopped=lambda: False, check_stop=nothing, progress=SimpleNamespace(step=nothing),
        recipe=SimpleNamespace(pairs=SimpleNamespace(reject_limit=False)),
        prompts={"p": SimpleNamespace(order=lambda shift: shift % rotations)},
    )  # fmt: skip
    for rows in stage_loop._stream(context, stage, units, 512 * stage_loop.STREAM_WINDOW):
        waits["most"] = max(waits["most"], waits["rows"])
        waits["rows"] -= len(rows)
    assert waits["rows"] == 0
    return {
        "steps": engine.steps, "mean_rows": round(engine.row_steps / engine.steps, 1),
        "seconds": round(engine.seconds, 1), "prefill_seconds": round(engine.prefill_seconds, 1),
        "prefix_changes": engine.prefixes, "lost_at_most": waits["most"],
        "tokens_per_s": round(sum(lengths) / engine.seconds),
    }  # fmt: skip


CHAIN = ("answers", "critiques", "revisions", "critiques", "revisions")
WAVES = (5200, 1300, 325, 81, 20, 5)  # three of four items have their pair after each


def pooled(items: int, names: Sequence[str], card: str, several: bool = True) -> Clocked:
    """Stages of which an item has each as soon as it has the one before; `stage_loop`'s window, redraws first."""
    lanes, shapes = range(len(names)), {shape.name: shape for shape in STAGES}
    draws = [[random.Random(f"{SEED}-{names[k]}-{k}-{item}") for item in range(items)] for k in lanes]
    sizes = [
        [(round(d.uniform(*shapes[names[k]].inputs)), d.randint(*shapes[names[k]].outputs)) for d in draws[k]]
        for k in lanes
    ]
    engine = Clocked(card, lambda request: sizes[request.id % len(names)][request.id // len(names)][1], several)
    number: Counter[int] = Counter()
    waiting = deque(sorted(range(items), key=lambda item: item % ROTATIONS[names[0]]))
    open_ = 0

    def submit(item: int, lane: int, first: bool) -> None:
        shape = shapes[names[lane]]
        turn = item % ROTATIONS[shape.name] + 10 * STAGES.index(shape)
        prefix = tuple(range(turn * 10_000, turn * 10_000 + shape.prefix))
        ids = prefix + (0,) * sizes[lane][item][0]
        sampling = Sampling(0.7, shape.outputs[1])
        engine.submit(Request(item * len(names) + lane, ids, sampling, 0, len(prefix), first=first))

    while waiting or open_:
        for done in engine.completions() if open_ else ():
            item, lane = divmod(done.id, len(names))
            refused = shapes[names[lane]].again(item + lane * APART, number[done.id])
            number[done.id] += refused
            if refused or lane + 1 < len(names):
                submit(item, lane + (not refused), True)
                continue
            open_ -= 1
            if waiting:
                submit(waiting.popleft(), 0, False)
                open_ += 1
        while waiting and open_ < 512 * stage_loop.STREAM_WINDOW:
            submit(waiting.popleft(), 0, False)
            open_ += 1
    return engine


def pools(card: str) -> None:
    stages = [(name,) for name in CHAIN]
    ways = {
        "stage by stage, one prefix at a time, s": (stages, False),
        "several prefixes together": (stages, True),
        "critique and revision pooled, too": ([CHAIN[:1], CHAIN[1:3], CHAIN[3:]], True),
        "one pool": ([CHAIN], True),
    }
    print(f"| items | {' | '.join(ways)} |\n" + "| --- " * (len(ways) + 1) + "|")
    total = dict.fromkeys(ways, 0.0)
    for items in WAVES:
        found = {
            way: sum(pooled(items, names, card, several).seconds for names in parts)
            for way, (parts, several) in ways.items()
        }
        total = {way: total[way] + found[way] for way in ways}
        print(f"| {items} | " + " | ".join(f"{seconds:.0f}" for seconds in found.values()) + " |", flush=True)
    print("| all | " + " | ".join(f"{seconds:.0f}" for seconds in total.values()) + " |")


@dataclass(frozen=True)
class Draw:
    """One try of a unit, as the loop handles it."""

    stage: Any
    unit: Any
    number: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=5200)
    parser.add_argument("--one", action="store_true", help="rows of one prefix at a time, as on a CPU")
    parser.add_argument("--card", choices=CARDS, default="whole")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pool", action="store_true", help="two rounds with their waves, stage by stage and pooled")
    options = parser.parse_args()
    if options.pool:
        return pools(options.card)
    found = {
        shape.name: run(shape, options.items, options.card, not options.one)
        for shape in STAGES
        if shape.name in ROTATIONS
    }
    print("| stage | steps | rows in a step | seconds | of them prompts | useful tokens/s | a kill loses |")
    print("| --- " * 7 + "|")
    for name, row in found.items():
        cells = [
            row[key] for key in ("steps", "mean_rows", "seconds", "prefill_seconds", "tokens_per_s", "lost_at_most")
        ]
        print("| " + " | ".join(map(str, [name, *cells])) + " |", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
