"""Figures of judged answers: who wins under which principle, in which pool, at equal length; refusals, lengths.

Pure: rows of `head_to_head` in, `Figure`s and plain rows out. A judgement without a number is unscored, never a tie.
Legend: `ours` against `theirs`; log-odds in nats that `ours` is better; a win is won in both orders, else a tie is 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cai.evaluate import preference
from cai.evaluate.head_to_head import Question
from cai.metrics.figure import Figure, Outcome, Scored, Unscored, finite_rows, mean, rate, unmeasured
from cai.metrics.objections import goes_along, objects
from cai.metrics.stats import bootstrap_mean, mcnemar_exact
from cai.metrics.text import words
from cai.metrics.wordings import is_refusal
from cai.recipe.constitution import Constitution, Principle
from cai.store.jsonl import Row
from cai.store.row_types import FigureRow

NO_NUMBER = "a log-probability is not finite"


@dataclass(frozen=True)
class Texts:
    """What both arms answered, by item; only prompts that both answered."""

    ours: Mapping[int, str]
    theirs: Mapping[int, str]


@dataclass(frozen=True)
class Under:
    """One list of judgements summarised: the win rate, the same at equal length, and the mean log-odds."""

    wins: Figure
    controlled: Figure
    log_odds: Figure

    def as_dict(self) -> Row:
        return {name: figure.as_dict() for name, figure in vars(self).items()}


def under(metric: str, rows: Sequence[Row], texts: Texts, judge: str) -> Under:
    """Wins, length-controlled wins and log-odds of these judgements, one a prompt."""
    wins = rate(f"{metric}.wins", [outcome(row, "win") for row in rows], judge=judge)
    odds = mean(f"{metric}.log_odds", [outcome(row, "log_odds") for row in rows], judge=judge)
    whole, name = finite_rows(rows, "log_odds"), f"{metric}.wins.length_controlled"
    if not whole:
        return Under(wins, unmeasured(name, "no answer was judged", judge, len(rows)), odds)
    sized = [{**row, **_sizes(texts, row["item"])} for row in whole]
    at_equal_length = preference.length_controlled(sized, judge)
    return Under(wins, replace(at_equal_length, metric=name, unscored=len(rows) - len(whole)), odds)


def outcome(row: Row, name: str) -> Outcome:
    return Unscored(NO_NUMBER) if row[name] is None else Scored(row[name])


def _sizes(texts: Texts, item: int) -> Row:
    """The names are `preference.length_controlled`'s."""
    return {"tuned_words": len(words(texts.ours[item])), "base_words": len(words(texts.theirs[item]))}


def of_place(rows: Iterable[Row], place: int) -> list[Row]:
    """The judgements under one principle (0: the judge's own wording)."""
    return [row for row in rows if row["round"] == place]


def of_items(rows: Iterable[Row], items: Iterable[int]) -> list[Row]:
    wanted = set(items)
    return [row for row in rows if row["item"] in wanted]


def by_group(questions: Sequence[Question], name: str) -> dict[str, list[int]]:
    """Pool or topic -> its items, in the order of the prompts; prompts that have none are left out."""
    groups: dict[str, list[int]] = {}
    for question in questions:
        if group := getattr(question, name):
            groups.setdefault(group, []).append(question.item)
    return groups


# --- principles of two constitutions


@dataclass(frozen=True)
class Asked:
    """A principle under which answers are judged, and whose it is: "A", "B" or "both"."""

    principle: Principle
    whose: str


def union(first: Constitution, second: Constitution) -> list[Asked]:
    """The principles of both, those of the first in front; equal texts once; a shared id with two texts says whose."""
    texts = [{p.principle.strip() for p in one.principles} for one in (first, second)]
    ids = [{p.id for p in one.principles if p.principle.strip() not in texts[0] & texts[1]} for one in (first, second)]
    found: list[Asked] = []
    for whose, one in (("A", first), ("B", second)):
        for principle in one.principles:
            if principle.principle.strip() in texts[0] & texts[1]:
                if whose == "A":
                    found.append(Asked(principle, "both"))
                continue
            twice = principle.id in ids[0] & ids[1]
            found.append(Asked(replace(principle, id=f"{principle.id} ({whose})") if twice else principle, whose))
    return found


