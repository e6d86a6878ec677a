"""What a stage is, what is asked of the model for a unit, and the row that a completion becomes.

A stage gives data and two pure functions: `render` (records -> prompt fields, or None while an input is missing) and
`parse` (text -> Parsed or Unparsed). Owns the request and the row of one draw; `stage_loop` owns batches, resume and
redraws. Invariant: every unit that ran has exactly one row (ok, or rejected with a reason).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from operator import or_
from typing import cast

from cai.data.parsing import Parsed, Unparsed
from cai.data.slots import seed_of
from cai.engine import Completion, Request, Sampling
from cai.recipe.copies import Shots, copied, shots_of
from cai.recipe.ends import cut, engine_stops, signs_of
from cai.recipe.load import Recipe
from cai.recipe.prompts import Prompt, Rendered, Shift
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record, RecordExtra, UnitExtra


@dataclass(frozen=True)
class Unit:
    """One thing to generate. `fields` fill the prompt; `extra` goes into the row as it is; `shift`: the examples shown.

    `prefill`: how the completion begins; it is part of the text. `repairs`: a revision that leaves all that its
    critique quotes is refused.
    """

    item: int
    round: int
    fields: Mapping[str, str]
    principle: str | None = None
    extra: UnitExtra = field(default_factory=UnitExtra)
    shift: Shift = 0
    prefill: str = ""
    repairs: bool = False


Accept = Callable[[list[Record]], list[Record]]  # a batch's rows in order; may turn ok rows into rejected ones
Inputs = tuple[tuple[str, int], ...]  # (stage, round) of the rows that one row is made of


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
    `attempts`: a row's round is which try it is, and each stands for the stage's one round.
    `aside`: no step of an item: it runs once, on numbers of its own, when no slot is tried any more.
    `optional`: a stage that came later: where it is off it adds nothing to an identity, so that runs of before fork.
    `trims(text, unit)`: a text without what is no part of it. One that loses its end is finished.
    `limit_is_fault`: a completion that ran to the token limit is rejected here (else flagged, and judged as a pair).
    `chosen(recipe)`: the prompt file where it is another than `prompt`.
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
    needs: Callable[[int], Inputs] = lambda round_: ()
    reads: Callable[[int], Inputs] = lambda round_: ()
    keys: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    fields: frozenset[str] = frozenset()
    sampling: str = ""
    trims: Callable[[str, Unit], str] | None = None
    optional: bool = False
    aside: bool = False
    attempts: bool = False
    enabled: Callable[[Recipe], bool] = lambda recipe: True
    items: Callable[[Context, Sequence[int]], Sequence[int]] = lambda context, items: items
    inputs: Callable[[Unit], Sequence[str]] = lambda unit: tuple(unit.fields.values())
    chosen: Callable[[Recipe], str] = lambda recipe: ""

    def prompt_of(self, recipe: Recipe) -> str:
        """The prompt file that a run of the recipe asks with."""
        return self.chosen(recipe) or self.prompt

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


def first_draw(context: Context, stage: Stage, unit: Unit) -> Draw:
    """The first draw of a unit, its prompt rendered for the loaded model."""
    model = context.model()
    prompt = context.prompts[stage.prompt]
    rendered = prompt.render(
        unit.fields, format=model.format, tokenizer=model.tokenizer, shift=unit.shift, prefill=unit.prefill
    )
    return Draw(stage, unit, rendered)


def asked(context: Context, draw: Draw) -> Request | Record:
    """What the engine is asked; a prompt that leaves no room for an answer is a rejected row instead."""
    recipe, model, rendered = context.recipe, context.model(), draw.rendered
    drawn = getattr(recipe.sampling, draw.stage.drawn)
    if len(rendered.token_ids) + drawn.max_new_tokens > model.max_seq_length:
        return _row(context, draw, "", f"prompt_too_long: {len(rendered.token_ids)} tokens")
    stops = tuple(dict.fromkeys((*rendered.stop, *engine_stops(signs_of(context.prompts[draw.stage.prompt])))))
    sampling = Sampling(drawn.temperature, drawn.max_new_tokens, stops, model.tokenizer.eos_ids)
    return Request(draw.unit.item, rendered.token_ids, sampling, draw.seed(recipe.seed), rendered.prefix_len)


def judged(context: Context, draw: Draw, completion: Completion) -> Record:
    """The row of a completion: cut where the transcript goes on, then parsed, then compared with the examples.

    What is cut is finished: what stands behind the sign is no part of it, so it neither loops nor ran to its limit.
    """
    prompt, unit = context.prompts[draw.stage.prompt], draw.unit
    found = cut(unit.prefill + completion.text, signs_of(prompt))
    if draw.stage.trims and (kept := draw.stage.trims(found.text, unit)) != found.text:
        ended = not found.text.rstrip().endswith(kept.rstrip())
        found, completion = (
            replace(found, text=kept),
            replace(completion, finish="stop" if ended else completion.finish),
        )
    if found.marker is not None:
        completion = replace(completion, text=found.text, finish="stop")
    assert draw.stage.parse is not None
    parsed = draw.stage.parse(found.text, unit)
    marks = ("cut_at_marker",) if found.marker is not None else ()
    if isinstance(parsed, Unparsed):
        return _flagged(_row(context, draw, found.text, parsed.reason, completion), marks)
    if draw.stage.limit_is_fault and completion.finish == "length":
        return _flagged(_row(context, draw, parsed.text, "ran_to_limit", completion), marks)
    if run := copied(parsed.text, shown_runs(context.prompts), draw.stage.inputs(unit)):
        return _flagged(_row(context, draw, parsed.text, f"copied_example: {run}", completion), marks)
    return _flagged(_row(context, draw, parsed.text, None, completion), (*parsed.flags, *marks))


def _flagged(row: Record, flags: Sequence[str]) -> Record:
    return row | {"flags": list(flags)} if flags else row


def shown_runs(prompts: Mapping[str, Prompt]) -> Shots:
    """Runs of words of the examples of every prompt in use: a text may copy from the file of another stage."""
    return _shown_runs(tuple(prompts.values()))


@lru_cache(maxsize=4)
def _shown_runs(prompts: tuple[Prompt, ...]) -> Shots:
    return reduce(or_, map(shots_of, prompts), Shots(frozenset()))


def plain_row(
    stage: str, item: int, round_: int, text: str, principle: str | None = None, reason: str | None = None
) -> Record:
    """A row of what was not drawn: ok, or rejected where there is a reason."""
    return {
        "v": 1,
        "stage": stage,
        "item": item,
        "round": round_,
        "principle": principle,
        "text": text,
        "status": "rejected" if reason else "ok",
        "reason": reason or None,
        "finish": None,
        "tokens": 0,
        "seed": 0,
        "prompt_sha": "",
    }


def _row(context: Context, draw: Draw, text: str, reason: str | None, completion: Completion | None = None) -> Record:
    unit = draw.unit
    row: Record = {
        **plain_row(draw.stage.name, unit.item, unit.round, text, unit.principle, reason),
        "finish": completion.finish if completion else None,
        "tokens": len(completion.token_ids) if completion else 0,
        "seed": draw.seed(context.recipe.seed),
        "prompt_sha": draw.rendered.sha,
        **cast(RecordExtra, unit.extra),
    }
    return row | {"draws": draw.number + 1} if draw.number else row


def measured(context: Context, stage: Stage, unit: Unit, fields: Row) -> Record:
    """The row of a unit that was scored instead of drawn."""
    prompt = context.prompts.get(stage.prompt_of(context.recipe))
    row = plain_row(stage.name, unit.item, unit.round, "", unit.principle)
    return cast(Record, row | {"prompt_sha": prompt.sha if prompt else ""} | fields)
