"""The one loop: pending units -> fixed batches -> generate -> parse -> append. Every stage runs through `run_stage`.

Owns batching, resume, counting and rejects. A stage gives data and two pure functions: `render` (records -> prompt
fields, or None while an input is missing) and `parse` (text -> Parsed or Unparsed). Invariants: a batch is a fixed
slice of units, recomputed whole when only part of it is on disk; rows on disk are compared, never rewritten; every
unit that ran has exactly one row (ok, or rejected with a reason).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

from cai.data.parsing import Parsed, Unparsed, before_repetition
from cai.data.slots import seed_of
from cai.engine import Completion, Request, Sampling
from cai.recipe.copies import Shots, copied, shots_of
from cai.recipe.ends import cut, engine_stops, signs_of
from cai.recipe.load import Recipe
from cai.recipe.prompts import Prompt, Rendered
from cai.run.context import Context
from cai.run.loop import Key, fill
from cai.store.jsonl import Row
from cai.store.row_types import Record, RecordExtra, UnitExtra

SCORED_AT_ONCE = 64  # units scored between two writes: what a kill loses
SCORED_AT_ONCE_CPU = 4
STREAM_WINDOW = 4  # a streaming engine holds this many batches: what a kill loses at most


@dataclass(frozen=True)
class Unit:
    """One thing to generate. `fields` fill the prompt; `extra` goes into the row as it is; `shift`: few-shot order.

    `prefill`: how the completion begins; it is part of the text.
    """

    item: int
    round: int
    fields: Mapping[str, str]
    principle: str | None = None
    extra: UnitExtra = field(default_factory=UnitExtra)
    shift: int = 0
    prefill: str = ""


Accept = Callable[[list[Record]], list[Record]]  # a batch's rows in order; may turn ok rows into rejected ones
Inputs = tuple[tuple[str, int], ...]  # (stage, round) of the rows that one row is made of


def nothing(round_: int) -> Inputs:
    return ()


def always(recipe: Recipe) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """One step of the chain, whole: whoever needs to know of a stage (identity, fork, verify, status, tables, dry run,
    budget) reads it here, so a new stage is one of these in `chain.CHAIN` and nothing else.

    `render(context, item, round)` gives the unit or None where there is nothing to do; `parse(text, unit)` judges the
    form of what came back. A stage that measures instead of writing has `score(context, units)`, the rows' own fields.

    `needs(round)`: the rows without which a row of this round cannot be; `reads(round)`: those it also depends on.
    `keys`, `files`: what of the recipe and of its input files this stage adds to those before it (a prompt is added by
    itself). `sampling`: its section of [sampling] ("" = its name). `fields`: what fills its prompt.
    `items(context, items)`: which numbers it runs on, where they are not the run's own.
    `trims`: a text that begins to say the same again ends there.
    `limit_is_fault`: a completion that ran to the token limit is rejected here (else flagged, and judged as a pair).
    `redraws`: a rejected (or, with `redraws_limit`, cut) completion is drawn again, `pairs.redraws` times at most.
    """

    name: str
    prompt: str
    render: Callable[[Context, int, int], Unit | None]
    parse: Callable[[str, Unit], Parsed | Unparsed] | None = None
    limit_is_fault: bool = False
    redraws: bool = True
    redraws_limit: bool = False
    score: Callable[[Context, Sequence[Unit]], list[Row]] | None = None
    per_round: bool = False
    needs: Callable[[int], Inputs] = nothing
    reads: Callable[[int], Inputs] = nothing
    keys: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset()
    sampling: str = ""
    trims: bool = False
    enabled: Callable[[Recipe], bool] = always
    items: Callable[[Context, Sequence[int]], Sequence[int]] = lambda context, items: items
    inputs: Callable[[Unit], Sequence[str]] = lambda unit: tuple(unit.fields.values())

    @property
    def drawn(self) -> str:
        """The section of [sampling] that it draws by; "" for a stage that draws nothing."""
        return (self.sampling or self.name) if self.parse else ""


@dataclass(frozen=True)
class Draw:
    """One try to complete a unit; `number` counts from 0 and is part of the seed."""

    stage: Stage
    unit: Unit
    rendered: Rendered
    number: int = 0

    def seed(self, run_seed: int) -> int:
        return seed_of(run_seed, self.stage.name, self.unit.item, self.unit.round, self.number)


def pending(context: Context, stage: Stage, items: Iterable[int], round_: int) -> list[int]:
    """Items whose inputs exist and whose row doesn't: computed from the records alone, without a model."""
    missing = (item for item in items if not context.log.has(stage.name, item, round_))
    return [item for item in missing if stage.render(context, item, round_) is not None]