# --- refusals, compliance and lengths


def refusals(questions: Sequence[Question], texts: Texts) -> list[Row]:
    """Share of answers that refuse, of either arm, in each pool and in all; the shift has an exact McNemar p."""
    answered = [question for question in questions if question.item in texts.ours and question.item in texts.theirs]
    groups = {"all": [q.item for q in answered], **by_group(answered, "pool")}
    return [_shares("refusals", pool, items, texts, is_refusal) for pool, items in groups.items()]


def compliance(questions: Sequence[Question], texts: Texts) -> list[Row]:
    """The same of red-team requests that are gone along with: neither refused nor objected to; no row without any."""
    answered = [question for question in questions if question.item in texts.ours and question.item in texts.theirs]
    items = by_group(answered, "pool").get("redteam", [])
    return [_shares("compliance", "redteam", items, texts, goes_along)] if items else []


def share_of(name: str, texts: Iterable[str], says: Callable[[str], bool]) -> FigureRow:
    return rate(name, [Scored(float(says(text))) for text in texts]).as_dict()


def _shares(name: str, pool: str, items: Sequence[int], texts: Texts, says: Callable[[str], bool]) -> Row:
    theirs, ours = ([of[item] for item in items] for of in (texts.theirs, texts.ours))
    return {
        "pool": pool,
        "n": len(items),
        "p": mcnemar_exact([says(text) for text in theirs], [says(text) for text in ours]),
        "theirs": share_of(f"{name}.{pool}.theirs", theirs, says),
        "ours": share_of(f"{name}.{pool}.ours", ours, says),
    }


def lengths(texts: Texts) -> Row:
    """Mean words of both arms' answers and the mean difference with its bootstrap interval."""
    both = [
        (len(words(texts.theirs[item])), len(words(text))) for item, text in texts.ours.items() if item in texts.theirs
    ]
    n = len(both)
    if not n:
        return {"n": 0, "theirs": None, "ours": None, "difference": None, "interval": None}
    means = [sum(side) / n for side in zip(*both, strict=True)]
    interval = bootstrap_mean([float(ours - theirs) for theirs, ours in both])
    return {"n": n, "theirs": means[0], "ours": means[1], "difference": means[1] - means[0], "interval": interval}


def most_different(questions: Sequence[Question], rows: Sequence[Row], texts: Texts, keep: int = 10) -> list[Row]:
    """The prompts on which the arms differ most: where one declines and the other does not, then by judged log-odds.

    Equal answers are no difference; a red-team request is declined by an objection, too. Row: item, prompt, pool, both
    texts, who declines, log-odds and win.
    """
    verdicts = {row["item"]: row for row in of_place(rows, 0)}
    found: list[Row] = []
    for question in questions:
        item = question.item
        verdict = verdicts.get(item)
        if verdict is None or texts.ours[item] == texts.theirs[item]:
            continue
        sides = (("theirs", texts.theirs), ("ours", texts.ours))
        declines = {side: _declines(of[item], question.pool) for side, of in sides}
        row: Row = {"item": item, "prompt": question.prompt, "pool": question.pool, "declines": declines}
        row |= {"theirs": texts.theirs[item], "ours": texts.ours[item]}
        found.append(row | {"log_odds": verdict["log_odds"], "win": verdict["win"]})
    return sorted(found, key=_distance)[:keep]


def _declines(text: str, pool: str) -> bool:
    return is_refusal(text) or (pool == "redteam" and objects(text))


def _distance(row: Row) -> tuple[bool, float, int]:
    declines = row["declines"]
    return declines["theirs"] == declines["ours"], -abs(row["log_odds"] or 0.0), row["item"]
