"""What people wrote beside their marks, for the report. Pure.

Owns which notes are shown and in which words; asking for them is `cai.commands.review`'s, agreement is `agreement`'s.
Invariant: a note on a planted text says nothing of the example that it was planted in, so it is not shown there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cai.store.jsonl import Row

SAID = {"skip": "can't tell", "equal": "about equal"}  # marks that the form words otherwise than the log


@dataclass(frozen=True)
class Note:
    """One note: on which text of which item, by whom, beside which mark."""

    item: int
    what: str
    rater: str
    mark: str
    text: str


def notes(reviews: Sequence[Row]) -> list[Note]:
    """Every note on a real text, by item, critique before revision, then by rater."""
    found = [
        Note(int(row["item"]), str(row["what"]), str(row["rater"]), _said(row), str(row["note"]).strip())
        for row in reviews
        if not row.get("control") and isinstance(row.get("note"), str) and row["note"].strip()
    ]
    return sorted(found, key=lambda note: (note.item, note.what, note.rater))


def _said(row: Row) -> str:
    """The mark in words; of two answers the arm that was found better, not the side that it stood on."""
    mark = str(row["mark"])
    return f"{row[mark]} better" if mark in ("left", "right") else SAID.get(mark, mark)


def by_item(found: Sequence[Note]) -> dict[int, list[Note]]:
    """The notes of each item that has one."""
    items: dict[int, list[Note]] = {}
    for note in found:
        items.setdefault(note.item, []).append(note)
    return items
