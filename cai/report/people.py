"""What people said of fresh answers that they read blind: who won, and how far they agree with judge and each other.

Owns those figures; which answers a run has is `fresh`'s, the marks' words are `cai.data.marks`'s. Pure. Invariants: a
mark counts only for the texts that still stand; a vote is told from the first arm's side, 1, 0.5 or 0, and so is the
judge's (better in both orders, or neither). No kappa where one of two has one answer for all: it would be 0 of itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cai.data.marks import ANSWERS
from cai.metrics.figure import Scored, rate
from cai.metrics.stats import kappa_interval, kappa_of
from cai.report.fresh import Fresh, ordered, read_fresh
from cai.report.snapshot import Snapshot
from cai.store.jsonl import Row
from cai.terminal import number, percent, printable

Votes = dict[int, float]
Pair = tuple[str, str]


def people(snapshot: Snapshot) -> Row:
    """`wins`: a row a rater and pair of arms; `agreement`: judge and rater, rater and rater; {} without such marks."""
    marks = [row for row in snapshot.reviews if row["what"] == ANSWERS]
    if not marks:
        return {}
    fresh = read_fresh(snapshot.path)
    standing = [row for row in marks if row["key"] == _key(fresh, row)]
    votes: dict[tuple[Pair, str], Votes] = {}
    for row in standing:
        pair = ordered(str(row["left"]), str(row["right"]))
        if row["mark"] != "skip":
            votes.setdefault((pair, str(row["rater"])), {})[int(row["item"])] = _vote(row, pair)
    wins = [_won(fresh, standing, pair, rater, votes[pair, rater]) for pair, rater in sorted(votes)]
    found = [row for pair in sorted({pair for pair, _ in votes}) for row in _agreements(fresh, pair, votes)]
    return {"wins": wins, "agreement": found, "stale": len(marks) - len(standing)}


def _key(fresh: Fresh, row: Row) -> str:
    """The key that a mark of these arms and prompt has now; "" where one of the texts is gone."""
    first, second = ordered(str(row["left"]), str(row["right"]))
    item = int(row["item"])
    return fresh.key(first, second, item) if item in fresh.both(first, second) else ""


def _vote(row: Row, pair: Pair) -> float:
    if row["mark"] == "equal":
        return 0.5
    return 1.0 if row[row["mark"]] == pair[0] else 0.0


def told(pair: Pair) -> str:
    return f"{pair[0]} over {pair[1]}"


def _won(fresh: Fresh, standing: Sequence[Row], pair: Pair, rater: str, votes: Votes) -> Row:
    """How often the first arm is better; and how often the left side: far from one half, the sides mattered."""
    values = list(votes.values())
    figure = rate(f"people.{rater}", [Scored(value) for value in values], judge=rater)
    mine = [r for r in standing if r["rater"] == rater and ordered(str(r["left"]), str(r["right"])) == pair]
    counts = {name: values.count(value) for name, value in (("better", 1.0), ("equal", 0.5), ("worse", 0.0))}
    return {
        "rater": rater,
        "what": told(pair),
        **counts,
        "n": figure.n,
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "left": sum(row["mark"] == "left" for row in mine),
        "sided": sum(row["mark"] in ("left", "right") for row in mine),
        "skipped": sum(row["mark"] == "skip" for row in mine),
        "alike": fresh.alike(*pair),
    }


def _agreements(fresh: Fresh, pair: Pair, votes: dict[tuple[Pair, str], Votes]) -> list[Row]:
    """The judge and each rater, then each two raters, on the prompts that both decided."""
    raters = sorted(rater for of, rater in votes if of == pair)
    judge, leaning = fresh.judged(*pair), fresh.leaning(*pair)
    rows = [_agreed(f"judge and {rater}", pair, judge, votes[pair, rater], leaning) for rater in raters]
    rows += [
        _agreed(f"{one} and {two}", pair, votes[pair, one], votes[pair, two])
        for one, two in itertools.combinations(raters, 2)
    ]
    return [row for row in rows if row["n"]]


def _agreed(who: str, pair: Pair, first: Votes, second: Votes, sides: Votes | None = None) -> Row:
    """Cohen's kappa over better, equal and worse. `decided`: of the prompts on which both took a side, how often the
    same; `sides`: those of the first, where they say more than its votes (the judge's log-odds)."""
    both = [(first[item], second[item]) for item in sorted(first.keys() & second.keys())]
    taken = first if sides is None else sides
    sided = [
        taken[item] == second[item] for item in taken.keys() & second.keys() if 0.5 not in (taken[item], second[item])
    ]
    ones, twos = [a for a, _ in both], [b for _, b in both]
    value = kappa_of(ones, twos) if len(set(ones)) > 1 and len(set(twos)) > 1 else None
    low, high = kappa_interval(both, kappa_of) if value is not None else (None, None)
    raw = sum(a == b for a, b in both) / len(both) if both else None
    return {"who": who, "what": told(pair), "n": len(both), "raw": raw, "kappa": value, "low": low, "high": high,
            "decided": (sum(sided), len(sided))}  # fmt: skip


def lines(found: Row) -> list[str]:
    """The same for the screen."""
    if not found:
        return []
    said = []
    for row in found["wins"]:
        counts = f"{row['better']} better, {row['equal']} equal, {row['worse']} worse of {row['n']}"
        wins = f"wins {percent(row['value'])} [{percent(row['low'])}, {percent(row['high'])}]"
        said.append(f"{row['rater']}, {row['what']}: {counts}, {wins}; left side {row['left']} of {row['sided']}")
    for row in found["agreement"]:
        said.append(f"{row['who']}, {row['what']}: {agreed(row)}")
    if found["stale"]:
        said.append(f"{found['stale']} marks are of answers that are not there any more: not counted")
    return [printable(line) for line in said]


def agreed(row: Row) -> str:
    """`n=20, 65%, kappa 0.41 [0.1, 0.7]; where both took a side 9 of 11`, of any kind of agreement."""
    interval = "" if row["low"] is None else f" [{number(row['low'], 2)}, {number(row['high'], 2)}]"
    kappa = "" if row["kappa"] is None else f", kappa {number(row['kappa'], 2)}{interval}"
    right, total = row.get("decided", (0, 0))
    sided = f"; where both took a side {right} of {total}" if total else ""
    return f"n={row['n']}, {percent(row['raw'])}{kappa}{sided}"
