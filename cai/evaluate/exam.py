"""The metric's own exam: labelled critiques and revisions in, acceptance by kind out.

Owns the labelled file's format (JSON lines: `prompt, answer, critique, kind, good`, optional `principle`,
`critique_request`, `revision`, `pool`) and the table. A row with `revision` examines R and CRI, one without it G and
CSI. The thresholds come from the recipe; nothing is fitted to the labels. Without an engine only the deterministic part
runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from cai.engine.asks import Scorer
from cai.errors import CaiError
from cai.evaluate import critiques, revisions
from cai.evaluate import judge as judging
from cai.evaluate.cases import Case
from cai.evaluate.likelihood import responsiveness, specificity
from cai.metrics.figure import Outcome, Scored, as_json, rounded, sample
from cai.metrics.stats import wilson
from cai.metrics.wordings import finds_nothing
from cai.recipe.settings_evaluation import EvaluationSection
from cai.store.jsonl import JsonObject, Row
from cai.store.reading import read_once
from cai.store.rows import Key

REQUIRED = {"prompt": str, "answer": str, "critique": str, "kind": str, "good": bool}
OPTIONAL = {"principle": str, "critique_request": str, "revision": str, "pool": str, "theme": str}
PARTS = ("deterministic", "likelihood", "both", "judge", "all")
MAX_KIND = 40
GOOD_AT_LEAST, BAD_AT_MOST = 0.8, 0.1
CPU_JUDGE_ROWS = 2  # rows of each kind: a judge's verdict takes 16 prompts of about 450 tokens
TRUTH_KINDS = ("invented", "cosmetic")  # only a judge of the truth can refuse these


@dataclass(frozen=True)
class Line:
    """Acceptance of one kind by one part of the metric: k of n, unscored apart."""

    kind: str
    good: bool
    part: str
    accepted: int
    n: int
    unscored: int

    @property
    def text(self) -> str:
        if not self.n:
            return f"- ({self.unscored} unscored)"
        low, high = wilson(self.accepted, self.n)
        missing = f", {self.unscored} unscored" if self.unscored else ""
        return f"{self.accepted}/{self.n} [{low:.2f}, {high:.2f}]{missing}"


@dataclass(frozen=True)
class Exam:
    """`rows`: one per labelled row with all scores, JSON-able. `lines`: acceptance by kind and part."""

    rows: list[Row]
    lines: list[Line]

    def line(self, kind: str, part: str, good: bool | None = None) -> Line | None:
        """The first such line; `good`: of rows with this label, where a kind has both."""
        found = (line for line in self.lines if line.kind == kind and line.part == part)
        return next((line for line in found if good is None or line.good is good), None)

    @property
    def table(self) -> str:
        """Kinds down, parts across."""
        parts = [part for part in PARTS if any(line.part == part for line in self.lines)]
        kinds = list(dict.fromkeys((line.kind, line.good) for line in self.lines))
        width = max(16, *(len(kind) + 2 for kind, _ in kinds))
        head = f"{'kind':<{width}}{'label':<7}" + "".join(f"{part:<24}" for part in parts)
        body = [
            f"{kind:<{width}}{'good' if good else 'bad':<7}"
            + "".join(f"{line.text if (line := self.line(kind, part, good)) else '':<24}" for part in parts)
            for kind, good in kinds
        ]
        return "\n".join(text.rstrip() for text in (head, *body))

    def failures(self, part: str) -> list[str]:
        """Kinds that miss the bar under one part: good below 80%, bad above 10%; truth kinds left out."""
        found = []
        for line in self.lines:
            if line.part != part or not line.n or (line.kind in TRUTH_KINDS and part != "all"):
                continue
            share = line.accepted / (line.n + (line.unscored if line.good else 0))
            if (line.good and share < GOOD_AT_LEAST) or (not line.good and share > BAD_AT_MOST):
                found.append(f"{line.kind}: {line.text}")
        return found


def read_exam(path: Path) -> list[Row]:
    """The labelled rows. Errors: CaiError naming file, line and key, also for a row that stands twice."""
    lines = read_once(path, where=f"{path}: --exam").removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows: list[Row] = []
    seen: dict[Key, tuple[int, bool]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {number}"
            rows.append(row := _checked(line, where))
            texts = tuple(row.get(key) for key in ("prompt", "answer", "critique", "revision", "kind"))
            first, good = seen.setdefault(texts, (number, row["good"]))
            if first != number:
                raise CaiError(f"{where}: {_twice(first, good == row['good'])}")
    if not rows:
        raise CaiError(f"{path}: no labelled row. Write one JSON object a line: {', '.join(REQUIRED)}.")
    return rows


def _twice(first: int, same: bool) -> str:
    if same:
        return f"the same row as line {first}. Leave one out: what stands twice counts twice."
    return f"good: the same row as line {first} with the other label. Decide which is right."


def _checked(line: bytes, where: str) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise CaiError(f"{where}: no JSON: {error}. Write one JSON object a line.") from None
    if not isinstance(row, dict):
        raise CaiError(f"{where}: no JSON object. Write one with the keys {', '.join(REQUIRED)}.")
    for key, kind in REQUIRED.items():
        if not isinstance(row.get(key), kind):
            raise CaiError(f"{where}: {key}: missing or not a {kind.__name__}. Every row needs {', '.join(REQUIRED)}.")
    for key, kind in OPTIONAL.items():
        if key in row and not isinstance(row[key], kind):
            raise CaiError(f"{where}: {key}: not a {kind.__name__}. Correct it or leave it out.")
    known = (*REQUIRED, *OPTIONAL)
    for key in row.keys() - known:
        if near := difflib.get_close_matches(key, known, 1, 0.75):
            raise CaiError(f"{where}: {key}: unknown key. Did you mean {near[0]}?")
    if not row["prompt"].strip():
        raise CaiError(f"{where}: prompt: empty. Write what was asked.")
    if not 0 < len(row["kind"].strip()) <= MAX_KIND or not row["kind"].isprintable():
        raise CaiError(f"{where}: kind: not a name of 1 to {MAX_KIND} printable characters. It is a line of the table.")
    if row.get("pool", "benign") not in ("benign", "redteam"):
        raise CaiError(
            f"{where}: pool: {row['pool'][:40]!r} is neither benign nor redteam. Correct it or leave it out."
        )
    return row


def run_exam(
    rows: Sequence[Row],
    section: EvaluationSection,
    scorer: Scorer | None = None,
    judge: judging.Judge | None = None,
    *,
    judge_rows: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Exam:
    """Score every row. `judge_rows`: how many rows of each kind the judge sees (0 = all); a seeded sample."""
    cases = [_case(index, row) for index, row in enumerate(rows)]
    pool = _pool(rows, cases)
    scored = [_deterministic(case, row, pool, section) for case, row in zip(cases, rows, strict=True)]
    if scorer is not None:
        _add_likelihood(scored, cases, rows, pool, scorer, section, progress)
        if judge is not None:
            kinds = dict.fromkeys(row["kind"] for row in rows if row["kind"] != "nothing")
            of_kind = {kind: [case.item for case in cases if rows[case.item]["kind"] == kind] for kind in kinds}
            chosen = {item for items in of_kind.values() for item in sample(items, judge_rows or len(items))}
            _add_judge(scored, [c for c in cases if c.item in chosen], rows, pool, scorer, judge, progress)
    return Exam(scored, _lines(scored))


def _case(index: int, row: Row) -> Case:
    return Case(
        item=index,
        round=0,
        instruction=row["prompt"],
        answer=row["answer"],
        principle=row.get("principle", ""),
        critique=row["critique"],
        revision=row.get("revision", ""),
        pool=row.get("pool", "benign"),
        initial=row["answer"],
    )


def _pool(rows: Sequence[Row], cases: Sequence[Case]) -> list[Case]:
    """One case a prompt, with its good critique where there is one: the exam's "other prompts"."""
    found: dict[str, Case] = {}
    for row, case in zip(rows, cases, strict=True):
        known = found.get(row["prompt"])
        if known is None or (row["good"] and "revision" not in row):
            found[row["prompt"]] = case
    return list(found.values())


