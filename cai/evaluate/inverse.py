"""Does the constitution come back out? The base proposes rules that explain the labels of a run's pairs.

Owns the proposals (`inverse.proposals`), the score that two texts state the same rule (`inverse.match`), the bar of
that score as measured on the constitution itself (`inverse.calibration`), and how often a rule explains a label
(`inverse.explains`). After inverse constitutional AI (Findeis et al. 2024); the matching by likelihood is ours. Round 0
of proposals: pairs as labelled; round 1, the control: chosen and rejected swapped.
Legend: same(x, p) = mean log p(x | p stands before it as a rule) - mean log p(x | a rule that says nothing does), nats
a token. The bar: with a principle's own revision request as x, 95% of the requests score below it under every other
principle, so a text that states no other principle passes under one of them in at most about 1 of 20.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rapidfuzz import fuzz

from cai.data.slots import seed_of
from cai.engine import Sampling
from cai.engine.asks import Ask, Name, Scorer, score
from cai.evaluate.answering import drawn
from cai.evaluate.head_to_head import compared
from cai.evaluate.judge import finite
from cai.evaluate.scores import Evaluation, Key
from cai.metrics.figure import Figure, Scored, finite_rows, indicator, rate, sample, shuffled
from cai.recipe.constitution import Principle
from cai.recipe.prompts import Prompt
from cai.store.jsonl import Row
from cai.store.row_types import Pair

FIELDS = frozenset({"cases"})
SHOWN = 2  # pairs behind a proposal: two texts of 100 tokens each, and a base of 4,096 has room for the examples
PAIR_TOKENS = 100  # of each text that is shown
LONGEST = 60  # tokens of a rule
TEMPERATURE = 0.7
TRIED = 20  # pairs on which each rule is tried
ALIKE = 80.0  # token-sort ratio above which two proposals are one, as instructions.similarity_threshold
PASSED = 0.95  # of texts that state another rule, the share below the bar
NOTHING = "An answer is an answer."
CUES = ("A rule for answers: ", "\nThe same rule in other words: ")
LABELS, SWAPPED = 0, 1
JUDGE = "likelihood of the base"


def groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in a seeded order, SHOWN at a time; a rest that is smaller is shown as it is."""
    by_item = {pair["item"]: pair for pair in pairs}
    order = shuffled(sorted(by_item), 0, "inverse")
    return [[by_item[item] for item in order[at : at + SHOWN]] for at in range(0, len(order), SHOWN)]


def cases(scorer: Scorer, shown: Sequence[Pair], swapped: bool) -> str:
    """The pairs as the prompt has them, each text cut."""
    found = []
    for pair in shown:
        best, other = (pair["rejected"], pair["chosen"]) if swapped else (pair["chosen"], pair["rejected"])
        texts = (scorer.cut(text).replace("\n", " ") for text in (pair["prompt"], other, best))
        found.append("Instruction: {}\nOther: {}\nPreferred: {}".format(*texts))
    return "\n\n".join(found)


def propose(evaluation: Evaluation, prompt: Prompt, pairs: Sequence[Pair]) -> list[Row]:
    """One rule a group of pairs, as labelled and with the labels swapped. Row: item (the group), round, text."""
    shown = groups(pairs)
    keys: list[Key] = [(place, arm) for arm in (LABELS, SWAPPED) for place in range(len(shown))]
    for part in evaluation.left("inverse.proposals", keys, 8):
        with evaluation.base() as scorer:
            brief = Scorer(scorer.engine, scorer.tokenizer, scorer.format, PAIR_TOKENS)
            texts = [cases(brief, shown[place], arm == SWAPPED) for place, arm in part]
            rules = _drawn(evaluation, prompt, texts, part)
        rows = [{"metric": "inverse.proposals", "item": place, "round": arm, "text": rule} for (place, arm), rule in
                zip(part, rules, strict=True)]  # fmt: skip
        evaluation.write("inverse.proposals", part, rows)
    return evaluation.rows("inverse.proposals", keys)


def _drawn(evaluation: Evaluation, prompt: Prompt, texts: Sequence[str], part: Sequence[Key]) -> list[str]:
    """The first line of each completion, behind the prompt's beginning of a rule."""
    context, fields = evaluation.context, {number: {"cases": text} for number, text in enumerate(texts)}
    seeds = {n: seed_of(context.recipe.seed, "inverse", place, arm) for n, (place, arm) in enumerate(part)}
    with evaluation.model().adapter(False):
        line = Sampling(TEMPERATURE, LONGEST, ("\n",))
        found = drawn(context, prompt, fields, line, "while rules are proposed", seeds)
    said = [found[number]["text"] for number in fields]
    return [f"{prompt.prefill} {text.splitlines()[0] if text else ''}".strip() for text in said]


def distinct(rows: Sequence[Row], prompt: Prompt) -> tuple[list[str], int]:
    """The proposals that say something, near-duplicates once; and how many copied the rule of one of the examples.

    A copy says nothing of the pairs: a model of 135M parameters gave the last example's rule for pairs of any kind.
    """
    kept: list[str] = []
    copied = 0
    for row in rows:
        text = row["text"]
        if any(_alike(text, example.assistant) for example in prompt.examples):
            copied += 1
        elif len(text.removeprefix(prompt.prefill).split()) >= 2 and not any(_alike(text, other) for other in kept):
            kept.append(text)
    return kept, copied


