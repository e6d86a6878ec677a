"""The probe prompts answered by the base and by the tuned model: what one bought, to be read at every milestone.

Owns the rows of stage "probes" in records.jsonl: one for each prompt and arm. Invariants: answers are greedy, under the
policy prompt, cut as fresh answers are; a row that stands is never drawn again, and one of an adapter that was replaced
since (more items: trained anew) stays beside that of the new one. They are shown and gate nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from cai.data.slots import HELDOUT
from cai.engine import Sampling
from cai.evaluate.answering import drawn
from cai.recipe.probes import Probe
from cai.run.context import Context
from cai.run.loop import left, write
from cai.store.row_types import Record
from cai.store.rows import Key

STAGE = "probes"
FIRST = HELDOUT + 499_000  # their item numbers: above every slot that a recipe of fewer held-out prompts has
AT_ONCE = 8
BASE = 0  # the round of the base's rows; the tuned arm's are 1, 2, ... for one adapter after the other


def ask(context: Context, probes: Sequence[Probe], adapter: Path) -> int:
    """Answer what is not answered yet; gives how many rows were added. With none missing, no model is loaded."""
    if not probes or not context.recipe.evaluation.enabled:
        return 0
    digest = adapter_digest(adapter)
    before = len(context.log.rows)
    for arm, round_, of in (("base", BASE, ""), ("tuned", _round_of(context, digest), digest)):
        keys: list[Key] = [(STAGE, FIRST + place, round_) for place in range(len(probes))]
        asked = [_asked(context, place, probe) for place, probe in enumerate(probes)]
        for part in left(context, context.log, f"{STAGE}, {arm}", keys, AT_ONCE):
            chosen = [(int(item), round_, asked[item - FIRST]) for _, item, _ in part]
            write(context, context.log, part, _answers(context, chosen, arm, adapter, of))
    return len(context.log.rows) - before


def adapter_digest(adapter: Path) -> str:
    """16 hex of the weights; which adapter a row is of."""
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        return "none"
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _round_of(context: Context, digest: str) -> int:
    """The round under which this adapter's rows stand: that of its rows, else the next."""
    known = dict.fromkeys(row["adapter"] for row in context.log.by_stage(STAGE) if row["round"] != BASE)
    places = {of: place for place, of in enumerate(known, start=BASE + 1)}
    return places.get(digest, len(places) + BASE + 1)


def _asked(context: Context, place: int, probe: Probe) -> Probe:
    """The probe at a place, as the base was asked it: a file that was edited since would compare two questions."""
    row = context.log.get(STAGE, FIRST + place, BASE)
    return probe if row is None else Probe(row["probe"], row["pool"], row["prompt"])


def _answers(
    context: Context, asked: Sequence[tuple[int, int, Probe]], arm: str, adapter: Path, digest: str
) -> list[Record]:
    """One row a probe, in order."""
    model, policy = context.model(), context.prompts["policy"]
    model.attach(adapter, context.recipe.lora)
    model.mode("generate")
    greedy = Sampling(0.0, context.recipe.evaluation.probe_tokens)
    fields = {item: {"instruction": probe.prompt} for item, _, probe in asked}
    with model.adapter(arm == "tuned"):
        context.progress.follow(model.engine(context.recipe.engine).stats)
        rows = drawn(context, policy, fields, greedy, "while answering the probes")
    shared = {"principle": None, "status": "ok", "reason": None, "seed": 0, "prompt_sha": policy.sha}
    made = [
        {"v": 1, "stage": STAGE, "item": item, "round": round_}
        | {**shared, **rows[item], "arm": arm, "adapter": digest}
        | {"probe": probe.id, "pool": probe.pool, "prompt": probe.prompt}
        for item, round_, probe in asked
    ]
    return [cast(Record, row) for row in made]