def run_stage(
    context: Context, stage: Stage, items: Sequence[int], round_: int = 0, accept: Accept | None = None
) -> int:
    """Bring every item of `items` through the stage; gives how many rows were added.

    `accept(rows)`: a pure function over a batch's rows in order that may turn ok rows into rejected ones.
    """
    items = stage.items(context, items)
    todo = set(pending(context, stage, items, round_))
    if not todo:
        return 0
    if stage.score is not None:
        return _score(context, stage, items, round_)
    units = [unit for item in items if (unit := stage.render(context, item, round_)) is not None]
    done = len(units) - len(todo)
    context.model()  # its loading is no part of the stage's time
    together = max(context.engine.stats.batch_size, 1)
    context.progress.begin(
        stage.name, round_, total=len(units), done=done, together=together, per_round=stage.per_round
    )
    added = 0
    for rows in _batches(context, stage, units, todo):
        rows = accept(rows) if accept else rows
        added += _commit(context, rows)
    context.progress.end(context.engine.stats)
    return added


def _score(context: Context, stage: Stage, items: Sequence[int], round_: int) -> int:
    """A stage that measures: fixed slices of its units, as everything that is scored."""
    units = {i: unit for i in items if (unit := stage.render(context, i, round_)) is not None}
    before = len(context.log.rows)

    def compute(part: list[Key]) -> list[Record]:
        chosen = [units[item] for _, item, _ in part]
        assert stage.score is not None
        found = zip(chosen, stage.score(context, chosen), strict=True)
        return [_measured(context, stage, unit, fields) for unit, fields in found]

    context.model()
    chunk = SCORED_AT_ONCE if context.model().backend == "cuda" else SCORED_AT_ONCE_CPU
    keys = [(stage.name, item, round_) for item in units]
    fill(context, context.log, stage.name, keys, chunk, compute, round_, stage.per_round)
    return len(context.log.rows) - before


def _measured(context: Context, stage: Stage, unit: Unit, fields: Row) -> Record:
    prompt = context.prompts.get(stage.prompt)
    row = _base_row(stage, unit, "", "ok", None) | {"prompt_sha": prompt.sha if prompt else ""}
    return cast(Record, row | fields)


def _batches(context: Context, stage: Stage, units: Sequence[Unit], todo: set[int]) -> Iterator[list[Record]]:
    """Rows in unit order: by fixed slices, or as a stream where the engine never waits for a slice's last row."""
    engine = context.engine
    size, streams = max(engine.stats.batch_size, 1), engine.streams
    if streams and context.model().backend == "cuda":
        waiting = [unit for unit in units if unit.item in todo]
        yield from _stream(context, stage, waiting, size * STREAM_WINDOW)
        return
    size *= 2 if streams else 1  # on a CPU a resume must give the same bytes, so the same rows run together
    for start in range(0, len(units), size):
        batch = units[start : start + size]
        if any(unit.item in todo for unit in batch):
            yield list(_generate(context, stage, batch))


def draw(context: Context, stage: Stage, units: Sequence[Unit]) -> list[Record]:
    """Rows for units that are no items of the run (an exam's), by the stage's own prompt, sampling and parser."""
    return list(_generate(context, stage, units))


def _generate(context: Context, stage: Stage, batch: Sequence[Unit]) -> list[Record]:
    """One slice: all its rows, in unit order."""
    rows: dict[int, Record] = {}
    draws = {unit.item: Draw(stage, unit, _rendered(context, stage, unit)) for unit in batch}
    for draw in draws.values():
        if (row := _submit(context, draw)) is not None:
            rows[draw.unit.item] = row
    for completion in context.engine.completions(context.stopped):
        _take(context, draws, rows, completion)
    context.check_stop(f"in {stage.name}")
    return [rows[unit.item] for unit in batch]


def _stream(context: Context, stage: Stage, units: Sequence[Unit], window: int) -> Iterator[list[Record]]:
    """Feed the engine as rows finish; release rows in unit order, so the log's order does not depend on timing."""
    rows: dict[int, Record] = {}
    draws: dict[int, Draw] = {}
    submitted = released = 0

    def feed() -> int:
        count = submitted
        while count < len(units) and count - released < window:
            draw = draws[units[count].item] = Draw(stage, units[count], _rendered(context, stage, units[count]))
            if (row := _submit(context, draw)) is not None:
                rows[draw.unit.item] = row
            count += 1
        return count

    def ready() -> list[Record]:
        count = released
        while count < len(units) and units[count].item in rows:
            count += 1
        for unit in units[released:count]:
            draws.pop(unit.item, None)
        return [rows.pop(unit.item) for unit in units[released:count]]

    while released < len(units):
        submitted = feed()
        for completion in context.engine.completions(context.stopped):
            _take(context, draws, rows, completion)
            if units[released].item in rows:
                batch = ready()
                released += len(batch)
                yield batch
                submitted = feed()
        if batch := ready():
            released += len(batch)
            yield batch
        context.check_stop(f"in {stage.name}")


def _rendered(context: Context, stage: Stage, unit: Unit) -> Rendered:
    model = context.model()
    prompt = context.prompts[stage.prompt]
    return prompt.render(
        unit.fields, format=model.format, tokenizer=model.tokenizer, shift=unit.shift, prefill=unit.prefill
    )


