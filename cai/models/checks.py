"""Check sets: does a guard, classifier or judge tell right from wrong where the answer is known?

Owns the three labelled sets (data/check_*.jsonl, written here, harmful rows without any instruction to follow), the
records of what each model said of them (eval/checks/<use>.jsonl), eval/checks.json, and the words "proven" and
"unproven" behind a judge's name. What is asked and how is the caller's: the very code whose figures are to be believed.
Invariants: labels are balanced and alternate, so that a judge with one answer for everything has kappa 0; a row that
could not be judged counts as wrong.

- harm: a request and a reply; label: the reply is harmful. For the guard and the harm classifier.
- refusal: a prompt and a reply; label: a full refusal. For XSTest's judge, its regular expression included.
- rating: two answers, one clearly better; label: the first one is. Each is rated alone, so that order cannot matter; a
  tie is wrong. For MT-Bench's judge.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from cai import errors
from cai.errors import CaiError
from cai.metrics.figure import Figure, indicator, rate, unmeasured
from cai.metrics.stats import kappa, wilson
from cai.recipe.prompts import digest
from cai.recipe.settings_benchmarks import STAND_IN, ChecksSection
from cai.run import loop
from cai.run.context import Context
from cai.run.loop import open_marked
from cai.store import records
from cai.store.files import write_json_atomic
from cai.store.jsonl import Row, read_object
from cai.store.records import RecordLog

Said = Callable[[Sequence[Row]], list[bool | None]]
DATA = Path(__file__).parent / "data"
SETS = {"guard": "harm", "harmbench": "harm", "xstest": "refusal", "mtbench": "rating"}
KEYS = {"guard": "guard.model"} | {name: f"benchmarks.{name}_judge" for name in ("harmbench", "xstest", "mtbench")}
KEY = ("arm", "item", "round")
AT_ONCE = 16  # rows judged between two writes


@dataclass(frozen=True)
class JudgeCheck:
    """What a model said of its check set. `undecided`: rows without a verdict, and ties; they count as wrong."""

    use: str
    judge: str
    n: int
    undecided: int
    kappa: float | None
    sensitivity: float | None
    specificity: float | None
    proven: bool

    @property
    def words(self) -> str:
        """`proven (kappa 0.83, n=40)`; why not, where it is not."""
        if not self.n:
            return "unproven (not checked)"
        shown = "undefined" if self.kappa is None else f"{self.kappa:.2f}"
        sensitivity = "" if self.sensitivity is None else f", sensitivity {self.sensitivity:.2f}"
        more = f", {self.undecided} undecided" if self.undecided else ""
        return f"{'proven' if self.proven else 'unproven'} (kappa {shown}{sensitivity}, n={self.n}{more})"


def marked(judge: str) -> str:
    """The stand-in is marked, whatever its check says."""
    return "STAND-IN (the base model: measures nothing)" if judge == STAND_IN else judge


def label(judge: str, check: JudgeCheck | None) -> str:
    """How a judge is called in every result: its name, and whether it is proven."""
    return f"{marked(judge)}, {check.words if check else 'unproven (not checked)'}"


def rows_of(use: str, limit: int = 0) -> list[Row]:
    """The labelled rows of a use; with a limit the first ones, of which every second is positive."""
    lines = (DATA / f"check_{SETS[use]}.jsonl").read_bytes().splitlines()
    rows = [{"item": item, **orjson.loads(line)} for item, line in enumerate(lines)]
    return rows[:limit] if limit else rows


def model_mark(context: Context) -> str:
    """The loaded model's facts in one order: those of a run that goes on were read from its file, sorted."""
    facts = context.run.manifest.get("model") or {}
    return orjson.dumps(facts, option=orjson.OPT_SORT_KEYS).decode()


@contextmanager
def open_log(context: Context, use: str, mark: str) -> Iterator[RecordLog | None]:
    """eval/checks/<use>.jsonl of this judge, prompt and set; that of another is set aside. None: checks are off."""
    if not context.recipe.checks.enabled:
        yield None
        return
    of = digest(mark.encode(), hashlib.sha256((DATA / f"check_{SETS[use]}.jsonl").read_bytes()).digest())
    with open_marked(context, context.run.eval / "checks" / f"{use}.jsonl", of, KEY) as log:
        yield log


def is_left(context: Context, log: RecordLog | None, use: str) -> bool:
    """Whether a row is still to be judged: then the judge has to be loaded."""
    rows = rows_of(use, context.recipe.checks.limit)
    return log is not None and any(log.get("check", row["item"], 0) is None for row in rows)


def measure(context: Context, log: RecordLog | None, use: str, judge: str, said: Said) -> JudgeCheck | None:
    """Judge the rows that are left, write eval/checks.json, give the verdict on the judge; None where checks are off.

    Errors: as `enforce`.
    """
    if log is None:
        return None
    section, fresh = context.recipe.checks, is_left(context, log, use)
    rows = {row["item"]: row for row in rows_of(use, section.limit)}

    keys = [("check", item, 0) for item in rows]
    for part in loop.left(context, log, f"check {use}", keys, AT_ONCE):
        chosen = [rows[item] for _, item, _ in part]
        found = zip(chosen, said(chosen), strict=True)
        answered = [{"arm": "check", "item": r["item"], "round": 0, "label": r["label"], "said": s} for r, s in found]
        loop.write(context, log, part, answered)
    check, figures = judged(use, judge, loop.rows_of(log, keys), section)
    _write(context, check, figures)
    if fresh:
        context.run.event("checked", **asdict(check))
    enforce(section, use, judge, check)
    return check


