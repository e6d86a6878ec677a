"""Which principle an answer breaks, read from the model's own likelihood; and the seeded draw among those.

Owns the question's two wordings, how they combine, the calibration on sound answers and the draw. Doesn't own what is
done with a drawn principle (`chain`). Legend: all scores in nats of log-odds that the answer breaks the principle.
  d(wording) = log p(Yes) - log(1 - p(Yes))                the shown examples leave nothing but Yes and No
  raw        = (d(breaks it?) - d(keeps to it?)) / 2       cancels a liking for one of the words
  score      = raw - mean of raw over sound answers        cancels a liking for finding that principle broken
The sound answers are those that the prompt files show as examples: fixed, so a draw depends on nothing but its item.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

from cai.data.stage import Unit
from cai.engine.asks import Ask, Name, Scorer, score
from cai.recipe.constitution import Constitution, Principle
from cai.recipe.prompts import Prompt
from cai.run.context import Context
from cai.store.jsonl import Row

FIELDS = frozenset({"instruction", "answer", "question"})
WORDINGS = ("Does this answer break the rule: {}", "Does this answer keep to the rule: {}")
CEILING = 1 - 1e-6  # of p(Yes): beyond it the log-odds are rounding


def scorer_of(context: Context) -> Scorer:
    """The base model as a reader: adapter or none, what is loaded now; texts cut to `principles.max_text_tokens`."""
    model, section = context.model(), context.recipe.principles
    return Scorer(context.engine, model.tokenizer, model.format, section.max_text_tokens, stopped=context.stopped)


def raw_scores(
    context: Context, answers: Mapping[Name, tuple[str, str]], principles: Sequence[Principle]
) -> dict[Name, dict[str, float]]:
    """{name: {principle id: raw}} of (instruction, answer) texts; NaN where a likelihood is not finite.

    All questions about one answer share the prompt up to the question; the engine computes that part once.
    """
    scorer, prompt = scorer_of(context), context.prompts["relevance"]
    asks: list[Ask] = []
    for name, (instruction, answer) in answers.items():
        asks += _asks(scorer, prompt, name, scorer.cut(instruction), scorer.cut(answer), principles)
    scores = score(scorer, asks)
    return {
        name: {p.id: _raw(scores[*name, p.id, 0].total, scores[*name, p.id, 1].total) for p in principles}
        for name in answers
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
    shared = min(_common(contexts[0], other) for other in contexts)
    for (id_, side), found in rendered.items():
        lead = "" if found.text[-1:].isspace() else " "
        yes = tuple(scorer.encode(f"{lead}Yes"))
        yield Ask((*name, id_, side), found.token_ids, yes, min(shared, len(found.token_ids) - 1))


def _common(first: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))


def _raw(breaks: float, keeps: float) -> float:
    if not (math.isfinite(breaks) and math.isfinite(keeps)):
        return math.nan
    return (_odds(breaks) - _odds(keeps)) / 2


def _odds(lp: float) -> float:
    """log p - log(1 - p) from log p."""
    lp = min(lp, math.log(CEILING))
    return lp - math.log1p(-math.exp(lp))


# --- calibration


def sound_answers(context: Context) -> list[tuple[str, str]]:
    """(instruction, answer) pairs that nothing is wrong with: the examples of the answer prompt, in file order."""
    label = context.prompts["answers"].final.partition("{{")[0]
    return [
        (example.user.removeprefix(label).strip(), example.assistant) for example in context.prompts["answers"].examples
    ]


def baseline(context: Context) -> dict[str, float]:
    """Principle id -> mean raw score over the sound answers, from the records of stage `calibration`."""
    rows = context.log.by_stage("calibration")
    return {
        principle.id: math.fsum(values) / len(values)
        for principle in context.constitution.principles
        if (values := [v for row in rows if (v := row["scores"].get(principle.id)) is not None])
    }


def calibration_unit(context: Context, item: int, round_: int) -> Unit | None:
    answers = sound_answers(context)
    if item >= len(answers):
        return None
    return Unit(item, 0, dict(zip(("instruction", "answer"), answers[item], strict=True)))


def calibrate(context: Context, units: Sequence[Unit]) -> list[Row]:
    """The raw scores of each sound answer."""
    answers: dict[Name, tuple[str, str]] = {(u.item,): (u.fields["instruction"], u.fields["answer"]) for u in units}
    found = raw_scores(context, answers, context.constitution.principles)
    return [{"scores": rounded(found[unit.item,])} for unit in units]


def centred(context: Context, raw: Mapping[str, float]) -> dict[str, float | None]:
    """Scores less the baseline, four decimals; None where there is no finite number."""
    base = baseline(context)
    return rounded({id_: value - base.get(id_, math.nan) for id_, value in raw.items()})


def rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    return {id_: round(value, 4) if math.isfinite(value) else None for id_, value in values.items()}


# --- the draw


def relevance(context: Context, units: Sequence[Unit]) -> list[Row]:
    """Each unit's scores and the principle that its round is about; None where no principle is broken."""
    answers: dict[Name, tuple[str, str]] = {(u.item,): (u.fields["instruction"], u.fields["answer"]) for u in units}
    found = raw_scores(context, answers, context.constitution.principles)
    rows = []
    for unit in units:
        scores = centred(context, found[unit.item,])
        used = [
            row["principle"] for r in range(unit.round) if (row := context.ok("relevance", unit.item, r)) is not None
        ]
        pool = unit.extra["pool"]
        rows.append({"principle": drawn(context, unit, scores, used), "scores": scores, "pool": pool})
    return rows


def drawn(context: Context, unit: Unit, scores: Mapping[str, float | None], used: Sequence[str | None]) -> str | None:
    """A seeded choice among the `principles.top` most broken; of these the highest priority goes first."""
    section = context.recipe.principles
    allowed = [p for p in fitting(context.constitution, unit.extra["pool"]) if p.id not in used]
    broken = [(value, p) for p in allowed if (value := scores.get(p.id)) is not None and value > section.threshold]
    broken.sort(key=lambda entry: (-entry[0], entry[1].id))
    most = [p for _, p in broken[: section.top]]
    ids = sorted(p.id for p in most if p.priority == max(q.priority for q in most))
    place = hashlib.sha256(f"{context.recipe.seed}/{unit.item}/{unit.round}".encode()).digest()
    return ids[int.from_bytes(place[:8], "big") % len(ids)] if ids else None


def fitting(constitution: Constitution, pool: str) -> list[Principle]:
    """The principles that are for requests of this pool; all of them where none says so."""
    return [p for p in constitution.principles if not p.pools or pool in p.pools] or list(constitution.principles)
