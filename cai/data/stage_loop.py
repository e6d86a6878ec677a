"""The loop of a stage: pending units -> fixed batches -> generate or score -> append.

Owns batching, resume, redraws and what is written; what is asked and what a completion becomes is `stage`'s.
Invariants: a batch is a fixed slice of units, recomputed whole when only part of it is on disk; rows on disk are
compared, never rewritten. A streaming engine on a GPU has no batches: it is fed as rows finish, order of examples by
order of examples, and what is finished out of turn is kept (`Released`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

from cai.data import on_policy
from cai.data.stage import Accept, Draw, Stage, Unit, asked, first_draw, judged, measured
from cai.engine import Completion, Request
from cai.run import loop, sharing
from cai.run.context import Context
from cai.store.row_types import Record
from cai.store.rows import Key
from cai.world import world

SCORED_AT_ONCE = 64  # units scored between two writes: what a kill loses
SCORED_AT_ONCE_CPU = 4
STREAM_WINDOW = 4  # a streaming engine holds this many batches of rows that are not finished
KEPT_AT_ONCE = 64  # finished rows of a streaming engine between two writes: what a kill loses of them at most


def pending(context: Context, stage: Stage, items: Iterable[int], round_: int) -> list[int]:
    """Items whose inputs exist and whose row doesn't: computed from the records alone, without a model."""
    missing = (item for item in items if not context.log.has(stage.name, item, round_))
    return [item for item in missing if stage.render(context, item, round_) is not None]


def run_stage(
    context: Context, stage: Stage, items: Sequence[int], round_: int = 0, accept: Accept = lambda rows: rows
) -> None:
    """Bring every item of `items` through the stage: drawn as text, or scored where the stage measures.

    `accept(rows)`: a pure function over a batch's rows in order that may turn ok rows into rejected ones.
    """
    items = stage.items(context, items)
    todo = set(pending(context, stage, items, round_))
    if not todo:
        return
    units = [unit for item in items if (unit := stage.render(context, item, round_)) is not None]
    cuda = context.model().backend == "cuda"  # its loading is no part of the stage's time
    with on_policy.writer(context, stage.name):
        if stage.score is not None:
            of = {unit.item: unit for unit in units}
            keys = [(stage.name, unit.item, round_) for unit in units]
            chunk = SCORED_AT_ONCE if cuda else SCORED_AT_ONCE_CPU
            for part in loop.left(context, context.log, stage.name, keys, chunk, round_, stage.per_round):
                chosen = [of[item] for _, item, _ in part]
                found = zip(chosen, stage.score(context, chosen), strict=True)
                made = [measured(context, stage, unit, fields) for unit, fields in found]
                loop.write(context, context.log, part, made)
            return
        size = sharing.agreed(max(context.engine.stats.batch_size, 1), f"in {stage.name}")
        batch_size = size * (2 if context.engine.streams else 1)
        done = len(units) - len(todo)
        context.progress.begin(
            stage.name, round_, total=len(units), done=done, together=size, per_round=stage.per_round
        )
        if streaming(context) and not world().several:
            released = Released(context, stage, [unit for unit in units if unit.item in todo], round_)
            _commit(context, accept(released.take([])))  # what an earlier attempt kept
            for rows in _stream(context, stage, released.missing, size * STREAM_WINDOW):
                _commit(context, accept(released.take(rows)))
            released.end()
        elif shared := sharing.begin(context, context.log, stage.name, round_):
            _run_shared(context, stage, units, todo, batch_size, shared, accept)
        else:  # a resume must give the same bytes, so the same rows run together
            for start in range(0, len(units), batch_size):
                batch = units[start : start + batch_size]
                if any(unit.item in todo for unit in batch):
                    _commit(context, accept(draw(context, stage, batch)))
        context.progress.end(context.engine.stats)


def streaming(context: Context) -> bool:
    """Whether rows come and go one by one: not on a CPU, where a row's bytes hang on the rows beside it."""
    return context.engine.streams and context.model().backend == "cuda"


def _run_shared(
    context: Context,
    stage: Stage,
    units: Sequence[Unit],
    todo: set[int],
    size: int,
    shared: sharing.Shared,
    accept: Accept,
) -> None:
    """The batches dealt to the processes of the run; all of them take all rows, in unit order, behind the last."""

    def keys(batch: Sequence[Unit]) -> list[Key]:
        return [(stage.name, unit.item, unit.round) for unit in batch]

    if streaming(context):  # a row's draw does not hang on the rows beside it: what a shard holds is not drawn again
        waiting = [unit for unit in units if unit.item in todo]
        fresh = [unit for unit, key in zip(waiting, keys(waiting), strict=True) if key not in shared.spare]
        batches = [fresh[start : start + size] for start in range(0, len(fresh), size)]
        mine = [unit for number in shared.mine([keys(batch) for batch in batches]) for unit in batches[number]]
        for rows in _stream(context, stage, mine, size * STREAM_WINDOW):
            shared.put(rows)
        batches = [waiting[start : start + size] for start in range(0, len(waiting), size)]
    else:
        batches = [list(units[start : start + size]) for start in range(0, len(units), size)]
        batches = [batch for batch in batches if any(unit.item in todo for unit in batch)]
        for number in shared.mine([keys(batch) for batch in batches]):
            shared.put(draw(context, stage, batches[number]))
    place = {key: number for number, key in enumerate(keys(units))}
    for found in shared.settled([keys(batch) for batch in batches]):
        rows = sorted(cast(list[Record], found), key=lambda row: place[row["stage"], row["item"], row["round"]])
        _commit(context, accept(rows))


