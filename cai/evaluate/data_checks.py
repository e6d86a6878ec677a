"""What a person would look at before believing any loss: is the data set text, and did anything get better? Pure.

Owns the figures `data.*`, `labels.*` and `principles.*`, from the records and the pairs alone. Invariant: each figure
counts over everything that would be trained on or held out, and names its three worst texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cai.data import labels
from cai.data.pairs import PairSet
from cai.data.stage import shown_runs
from cai.metrics.figure import Figure, Figures, Outcome, Scored, Unscored, count, indicator, mean, rate, unmeasured
from cai.metrics.wordings import finds_nothing
from cai.recipe.constitution import Constitution
from cai.recipe.copies import copied
from cai.recipe.ends import Signs, has_sign, signs_of
from cai.recipe.prompts import Prompt
from cai.store.jsonl import Row
from cai.store.row_types import Example, Record, Round

MADE_BY = {"initial_answer": "answers", "critique": "critiques", "revised_answer": "revisions"}
SHOWN = 160  # characters of a worst text


def texts_of(example: Example) -> list[tuple[str, str]]:
    """(stage, text) of every text that an example holds."""
    made_by = "answers" if example.get("kind") == "sampled" else "revisions"
    found = [("answers", example["initial_answer"]), (made_by, example["revised_answer"])]
    found += [("critiques", entry["critique"]) for entry in example["rounds"]]
    return [*found, *(("revisions", entry["revised_answer"]) for entry in example["rounds"])]


def measure(
    pairs: PairSet, rows: Sequence[Record], prompts: Mapping[str, Prompt], constitution: Constitution
) -> Figures:
    """Every figure of this module, by metric name."""
    figures = [
        scaffolding(pairs.examples, {name: signs_of(prompts[name]) for name in MADE_BY.values() if name in prompts}),
        copies(pairs.examples, prompts),
        nothing_found(pairs.examples),
        *_labels(rows),
        *_principles(rows, constitution),
    ]
    return {figure.metric: figure for figure in figures}


def scaffolding(examples: Sequence[Example], signs: Mapping[str, Signs]) -> Figure:
    """Examples in which a text holds a sign that the transcript went on."""
    found = []
    for example in examples:
        for stage, text in texts_of(example):
            if (sign := has_sign(text, signs[stage]) if stage in signs else None) is not None:
                found.append({"item": example["item"], "stage": stage, "sign": sign, "text": text[-SHOWN:]})
                break
    return _counted("data.scaffolding", found, len(examples))


def copies(examples: Sequence[Example], prompts: Mapping[str, Prompt]) -> Figure:
    """Examples in which a text copies eight words of a prompt's example that the item's own texts do not hold."""
    shots, found = shown_runs(prompts), []
    for example in examples:
        inputs = [example["instruction"], example["initial_answer"]]
        for stage, text in texts_of(example):
            own = inputs if stage != "answers" else inputs[:1]
            if run := copied(text, shots, own):
                found.append({"item": example["item"], "stage": stage, "copied": run, "text": text[:SHOWN]})
                break
    return _counted("data.copied", found, len(examples))


def nothing_found(examples: Sequence[Example]) -> Figure:
    """Examples of which every critique says that nothing is wrong: their pairs prefer a rewriting to its original."""
    found = [
        {"item": example["item"], "critique": example["critique"][:SHOWN]}
        for example in examples
        if example.get("kind") != "sampled" and all(_nothing(entry) for entry in example["rounds"])
    ]
    return _counted("data.nothing_found", found, len(examples))


def _nothing(entry: Round) -> bool:
    return not entry.get("found", True) or finds_nothing(entry["critique"])


def _counted(metric: str, found: Sequence[Row], n: int) -> Figure:
    if not n:
        return unmeasured(metric, "no pair came through")
    return count(metric, len(found), n, worst=tuple(found[:3]))


def _labels(rows: Iterable[Record]) -> list[Figure]:
    """How often the checked revision is the better text, and how often the original wins outright."""
    checked = [row for row in rows if row["stage"] == "labels" and row["status"] == "ok"]
    if not checked:
        return []
    scored = [row for row in checked if _orders(row)]
    lost = [row for row in scored if _loses(row)]
    worst = tuple(
        {"item": row["item"], "margin": row["margin"], "used": row["used"]}
        for row in sorted(scored, key=lambda row: row["margin"] or 0.0)[:3]
    )
    unscored = len(checked) - len(scored)
    better: list[Outcome] = [indicator(not labels.fault(row)) for row in scored]
    original: list[Outcome] = [indicator(row in lost) for row in scored]
    margins: list[Outcome] = [Scored(margin) for row in scored if (margin := row["margin"]) is not None]
    judge = "the policy itself, adapter off"
    found = [
        rate("labels.better", better, judge=judge, worst=worst),
        rate("labels.original_wins", original, judge=judge, facts=_by_principle(scored, lost)),
        mean("labels.margin", margins, judge=judge),
    ]
    for figure in found:
        figure.facts["unscored"] = unscored
    return found


def _loses(row: Record) -> bool:
    """The original is preferred as clearly as a revision has to be: by more than the bar, or in both orders."""
    if (bar := row.get("bar")) is not None:
        return (row["margin"] or 0.0) < -bar
    both = _orders(row)
    return both is not None and both[0] <= 0 <= both[1]


def labels_known(rows: Iterable[Record], bar: float | None) -> Figures:
    """What the bar does to known revisions that had no part in setting it; nothing where there is no bar."""
    known = [row for row in rows if row["status"] == "ok" and row["use"] == "exam"] if bar is not None else []
    found = {}
    for name, kind in (("labels.known.better", "better"), ("labels.known.worse", "no better")):
        margins = [row["margin"] for row in known if row["known"] == kind]
        if outcomes := [_passes(margin, bar) for margin in margins]:
            found[name] = rate(name, outcomes, judge="the policy itself, adapter off", facts={"bar": bar})
    return found


def _passes(margin: float | None, bar: float | None) -> Outcome:
    if margin is None or bar is None or not math.isfinite(bar):
        return Unscored("a likelihood is not finite")
    return indicator(margin > bar)


def _orders(row: Record) -> tuple[float, float] | None:
    """Log-odds of the first and the second order; None where a likelihood is not finite."""
    first, second = row["first"], row["second"]
    return None if first is None or second is None else (first, second)


def _by_principle(scored: Sequence[Record], lost: Sequence[Record]) -> Row:
    """Principle -> "lost of judged"."""
    judged, beaten = (Counter(id_ for row in part for id_ in row["used"]) for part in (scored, lost))
    return {"by_principle": {id_: f"{beaten[id_]} of {judged[id_]}" for id_ in sorted(judged)}}


def _principles(rows: Iterable[Record], constitution: Constitution) -> list[Figure]:
    """What drawing by relevance gains over dealing blindly: mean score of the drawn less that of all that fit."""
    asked = [row for row in rows if row["stage"] == "relevance" and row["status"] == "ok"]
    if not asked:
        return []
    lifts: list[Outcome] = []
    used: Counter[str] = Counter()
    for row in asked:
        if (id_ := row["principle"]) is None:
            continue
        pool = str(row.get("pool", ""))
        used[f"{id_}/{pool}"] += 1
        fitting = {p.id for p in constitution.principles if not p.pools or pool in p.pools}
        values = [v for name, v in row["scores"].items() if v is not None and name in fitting]
        if values and (score := row["scores"][id_]) is not None:
            lifts.append(Scored(score - math.fsum(values) / len(values)))
    broken: list[Outcome] = [indicator(row["principle"] is not None) for row in asked]
    return [
        mean("principles.lift", lifts, judge="likelihood, adapter off", facts={"used": dict(sorted(used.items()))}),
        rate("principles.broken", broken, judge="likelihood, adapter off"),
    ]