def _deterministic(case: Case, row: Row, pool: Sequence[Case], section: EvaluationSection) -> Row:
    head = {"row": case.item, "kind": row["kind"], "good": row["good"], "prompt": row["prompt"][:120]}
    if "revision" in row:
        values = revisions.values(case)
        passed = revisions.passes(values, case)
        numbers = {name: float(value) for name, value in values.items()}
    else:
        # A shuffled row holds another prompt's critique: it must fail on its own, not by matching its source.
        peer = [c.critique for c in pool if c.instruction != case.instruction and c.critique != case.critique]
        request = [row["critique_request"]] if row.get("critique_request") else []
        values = critiques.gate_values(case, critiques.weights(pool), request, peer)
        passed = critiques.gate_passes(values, section)
        numbers = dict(values)
    accepted = all(passed.values())
    if "revision" not in row and finds_nothing(case.critique):
        accepted = row["kind"] == "nothing"  # counted apart: right on a flawless answer, never "meaningful"
    failed = [name for name, ok in passed.items() if not ok]
    return {**head, **rounded(numbers), "failed": failed, "accepted": {"deterministic": accepted}}


def _add_likelihood(
    scored: list[Row],
    cases: Sequence[Case],
    rows: Sequence[Row],
    pool: Sequence[Case],
    scorer: Scorer,
    section: EvaluationSection,
    progress: Callable[[str, int, int], None],
) -> None:
    """CSI or CRI of every row, in slices; `both` joins it with the deterministic part."""
    done = 0
    for is_revision in (False, True):
        part = [case for case in cases if ("revision" in rows[case.item]) is is_revision]
        for start in range(0, len(part), 16):
            group = part[start : start + 16]
            if is_revision:
                found = responsiveness(scorer, group, pool, controls=False)
            else:
                found = specificity(scorer, group, pool)
            for case in group:
                outcome = found[case.key]["real"]
                bar = section.min_response if is_revision else section.min_specificity
                _note(scored[case.item], "cri" if is_revision else "csi", outcome, bar)
            done += len(group)
            progress("likelihood", done, len(cases))


