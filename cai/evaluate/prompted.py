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
from cai.engine.asks import Ask, Name, Scorer, score
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

Compared = tuple[Pair, str, str]  # the prompt's pair, our answer, theirs
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
    context, section = evaluation.context, evaluation.section
    tuned = {row["item"]: row["tuned"] for row in fresh}
    keys: list[Key] = [(item, 0) for item in wanted if item in tuned]
    heat, count, metric = 0.0, 1, f"prompted.{arm}"
    if arm == "best_of_n":
        heat, count, metric = (
            context.recipe.sampling.answers.temperature,
            section.best_of,
            f"{metric}_{section.best_of}",
        )
    for part in evaluation.left(metric, keys, loop.together(context, SLICE, len(keys))):
        asked = [wanted[item] for item, _ in part]
        prompt = prompt_of(context, arm, training_pairs)
        drawn = _drawn(evaluation, prompt, asked, Sampling(heat, section.fresh_max_new_tokens), count)
        texts, judged_rows = [[row["text"] for row in rows if "text" in row] for rows in drawn], list[Row]()
        if both := rivals([pair["prompt"] for pair in asked], texts):
            with evaluation.judging() as scorer:
                judged_rows = compared(score(scorer, comparisons(evaluation, scorer, both)), both)
        rows = [candidates[at] for candidates, at in zip(drawn, best(texts, judged_rows), strict=True)]
        keyed = [{"metric": metric, "item": pair["item"], "round": 0} for pair in asked]
        evaluation.write(metric, part, [key | row for key, row in zip(keyed, rows, strict=True)])
    rows = evaluation.rows(metric, keys)
    texts_of = {row["item"]: row["text"] for row in rows}
    figures = forgetting.of_answers(list(texts_of.values()), [row["finish"] for row in rows], arm)
    redteam = [text for item, text in texts_of.items() if wanted[item]["pool"] == "redteam"]
    figures |= forgetting.compliance(redteam, arm)
    pairs = {item: (wanted[item], tuned[item], text) for item, text in texts_of.items()} if evaluation.judge else {}
    return figures | against(judged(evaluation, f"{metric}.judged", pairs), evaluation.judge_name, arm)


def judged(evaluation: Evaluation, metric: str, both: Mapping[int, Compared], by_base: bool = False) -> list[Row]:
    """The rows of these comparisons, by item, made by the judge, or the base; what is missing is asked for."""
    keys = [(item, 0) for item in both]
    for part in evaluation.left(metric, keys, SLICE):
        asked = [both[item] for item, _ in part]
        with evaluation.base() if by_base else evaluation.judging() as scorer:
            scores = score(scorer, comparisons(evaluation, scorer, asked))
        evaluation.write(metric, part, [{"metric": metric, **row} for row in compared(scores, asked)])
    return evaluation.rows(metric, keys)


def against(rows: Sequence[Row], judge: str, arm: str) -> Figures:
    """How often the judge prefers the tuned model's answer to an arm's, by the rows of `judged`."""
    found: Figures = {}
    for figure in preference.summarise_fresh(rows, judge).values():
        name = figure.metric.replace("preference.p3", f"preference.over.{arm}")
        found[name] = replace(figure, metric=name)
    return found


def rivals(prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[Compared]:
    """Each prompt's later answers, each against the first."""
    both = [(text, other, row[0]) for text, row in zip(prompts, candidates, strict=True) for other in row[1:]]
    return [(_asked(place, text), other, first) for place, (text, other, first) in enumerate(both)]


def best(candidates: Sequence[Sequence[str]], rows: Sequence[Row]) -> list[int]:
    """Which of each prompt's answers the judge likes most beside the first; an unscored one is not chosen.

    `rows`: of its `rivals`, as `compared` gives them.
    """
    odds = iter([row["log_odds"] for row in rows])
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


def comparisons(evaluation: Evaluation, scorer: Scorer, both: Sequence[Compared]) -> list[Ask]:
    """What asks how `ours` is taken against `theirs`, blind, in both orders."""
    assert evaluation.judge is not None
    asks = []
    for place, (pair, *texts) in enumerate(both):
        asks += comparison_asks(scorer, evaluation.judge.pair, (place,), pair["prompt"], "", *texts)
    return asks


def compared(scores: Mapping[Name, Score], both: Sequence[Compared]) -> list[Row]:
    """A row of each comparison, from the scores of `comparisons`."""
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
