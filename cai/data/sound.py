"""Answers that no principle objects to: what SFT learns beside the revisions."""

from __future__ import annotations

from cai.data.pairs import PairSet
from cai.store.row_types import SoundAnswer


def sound_rows(pairs: PairSet, limit: int) -> list[SoundAnswer]:
    """Answers that no round found anything wrong with, of training items: what SFT may imitate beside the revisions."""
    found: list[SoundAnswer] = [
        {
            "item": reject["item"],
            "prompt": reject["example"]["instruction"],
            "chosen": reject["example"]["initial_answer"],
        }
        for reject in pairs.rejects
        if reject["reason"] == "no_issue" and reject["example"]["split"] == "train"
    ]
    return found[:limit]
