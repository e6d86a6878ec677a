"""What the loaded model's likelihoods say of an answer and a principle: the rule check and the critic's first word.

Owns the two questions and how their scores are read; what a score is compared with is `principles`'. Pure but for the
prompts. Legend, all in nats of log-odds:
  d(wording) = log p(Yes) - log(1 - p(Yes))                the shown examples leave nothing but Yes and No
  raw        = (d(breaks it?) - d(keeps to it?)) / 2       cancels a liking for one of the words
  critic     = log p(not "No") - log p("No")               of the critique's first word: would it find something?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer, common
from cai.recipe.constitution import Principle
from cai.recipe.prompts import Prompt
from cai.run.context import Context

WORDINGS = ("Does this answer break the rule: {}", "Does this answer keep to the rule: {}")
CEILING = 1 - 1e-6  # of p(Yes): beyond it the log-odds are rounding


def question_asks(
    context: Context, scorer: Scorer, answers: Mapping[Name, tuple[str, str]], principles: Sequence[Principle]
) -> list[Ask]:
    """Both wordings of every principle's question about (instruction, answer) texts; `raw_scores` reads the scores.

    All questions about one answer share the prompt up to the question, all answers its examples; the engine computes
    either part once.
    """
    asks: list[Ask] = []
    for name, (instruction, answer) in answers.items():
        texts = scorer.cut(instruction), scorer.cut(answer)
        asks += _asks(scorer, context.prompts["relevance"], name, *texts, principles)
    return asks


def raw_scores(
    scores: Mapping[Name, Score], names: Iterable[Name], principles: Sequence[Principle]
) -> dict[Name, dict[str, float]]:
    """{name: {principle id: raw}} of what `question_asks` asked; NaN where a likelihood is not finite."""
    return {
        name: {p.id: _raw(scores[*name, p.id, 0].total, scores[*name, p.id, 1].total) for p in principles}
        for name in names
    }


def _asks(
    scorer: Scorer, prompt: Prompt, name: Name, instruction: str, answer: str, principles: Sequence[Principle]
) -> Iterable[Ask]:
    rendered = {}
    for principle in principles:
        for side, wording in enumerate(WORDINGS):
            fields = {"instruction": instruction, "answer": answer, "question": wording.format(principle.principle)}
            rendered[principle.id, side] = prompt.render(fields, format=scorer.format, tokenizer=scorer.tokenizer)
    contexts = [found.token_ids for found in rendered.values()]
    shared = common(min(contexts), max(contexts))  # what the first and the last in order share, all share
    for (id_, side), found in rendered.items():
        lead = "" if found.text[-1:].isspace() else " "
        yes = tuple(scorer.encode(f"{lead}Yes"))
        yield Ask((*name, id_, side), found.token_ids, yes, min(shared, len(found.token_ids) - 1), found.prefix_len)


def _raw(breaks: float, keeps: float) -> float:
    if not (math.isfinite(breaks) and math.isfinite(keeps)):
        return math.nan
    return (_odds(breaks) - _odds(keeps)) / 2


def _odds(lp: float) -> float:
    """log p - log(1 - p) from log p."""
    lp = min(lp, math.log(CEILING))
    return lp - math.log1p(-math.exp(lp))


def critic_asks(context: Context, scorer: Scorer, asked: Mapping[Name, tuple[str, str, Principle]]) -> list[Ask]:
    """How the critique of (instruction, answer) under the principle would begin; `critic_odds` reads the scores."""
    prompt, asks = context.prompts["critiques"], []
    for name, (instruction, answer, principle) in asked.items():
        fields = {
            "instruction": scorer.cut(instruction),
            "answer": scorer.cut(answer),
            "critique_request": principle.critique_request,
        }
        found = prompt.render(fields, format=scorer.format, tokenizer=scorer.tokenizer)
        lead = "" if found.text[-1:].isspace() else " "
        asks.append(Ask(name, found.token_ids, tuple(scorer.encode(f"{lead}No"))[:1], found.prefix_len))
    return asks


def critic_odds(scores: Mapping[Name, Score]) -> dict[Name, float]:
    """Log-odds that the critique begins otherwise than with "No issue", of what `critic_asks` asked."""
    return {name: -_odds(found.total) if math.isfinite(found.total) else math.nan for name, found in scores.items()}
