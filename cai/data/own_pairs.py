"""Pairs of the user's own (`pairs.file`) in place of generated ones: which are trained on, held out, or left out.

Owns that choice and what is said of it. Pure over the rows of the file and the recipe: a run, its report and a resume
build the same set from the run's own copy. An item is the row's place in the file, so more items renumber nothing.
Invariant: no prompt is both trained on and held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cai.data.examples import example_of, pair_of
from cai.data.pairs import PairSet
from cai.data.slots import HELDOUT
from cai.metrics.figure import shuffled
from cai.metrics.text import words
from cai.recipe.intake import pairfile
from cai.recipe.intake.pairfile import KEY, OwnPair, PairIntake
from cai.recipe.load import Recipe
from cai.store.row_types import Example, Record, Reject, TextPair
from cai.terminal import printable

SHOWN, WIDTH = 2, 70
WORDS = {
    "identical": "chosen and rejected are the same",
    "duplicate": "the same pair stands further up",
    "contradicts": "the same two texts stand further up the other way round",
    "more_turns": "more than one turn: the policy's prompt has one",
    "empty_prompt": "no text of a user",
    "empty_chosen": "chosen is empty",
    "empty_rejected": "rejected is empty",
    "prompt_held_out": "its prompt is held out",
    "guard": "refused by the guard",
}


def build(rows: Sequence[OwnPair], recipe: Recipe, refused: Mapping[int, str] | None = None) -> PairSet:
    """The first `items` sound rows to train on, `heldout.items` others held out. `refused`: item -> the guard's reason.

    Held out are the rows that say so (`split`), else a seeded draw, so that a sorted file is no sorted held-out set.
    """
    refused = refused or {}
    faults = _faults(rows)
    marked = [place for place, row in enumerate(rows) if row.heldout]
    drawn = marked or shuffled(range(len(rows)), recipe.seed, "held-out pairs")
    heldout = {p for p in drawn if p not in faults and HELDOUT + p not in refused}
    heldout = set([p for p in drawn if p in heldout][: recipe.heldout.items])
    aside = {rows[place].prompt for place in (marked or heldout)}
    examples: list[Example] = []
    rejects: list[Reject] = []
    for place, row in enumerate(rows):
        if len(examples) == recipe.items:
            break
        if row.heldout or (place in heldout and not marked):
            continue
        why = faults.get(place) or ("prompt_held_out" if row.prompt in aside else "")
        why = why or ("guard" if place in refused else "")
        if why:
            rejects.append(_reject(place, row, why, refused.get(place, "")))
        else:
            examples.append(_example(place, row))
    examples += [_example(HELDOUT + place, rows[place]) for place in sorted(heldout)]
    for item in sorted(item for item in refused if item >= HELDOUT):
        rejects.append(_reject(item, rows[item - HELDOUT], "guard", refused[item]))
    return PairSet(examples, [pair_of(example) for example in examples], rejects)


def _faults(rows: Sequence[OwnPair]) -> dict[int, str]:
    """Place -> why a row is no pair to train on."""
    found: dict[int, str] = {}
    seen: set[tuple[str, str, str]] = set()
    for place, row in enumerate(rows):
        key = (row.prompt, row.chosen, row.rejected)
        if row.fault:
            found[place] = row.fault
        elif words(row.chosen) == words(row.rejected):
            found[place] = "identical"
        elif key in seen:
            found[place] = "duplicate"
        elif (row.prompt, row.rejected, row.chosen) in seen:
            found[place] = "contradicts"
        seen.add(key)
    return found


def _reject(item: int, row: OwnPair, why: str, detail: str) -> Reject:
    return {"item": item, "reason": why, "detail": detail or f"line {row.line}: {WORDS[why]}", "all": [why]}


def _example(item: int, row: OwnPair) -> Example:
    texts: TextPair = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    example = example_of(texts, item, row.pool, "heldout" if item >= HELDOUT else "train")
    return example if row.margin is None else example | {"margin": row.margin}


def of_run(path: Path, recipe: Recipe, rows: Sequence[Record]) -> PairSet:
    """The pairs of a run by its own copy of the file. `rows`: its records, for what the guard refused."""
    copy = path / KEY
    return build(pairfile.read(copy.read_bytes(), str(copy), pool=recipe.instructions.pool).rows, recipe, guarded(rows))


def guarded(rows: Sequence[Record]) -> dict[int, str]:
    """Item -> the guard's reason."""
    return {row["item"]: str(row["reason"]) for row in rows if row["stage"] == "guard" and row["status"] != "ok"}


def about(intake: PairIntake, name: str, recipe: Recipe) -> list[str]:
    """What is said of the file before anything starts: counts, the first rows, what is taken, left out and short."""
    found, rows = build(intake.rows, recipe), intake.rows
    pools = ", ".join(f"{sum(row.pool == pool for row in rows):,} {pool}" for pool in ("benign", "redteam"))
    lines = [f"{KEY}: {name}: {len(rows):,} pairs, {pools} ({intake.how}); nothing is generated"]
    for row in rows[:SHOWN]:
        texts = (printable(text, one_line=True)[:WIDTH] for text in (row.prompt, row.chosen, row.rejected))
        lines.append("  line {}: {} | chosen: {} | rejected: {}".format(row.line, *texts))
    lines += [f"  {note}" for note in intake.notes]
    train, heldout = len(found.train), len(found.heldout)
    lines.append(f"  taken: {train:,} to train on, {heldout:,} held out (items, heldout.items)")
    if found.rejects:
        told = ", ".join(f"{count:,} {reason} ({WORDS[reason]})" for reason, count in found.reasons.items())
        lines.append(f"  left out: {told}")
    if train < recipe.items or heldout < recipe.heldout.items:
        lines.append(
            f"  short: {recipe.items:,} to train on and {recipe.heldout.items:,} held out are asked for. "
            "Add pairs, or lower items or heldout.items"
        )
    elif (most := len(build(rows, recipe.model_copy(update={"items": len(rows)})).train)) > train:
        lines.append(f"  not taken: {most - train:,} more; --set items={most} trains on all")
    return lines