def _alike(one: str, other: str) -> bool:
    return fuzz.token_sort_ratio(one.lower(), other.lower()) >= ALIKE


# --- do two texts state the same rule?


def same(scorer: Scorer, texts: Mapping[int, str], principles: Sequence[Principle]) -> dict[tuple[int, int], float]:
    """{(text, principle's place): same}; NaN where a likelihood is none."""
    asks: list[Ask] = []
    rules = [NOTHING, *(principle.principle for principle in principles)]
    for name, text in texts.items():
        said = scorer.continuation(text)
        asks += [Ask((name, place), scorer.context(CUES[0], rule, CUES[1]), said) for place, rule in enumerate(rules)]
    found: dict[Name, float] = {name: s.total / max(1, len(s.logps)) for name, s in score(scorer, asks).items()}
    return {
        (name, place): found.get((name, place), math.nan) - found.get((name, 0), math.nan)
        for name in texts
        for place in range(1, len(rules))
    }


def matched(
    evaluation: Evaluation, metric: str, texts: Sequence[str], principles: Sequence[Principle], first: int = 0
) -> list[list[float | None]]:
    """`same` of each text under every principle, from rows (item: the text's number from `first`, round: the place)."""
    size = len(principles)
    keys: list[Key] = [(first + i, place) for i in range(len(texts)) for place in range(1, size + 1)]
    for part in evaluation.left(metric, keys, size):
        item = part[0][0]
        with evaluation.base() as scorer:
            found = same(scorer, {item: texts[item - first]}, principles)
        said = {place: finite(found[item, place]) for _, place in part}
        rows = [{"metric": metric, "item": item, "round": place, "same": value} for place, value in said.items()]
        evaluation.write(metric, part, rows)
    values = {(row["item"], row["round"]): row["same"] for row in evaluation.rows(metric, keys)}
    return [[values[first + i, place] for place in range(1, size + 1)] for i in range(len(texts))]


def best(values: Sequence[float | None]) -> tuple[int, float]:
    """The place (from 0) under which a text scores highest, and how high; (-1, -inf) where nothing has a number."""
    known = [(value, -place) for place, value in enumerate(values) if value is not None]
    if not known:
        return -1, -math.inf
    value, place = max(known)
    return -place, value


def bar(calibration: Sequence[Sequence[float | None]]) -> tuple[float, Figure]:
    """The bar, and the share of requests that reach it under their own principle before all others (sensitivity).

    `calibration[i][j]`: principle i's revision request under principle j.
    """
    others = sorted(best([v for j, v in enumerate(row) if j != i])[1] for i, row in enumerate(calibration))
    found = others[math.ceil(PASSED * len(others)) - 1] if len(others) > 1 else math.inf
    hits = [indicator(best(row)[0] == i and best(row)[1] > found) for i, row in enumerate(calibration)]
    return found, rate("inverse.sensitivity", hits, judge=JUDGE)


# --- how often a rule explains a label


def explained(evaluation: Evaluation, rules: Sequence[str], pairs: Sequence[Pair]) -> list[Figure]:
    """For each rule the share of pairs whose chosen text the judge prefers under it, blind, in both orders."""
    tried = {item: pair for pair in pairs if (item := pair["item"]) in set(sample([p["item"] for p in pairs], TRIED))}
    asked = [Principle(str(number), rule, "", "") for number, rule in enumerate(rules)]
    keys: list[Key] = [(item, number) for item in tried for number in range(len(rules))]
    for part in evaluation.left("inverse.explains", keys, max(1, len(rules))):
        pair = tried[part[0][0]]
        with evaluation.judging() as scorer:
            found = compared(scorer, evaluation.judge, pair["prompt"], (pair["chosen"], pair["rejected"]), asked)
        rows = [{"metric": "inverse.explains", "item": pair["item"], "round": n, **row} for n, row in enumerate(found)]
        evaluation.write("inverse.explains", part, rows)
    rows = finite_rows(evaluation.rows("inverse.explains", keys), "win")
    wins = [[Scored(row["win"]) for row in rows if row["round"] == number] for number in range(len(rules))]
    return [rate("inverse.explains", of_rule, judge=evaluation.judge_name) for of_rule in wins]


def summary(
    rules: Sequence[str],
    values: Sequence[Sequence[float | None]],
    above: float,
    principles: Sequence[Principle],
    about: Sequence[str],
) -> Row:
    """Which principle each rule states, the share of `about` (ids that pairs were about) recovered, and of invented."""
    stated: list[Row] = []
    for rule, row in zip(rules, values, strict=True):
        place, value = best(row)
        nearest = principles[place].id if place >= 0 else None
        known = value if math.isfinite(value) else None
        stated.append({"rule": rule, "nearest": nearest, "same": known, "matched": value > above})
    found = {one["nearest"] for one in stated if one["matched"]}
    recovered = rate("inverse.recovered", [indicator(id_ in found) for id_ in about], judge=JUDGE)
    invented = rate("inverse.invented", [indicator(not one["matched"]) for one in stated], judge=JUDGE)
    return {"rules": stated, "recovered": recovered.as_dict(), "invented": invented.as_dict()}
