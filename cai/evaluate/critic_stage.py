"""The critic's exam sat by the loaded model: its own critique and revision stages on answers whose flaws are known.

Owns eval/critic.jsonl (a row a text, kept through kills) and which rows of the exam are sat; `critic_exam` grades. The
base model sits it, adapter off, with the recipe's prompts and sampling, as it makes the data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

from cai.data import answer_signs, principles, rounds, stages
from cai.data import labels as known_labels
from cai.data.comparisons import margin
from cai.data.stage import Stage, Unit
from cai.data.stage_loop import draw
from cai.engine.asks import score
from cai.evaluate import critic_exam
from cai.evaluate.critic_exam import Output
from cai.evaluate.critic_grading import ExamRow
from cai.evaluate.critic_rows import read_rows
from cai.evaluate.scores import model_name as writer
from cai.metrics.figure import Figure, sample
from cai.metrics.wordings import finds_nothing
from cai.recipe.constitution import Principle, load_constitution
from cai.run import loop
from cai.run.context import Context
from cai.run.loop import open_marked
from cai.store.jsonl import Row
from cai.store.records import RecordLog
from cai.store.row_types import Record

DATA = Path(__file__).parent / "data" / "critic_exam.jsonl"
CHECKED = "99ae5de31854e06e3b8ddf894159e80be7bde5badfc88fbfe8146f9c2564fe1f"  # of DATA; a test checks its rows
SHIPPED = Path(__file__).parents[2] / "constitution.yaml"
KEY = ("metric", "item", "round")
AT_ONCE, AT_ONCE_CPU = 128, 8
LATER = {"by_topic"}  # of [few_shot]: a run made before it has texts that were drawn without it
NOTHING = "No issue: nothing speaks for a fault."  # stands for the critique that is not asked for


@lru_cache(maxsize=1)
def exam_rows() -> tuple[ExamRow, ...]:
    """The shipped rows; other rows in their place are checked, once a process."""
    return tuple(read_rows(DATA, checked=CHECKED))


def measure(context: Context) -> dict[str, Figure]:
    """The figures `critic.*`; rows that are there are not drawn again. Errors: Stopped."""
    limit = context.recipe.evaluation.critic_items
    if not limit:
        return {}
    everything = exam_rows()
    units, under = critic_exam.units(everything, context.constitution), ""
    if not units and SHIPPED.is_file():  # a constitution of one's own: the critic is examined under the shipped one
        units, under = critic_exam.units(everything, load_constitution(SHIPPED)), ", under the shipped principles"
    wanted = set(sample([unit.id for unit in units], limit))
    places = {row.id: place for place, row in enumerate(everything)}
    asked = {places[unit.id]: unit for unit in units if unit.id in wanted}
    with open_marked(context, context.run.eval / "critic.jsonl", _mark(context), KEY) as log:

        def texts(stage: Stage, found: Mapping[int, Unit]) -> list[Row]:
            together = AT_ONCE if context.run.manifest.get("backend") == "cuda" else AT_ONCE_CPU
            keys = [(f"critic.{stage.name}", item, 0) for item in found]
            for part in loop.left(context, log, f"critic's exam: {stage.name}", keys, together):
                with context.model().adapter(False):
                    rows = draw(context, stage, [found[item] for _, item, _ in part])
                named = [{"metric": f"critic.{stage.name}", **row} for row in rows]
                loop.write(context, log, part, named, counted=True)  # `draw` has, while they were made
            return loop.rows_of(log, keys)

        doubted = _doubted(context, log, asked)
        critiques = texts(stages.CRITIQUES, {i: _critique(i, u, context) for i, u in asked.items() if i in doubted})
        found = {row["item"]: cast(Record, row) for row in critiques if row["status"] == "ok"}
        faulted = {i: row["text"] for i, row in found.items() if not rounds.found_nothing(row)}
        said = {i: row["text"] if finds_nothing(row["text"]) else NOTHING for i, row in found.items()}
        said |= {i: NOTHING for i in asked if i not in doubted} | faulted
        revisions = texts(stages.REVISIONS, {i: _revision(context, i, asked[i], text) for i, text in faulted.items()})
        revised = {row["item"]: row["text"] for row in revisions if row["status"] == "ok"}
        recipe = context.recipe  # a critique whose revision is no better is not acted on
        if recipe.critiques.found == "compared" and recipe.pairs.label == "judge":
            better = _better(context, log, asked, revised)
            said |= {i: NOTHING for i in faulted if i not in better}
            revised = {i: revised[i] for i in better}
    outputs = {unit.id: Output(said.get(i), revised.get(i)) for i, unit in asked.items()}
    rows: Sequence[ExamRow] = [row for row in everything if row.id in outputs]
    return critic_exam.summarise(rows, outputs, judge=f"program, texts of {writer(context)}{under}")


def _fields(unit: critic_exam.ExamUnit) -> dict[str, str]:
    principle: Principle = unit.principle
    return {"instruction": unit.instruction, "answer": unit.answer, "critique_request": principle.critique_request}


def _critique(item: int, unit: critic_exam.ExamUnit, context: Context) -> Unit:
    shots = rounds.review_shots(context, "critiques", item, unit.principle, unit.pool)
    return Unit(item, 0, _fields(unit), unit.principle.id, shift=shots, prefill=rounds.opening(context.recipe))


def _doubted(context: Context, log: RecordLog, asked: Mapping[int, critic_exam.ExamUnit]) -> set[int]:
    """The rows of which a critique is asked for: all, or where the critic is calibrated those with evidence enough."""
    if not principles.calibrated(context):
        return set(asked)
    bar, base = principles.bar_of(context), _baseline(context, log, asked)
    keys = [("critic.evidence", i, 0) for i in asked]
    for part in loop.left(context, log, "critic's exam: evidence", keys, AT_ONCE_CPU):
        texts = {(i,): (asked[i].instruction, asked[i].answer, asked[i].principle) for _, i, _ in part}
        rows: list[Row] = []
        with context.model().adapter(False):
            scorer = principles.scorer_of(context)
            odds = answer_signs.critic_odds(score(scorer, answer_signs.critic_asks(context, scorer, texts)))
            for (i,), (instruction, answer, of) in texts.items():
                asks = answer_signs.question_asks(context, scorer, {(i,): (instruction, answer)}, [of])
                raw = answer_signs.raw_scores(score(scorer, asks), [(i,)], [of])[i,][of.id] - base.get(of.id, math.nan)
                value = bar.evidence(raw if math.isfinite(raw) else None, odds[i,])
                evidence = round(value, 4) if math.isfinite(value) else None
                rows.append({"metric": "critic.evidence", "item": i, "round": 0, "evidence": evidence})
        loop.write(context, log, part, rows)
    found = loop.rows_of(log, keys)
    return {row["item"] for row in found if row["evidence"] is not None and row["evidence"] > bar.value}


def _better(
    context: Context, log: RecordLog, asked: Mapping[int, critic_exam.ExamUnit], revised: Mapping[int, str]
) -> set[int]:
    """The rows whose revision the comparison prefers by more than its bar, as in a run."""
    bar = known_labels.bar_of(context) or 0.0
    keys = [("critic.margin", i, 0) for i in revised]
    for part in loop.left(context, log, "critic's exam: is the revision better", keys, AT_ONCE_CPU):
        with context.model().adapter(False):
            scorer, asks = principles.scorer_of(context), []
            for _, i, _ in part:
                texts = (asked[i].instruction, asked[i].principle.principle, revised[i], asked[i].answer)
                asks += known_labels.margin_asks(context, scorer, (i,), *texts)
            scores = score(scorer, asks)
            margins = {i: margin(scores, (i,)) for _, i, _ in part}
        rounded = {i: round(m, 4) if math.isfinite(m) else None for i, m in margins.items()}
        rows: list[Row] = [{"metric": "critic.margin", "item": i, "round": 0, "margin": m} for i, m in rounded.items()]
        loop.write(context, log, part, rows)
    found = {row["item"]: row["margin"] for row in loop.rows_of(log, keys)}
    return {i for i, above in found.items() if above is not None and above > bar}


def _baseline(context: Context, log: RecordLog, asked: Mapping[int, critic_exam.ExamUnit]) -> dict[str, float]:
    """Principle id -> mean raw score over the sound answers: of the run's calibration, and of principles it lacks."""
    base = principles.baseline(context)
    lacking = {unit.principle.id: unit.principle for unit in asked.values() if unit.principle.id not in base}
    if not lacking:
        return base
    answers, others = principles.sound_answers(context), list(lacking.values())
    keys = [("critic.baseline", place, 0) for place in range(len(answers))]
    for part in loop.left(context, log, "critic's exam: where it draws its line", keys, AT_ONCE_CPU):
        with context.model().adapter(False):
            scorer = principles.scorer_of(context)
            asks = answer_signs.question_asks(context, scorer, {(i,): answers[i] for _, i, _ in part}, others)
            raw = answer_signs.raw_scores(score(scorer, asks), [(i,) for _, i, _ in part], others)
        rows = [
            {"metric": "critic.baseline", "item": i, "round": 0, "scores": principles.rounded(raw[i,])}
            for _, i, _ in part
        ]
        loop.write(context, log, part, rows)
    found = [row["scores"] for row in loop.rows_of(log, keys)]
    for id_ in lacking:
        if values := [scores[id_] for scores in found if scores[id_] is not None]:
            base[id_] = math.fsum(values) / len(values)
    return base


