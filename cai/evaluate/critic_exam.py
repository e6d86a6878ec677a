"""The critic's exam: what the loaded model's own critique and revision stages are asked, and the figures of what came.

Owns no model and no file of rows. `units` says what to ask; the texts come back as `{row id: Output}`, and `summarise`
makes figures of them. The invariant: what is not there counts as unscored, never as found, gone or sound. In a run:

    rows = read_rows(path, constitution)
    for unit in units(rows, constitution):     # the critique stage's fields: instruction, answer, critique_request
        ...                                    # the revision stage's: the same, the critique, revision_request
    figures = summarise(rows, {unit.id: Output(critique, revision) for ...}, judge=f"program, texts of {model.name}")

A critique that finds nothing leaves the answer as it is, as a round does: no revision is drawn, `revision` stays None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cai.evaluate.critic_grading import CHECKABLE, KINDS, ExamRow, Grade, broken, flaw_gone, grade_critique
from cai.metrics.figure import Figure, Outcome, Scored, Unscored, by_metric, indicator, rate
from cai.recipe.constitution import Constitution, Principle
from cai.store.jsonl import Row


@dataclass(frozen=True)
class ExamUnit:
    """What the critique stage is asked for one row; the revision stage takes the same with the critique that came."""

    id: str
    instruction: str
    answer: str
    principle: Principle
    pool: str


@dataclass(frozen=True)
class Output:
    """What the two stages made of one row. None: refused or never drawn; a revision is not drawn after "no issue"."""

    critique: str | None
    revision: str | None = None


@dataclass(frozen=True)
class Marked:
    """One row with what came and how it was graded; `grade` None where there is no critique."""

    row: ExamRow
    output: Output
    grade: Grade | None

    @property
    def final(self) -> str | None:
        """The text after the round: the revision, or the answer where nothing was found."""
        if self.output.revision is not None:
            return self.output.revision
        return self.row.answer if self.grade is not None and self.grade.nothing else None


def units(rows: Sequence[ExamRow], constitution: Constitution) -> list[ExamUnit]:
    """What the two stages need of each row, in order; rows whose principle this constitution lacks are left out.

    Draw a critique of `answer` under `principle.critique_request`; where it does not find nothing, draw the revision
    behind it, as in a run. Hand `summarise` one `Output` a unit; a row without one counts as unscored.
    """
    known = {principle.id: principle for principle in constitution.principles}
    return [
        ExamUnit(row.id, row.instruction, row.answer, known[row.principle], row.pool)
        for row in rows
        if row.principle in known
    ]


def mark(rows: Sequence[ExamRow], outputs: Mapping[str, Output]) -> list[Marked]:
    """Every row graded, in order; one without output is kept, ungraded."""
    marked = []
    for row in rows:
        output = outputs.get(row.id, Output(None))
        grade = None if output.critique is None else grade_critique(row, output.critique)
        marked.append(Marked(row, output, grade))
    return marked


def summarise(rows: Sequence[ExamRow], outputs: Mapping[str, Output], judge: str = "program") -> dict[str, Figure]:
    """Figures by name: `critic.*`, and each with a tail: `.short`, `.long`, `.benign`, `.redteam`, `.<kind>` of flaw.

    The unit is the answer: with several flaws its value is the share that was found, so that the Wilson interval
    counts it once. `facts` of the recall: flaws found, and of how many.
    """
    marked = mark(rows, outputs)
    figures: dict[str, Figure] = {}
    flawed = [m for m in marked if not m.row.sound]
    sound = [m for m in marked if m.row.sound]
    for name, ask in (("recall", _found), ("flaw_gone", _gone)):
        _add_flaws(figures, f"critic.{name}", flawed, ask, KINDS, judge)
    for name, ask in (("found", _found), ("gone", _gone)):
        checkable = [m for m in flawed if any(flaw.kind in CHECKABLE for flaw in m.row.flaws)]
        _add_flaws(figures, f"critic.checkable.{name}", checkable, ask, CHECKABLE, judge)
    for name, outcome, seen in (("false_alarms", _alarm, _seen_critique), ("broken", _broken, _seen_revision)):
        for tail, part in _parts(sound):
            worst = tuple(map(seen, (m for m in part if outcome(m) == Scored(1.0))))[:3]
            found = [outcome(m) for m in part]
            figures |= by_metric(rate(f"critic.{name}{tail}", found, judge=judge, worst=worst))
    return figures


def _add_flaws(
    figures: dict[str, Figure],
    name: str,
    marked: Sequence[Marked],
    ask: Callable[[Marked, int], bool | None],
    kinds: Sequence[str],
    judge: str,
) -> None:
    """A figure over the flaws of these kinds: of all rows, by length and pool, and by kind."""
    for tail, part in _parts(marked):
        figures |= by_metric(_of_flaws(name + tail, part, ask, kinds, judge))
    for kind in kinds:
        if part := [m for m in marked if any(flaw.kind == kind for flaw in m.row.flaws)]:
            figures |= by_metric(_of_flaws(f"{name}.{kind}", part, ask, (kind,), judge))


def _of_flaws(
    metric: str, part: Sequence[Marked], ask: Callable[[Marked, int], bool | None], kinds: Sequence[str], judge: str
) -> Figure:
    answers = [[ask(m, i) for i, flaw in enumerate(m.row.flaws) if flaw.kind in kinds] for m in part]
    outcomes = [_share(values) for values in answers]
    known = [value for values in answers for value in values if value is not None]
    facts = {"flaws": len(known), "yes": sum(known)}
    missed = [m for m, outcome in zip(part, outcomes, strict=True) if isinstance(outcome, Scored) and outcome.value < 1]
    worst = tuple(map(_seen_revision, missed[:3]))
    return rate(metric, outcomes, judge=judge, facts=facts, worst=worst)


def _share(values: Sequence[bool | None]) -> Outcome:
    known = [value for value in values if value is not None]
    return Scored(sum(known) / len(known)) if known else Unscored("no critique, or no revision of it")


def _parts(marked: Sequence[Marked]) -> list[tuple[str, list[Marked]]]:
    """All, by length and by pool; parts without a row are left out, but not the whole."""
    parts = [("", list(marked))]
    for tail in ("short", "long", "benign", "redteam"):
        if own := [m for m in marked if tail in (m.row.length, m.row.pool)]:
            parts.append((f".{tail}", own))
    return parts


def _found(marked: Marked, index: int) -> bool | None:
    return None if marked.grade is None else marked.grade.found[index]


def _gone(marked: Marked, index: int) -> bool | None:
    final = marked.final
    return None if final is None else flaw_gone(marked.row, marked.row.flaws[index], final)


def _alarm(marked: Marked) -> Outcome:
    return Unscored("no critique") if marked.grade is None else indicator(marked.grade.invented)


def _broken(marked: Marked) -> Outcome:
    final = marked.final
    return Unscored("no revision") if final is None else indicator(broken(marked.row, final))


def _seen_critique(marked: Marked) -> Row:
    return {"id": marked.row.id, "critique": (marked.output.critique or "")[:400]}


def _seen_revision(marked: Marked) -> Row:
    spans = [flaw.span[:200] for flaw in marked.row.flaws]
    return _seen_critique(marked) | {"flaws": spans, "revision": (marked.final or "")[:400]}


def table(figures: Mapping[str, Figure]) -> str:
    """Every figure a line, for the screen: checkable ones first, since no judgement stands behind them."""
    order = sorted(figures, key=lambda name: (not name.startswith("critic.checkable"), name))
    width = max(map(len, figures), default=0) + 2
    return "\n".join(f"{name:<{width}}{figures[name].text}" for name in order)
