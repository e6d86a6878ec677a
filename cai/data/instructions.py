"""Where instructions come from: a user's file, the item tried before, or the model over the grid, near-duplicates out.

Owns the near-duplicate rule and the diversity figures; cai.recipe.intake reads the file. Rows from a file or
from an earlier try are records like any other (finish "file", no tokens). Invariant: no two accepted fresh
instructions of a run are closer than the recipe's threshold, so no held-out prompt has a near-duplicate that is
trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cai.data import slots
from cai.data.near import NearDuplicates, in_order, mean_nearest, normalise
from cai.data.rounds import instruction_of
from cai.data.stage import Accept, plain_row
from cai.recipe.arm_costs import ASIDE
from cai.recipe.intake.entries import Given
from cai.recipe.prompts import digest
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record

ALL_COMPARED = 2_000  # texts up to which each is asked for its nearest other one; of more a thousand are
ASKED = 1_000


def rejected(context: Context, items: Sequence[int], attempts: int, stage: str = "instructions") -> list[int]:
    """The items of which all the attempts before this one stand in the log and were rejected."""
    rows = {item: [context.log.get(stage, item, a) for a in range(attempts)] for item in items}
    return [item for item in items if all(row is not None and row["status"] != "ok" for row in rows[item])]


def drop_near_duplicates(context: Context, stage: str = "instructions", other: str = ASIDE[0]) -> Accept:
    """Reject what is too near to an accepted instruction of this stage or, when it begins, of the `other` one.

    What stands in the log is read once, not at every batch.
    """
    threshold = context.recipe.instructions.similarity_threshold
    others = [row["text"] for row in context.log.by_stage(other) if row["status"] == "ok"]
    seen, taken = NearDuplicates(others, threshold), 0
    kept_here: set[tuple[int, int]] = set()

    def accept(rows: list[Record]) -> list[Record]:
        nonlocal seen, taken
        logged = context.log.by_stage(stage)
        batch = {(row["item"], row["round"]) for row in rows}
        if any(context.log.has(stage, *key) for key in batch):  # a batch recomputed whole
            seen, taken = NearDuplicates(others, threshold), 0
            kept_here.clear()
        for row in logged[taken:]:
            key = (row["item"], row["round"])
            if row["status"] == "ok" and key not in kept_here and key not in batch:
                seen.add(row["text"])
        taken, kept = len(logged), []
        for row in rows:
            near = seen.nearest(row["text"]) if row["status"] == "ok" else 0.0
            if near:
                row = {**row, "status": "rejected", "reason": f"near_duplicate: {near:.2f}"}
            elif row["status"] == "ok":
                seen.add(row["text"])
                kept_here.add((row["item"], row["round"]))
            kept.append(row)
        return kept

    return accept


def take_from_file(context: Context, items: Sequence[int], lines: Sequence[Given]) -> int:
    """Give each item the next unused request of the file, near-duplicates passed over; how many got one.

    A row is known by its text, so a file that grew, or was put in another order, gives no request twice. Nor does it
    give one that an SFT stage is shown: it may stand in the held-out half.
    """
    shown = [row["text"] for row in context.log.by_stage(ASIDE[0]) if row["status"] == "ok"]
    seen = NearDuplicates(shown, context.recipe.instructions.similarity_threshold)
    rows = context.log.by_stage("instructions")
    used = {row["text"] for row in rows if "line" in row}
    for row in rows:
        if row["status"] == "ok" and row["parent"] is None:
            seen.add(row["text"])
    free = iter([line for line in lines if line.text not in used])
    fresh, alike = [], 0
    wanted = [i for i in items if context.log.get("instructions", i, 0) is None]
    for item in wanted:
        for line in free:
            if seen.nearest(line.text):
                alike += 1
                continue
            seen.add(line.text)
            fresh.append(_given(item, line.text, line.pool, None) | {"line": line.line})
            break
    context.log.append(fresh)
    if len(fresh) < len(wanted):
        _tell_shortage(context, len(fresh), len(wanted), alike, len(lines))
    return len(fresh)


def _tell_shortage(context: Context, got: int, wanted: int, alike: int, lines: int) -> None:
    """Once for a file, not in every wave again."""
    if any(event.get("lines") == lines for event in context.run.events("instructions_short")):
        return
    context.run.event("instructions_short", got=got, wanted=wanted, alike=alike, lines=lines)
    threshold = context.recipe.instructions.similarity_threshold
    why = f"passed over as too like an earlier one (instructions.similarity_threshold {threshold})"
    told = f"; {alike} {why}" if alike else ""
    context.progress.say(
        f"instructions.file: no line is left for {wanted - got} of {wanted} items that want a new one{told}. "
        "Add lines (a resume takes them until training begins), or lower items."
    )


def repeat(context: Context, items: Sequence[int]) -> None:
    """A retry keeps the instruction of the try before (new item number, so new seeds everywhere)."""
    rows = []
    for item in items:
        before = instruction_of(context, slots.earlier(item))
        if before is not None and context.log.get("instructions", item, 0) is None:
            rows.append(_given(item, before["text"], before["pool"], slots.earlier(item)) | {"cell": before["cell"]})
    context.log.append(rows)


def _given(item: int, text: str, pool: str, parent: int | None) -> Record:
    row = plain_row("instructions", item, 0, text) | {"finish": "file", "prompt_sha": digest(text.encode())}
    return row | {"pool": pool, "cell": None, "split": slots.split_of(item), "parent": parent}


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """n, share of distinct texts, distinct-2 (distinct word bigrams over all), mean nearest-neighbour similarity.

    `nearest_asked`: of how many texts the last is the mean, where it is not all.
    """
    normal = [normalise(text) for text in texts]
    grams = [pair for text in normal for pair in zip(text.split(), text.split()[1:], strict=False)]
    most = len(normal) if len(normal) <= ALL_COMPARED else ASKED
    near, asked = mean_nearest([in_order(text) for text in normal], most)
    sampled = {"nearest_asked": asked} if asked < len(normal) else {}
    return {
        "n": len(normal),
        "unique_share": len(set(normal)) / max(len(normal), 1),
        "distinct_2": len(set(grams)) / max(len(grams), 1),
        "nearest_neighbour": near,
    } | sampled


def summary(rows: Sequence[Record], wanted: int) -> Row:
    """What the instruction stage did: accepted, attempts, rejects by reason, diversity of the fresh ones."""
    fresh = [row for row in rows if row["status"] == "ok" and row["parent"] is None]
    reasons = Counter(str(row["reason"]).split(":")[0] for row in rows if row["status"] != "ok")
    drawn = sum(row.get("parent") is None for row in rows)  # a repeat of an instruction is no try
    counts = {"wanted": wanted, "accepted": len(fresh), "attempts": drawn, "rejects": dict(reasons)}
    return counts | {"diversity": diversity([row["text"] for row in fresh])}
