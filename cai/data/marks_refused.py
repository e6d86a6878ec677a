"""The training pairs of a run that people's marks leave out, and the list of them that holds once training began.

Owns eval/marks.json; the marks and what they mean are `marks`'.
"""

from __future__ import annotations

from pathlib import Path

import orjson

from cai import errors
from cai.data import marks
from cai.data.pairs import PairSet
from cai.errors import CaiError
from cai.run.context import Context
from cai.store import records
from cai.store.files import write_json_atomic
from cai.terminal import say


def of_run(context: Context, pairs: PairSet) -> dict[int, str]:
    """The items that people's marks refuse, where `hygiene.reviews` is on; written to eval/marks.json.

    From the beginning of training on the written list holds: what is marked later changes no data set of this run.
    """
    if not context.recipe.hygiene.reviews:
        return {}
    run, path = context.run, context.run.eval / "marks.json"
    if "training_identity" in run.manifest and path.is_file():
        return _removed(path)
    reviews = records.read(run.path / "reviews.jsonl", marks.REVIEW_KEY)
    if odd := len(reviews) - len(marks.whole(reviews)):
        raise CaiError(
            f"{run.path}/reviews.jsonl: {odd} of {len(reviews)} lines are no whole marks: what they refuse is unknown. "
            "Put the file back from a copy, take them out, or go on without: --set hygiene.reviews=false",
            errors.CORRUPT,
        )
    reviews = marks.of_texts(reviews)
    mine = {pair["item"] for pair in pairs.train}
    refused = {item: detail for item, detail in marks.refused(reviews).items() if item in mine}
    if mine and len(refused) == len(mine):
        raise CaiError(
            f"{run.path}/reviews.jsonl: a mark refuses each of the {len(mine)} training pairs. "
            "Make more items, or go on without the marks: --set hygiene.reviews=false",
            errors.QUALITY,
        )
    run.eval.mkdir(exist_ok=True)
    removed = [{"item": item, "detail": detail} for item, detail in refused.items()]
    write_json_atomic(path, {"raters": sorted({row["rater"] for row in reviews}), "removed": removed})
    say(f"marks: {len(reviews)} of people, {len(refused)} training pairs left out by them")
    return refused


def _removed(path: Path) -> dict[int, str]:
    """eval/marks.json as it was written before training began; nothing else tells what was left out then."""
    try:
        return {int(row["item"]): str(row["detail"]) for row in orjson.loads(path.read_bytes())["removed"]}
    except (ValueError, TypeError, KeyError):
        raise CaiError(
            f"{path}: not whole, and training began without what it lists: put it back from a copy, or fork the run",
            errors.CORRUPT,
        ) from None
