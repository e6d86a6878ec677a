"""Which principle an answer breaks, read from the model's own likelihood; and the seeded draw among those.

Owns what the two signs (`answer_signs`: raw, critic) are compared with, and the draw. Doesn't own what is done with a
drawn principle (`chain`). Legend:
  score      = raw - mean of raw over sound answers, nats  cancels a liking for finding that principle broken
  by critic: score = (critic - its mean for that principle) / its spread for it, over the run's own first answers or
           over known ones (`principles.over`). Of 75 answers with planted flaws the highest was the right principle in
           21% over answers like them, in 16% over the known ones, where one principle led in 29 of 75 (chance 6%; 1.5B)
  evidence   = score / its spread + (critic - its mean) / its spread, over sound answers
The sound answers are those that the prompt files show: fixed, so a draw depends on nothing but its item.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import orjson

from cai.data import rounds
from cai.data.answer_signs import critic_asks, critic_odds, question_asks, raw_scores
from cai.data.stage import Unit
from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer, common, score
from cai.recipe.constitution import Constitution, Principle
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record

CASES = Path(__file__).parent / "cases" / "label_cases.jsonl"
FIELDS = frozenset({"instruction", "answer", "question"})
OWN, LEAST_OWN = 64, 8  # of the run's first answers: so many are compared with, from so many on
FIRST_OWN = 1_000  # item of the run's first answer in stage `calibration`; the known ones stand before
CRITIC_PRINCIPLES = 4  # of each sound answer, under which the critic's odds are calibrated


def scorer_of(context: Context) -> Scorer:
    """The base model as a reader: adapter or none, what is loaded now; texts cut to `principles.max_text_tokens`."""
    model, section = context.model(), context.recipe.principles
    return Scorer(context.engine, model.tokenizer, model.format, section.max_text_tokens, stopped=context.stopped)


# --- calibration


def sound_answers(context: Context) -> list[tuple[str, str]]:
    """(instruction, answer) pairs that nothing is wrong with: the examples of the answer prompt, in file order."""
    label = context.prompts["answers"].final.partition("{{")[0]
    return [
        (example.user.removeprefix(label).strip(), example.assistant) for example in context.prompts["answers"].examples
    ]


def baseline(context: Context) -> dict[str, float]:
    """Principle id -> mean raw score over the sound answers, from the records of stage `calibration`."""
    found = _by_principle(context, context.log.by_stage("calibration"))
    return {id_: math.fsum(values) / len(values) for id_, values in found.items() if values}


def _by_principle(context: Context, rows: Sequence[Record]) -> dict[str, list[float]]:
    """Principle id -> the scores that these rows have under it."""
    ids = [principle.id for principle in context.constitution.principles]
    return {id_: [v for row in rows if (v := row["scores"].get(id_)) is not None] for id_ in ids}


def by_critic(context: Context) -> bool:
    return context.recipe.principles.by == "critic"


@lru_cache(maxsize=1)
def cases() -> tuple[Row, ...]:
    """The shipped cases: instruction, principle, answer, revision, `better`, `kind`, and `use`: "bar" or "exam"."""
    return tuple(map(orjson.loads, CASES.read_bytes().splitlines()))


@lru_cache(maxsize=1)
def known_answers() -> tuple[tuple[str, str], ...]:
    """(instruction, answer) of the shipped cases, each once: 26 ordinary answers with faults of many kinds."""
    return tuple(dict.fromkeys((row["instruction"], row["answer"]) for row in cases()))


def calibration_answers(context: Context) -> Sequence[tuple[str, str]]:
    """The answers over which scores are set to rights: known ones for the critic, sound ones for the rule check."""
    return known_answers() if by_critic(context) else sound_answers(context)


def calibration_items(context: Context) -> list[int]:
    """The known answers, then the first try of the run's first training slots: the same in every wave.

    Once a principle was drawn no more come: a run that is given more items compares with what it compared with.
    """
    section, known = context.recipe.principles, range(len(calibration_answers(context)))
    own = range(min(OWN, context.recipe.items)) if by_critic(context) and section.over == "run" else ()
    if own and context.log.by_stage("relevance"):
        return [*known, *(row["item"] for row in context.log.by_stage("calibration") if row["item"] >= FIRST_OWN)]
    return [*known, *(FIRST_OWN + slot for slot in own)]


def calibration_unit(context: Context, item: int, round_: int) -> Unit | None:
    answers = calibration_answers(context)
    texts = answers[item] if item < len(answers) else None
    if item >= FIRST_OWN:
        row, answer = rounds.instruction_of(context, item - FIRST_OWN), context.ok("answers", item - FIRST_OWN)
        texts = (row["text"], answer["text"]) if row and answer else None
    return Unit(item, 0, {"instruction": texts[0], "answer": texts[1]}) if texts else None


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


Fits = Mapping[Name, Sequence[Principle]]  # an answer -> the principles that are for its pool


def every_ask(
    context: Context, scorer: Scorer, answers: Mapping[Name, tuple[str, str]], fits: Fits | None = None
) -> list[Ask]:
    """What says how much each answer breaks each principle (`principles.by`); `scores_of` reads the scores.

    `fits`: the principles that an answer is asked about, where they are not all of them.
    What the requests about one answer share is computed once: the request stands last in the critic's prompt. What all
    answers share, the examples, is its head.
    """
    of = fits or dict.fromkeys(answers, context.constitution.principles)
    if not by_critic(context):
        each = (question_asks(context, scorer, {name: texts}, of[name]) for name, texts in answers.items())
        return [ask for asks in each for ask in asks]
    asked = {(*name, p.id): (*texts, p) for name, texts in answers.items() for p in of[name]}
    asks = critic_asks(context, scorer, asked)
    shared: dict[Name, tuple[int, ...]] = {}
    for ask in asks:
        known = shared.get(ask.name[:-1])
        shared[ask.name[:-1]] = ask.context if known is None else known[: common(known, ask.context)]
    return [replace(ask, shared=min(len(shared[ask.name[:-1]]), len(ask.context) - 1), head=ask.shared) for ask in asks]


def spreads(context: Context) -> dict[str, tuple[float, float]]:
    """Principle id -> mean and spread of the critic's odds over the run's own answers, from stage `calibration`.

    Over the known answers where the run has too few, or the recipe says so.
    """
    every = context.log.by_stage("calibration")
    own = [row for row in every if row["item"] >= FIRST_OWN]
    rows = own if len(own) >= LEAST_OWN else [row for row in every if row["item"] < FIRST_OWN]
    found = _by_principle(context, rows)
    return {id_: (statistics.fmean(v), statistics.pstdev(v) or 1.0) for id_, v in found.items() if len(v) > 1}


def scores_of(context: Context, scores: Mapping[Name, Score], fits: Fits) -> dict[Name, dict[str, float | None]]:
    """How much each answer breaks each principle that fits it, from what `every_ask` asked and `calibration` measured.

    None where there is no number.
    """
    if not by_critic(context):
        return {name: centred(context, raw_scores(scores, [name], some)[name]) for name, some in fits.items()}
    odds, of = critic_odds(scores), spreads(context)
    return {
        name: rounded({p.id: (odds[*name, p.id] - of[p.id][0]) / of[p.id][1] if p.id in of else math.nan for p in some})
        for name, some in fits.items()
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
    fits: Fits = {(u.item,): fitting(context.constitution, u.extra["pool"]) for u in units}
    found = scores_of(context, score(scorer, every_ask(context, scorer, answers, fits)), fits)
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
    Where the label decides afterwards, an answer with none above it has a first round all the same, about the highest.
    """
    section = context.recipe.principles
    rows = (context.ok("relevance", unit.item, r) for r in range(unit.round))
    used = {row["principle"] for row in rows if row is not None}
    least = -math.inf if calibrated(context) else section.threshold
    fits = [p for p in fitting(context.constitution, unit.extra["pool"]) if p.id not in used]
    scored = [(value, p) for p in fits if (value := scores.get(p.id)) is not None]
    broken = [entry for entry in scored if entry[0] > least]
    if not broken and unit.round == 0 and context.recipe.critiques.found == "compared":
        broken = scored[:1] and [max(scored, key=lambda entry: entry[0])]
    return highest(broken, section.top)


def highest(scored: Sequence[tuple[float, Principle]], most: int) -> list[Principle]:
    return [p for _, p in sorted(scored, key=lambda entry: (-entry[0], entry[1].id))[:most]]


def drawn(context: Context, unit: Unit, most: Sequence[Principle]) -> str | None:
    """A seeded choice among these; the highest priority goes first."""
    ids = sorted(p.id for p in most if p.priority == max(q.priority for q in most))
    place = hashlib.sha256(f"{context.recipe.seed}/{unit.item}/{unit.round}".encode()).digest()
    return ids[int.from_bytes(place[:8], "big") % len(ids)] if ids else None


def fitting(constitution: Constitution, pool: str) -> list[Principle]:
    """The principles that are for requests of this pool; all of them where none says so."""
    return [p for p in constitution.principles if not p.pools or pool in p.pools] or list(constitution.principles)
