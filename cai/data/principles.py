"""Which principle an answer breaks, read from the model's own likelihood; and the seeded draw among those.

Owns the question's two wordings, how they combine, the calibration on sound answers and the draw. Doesn't own what is
done with a drawn principle (`chain`). Legend: all scores in nats of log-odds that the answer breaks the principle.
  d(wording) = log p(Yes) - log(1 - p(Yes))                the shown examples leave nothing but Yes and No
  raw        = (d(breaks it?) - d(keeps to it?)) / 2       cancels a liking for one of the words
  score      = raw - mean of raw over sound answers        cancels a liking for finding that principle broken
  critic     = log p(not "No") - log p("No")               of the critique's first word: would it find something?
  by critic: score = (critic - its mean for that principle) / its spread for it, over known answers. Of 75 answers with
           planted flaws it has the right principle among the highest three in 43% (chance 20%, rule check 11%; 1.5B)
  evidence   = score / its spread + (critic - its mean) / its spread, over sound answers
The sound answers are those that the prompt files show as examples: fixed, so a draw depends on nothing but its item.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import orjson

from cai.data.stage import Unit
from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer, score
from cai.recipe.constitution import Constitution, Principle
from cai.recipe.prompts import Prompt
from cai.run.context import Context
from cai.store.jsonl import Row

CASES = Path(__file__).parent / "cases" / "label_cases.jsonl"
FIELDS = frozenset({"instruction", "answer", "question"})
WORDINGS = ("Does this answer break the rule: {}", "Does this answer keep to the rule: {}")
CRITIC_PRINCIPLES = 4  # of each sound answer, under which the critic's odds are calibrated
CEILING = 1 - 1e-6  # of p(Yes): beyond it the log-odds are rounding


def scorer_of(context: Context) -> Scorer:
    """The base model as a reader: adapter or none, what is loaded now; texts cut to `principles.max_text_tokens`."""
    model, section = context.model(), context.recipe.principles
    return Scorer(context.engine, model.tokenizer, model.format, section.max_text_tokens, stopped=context.stopped)


def question_asks(
    context: Context, scorer: Scorer, answers: Mapping[Name, tuple[str, str]], principles: Sequence[Principle]
) -> list[Ask]:
    """Both wordings of every principle's question about (instruction, answer) texts; `raw_scores` reads the scores.

    All questions about one answer share the prompt up to the question; the engine computes that part once.
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
    shared = _common(min(contexts), max(contexts))  # what the first and the last in order share, all share
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


def by_critic(context: Context) -> bool:
    return context.recipe.principles.by == "critic"


@lru_cache(maxsize=1)
def known_answers() -> tuple[tuple[str, str], ...]:
    """(instruction, answer) of the shipped cases, each once: 26 ordinary answers with faults of many kinds."""
    rows = map(orjson.loads, CASES.read_bytes().splitlines())
    return tuple(dict.fromkeys((row["instruction"], row["answer"]) for row in rows))


def calibration_answers(context: Context) -> Sequence[tuple[str, str]]:
    """The answers over which scores are set to rights: known ones for the critic, sound ones for the rule check."""
    return known_answers() if by_critic(context) else sound_answers(context)


def calibration_unit(context: Context, item: int, round_: int) -> Unit | None:
    answers = calibration_answers(context)
    if item >= len(answers):
        return None
    return Unit(item, 0, dict(zip(("instruction", "answer"), answers[item], strict=True)))


