"""What is asked of the stages of a run as a whole: their names and order, their prompts, what each depends on.

The stages themselves stand in `stages`. No loops, no model: `stage_loop.run_stage` runs them, `collect` orders them. A
round is one principle: critique of the current text, then revision of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai.data import labels, sampled, slots
from cai.data.comparisons import ANSWER_FIELDS
from cai.data.stage import Stage, Unit
from cai.data.stages import CHAIN, COMPARISONS, CRITIQUES, INSTRUCTIONS, REVISIONS, revises
from cai.recipe.grid import Grid
from cai.recipe.identity import drop_unset, rounding
from cai.recipe.load import Recipe, flatten
from cai.recipe.prompts import Prompt, load_prompt, load_reviews
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import UnitExtra
from cai.terminal import stage_name


def make_instructions(grid: Grid) -> Stage:
    """Instructions from the seeded grid: `round` is the attempt; each attempt stands on its own cell."""

    def render(context: Context, item: int, attempt: int) -> Unit:
        recipe = context.recipe
        slot, number = slots.slot_of(item), slots.try_of(item) * recipe.instructions.max_tries + attempt
        pool = grid.pool(recipe.seed, slot, recipe.instructions.red_team_share)
        index = slot % slots.HELDOUT + number * slots.HELDOUT * 2 + (slots.HELDOUT if slot >= slots.HELDOUT else 0)
        cell = grid.cell(recipe.seed, index, pool)
        extra: UnitExtra = {"pool": pool, "cell": cell, "split": slots.split_of(item), "parent": None}
        return Unit(item, attempt, cell, None, extra, shift=slot)

    return replace(INSTRUCTIONS, render=render)


REVIEWS = "reviews"  # the prompt file of critiques and revisions in one transcript
GUARD = "guard"  # judges finished pairs: it stands behind the chain, with a model of its own (`guarding`)


def names() -> tuple[str, ...]:
    """Every stage that writes records, in order."""
    return (*(stage.name for stage in CHAIN), GUARD)


def named(name: str) -> Stage | None:
    return next((stage for stage in CHAIN if stage.name == name), None)


def round_of(row: Mapping[str, Any]) -> int:
    """The round that a row stands for: 0 where its number says which try it was."""
    found = named(row["stage"])
    return 0 if found is not None and found.attempts else int(row["round"])


def is_aside(name: str) -> bool:
    return any(stage.name == name and stage.aside for stage in CHAIN)


def drawn(prompt: str) -> str:
    """The section of [sampling] by which completions of a prompt file are drawn; "" where none are."""
    return next((stage.drawn for stage in CHAIN if stage.prompt == prompt), "")


def prompt_files(recipe: Recipe) -> tuple[str, ...]:
    """The prompt files that a run of this recipe reads; the policy's is trained and measured with."""
    examined = (CRITIQUES, REVISIONS)  # where no pair is revised, too: calibration reads the critic's prompt
    files = dict.fromkeys(stage.prompt_of(recipe) for stage in CHAIN if stage.enabled(recipe) or stage in examined)
    joint = {CRITIQUES.prompt, REVISIONS.prompt} if recipe.critiques.transcript == "joint" else set()
    found = [name for name in files if name not in joint]
    return (*found, *((REVIEWS,) if joint else ()), "policy")


def read_prompts(contents: Mapping[str, tuple[Path, bytes]], recipe: Recipe) -> dict[str, Prompt]:
    """Prompt name -> the checked prompt, from {file name: (path, bytes)}. Errors: CaiError, one line."""
    found: dict[str, Prompt] = {}
    for name, (path, data) in contents.items():
        shots = getattr(recipe.few_shot, name, -1)
        if name == REVIEWS:
            pair = load_reviews(path, CRITIQUES.fields, REVISIONS.fields, data)
            named = zip((CRITIQUES.prompt, REVISIONS.prompt), pair, strict=True)
            found |= {stage: replace(prompt, few_shot=shots) for stage, prompt in named}
        else:
            found[name] = replace(load_prompt(path, fields_of(name), data), few_shot=shots)
    return found


