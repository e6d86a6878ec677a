"""The kinds of pairs of one run side by side (`pairs.kind` = "both"): yield, margin of the label, P1.

Owns the figures that end in a kind's name. Pure over the pairs and the scores that others made; a run of one kind has
none of these, for its plain figures say the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.data.kinds import kind_of
from cai.data.pairs import PairSet
from cai.evaluate.dpo_health import LOGPS
from cai.evaluate.preference import POLICY, implicit
from cai.metrics.figure import Figure, Outcome, Scored, by_metric, count, finite_rows, mean, rate
from cai.store.row_types import PairScore

WRITER = "the policy itself, adapter off"


def of_data(pairs: PairSet, kinds: Sequence[str]) -> dict[str, Figure]:
    """Of each kind: the share of items that gave a pair, and by how much the judge preferred its chosen text."""
    figures = []
    for kind in kinds if len(kinds) > 1 else ():
        kept = [pair for pair in pairs.kept if kind_of(pair["item"]) == kind]
        lost = [reject for reject in pairs.rejects if kind_of(reject["item"]) == kind]
        tried = len(kept) + len(lost)
        share = len(kept) / tried if tried else 0.0
        figures.append(count(f"pairs.yield.{kind}", share, tried, facts={"kept": len(kept)}))
        margins: list[Outcome] = [Scored(margin) for pair in kept if (margin := pair.get("margin")) is not None]
        if margins:
            figures.append(mean(f"labels.margin.{kind}", margins, judge=WRITER))
    return by_metric(*figures)


def of_preference(rows: Sequence[PairScore], kinds: Sequence[str]) -> dict[str, Figure]:
    """P1 of each kind, on held-out pairs and on those trained on; the prompts are the same, the two texts are not."""
    figures = []
    for kind in kinds if len(kinds) > 1 else ():
        own = [row for row in finite_rows(rows, *LOGPS) if kind_of(row["item"]) == kind]
        for split, tail in (("heldout", ""), ("train", ".train")):
            wins: list[Outcome] = [Scored(implicit(row)) for row in own if row["split"] == split]
            if wins:
                figures.append(rate(f"preference.p1{tail}.{kind}", wins, judge=POLICY))
    return by_metric(*figures)