def calibrate(context: Context, units: Sequence[Unit]) -> list[Row]:
    """The raw scores of each sound answer and, where the critic is calibrated, its odds under some principles."""
    answers: dict[Name, tuple[str, str]] = {(u.item,): (u.fields["instruction"], u.fields["answer"]) for u in units}
    scorer, every = scorer_of(context), context.constitution.principles
    scores = score(scorer, every_ask(context, scorer, answers))
    if by_critic(context):
        signs = critic_odds(scores)
        return [{"scores": rounded({p.id: signs[unit.item, p.id] for p in every})} for unit in units]
    found = raw_scores(scores, answers, every)
    rows: list[Row] = [{"scores": rounded(found[unit.item,])} for unit in units]
    if not calibrated(context):
        return rows
    asked = {(u.item, p.id): (*answers[u.item,], p) for u in units for p in _some(context.constitution, u.item)}
    odds = critic_odds(score(scorer, critic_asks(context, scorer, asked)))
    for unit, row in zip(units, rows, strict=True):
        row["critic"] = rounded({id_: value for (item, id_), value in odds.items() if item == unit.item})
    return rows


def _some(constitution: Constitution, item: int) -> list[Principle]:
    """CRITIC_PRINCIPLES of the constitution, others for each sound answer."""
    size = len(constitution.principles)
    places = {(item * CRITIC_PRINCIPLES + i) % size for i in range(min(size, CRITIC_PRINCIPLES))}
    return [constitution.principles[place] for place in sorted(places)]


# --- is there anything to criticise?


def calibrated(context: Context) -> bool:
    return context.recipe.critiques.found == "calibrated"


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


def every_ask(context: Context, scorer: Scorer, answers: Mapping[Name, tuple[str, str]]) -> list[Ask]:
    """What says how much each answer breaks each principle (`principles.by`); `scores_of` reads the scores.

    What the requests about one answer share is computed once: the request stands last in the critic's prompt.
    """
    every = context.constitution.principles
    if not by_critic(context):
        return question_asks(context, scorer, answers, every)
    asks = critic_asks(context, scorer, {(*name, p.id): (*texts, p) for name, texts in answers.items() for p in every})
    shared: dict[Name, tuple[int, ...]] = {}
    for ask in asks:
        known = shared.get(ask.name[:-1])
        shared[ask.name[:-1]] = ask.context if known is None else known[: _common(known, ask.context)]
    return [replace(ask, shared=min(len(shared[ask.name[:-1]]), len(ask.context) - 1)) for ask in asks]


def spreads(context: Context) -> dict[str, tuple[float, float]]:
    """Principle id -> mean and spread of the critic's odds over the known answers, from stage `calibration`."""
    rows = context.log.by_stage("calibration")
    found = {}
    for principle in context.constitution.principles:
        values = [value for row in rows if (value := row["scores"].get(principle.id)) is not None]
        if len(values) > 1:
            found[principle.id] = statistics.fmean(values), statistics.pstdev(values) or 1.0
    return found


def scores_of(
    context: Context, scores: Mapping[Name, Score], answers: Iterable[Name]
) -> dict[Name, dict[str, float | None]]:
    """How much each answer breaks each principle, from what `every_ask` asked and stage `calibration` measured.

    None where there is no number.
    """
    every, names = context.constitution.principles, list(answers)
    if not by_critic(context):
        return {name: centred(context, raw) for name, raw in raw_scores(scores, names, every).items()}
    odds, of = critic_odds(scores), spreads(context)
    return {
        name: rounded(
            {p.id: (odds[*name, p.id] - of[p.id][0]) / of[p.id][1] if p.id in of else math.nan for p in every}
        )
        for name in names
    }


@dataclass(frozen=True)
class Bar:
    """Mean and spread of both signs over sound answers, and the sum that `false_alarms` of them pass."""

    spread: float
    critic_mean: float
    critic_spread: float
    value: float

    def evidence(self, relevance: float | None, critic: float) -> float:
        """Both signs in units of their spread over sound answers; NaN where one has no number."""
        if relevance is None:
            return math.nan
        return relevance / self.spread + (critic - self.critic_mean) / self.critic_spread