def enforce(section: ChecksSection, use: str, judge: str, check: JudgeCheck | None) -> None:
    """Error: CaiError (exit 7) for an unproven judge where the recipe requires a proven one."""
    if section.require_proven and not (check and check.proven):
        raise CaiError(
            f"{KEYS[use]}: {label(judge, check)}, wanted kappa {section.kappa:g} and sensitivity "
            f"{section.sensitivity:g} on {section.minimum_n} rows. Take another, or set checks.require_proven = false.",
            errors.GATE,
        )


def judged(use: str, judge: str, rows: Sequence[Row], section: ChecksSection) -> tuple[JudgeCheck, dict[str, Figure]]:
    """Kappa, sensitivity and specificity of recorded answers. Pure.

    With half of the labels positive kappa is 2 * agreement - 1, whatever the judge's own rate, and so are the ends of
    its interval (Wilson's of the agreement).
    """
    truth = [bool(row["label"]) for row in rows]
    said = [row["said"] if row["said"] is not None else not row["label"] for row in rows]
    right = [a == b for a, b in zip(truth, said, strict=True)]
    undecided, value = sum(row["said"] is None for row in rows), kappa(truth, said)
    parts = {
        "sensitivity": [indicator(fine) for fine, positive in zip(right, truth, strict=True) if positive],
        "specificity": [indicator(fine) for fine, positive in zip(right, truth, strict=True) if not positive],
    }
    figures = {
        f"checks.{use}.{name}": rate(f"checks.{use}.{name}", outcomes, judge=marked(judge))
        for name, outcomes in parts.items()
    }
    metric = f"checks.{use}.kappa"
    found = unmeasured(metric, "the check set has no row", marked(judge))
    if value is not None:
        low, high = wilson(sum(right), len(right))
        facts = {"undecided": undecided}
        found = Figure(metric, value, 2 * low - 1, 2 * high - 1, len(rows), judge=marked(judge), facts=facts)
    sensitivity, specificity = (figures[f"checks.{use}.{name}"].value for name in parts)
    proven = (
        len(rows) >= section.minimum_n
        and value is not None
        and value >= section.kappa - 1e-9
        and sensitivity is not None
        and sensitivity >= section.sensitivity - 1e-9
    )
    found.facts["proven"] = proven
    check = JudgeCheck(use, judge, len(rows), undecided, value, sensitivity, specificity, proven)
    return check, {metric: found, **figures}


def _write(context: Context, check: JudgeCheck, figures: dict[str, Figure]) -> None:
    """eval/checks.json: this check and its figures beside those of other uses; an unchanged file is left alone."""
    content = _read(context.run.eval / "checks.json")
    of = {name: figure for name, figure in content["figures"].items() if name.split(".")[1:2] != [check.use]}
    of |= {name: figure.as_dict() for name, figure in figures.items()}
    _put(context, {**content["checks"], check.use: asdict(check)}, of)


def remake(context: Context) -> None:
    """eval/checks.json of every check that an event tells of, from its records alone; what was damaged is mended.

    A part of it that belongs to no such check goes, and a check that lost rows: the rest may say "proven" of a judge
    that was not. Nothing where no check was made: then there is no such file.
    """
    found = {use: _recorded(context, use, event) for use, event in _told(context).items()}
    whole = {use: part for use, part in found.items() if part is not None}
    if whole:
        of = {name: figure.as_dict() for _, part in whole.values() for name, figure in part.items()}
        _put(context, {use: asdict(check) for use, (check, _) in whole.items()}, of)


def _told(context: Context) -> dict[str, Row]:
    """Use -> the newest event of a check that was made."""
    return {str(event["use"]): event for event in context.run.events("checked") if event.get("use") in SETS}


def lost(context: Context, use: str) -> bool:
    """Whether a check was made of which rows, or all, are gone since: it has to be made again."""
    event = _told(context).get(use) if context.recipe.checks.enabled else None
    return event is not None and _recorded(context, use, event) is None


def _recorded(context: Context, use: str, event: Row) -> tuple[JudgeCheck, dict[str, Figure]] | None:
    """The check as its log has it; None where rows of it are gone, so that it says another thing than its event."""
    path = context.run.eval / "checks" / f"{use}.jsonl"
    context.run.check_log(path)
    rows = [row for row in records.read(path, KEY) if row["arm"] == "check"]
    if wrong := [row for row in rows if not (isinstance(row.get("label"), bool | int) and "said" in row)]:
        raise CaiError(f"{path}: row {wrong[0]['item']}: no label or verdict in it: remove it and its .sum, and resume")
    if not rows:
        return None
    found = judged(use, str(event.get("judge")), rows, context.recipe.checks)
    return found if _as_told(found[0], event) else None


def _as_told(check: JudgeCheck, event: Row) -> bool:
    """Whether its numbers are those of its event (whose `n` is the event's own); an event of before may lack some."""
    pairs = ((getattr(check, name), event[name]) for name in ("kappa", "sensitivity", "undecided") if name in event)
    return all(a == b or (a is not None and b is not None and math.isclose(a, b, abs_tol=1e-6)) for a, b in pairs)


def _put(context: Context, checks: Row, figures: Row) -> None:
    write_json_atomic(context.run.eval / "checks.json", {"checks": checks, "figures": figures})


def stored(folder: Path, use: str, judge: str) -> JudgeCheck | None:
    """The check of this judge in eval/checks.json, or None."""
    try:
        found = TypeAdapter(JudgeCheck).validate_python(_read(folder / "checks.json")["checks"].get(use))
    except ValidationError:
        return None
    return found if found.judge == judge else None


def _read(path: Path) -> dict[str, Row]:
    """The two parts of checks.json; of one that is not whole, empty ones."""
    parts = read_object(path)
    return {name: part if isinstance(part := parts.get(name), dict) else {} for name in ("checks", "figures")}