def draw(context: Context, stage: Stage, units: Sequence[Unit]) -> list[Record]:
    """The rows of one slice, in unit order; nothing is written, so the units may be no items of the run (an exam's)."""
    rows: dict[int, Record] = {}
    draws = {unit.item: first_draw(context, stage, unit) for unit in units}
    for item, first in draws.items():
        request = asked(context, first)
        if isinstance(request, Request):
            context.engine.submit(request)
        else:
            rows[item] = request
    for completion in context.engine.completions(context.stopped):
        if (again := _taken(context, draws, rows, completion)) is not None:
            context.engine.submit(again)
    context.check_stop(f"in {stage.name}")
    return [rows[unit.item] for unit in units]


def _stream(context: Context, stage: Stage, units: Sequence[Unit], window: int) -> Iterator[list[Record]]:
    """Feed the engine as rows finish, `window` unfinished ones at most; finished rows in any order, some at a time.

    Rows that run together share their prefix: units go by the order of their examples, so that the engine runs empty
    once an order and not once an order and window.
    """
    prompt = context.prompts[stage.prompt]
    waiting = deque(sorted(units, key=lambda unit: prompt.order(unit.shift)))
    rows: dict[int, Record] = {}
    draws: dict[int, Draw] = {}

    def wanted() -> Iterator[Request]:
        """What fills the window; a unit that has no room is a row at once."""
        while waiting and len(draws) < window:
            first = first_draw(context, stage, waiting.popleft())
            request = asked(context, first)
            if isinstance(request, Request):
                draws[first.unit.item] = first
                yield request
            else:
                rows[first.unit.item] = request

    def finished() -> list[Record]:
        found = list(rows.values())
        rows.clear()
        return found

    while waiting or draws:
        for request in wanted():
            context.engine.submit(request)
        for completion in context.engine.completions(context.stopped):
            if (again := _taken(context, draws, rows, completion)) is not None:
                context.engine.submit(replace(again, first=True))
            else:
                del draws[completion.id]
            if len(rows) >= KEPT_AT_ONCE:
                yield finished()
            for request in wanted():
                context.engine.submit(request)
        if rows:
            yield finished()
        context.check_stop(f"in {stage.name}")


def _taken(context: Context, draws: dict[int, Draw], rows: dict[int, Record], completion: Completion) -> Request | None:
    """Judge a completion: its row, or the request of the same unit with the next seed."""
    draw = draws[completion.id]
    row = judged(context, draw, completion)
    if draw.number < _redraws(context, draw.stage) and _is_faulty(context, draw.stage, row):
        draws[completion.id] = again = replace(draw, number=draw.number + 1)
        context.progress.step(len(completion.token_ids), items=0)
        request = asked(context, again)
        assert isinstance(request, Request)  # the prompt is the one that had room before
        return request
    rows[completion.id] = row
    context.progress.step(len(completion.token_ids))
    return None


def _redraws(context: Context, stage: Stage) -> int:
    greedy = getattr(context.recipe.sampling, stage.drawn).temperature == 0
    return context.recipe.pairs.redraws if stage.redraws and not greedy else 0


def _is_faulty(context: Context, stage: Stage, row: Record) -> bool:
    cut = stage.redraws_limit and context.recipe.pairs.reject_limit and row["finish"] == "length"
    return row["status"] != "ok" or cut


def _commit(context: Context, rows: Sequence[Record]) -> None:
    """Append what is not on disk. A recomputed row that differs (rounding on another GPU) is noted, never written."""
    fresh = []
    for row in rows:
        known = context.log.get(row["stage"], row["item"], row["round"])
        if known is None:
            fresh.append(row)
        elif known["text"] != row["text"] or known["status"] != row["status"]:
            context.run.event("recomputed_differs", stage=row["stage"], item=row["item"], round=row["round"])
    context.log.append(fresh)
    context.progress.committed(fresh)


class Released:
    """Rows of one stage of a run of one process that finish in any order, released in unit order.

    `units`: those that have no row in the log, in the order of their release. Those that wait for others stand in a
    shard meanwhile. The log's order depends on no timing. Invariants: a row that was taken is on disk, in the log or in
    the shard, before the next ones are asked for; a row of a shard is not drawn again; the shard goes when every row
    stands in the log.
    """

    def __init__(self, context: Context, stage: Stage, units: Sequence[Unit], round_: int) -> None:
        self._units, self._front = units, 0
        self._shard = sharing.Shared(context, context.log, stage.name, round_)
        kept = {(row["stage"], row["item"], row["round"]): row for row in self._shard.spare.values()}
        found = ((unit.item, kept.get((stage.name, unit.item, unit.round))) for unit in units)
        self._held = {item: cast(Record, row) for item, row in found if row is not None}

    @property
    def missing(self) -> list[Unit]:
        """The units of which no attempt kept a row."""
        return [unit for unit in self._units[self._front :] if unit.item not in self._held]

    def take(self, rows: Sequence[Record]) -> list[Record]:
        """The rows whose turn it is, in order; the others of these are on disk when this returns."""
        self._held |= {row["item"]: row for row in rows}
        first = self._front
        while self._front < len(self._units) and self._units[self._front].item in self._held:
            self._front += 1
        ready = [self._held.pop(unit.item) for unit in self._units[first : self._front]]
        self._shard.put(row for row in rows if row["item"] in self._held)
        return ready

    def end(self) -> None:
        assert self._front == len(self._units) and not self._held
        self._shard.done()
