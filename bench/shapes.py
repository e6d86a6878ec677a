"""What bench/generate.py asks of every backend: requests shaped like the M3 recipe's, drawn from a fixed seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cai.engine import Request, Sampling

SEED = 20261122


@dataclass(frozen=True)
class StageShape:
    """Tokens of the shared prefix, range of inputs, range of outputs; and of the mix that a run really asks for:

    `rotations` of the prefix's examples, and the share of completions that is drawn again (twice at most).
    """

    name: str
    prefix: int
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    rotations: int = 1
    redraws: float = 0.0

    def again(self, item: int, number: int) -> bool:
        """Whether draw `number` of an item is refused; the same in every run and backend."""
        return number < REDRAWS and random.Random(f"{SEED}-{self.name}-{item}-{number}").random() < self.redraws


REDRAWS = 2
STAGES = (
    StageShape("instructions", 600, (20, 60), (20, 100), rotations=6),
    StageShape("answers", 800, (20, 150), (100, 500), redraws=0.08),
    StageShape("critiques", 1000, (150, 600), (60, 300), redraws=0.08),
    StageShape("revisions", 1000, (250, 900), (100, 500), redraws=0.08),
    StageShape("evaluation", 700, (20, 200), (100, 500)),
)


def stage_requests(stage: StageShape, count: int, vocab: int, scale: float, rotations: int = 1) -> list[Request]:
    """The first `count` requests of a stage; the same whatever the count, but for the order of the prefix's examples:
    request i has them from example i % `rotations` on."""
    draw = random.Random(f"{SEED}-{stage.name}")
    top = min(vocab, 40000)
    length = lambda tokens: max(2, round(tokens * scale))  # noqa: E731
    prefix = [draw.randrange(1000, top) for _ in range(length(stage.prefix))]
    made = []
    for item in range(count):
        low, high = stage.inputs
        own = length(math.exp(draw.uniform(math.log(low), math.log(high))))
        new = length(draw.randint(*stage.outputs))
        turn = item % rotations * len(prefix) // rotations
        ids = (*prefix[turn:], *prefix[:turn], *(draw.randrange(1000, top) for _ in range(own)))
        made.append(Request(item, ids, Sampling(0.7, new), seed=draw.getrandbits(63), prefix_len=len(prefix)))
    return made


Again = Callable[[int, int], bool]  # whether draw so-and-so of a request is refused
APART = 1_000_000  # between the ids of two stages, where all are asked at once


def never(id_: int, number: int) -> bool:
    return False


def the_requests(
    stages: Collection[str], count: int, vocab: int, options: Any
) -> Iterator[tuple[str, list[Request], Again]]:
    """Name, requests and refusals of each stage, or of all of them at once; `options`: scale, mix and together."""
    found = []
    for place, stage in enumerate(stage for stage in STAGES if stage.name in stages):
        requests = stage_requests(stage, count, vocab, options.scale, stage.rotations if options.mix else 1)
        requests = [replace(request, id=request.id + place * APART) for request in requests]
        found.append((stage, requests))
    shapes = [stage for stage, _ in found]
    again = (lambda id_, number: shapes[id_ // APART].again(id_ % APART, number)) if options.mix else never
    if options.together:
        yield "together", [request for _, requests in found for request in requests], again
        return
    for stage, requests in found:
        yield stage.name, requests, again