def _note(row: Row, name: str, outcome: Outcome, bar: float) -> None:
    row[name] = as_json(outcome)
    # an empty text has no likelihood: it is refused, not unscored
    row["accepted"]["likelihood"] = isinstance(outcome, Scored) and outcome.value >= bar
    if row["kind"] == "nothing":
        row["accepted"] |= {"likelihood": row["accepted"]["deterministic"]}
    row["accepted"]["both"] = row["accepted"]["deterministic"] and row["accepted"]["likelihood"]


def _add_judge(
    scored: list[Row],
    cases: Sequence[Case],
    rows: Sequence[Row],
    pool: Sequence[Case],
    scorer: Scorer,
    judge: judging.Judge,
    progress: Callable[[str, int, int], None],
) -> None:
    """J1 and J2 of critique rows, J3 and J4 of revision rows; `all` joins the judge with the rest."""
    for start in range(0, len(cases), 8):
        group = cases[start : start + 8]
        as_critique = [case for case in group if "revision" not in rows[case.item]]
        as_revision = [case for case in group if "revision" in rows[case.item]]
        for row in judging.judge_critiques(scorer, judge, as_critique, pool, controls=False):
            verdict = _both(row["real"]["j1"], row["real"]["j2"])
            _note_judge(scored[row["item"]], {"j1": row["real"]["j1"], "j2": row["real"]["j2"]}, verdict)
        for row in judging.judge_revisions(scorer, judge, as_revision):
            case = next(case for case in as_revision if case.item == row["item"])
            unread = None if case.critique.strip() and case.revision.strip() else False  # an empty text was not asked
            verdict = unread if row["j3"] is None else row["j3"] > 0
            _note_judge(scored[row["item"]], {"j3": row["j3"], "j4": row["j4"]}, verdict)
        progress("judge", min(start + 8, len(cases)), len(cases))


def _both(j1: float | None, j2: float | None) -> bool | None:
    return None if j1 is None or j2 is None else j1 > 0 and j2 > 0


def _note_judge(row: Row, values: JsonObject, verdict: bool | None) -> None:
    """`verdict` None: the judge gave no number, so the row is unscored."""
    row |= values
    if row["kind"] == "nothing":
        return
    row["accepted"] |= {"judge": verdict, "all": row["accepted"]["both"] and verdict}


def _lines(scored: Iterable[Row]) -> list[Line]:
    """Good kinds first, in the order of the file."""
    by_kind: dict[tuple[str, bool], list[Row]] = {}
    for row in scored:
        by_kind.setdefault((row["kind"], row["good"]), []).append(row)
    lines = []
    for (kind, good), rows in sorted(by_kind.items(), key=lambda entry: not entry[0][1]):
        for part in PARTS:
            flags = [row["accepted"][part] for row in rows if part in row["accepted"]]
            if flags:
                said = [flag for flag in flags if flag is not None]
                lines.append(Line(kind, good, part, sum(said), len(said), len(flags) - len(said)))
    return lines
