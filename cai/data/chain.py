"""The four generated stages as data: instructions -> answers -> critiques and revisions, round by round.

Owns what fills each prompt and which parser judges what came back. No loops, no files, no model: `stage.run_stage`
runs them, `runner` orders them. A round is one principle: critique of the current text, then revision of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cai.data import parsing, slots
from cai.data.parsing import Parsed, Unparsed
from cai.data.stage import Inputs, Stage, Unit
from cai.recipe.constitution import Principle, choose
from cai.recipe.grid import Grid
from cai.recipe.load import Recipe, flatten, rounding
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.terminal import stage_name


def principle_of(context: Context, item: int, round_: int) -> Principle:
    """The principle of an item's round: seeded, balanced over the run, never twice within an item."""
    recipe = context.recipe
    return choose(context.constitution, recipe.seed, item, recipe.rounds)[round_]


def current_text(context: Context, item: int, round_: int) -> str | None:
    """What round `round_` criticises: the answer, or the revision of the round before."""
    row = context.ok("answers", item) if round_ == 0 else context.ok("revisions", item, round_ - 1)
    return row["text"] if row else None


def instruction_of(context: Context, item: int) -> dict[str, Any] | None:
    """The accepted instruction row of an item, whichever attempt produced it."""
    for attempt in range(context.recipe.instructions.max_tries):
        row = context.log.get("instructions", item, attempt)
        if row is None:
            return None
        if row["status"] == "ok":
            return row
    return None


def make_instructions(grid: Grid) -> Stage:
    """Instructions from the seeded grid: `round` is the attempt; each attempt stands on its own cell."""

    def render(context: Context, item: int, attempt: int) -> Unit:
        recipe = context.recipe
        slot, number = slots.slot_of(item), slots.try_of(item) * recipe.instructions.max_tries + attempt
        pool = grid.pool(recipe.seed, slot, recipe.instructions.red_team_share)
        index = slot % slots.HELDOUT + number * slots.HELDOUT * 2 + (slots.HELDOUT if slot >= slots.HELDOUT else 0)
        cell = grid.cell(recipe.seed, index, pool)
        extra = {"pool": pool, "cell": cell, "split": slots.split_of(item), "parent": None}
        return Unit(item, attempt, cell, None, extra, shift=slot)

    return replace(INSTRUCTIONS, render=render)


def _render_answer(context: Context, item: int, round_: int) -> Unit | None:
    row = instruction_of(context, item)
    return Unit(item, 0, {"instruction": row["text"]}) if row else None


def _render_critique(context: Context, item: int, round_: int) -> Unit | None:
    row, text = instruction_of(context, item), current_text(context, item, round_)
    if row is None or text is None:
        return None
    principle = principle_of(context, item, round_)
    fields = {"instruction": row["text"], "answer": text, "critique_request": principle.critique_request}
    return Unit(item, round_, fields, principle.id)


def _render_revision(context: Context, item: int, round_: int) -> Unit | None:
    row, text = instruction_of(context, item), current_text(context, item, round_)
    critique = context.ok("critiques", item, round_)
    if row is None or text is None or critique is None:
        return None
    principle = principle_of(context, item, round_)
    fields = {
        "instruction": row["text"],
        "answer": text,
        "critique": critique["text"],
        "revision_request": principle.revision_request,
    }
    return Unit(item, round_, fields, principle.id)


def _parse(parser: Any) -> Any:
    def parse(text: str, unit: Unit) -> Parsed | Unparsed:
        return parser(text)

    return parse


def _answer_or_revision(round_: int) -> Inputs:
    """The text that a round criticises."""
    return (("revisions", round_ - 1),) if round_ else (("answers", 0),)


