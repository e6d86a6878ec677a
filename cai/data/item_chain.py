"""The rows of one item by stage and round, and which of those that a pair needs is missing. Pure; judges none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cai.data.chain import label
from cai.store.row_types import Record


@dataclass
class Chain:
    """The rows of one item, by stage and round; only rows of status ok."""

    item: int
    rows: dict[tuple[str, int], Record] = field(default_factory=dict)
    failures: list[Record] = field(default_factory=list)

    def get(self, stage: str, round_: int = 0) -> Record | None:
        return self.rows.get((stage, round_))


def chain_of(item: int, rows: Iterable[Record]) -> Chain:
    """An instruction's accepted attempt stands at round 0."""
    chain = Chain(item)
    for row in rows:
        if row["status"] == "ok":
            chain.rows[row["stage"], 0 if row["stage"] == "instructions" else row["round"]] = row
        else:
            chain.failures.append(row)
    return chain


def lacking(chain: Chain, wanted: Iterable[tuple[str, int]]) -> str:
    """The first of these rows that is not there, with the reason why it was refused; "" if all are."""
    for stage, round_ in wanted:
        if chain.get(stage, round_) is None:
            same = [
                f for f in chain.failures if f["stage"] == stage and (stage == "instructions" or f["round"] == round_)
            ]
            why = f": {same[-1]['reason']}" if same else ""
            return f"{label(stage, round_)}{why}"
    return ""