def bar_of(context: Context) -> Bar:
    """From the records of stage `calibration`: `critiques.false_alarms` of the sound answers are above the bar."""
    base = baseline(context)
    pairs = [
        (value - base[id_], odds)
        for row in context.log.by_stage("calibration")
        for id_, odds in (row.get("critic") or {}).items()
        if odds is not None and (value := row["scores"].get(id_)) is not None and id_ in base
    ]
    if len(pairs) < 2:
        return Bar(1.0, 0.0, 1.0, math.inf)
    relevance, critic = zip(*pairs, strict=True)
    made = Bar(statistics.pstdev(relevance) or 1.0, statistics.fmean(critic), statistics.pstdev(critic) or 1.0, 0.0)
    values = sorted(made.evidence(one, two) for one, two in pairs)
    place = math.ceil((1 - context.recipe.critiques.false_alarms) * len(values)) - 1
    return replace(made, value=round(values[max(0, place)], 6))


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
    scorer = scorer_of(context)
    found = scores_of(context, score(scorer, every_ask(context, scorer, answers)), answers)
    scores = {unit.item: found[unit.item,] for unit in units}
    most = {unit.item: most_broken(context, unit, scores[unit.item]) for unit in units}
    unscored = {unit.item: _unscored(context, unit, scores[unit.item]) for unit in units}
    rows: list[Row] = [{"scores": scores[unit.item], "pool": unit.extra["pool"]} for unit in units]
    if calibrated(context):
        bar = bar_of(context)
        asked = {(i, p.id): (*answers[i,], p) for i, some in most.items() for p in some}
        odds = critic_odds(score(scorer, critic_asks(context, scorer, asked)))
        for unit, row in zip(units, rows, strict=True):
            signs = {p.id: bar.evidence(scores[unit.item][p.id], odds[unit.item, p.id]) for p in most[unit.item]}
            row |= {"evidence": rounded(signs), "bar": bar.value if math.isfinite(bar.value) else None}
            if not all(map(math.isfinite, (bar.value, *signs.values()))):
                unscored[unit.item] = "unscored: the critic's likelihood is not finite"
            most[unit.item] = [p for p in most[unit.item] if signs[p.id] > bar.value]
    for unit, row in zip(units, rows, strict=True):
        row["principle"] = drawn(context, unit, most[unit.item])
        if row["principle"] is None and (reason := unscored[unit.item]):  # "nothing is broken" would be a verdict
            row |= {"status": "rejected", "reason": reason}
    return rows


def _unscored(context: Context, unit: Unit, scores: Mapping[str, float | None]) -> str:
    """Why "nothing is broken" cannot be said, "" where every principle that fits has a score."""
    missing = sum(scores.get(principle.id) is None for principle in fitting(context.constitution, unit.extra["pool"]))
    return f"unscored: {missing} likelihood(s) not finite" if missing else ""


def most_broken(context: Context, unit: Unit, scores: Mapping[str, float | None]) -> list[Principle]:
    """The `principles.top` most broken of those that fit and that no earlier round was about, the most broken first.

    Where the critic is calibrated it decides whether one is broken at all; else a score above `principles.threshold`.
    """
    section = context.recipe.principles
    rows = (context.ok("relevance", unit.item, r) for r in range(unit.round))
    used = {row["principle"] for row in rows if row is not None}
    least = -math.inf if calibrated(context) else section.threshold
    fits = [p for p in fitting(context.constitution, unit.extra["pool"]) if p.id not in used]
    broken = [(value, p) for p in fits if (value := scores.get(p.id)) is not None and value > least]
    return [p for _, p in sorted(broken, key=lambda entry: (-entry[0], entry[1].id))[: section.top]]


def drawn(context: Context, unit: Unit, most: Sequence[Principle]) -> str | None:
    """A seeded choice among these; the highest priority goes first."""
    ids = sorted(p.id for p in most if p.priority == max(q.priority for q in most))
    place = hashlib.sha256(f"{context.recipe.seed}/{unit.item}/{unit.round}".encode()).digest()
    return ids[int.from_bytes(place[:8], "big") % len(ids)] if ids else None


def fitting(constitution: Constitution, pool: str) -> list[Principle]:
    """The principles that are for requests of this pool; all of them where none says so."""
    return [p for p in constitution.principles if not p.pools or pool in p.pools] or list(constitution.principles)