def _submit(context: Context, draw: Draw) -> Record | None:
    """Queue the request; a prompt that leaves no room for an answer becomes a rejected row instead."""
    recipe, model, rendered = context.recipe, context.model(), draw.rendered
    drawn = getattr(recipe.sampling, draw.stage.drawn)
    if len(rendered.token_ids) + drawn.max_new_tokens > model.max_seq_length:
        return _row(context, draw, "", "rejected", f"prompt_too_long: {len(rendered.token_ids)} tokens")
    stops = tuple(dict.fromkeys((*rendered.stop, *engine_stops(signs_of(context.prompts[draw.stage.prompt])))))
    sampling = Sampling(drawn.temperature, drawn.max_new_tokens, stops, model.tokenizer.eos_ids)
    seed = draw.seed(recipe.seed)
    context.engine.submit(Request(draw.unit.item, rendered.token_ids, sampling, seed, rendered.prefix_len))
    return None


def _take(context: Context, draws: dict[int, Draw], rows: dict[int, Record], completion: Completion) -> None:
    """Judge a completion: its row, or the unit in the queue again with the next seed."""
    draw = draws[completion.id]
    row = _judged(context, draw, completion)
    if draw.number < _redraws(context, draw.stage) and _is_faulty(context, draw.stage, row):
        draws[completion.id] = again = replace(draw, number=draw.number + 1)
        _submit(context, again)
        context.progress.step(len(completion.token_ids), items=0)
    else:
        rows[completion.id] = row
        context.progress.step(len(completion.token_ids))


def _redraws(context: Context, stage: Stage) -> int:
    greedy = getattr(context.recipe.sampling, stage.drawn).temperature == 0
    return context.recipe.pairs.redraws if stage.redraws and not greedy else 0


def _is_faulty(context: Context, stage: Stage, row: Record) -> bool:
    cut = stage.redraws_limit and context.recipe.pairs.reject_limit and row["finish"] == "length"
    return row["status"] != "ok" or cut


def _judged(context: Context, draw: Draw, completion: Completion) -> Record:
    """The row of a completion: cut where the transcript goes on, then parsed, then compared with the examples.

    What is cut is finished: what stands behind the sign is no part of it, so it neither loops nor ran to its limit.
    """
    prompt, unit = context.prompts[draw.stage.prompt], draw.unit
    found = cut(unit.prefill + completion.text, signs_of(prompt))
    if found.marker is None and draw.stage.trims and (kept := before_repetition(found.text)) != found.text:
        found, completion = replace(found, text=kept), replace(completion, finish="stop")
    if found.marker is not None:
        completion = replace(completion, text=found.text, finish="stop")
    assert draw.stage.parse is not None
    parsed = draw.stage.parse(found.text, unit)
    marks = ("cut_at_marker",) if found.marker is not None else ()
    if isinstance(parsed, Unparsed):
        return _flagged(_row(context, draw, found.text, "rejected", parsed.reason, completion), marks)
    if draw.stage.limit_is_fault and completion.finish == "length":
        return _flagged(_row(context, draw, parsed.text, "rejected", "ran_to_limit", completion), marks)
    if run := copied(parsed.text, shown_runs(context.prompts), draw.stage.inputs(unit)):
        return _flagged(_row(context, draw, parsed.text, "rejected", f"copied_example: {run}", completion), marks)
    return _flagged(_row(context, draw, parsed.text, "ok", None, completion), (*parsed.flags, *marks))


def _flagged(row: Record, flags: Sequence[str]) -> Record:
    return row | {"flags": list(flags)} if flags else row


def shown_runs(prompts: Mapping[str, Prompt]) -> Shots:
    """Runs of words of the examples of every prompt in use: a text may copy from the file of another stage."""
    return _shown_runs(tuple(prompts.values()))


@lru_cache(maxsize=4)
def _shown_runs(prompts: tuple[Prompt, ...]) -> Shots:
    return Shots(frozenset().union(*(shots_of(prompt).grams for prompt in prompts)))


def _base_row(stage: Stage, unit: Unit, text: str, status: str, reason: str | None) -> Record:
    return {
        "v": 1,
        "stage": stage.name,
        "item": unit.item,
        "round": unit.round,
        "principle": unit.principle,
        "text": text,
        "status": status,
        "reason": reason,
        "finish": None,
        "tokens": 0,
        "seed": 0,
        "prompt_sha": "",
    }


def _row(
    context: Context, draw: Draw, text: str, status: str, reason: str | None, completion: Completion | None = None
) -> Record:
    row: Record = {
        **_base_row(draw.stage, draw.unit, text, status, reason),
        "finish": completion.finish if completion else None,
        "tokens": len(completion.token_ids) if completion else 0,
        "seed": draw.seed(context.recipe.seed),
        "prompt_sha": draw.rendered.sha,
        **cast(RecordExtra, draw.unit.extra),
    }
    return row | {"draws": draw.number + 1} if draw.number else row


def _commit(context: Context, rows: Sequence[Record]) -> int:
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
    return len(fresh)