INSTRUCTIONS = Stage(
    "instructions",
    "instructions",
    lambda context, item, round_: None,  # `make_instructions` knows the grid
    _parse(parsing.instruction),
    limit_is_fault=True,
    redraws=False,
    keys=(
        "seed",
        "model",
        "instructions",
        "sampling.min_p",
        "sampling.no_repeat_ngram",
        "sampling.instructions",
        "few_shot.instructions",
    ),
    files=("prompts/grid.yaml", "instructions.file"),
    fields=frozenset({"topic", "kind", "persona", "tone"}),
)
ANSWERS = Stage(
    "answers",
    "answers",
    _render_answer,
    _parse(parsing.answer),
    redraws_limit=True,
    needs=lambda round_: (("instructions", 0),),
    keys=("sampling.answers", "few_shot.answers"),
    fields=frozenset({"instruction"}),
)
CRITIQUES = Stage(
    "critiques",
    "critiques",
    _render_critique,
    _parse(parsing.critique),
    per_round=True,
    needs=_answer_or_revision,
    keys=("rounds", "sampling.critiques", "few_shot.critiques"),
    files=("constitution.yaml",),
    fields=frozenset({"instruction", "answer", "critique_request"}),
)
REVISIONS = Stage(
    "revisions",
    "revisions",
    _render_revision,
    _parse(parsing.revision),
    redraws_limit=True,
    per_round=True,
    needs=lambda round_: (("critiques", round_),),
    reads=_answer_or_revision,
    keys=("rounds", "sampling.revisions", "few_shot.revisions"),
    files=("constitution.yaml",),
    fields=frozenset({"instruction", "answer", "critique", "revision_request"}),
)
CHAIN: tuple[Stage, ...] = (INSTRUCTIONS, ANSWERS, CRITIQUES, REVISIONS)
GUARD = "guard"  # judges finished pairs: it stands behind the chain, with a model of its own (`guarding`)


def names() -> tuple[str, ...]:
    """Every stage that writes records, in order."""
    return (*(stage.name for stage in CHAIN), GUARD)


def named(name: str) -> Stage | None:
    return next((stage for stage in CHAIN if stage.name == name), None)


def drawn(prompt: str) -> str:
    """The section of [sampling] by which completions of a prompt file are drawn."""
    return next(stage.drawn for stage in CHAIN if stage.prompt == prompt)


def prompts() -> dict[str, frozenset[str]]:
    """Prompt file -> the names that its stage fills in; the policy's is trained and measured with."""
    return {stage.prompt: stage.fields for stage in CHAIN if stage.prompt} | {"policy": frozenset({"instruction"})}


def ordered(rounds: int, recipe: Recipe | None = None) -> list[tuple[Stage, int]]:
    """(stage, round) in the order in which they run: what stands once, the rounds, what stands once behind them."""
    chain = [stage for stage in CHAIN if recipe is None or stage.enabled(recipe)]
    inner = [place for place, stage in enumerate(chain) if stage.per_round]
    first, last = (inner[0], inner[-1] + 1) if inner else (len(chain), len(chain))
    middle = [(stage, round_) for round_ in range(rounds) for stage in chain[first:last]]
    return [*((stage, 0) for stage in chain[:first]), *middle, *((stage, 0) for stage in chain[last:])]


def label(stage: str, round_: int) -> str:
    """A stage's round for the eye."""
    found = named(stage)
    return stage_name(stage, round_, found is not None and found.per_round)


def upstream(stage: str, round_: int) -> frozenset[str]:
    """The stages on which a row depends, its own included; guard depends on all."""
    if stage == GUARD:
        return frozenset(names())
    found = named(stage)
    if found is None:
        return frozenset()
    inputs = {key for key in (*found.needs(round_), *found.reads(round_)) if key != (stage, round_)}
    return frozenset({stage}).union(*(upstream(*key) for key in inputs))


def stage_identity(recipe: Recipe, stage: str, files: Mapping[str, str]) -> dict[str, str]:
    """What made one stage's records beside the stages before it: the keys and files that only this stage adds."""
    found = named(stage)
    wanted = found.keys if found else (stage,)  # the guard's section has its name
    flat = flatten(recipe.model_dump(mode="json"))
    keep = {k: v for k, v in flat.items() if any(k == name or k.startswith(name + ".") for name in wanted)}
    keep.pop("model.backend", None)
    keep |= rounding(recipe) if stage == CHAIN[0].name else {}
    inputs = {f"prompts/{found.prompt}.yaml", *found.files} if found else set()
    return keep | {f"sha256({name})": sha for name, sha in files.items() if name in inputs}


def limit_tokens(recipe: Recipe) -> int:
    """The most tokens that one item generates when nothing is tried twice."""
    given = CHAIN[0].name if recipe.instructions.file else ""
    drawn = [stage.drawn for stage, _ in ordered(recipe.rounds, recipe) if stage.drawn and stage.name != given]
    return sum(getattr(recipe.sampling, section).max_new_tokens for section in drawn)


def whole_items(rows: Iterable[Row], rounds: int) -> set[int]:
    """The items whose last revision stands: the pairs that may be accepted."""
    last = (REVISIONS.name, rounds - 1)
    return {row["item"] for row in rows if (row.get("stage"), row.get("round")) == last and row["status"] == "ok"}
