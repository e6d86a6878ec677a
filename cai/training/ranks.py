"""How the micro-batches of each step are dealt to the processes of a run, and how what they made comes together.

Owns the deal, the sums over processes (gradients, loss, metrics) and the agreements before any process raises. The loop
stays TRL's, which sees one process: gradients are added up once a step, behind the last backward pass. Through
DistributedDataParallel they would be added up inside that pass, and a process whose memory ends there would leave the
others waiting. Invariants: the micro-batches are those of one process, whoever computes them; each counts the same; a
step is applied by all or by none. Imports no torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from cai.store.jsonl import Row
from cai.world import add_up, any_of, gather, share, world

if TYPE_CHECKING:
    import torch

    from cai.training.job import BatchShape

Logps = tuple[float, float]  # sums of chosen, rejected
NO_ROOM = "out of memory in another process of this run"


@dataclass(frozen=True)
class Dealt:
    """This process's micro-batches of row indexes, `each_step` a step; an empty one waits for the others."""

    micro_batches: list[list[int]]
    each_step: int

    @classmethod
    def of(cls, order: Sequence[int], tokens: Sequence[int], micro_batch: int, of_step: int) -> Dealt:
        """Of each step's micro-batches, longest first, the next goes to the process that has the fewest tokens."""
        here, each_step = world(), math.ceil(of_step / world().size)
        mine: list[list[int]] = []
        for start in range(0, len(order), micro_batch * of_step):
            step = order[start : start + micro_batch * of_step]
            parts = [list(step[at : at + micro_batch]) for at in range(0, len(step), micro_batch)]
            dealt = deal([sum(tokens[i] for i in part) for part in parts], here.size, each_step)[here.rank]
            own = [parts[place] for place in dealt]
            mine += own + [[] for _ in range(each_step - len(own))]
        return cls(mine, each_step)


def deal(sizes: Sequence[int], processes: int, most: int) -> list[list[int]]:
    """Places of `sizes` for each process, at most `most` each: the largest first, each to whoever has least."""
    dealt: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        open_ = [number for number in range(processes) if len(dealt[number]) < most]
        chosen = min(open_, key=lambda number: (loads[number], number))
        dealt[chosen].append(place)
        loads[chosen] += sizes[place]
    return [sorted(places) for places in dealt]


def spread(shape: BatchShape) -> BatchShape:
    """The shape with as many micro-batches a step as there are processes, where the effective batch has them."""
    size, effective = world().size, shape.effective
    fits = [n for n in range(shape.micro_batch, 0, -1) if effective % n == 0 and effective // n >= size]
    return shape.cut(fits[0] if fits else 1)


def agreed_shape(shape: BatchShape) -> BatchShape:
    """What fits into the memory of every process."""
    found = _of_all([shape.micro_batch, shape.checkpointing], "choosing the micro-batch")
    return replace(shape.cut(min(part[0] for part in found)), checkpointing=any(part[1] for part in found))


def _of_all(value: object, doing: str) -> list[Any]:
    """Every process's value, in the order of their ranks; a number that JSON does not know is None."""
    return [orjson.loads(part) for part in gather(orjson.dumps(value), doing)]


def of_first(value: Row, doing: str) -> Row:
    """The first process's facts, on all."""
    return orjson.loads(share(orjson.dumps(value), doing))


def one_folder(folder: Path) -> Path:
    """The training folder of the run itself, which the first process writes."""
    return Path(of_first({"folder": str(folder.resolve())}, "training begins")["folder"]) if world().several else folder


def scored_by_all(
    groups: Sequence[Sequence[int]], score: Callable[[Sequence[int]], list[Logps]], stopped: Callable[[], bool]
) -> dict[int, list[Logps]] | None:
    """Log-probs of each micro-batch by its number; each process scores every n-th. None where this one is stopped.

    Errors: OutOfMemoryError in every process where memory ended in one.
    """
    import torch

    mine: dict[int, list[Logps]] = {}
    why, here = "", world()
    for number in range(here.rank, len(groups), here.size):
        if stopped():
            return None
        try:
            mine[number] = score(groups[number])
        except torch.OutOfMemoryError as error:
            why = str(error).splitlines()[0][:200]
            break
    no_room_anywhere(why, "the reference, whether memory lasts")
    found = _of_all(list(mine.items()), "the reference")
    return {number: [(_number(a), _number(b)) for a, b in rows] for part in found for number, rows in part}


def lists_of_all(mine: Mapping[int, list[float]], stopped: bool, doing: str) -> dict[int, list[float]] | None:
    """Lists of numbers by place, of all processes; None where one of them was stopped."""
    found = _of_all({"stopped": stopped, "rows": list(mine.items())}, doing)
    if any(part["stopped"] for part in found):
        return None
    return {place: [_number(value) for value in row] for part in found for place, row in part["rows"]}


def add_gradients(parameters: Iterable[torch.nn.Parameter], doing: str) -> None:
    """Each trained tensor's gradient becomes the sum over all processes: one exchange of one flat tensor."""
    import torch

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in trained if parameter.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    add_up(flat, doing)
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()


def no_room_anywhere(why: str, doing: str) -> None:
    """Errors: OutOfMemoryError in every process where memory ended in one (`why`)."""
    import torch

    if any_of(bool(why), doing):
        raise torch.OutOfMemoryError(why or NO_ROOM)


def means_of_all(sums: Mapping[str, tuple[float, int]], doing: str) -> dict[str, float]:
    """Mean of each metric over the micro-batches of all processes, from (sum, count) of each."""
    total: dict[str, tuple[float, int]] = {}
    for part in _of_all(dict(sums), doing):
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0))
            total[name] = before[0] + _number(value), before[1] + count
    return {name: value / count for name, (value, count) in total.items() if count}


def stopping(stopped: Callable[[], bool], step: int) -> bool:
    """Whether any process was told to stop: then all do, at the same place."""
    return any_of(stopped(), f"training step {step}, whether to stop")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