def fields_of(prompt: str) -> frozenset[str]:
    """The names that a prompt file fills in."""
    if prompt == labels.BY_ANSWER:
        return ANSWER_FIELDS
    return next((stage.fields for stage in CHAIN if stage.prompt == prompt), frozenset({"instruction"}))


def ordered(rounds: int, recipe: Recipe | None = None) -> list[tuple[Stage, int]]:
    """(stage, round) in the order in which they run: what stands once, the rounds, what stands once behind them."""
    chain = [stage for stage in CHAIN if recipe is None or stage.enabled(recipe)]
    rounds = rounds if recipe is None or revises(recipe) else 1  # later rounds are about revised texts
    begun = next((place for place, stage in enumerate(chain) if stage.per_round), len(chain))
    first, rest = chain[:begun], chain[begun:]
    inner = [(stage, round_) for round_ in range(rounds) for stage in rest if stage.per_round]
    return [*((stage, 0) for stage in first), *inner, *((stage, 0) for stage in rest if not stage.per_round)]


def label(stage: str, round_: int) -> str:
    """A stage's round for the eye."""
    found = named(stage)
    return stage_name(stage, round_, found is not None and found.per_round)


def upstream(stage: str, round_: int) -> frozenset[str]:
    """The stages on which a row depends, its own included; guard depends on all.

    So does a stage aside, and on what makes a pair: each try of a slot decides which requests it may have.
    """
    found = named(stage)
    if stage == GUARD or is_aside(stage):
        return frozenset(names()) | ({"pairs"} if is_aside(stage) else set())
    if found is None:
        return frozenset()
    inputs = {key for key in (*found.needs(round_), *found.reads(round_)) if key != (stage, round_)}
    return frozenset({stage}).union(*(upstream(*key) for key in inputs))


def stage_identity(recipe: Recipe, stage: str, files: Mapping[str, str]) -> dict[str, str]:
    """What made one stage's records beside the stages before it: the keys and files that only this stage adds."""
    found = named(stage)
    wanted = found.keys if found else (stage,)  # the guard's section has its name
    if found and found.optional and not found.aside and not found.enabled(recipe):
        return {}
    flat = flatten(recipe.model_dump(mode="json"))
    keep = {k: v for k, v in flat.items() if any(k == name or k.startswith(name + ".") for name in wanted)}
    keep.pop("model.backend", None)
    drop_unset(keep)
    keep |= rounding(recipe) if stage == CHAIN[0].name else {}
    keep |= {"pairs.kind": repr(recipe.pairs.kind)} if found in (CRITIQUES, REVISIONS) and not revises(recipe) else {}
    inputs = {f"prompts/{found.prompt_of(recipe)}.yaml", *found.files} if found else set()
    return keep | {f"sha256({name})": sha for name, sha in files.items() if name in inputs}


def limit_tokens(recipe: Recipe) -> int:
    """The most tokens that one item generates when nothing is tried twice."""
    if recipe.pairs.file:
        return 0
    given = CHAIN[0].name if recipe.instructions.file else ""
    each = [stage for stage, _ in ordered(recipe.rounds, recipe) if not stage.aside]
    drawn = [stage.drawn for stage in each if stage.drawn and stage.name != given]
    return sum(getattr(recipe.sampling, section).max_new_tokens for section in drawn)


def whole_items(rows: Iterable[Row], rounds: int, kind: str = "revision") -> set[int]:
    """The items whose last revision, or comparison where nothing is revised, stands: what may be accepted."""
    last = (COMPARISONS.name, 0) if kind == sampled.KIND else (REVISIONS.name, rounds - 1)
    return {row["item"] for row in rows if (row.get("stage"), row.get("round")) == last and row["status"] == "ok"}