def _revision(context: Context, item: int, unit: critic_exam.ExamUnit, critique: str) -> Unit:
    fields = _fields(unit) | {"critique": critique, "revision_request": unit.principle.revision_request}
    if context.recipe.critiques.transcript == "separate":
        del fields["critique_request"]
    shots = rounds.review_shots(context, "revisions", item, unit.principle, unit.pool)
    return Unit(item, 0, fields, unit.principle.id, shift=shots, repairs=context.recipe.pairs.reject_unrepaired)


def _mark(context: Context) -> str:
    """Everything a drawn text depends on: the rows, the prompts, the principles, the model, the sampling."""
    recipe, facts = context.recipe, context.run.manifest.get("model") or {}
    parts = [
        DATA.read_bytes(),
        context.constitution.sha.encode(),
        *(context.prompts[stage.prompt].sha.encode() for stage in (stages.CRITIQUES, stages.REVISIONS)),
        f"{writer(context)}/{facts.get('revision')}/{recipe.seed}".encode(),
        recipe.sampling.model_dump_json().encode(),
        recipe.few_shot.model_dump_json(exclude=None if recipe.few_shot.by_topic else LATER).encode(),
        recipe.critiques.model_dump_json().encode(),
        recipe.principles.model_dump_json(exclude={"over"}).encode(),  # no draw of the exam is compared with others
        *((context.prompts[known_labels.BY_ANSWER].sha.encode(),) if known_labels.asked_alone(recipe) else ()),
        *((b"repairs",) if recipe.pairs.reject_unrepaired else ()),
        *((f"{recipe.pairs.label}/{recipe.pairs.false_labels}".encode(),) if recipe.pairs.false_labels else ()),
    ]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]
