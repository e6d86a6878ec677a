"""The base prompted well against the tuned model: what training adds over prompting.

Owns three arms that nobody trains (`few_shot`: pairs of the run as a transcript before the prompt; `constitution`: its
principles before it; `best_of_n`: the judge's choice among drawn answers) and the judged comparison of the tuned
model's fresh answers with theirs. Invariant: every arm answers the same held-out prompts under the policy's own cues,
and the base judges, blind and in both orders, as in P3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cai.data.comparisons import comparison_asks, pair_log_odds, pair_win
from cai.engine import Sampling, Score
from cai.engine.asks import Name, score
from cai.engine.model import Model
from cai.evaluate import answering, forgetting, preference
from cai.evaluate.judge import finite
from cai.evaluate.scores import Evaluation, Key
from cai.metrics.figure import Figures, sample
from cai.metrics.text import words
from cai.recipe.prompts import FewShotExample, Prompt
from cai.run import loop
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Pair

SLICE = 8  # prompts answered, or comparisons judged, between two writes
SHOWN = 6  # pairs in the few-shot arm's transcript: as many as the chain's own prompts show


def prompt_of(context: Context, arm: str, training_pairs: Sequence[Pair], tokens: int = 0) -> Prompt:
    """The policy's prompt with what this arm puts before it; `tokens` of answers follow."""
    policy = context.prompts["policy"]
    if arm == "few_shot":
        return replace(
            policy, examples=tuple(_fitting(context.model(), shown_of(training_pairs), tokens)), _prefixes={}
        )
    if arm == "constitution":
        asked = f"An assistant answers. Its answers keep to these rules:\n{rules_of(context)}"
        return replace(policy, preamble="\n\n".join(filter(None, (policy.preamble, asked))), _prefixes={})
    return policy


def rules_of(context: Context) -> str:
    return "\n".join(f"- {p.principle.strip()}" for p in context.constitution.principles)


def shown_of(training_pairs: Sequence[Pair]) -> list[FewShotExample]:
    places = sorted(sample(range(len(training_pairs)), SHOWN))
    return [FewShotExample(training_pairs[place]["prompt"], training_pairs[place]["chosen"]) for place in places]


