"""The blind comparison of two answers (J4): letters A and B, both orders, read from likelihoods. Pure but for the asks.

Owns the fields of prompts/judge_pair.yaml and how two orders combine: the letters' own preference cancels, and swapping
the texts negates the log-odds. Legend: d = log p(A) - log p(B), nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer, common
from cai.recipe.prompts import PLACEHOLDER, Prompt

PAIR_FIELDS = frozenset({"instruction", "principle", "first", "second"})
ANSWER_FIELDS = frozenset({"instruction", "principle", "answer"})
NO_PRINCIPLE = "An answer is helpful, honest and harmless."


def verdict_asks(
    scorer: Scorer, prompt: Prompt, name: Name, fields: Mapping[str, str], words: tuple[str, str], apart: str = ""
) -> Iterable[Ask]:
    """An ask a word. `apart`: the field in which the asks about a case differ; they share what stands before it.

    Only where it stands last: before the texts it leaves a case little to share, and a pass of its own for it.
    """
    rendered = prompt.render(fields, format=scorer.format, tokenizer=scorer.tokenizer)
    lead = "" if rendered.text[-1:].isspace() else " "
    shared, head = rendered.prefix_len, 0
    if apart and PLACEHOLDER.findall(prompt.final)[-1] == apart:
        other = prompt.render({**fields, apart: "?"}, format=scorer.format, tokenizer=scorer.tokenizer)
        shared, head = max(shared, common(rendered.token_ids, other.token_ids)), rendered.prefix_len
    for word in words:
        yield Ask((*name, word), tuple(rendered.token_ids), tuple(scorer.encode(lead + word)), shared, head)


def log_odds(scores: Mapping[Name, Score], name: Name, words: tuple[str, str]) -> float:
    first, second = (scores[*name, word].total for word in words)
    return first - second


def orders(scores: Mapping[Name, Score], name: Name) -> tuple[float, float]:
    """Log-odds for A with ours first, and with ours second."""
    first, second = (log_odds(scores, (*name, "j4", order), ("A", "B")) for order in (0, 1))
    return first, second


def pair_log_odds(scores: Mapping[Name, Score], name: Name) -> float:
    """Log-odds that ours is better with the letters' own preference cancelled; swapping the texts negates it."""
    first, second = orders(scores, name)
    return round((first - second) / 2, 6)


def pair_win(scores: Mapping[Name, Score], name: Name) -> float:
    """1 if ours wins in both orders, 0 if it loses in both, else 0.5; NaN, which is no tie, where one is not finite."""
    first, second = orders(scores, name)
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.nan
    if first > 0 and second < 0:
        return 1.0
    return 0.0 if first < 0 and second > 0 else 0.5


def answer_asks(
    scorer: Scorer, prompt: Prompt, name: Name, instruction: str, principle: str, ours: str, theirs: str
) -> list[Ask]:
    """Either text asked about by itself, `ours` first: four asks that `orders` reads, its letters for Yes and No.

    The rule stands last, so all rules of a text share what stands before.
    """
    asks: list[Ask] = []
    for order, text in enumerate((ours, theirs)):
        fields = {
            "instruction": scorer.cut(instruction),
            "answer": scorer.cut(text),
            "principle": principle or NO_PRINCIPLE,
        }
        found = verdict_asks(scorer, prompt, (*name, "j4", order), fields, ("Yes", "No"), apart="principle")
        asks += [replace(ask, name=(*ask.name[:-1], letter)) for ask, letter in zip(found, "AB", strict=True)]
    return asks


def margin(scores: Mapping[Name, Score], name: Name) -> float:
    """Log-odds that ours is better, the mean of both comparisons: as the label of a pair about one principle."""
    return (pair_log_odds(scores, (*name, 0)) + pair_log_odds(scores, (*name, 1))) / 2


def comparison_asks(
    scorer: Scorer, prompt: Prompt, name: Name, instruction: str, principle: str, ours: str, theirs: str
) -> list[Ask]:
    """Four asks: `ours` as A then as B, letters A and B."""
    asks: list[Ask] = []
    for order, (first, second) in enumerate(((ours, theirs), (theirs, ours))):
        fields = {
            "instruction": scorer.cut(instruction),
            "principle": principle or NO_PRINCIPLE,
            "first": scorer.cut(first),
            "second": scorer.cut(second),
        }
        asks += verdict_asks(scorer, prompt, (*name, "j4", order), fields, ("A", "B"), apart="principle")
    return asks