def _fitting(model: Model, shown: Sequence[FewShotExample], tokens: int) -> list[FewShotExample]:
    """As many of them, in their order, as leave half of the context, and so many tokens, to prompt and answers."""
    left, kept = min(model.max_seq_length // 2, model.max_seq_length - tokens), []
    for example in shown:
        left -= len(model.tokenizer.encode(f"{example.user}\n\n{example.assistant}\n\n"))
        if left < 0:
            break
        kept.append(example)
    return kept


def measure(
    evaluation: Evaluation, arm: str, wanted: Mapping[int, Pair], fresh: Sequence[Row], training_pairs: Sequence[Pair]
) -> Figures:
    """One arm's figures. `fresh`: rows with the tuned model's answers, `wanted`: prompts."""
    tuned = {row["item"]: row["tuned"] for row in fresh}
    keys: list[Key] = [(item, 0) for item in wanted if item in tuned]
    name = f"{arm}_{evaluation.section.best_of}" if arm == "best_of_n" else arm
    for part in evaluation.left(f"prompted.{name}", keys, loop.together(evaluation.context, SLICE, len(keys))):
        asked = [wanted[item] for item, _ in part]
        if arm == "best_of_n":
            rows = _best(evaluation, asked)
        else:
            prompt, greedy = prompt_of(evaluation.context, arm, training_pairs), evaluation.section.fresh_max_new_tokens
            rows = [drawn[0] for drawn in _drawn(evaluation, prompt, asked, Sampling(0.0, greedy), 1)]
        keyed = [{"metric": f"prompted.{name}", "item": pair["item"], "round": 0} for pair in asked]
        answers = [key | row for key, row in zip(keyed, rows, strict=True)]
        evaluation.write(f"prompted.{name}", part, answers)
    rows = evaluation.rows(f"prompted.{name}", keys)
    texts = {row["item"]: row["text"] for row in rows}
    figures = forgetting.of_answers(list(texts.values()), [row["finish"] for row in rows], arm)
    both = {item: (wanted[item], tuned[item], text) for item, text in texts.items()} if evaluation.judge else {}
    return figures | against(evaluation, f"prompted.{name}.judged", arm, both)


def against(evaluation: Evaluation, metric: str, arm: str, both: Mapping[int, tuple[Pair, str, str]]) -> Figures:
    """How often the judge prefers the tuned model's answer to an arm's. `both`: item -> (pair, tuned, arm's answer)."""
    keys = [(item, 0) for item in both]
    for part in evaluation.left(metric, keys, SLICE):
        rows = [{"metric": metric, **row} for row in compared(evaluation, [both[item] for item, _ in part])]
        evaluation.write(metric, part, rows)
    found: Figures = {}
    for figure in preference.summarise_fresh(evaluation.rows(metric, keys), evaluation.judge_name).values():
        name = figure.metric.replace("preference.p3", f"preference.over.{arm}")
        found[name] = replace(figure, metric=name)
    return found


def _best(evaluation: Evaluation, asked: Sequence[Pair]) -> list[Row]:
    """Of `best_of` answers drawn at the answer temperature, the one that the judge likes most beside the first."""
    policy, count = evaluation.context.prompts["policy"], evaluation.section.best_of
    drawn = Sampling(evaluation.context.recipe.sampling.answers.temperature, evaluation.section.fresh_max_new_tokens)
    candidates = _drawn(evaluation, policy, asked, drawn, count)
    fits = [place for place, rows in enumerate(candidates) if "text" in rows[0]]
    best = [rows[0] for rows in candidates]
    texts = [[row["text"] for row in candidates[place]] for place in fits]
    for place, at in zip(fits, chosen(evaluation, [asked[place]["prompt"] for place in fits], texts), strict=True):
        best[place] = candidates[place][at]
    return best


def chosen(evaluation: Evaluation, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[int]:
    """Which of each prompt's answers the judge likes most beside the first; an unscored one is not chosen."""
    both = [(text, row[0], other) for text, row in zip(prompts, candidates, strict=True) for other in row[1:]]
    asked = [(_asked(place, text), other, first) for place, (text, first, other) in enumerate(both)]
    odds = iter([row["log_odds"] for row in compared(evaluation, asked)] if asked else [])
    found = []
    for row in candidates:
        ahead = [0.0, *(-math.inf if value is None else value for _, value in zip(row[1:], odds, strict=False))]
        found.append(ahead.index(max(ahead)))
    return found


def _asked(item: int, prompt: str) -> Pair:
    return Pair(item=item, prompt=prompt, chosen="", rejected="", pool="", split="")


def _drawn(
    evaluation: Evaluation, prompt: Prompt, asked: Sequence[Pair], sampling: Sampling, count: int
) -> list[list[Row]]:
    """`count` answers of the base to each prompt: the text before any sign that the transcript went on."""
    context, several = evaluation.context, [(pair, again) for pair in asked for again in range(count)]
    fields = {number: {"instruction": pair["prompt"]} for number, (pair, _) in enumerate(several)}
    seeds = {n: context.recipe.seed * 1009 + pair["item"] * 31 + again for n, (pair, again) in enumerate(several)}
    with evaluation.model().adapter(False):
        where = "while the prompted base answers held-out prompts"
        found = answering.drawn(context, prompt, fields, sampling, where, seeds, bounded=True)
    rows = [{name: found[number][name] for name in answering.KEPT if name in found[number]} for number in fields]
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def compared(evaluation: Evaluation, both: Sequence[tuple[Pair, str, str]], by_base: bool = False) -> list[Row]:
    """(pair, ours, theirs) -> how the judge, or the base, takes `ours` against `theirs`, blind, in both orders."""
    assert evaluation.judge is not None
    with evaluation.base() if by_base else evaluation.judging() as scorer:
        asks = []
        for place, (pair, *texts) in enumerate(both):
            asks += comparison_asks(scorer, evaluation.judge.pair, (place,), pair["prompt"], "", *texts)
        scores = score(scorer, asks)
    return [_row(scores, place, *texts) for place, texts in enumerate(both)]


def _row(scores: Mapping[Name, Score], place: int, pair: Pair, ours: str, theirs: str) -> Row:
    return {
        "item": pair["item"],
        "round": 0,
        "j4": finite(pair_win(scores, (place,))),
        "log_odds": finite(pair_log_odds(scores, (place,))),
        "base_words": len(words(theirs)),
        "tuned_words": len(words(ours)),
        "base": theirs[:400],
        "tuned": ours[:400],
    }
