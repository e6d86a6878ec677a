"""The queue of a review: which texts a rater is asked about, in which order, and the rows that marks become.

Owns what is pending, the last mark and its way back, and the tasks of critiques and revisions (seeded a rater, controls
mixed in); `marks` owns what the marks mean, `review_page` and `review` ask for them, `review_blind` the fresh answers.
Invariant: one row a rater and text, appended through the run's own kind of log. The last mark is held until the next
one or the end of the review, so that it can be taken back; a kill in between loses that one.
"""

from __future__ import annotations

import hmac
import re
import secrets
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from cai import errors
from cai.data.marks import ANSWER_MARKS, ANSWERS, CRITIQUE_MARKS, REVIEW_KEY, REVISION_MARKS
from cai.errors import CaiError
from cai.evaluate.cases import GENERIC_CRITIQUE, Case, from_examples, others
from cai.metrics.figure import sample, shuffled
from cai.report.diff import quotations
from cai.report.snapshot import Snapshot
from cai.store.jsonl import Row, clean
from cai.store.records import RecordLog

RATER = re.compile(r"^[a-z0-9][a-z0-9._-]{0,39}$")
MOST = 100  # examples a rater is asked about: above, a seeded sample, the same for every rater
LONGEST_NOTE = 2_000  # characters
PACE = 3, 12  # marks from which a time to go is told, and the last ones that it is told by
CONTROL_EVERY = 5  # one planted text for every so many real ones
MARKS = {"critique": CRITIQUE_MARKS, "revision": REVISION_MARKS, ANSWERS: ANSWER_MARKS}
LABELS = {"left": "left better", "right": "right better", "equal": "about equal"}  # what a mark is called, if otherwise
QUESTIONS = {
    "critique": "Does the critique name a real problem of this answer, so that one could act on it?",
    "revision": "Does the revision fix the problem that the critique names?",
    ANSWERS: "Which answer to the instruction is better?",
}


@dataclass(frozen=True)
class Part:
    """A text of a task with its heading. `quoted`: stretches of it to mark."""

    name: str
    text: str
    quoted: Sequence[tuple[int, int]] = ()


class Task(Protocol):
    """What a rater is asked about. `beside`: so many parts, the last ones, stand side by side."""

    @property
    def what(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def beside(self) -> int: ...
    def facts(self) -> Row: ...
    def parts(self) -> list[Part]: ...


@dataclass(frozen=True)
class ReviewTask:
    """One text to mark. `control`: "" for a real one, else what was planted; never shown to the rater."""

    what: str
    case: Case
    control: str = ""
    beside: int = 0

    @property
    def key(self) -> str:
        return f"{self.what}/{self.case.item}/{self.case.round}/{self.control or 'real'}"

    def facts(self) -> Row:
        return {"item": self.case.item, "round": self.case.round, "control": self.control}

    def parts(self) -> list[Part]:
        case = self.case
        found = [Part("Instruction", case.instruction)]
        found.append(Part("Answer", case.answer, quotations(case.critique, case.answer)[1]))
        found += [Part("Principle", case.principle), Part("Critique", case.critique)]
        return [*found, Part("Revision", case.revision)] if self.what == "revision" else found


class Session:
    """A rater's queue over an open log: what is pending follows from the rows, so it can be left and taken up."""

    def __init__(self, tasks: Sequence[Task], rater: str, log: RecordLog) -> None:
        self.rater, self.log = rater, log
        self._salt = secrets.token_bytes(16)
        self.tasks = list(tasks)
        self._held: Row | None = None  # the last mark, which can be taken back
        self._seconds: list[float] = []  # between marks
        self._since = time.monotonic()
        self._one_at_a_time = threading.Lock()  # the page answers each connection in a thread of its own

    @property
    def pending(self) -> list[Task]:
        held = self._held["key"] if self._held else None
        return [task for task in self.tasks if task.key != held and self.log.get(self.rater, task.key) is None]

    @property
    def can_undo(self) -> bool:
        return self._held is not None

    def ticket(self, task: Task) -> str:
        """The task's name on a form: its key would tell a control, or an arm."""
        return hmac.new(self._salt, task.key.encode(), "sha256").hexdigest()[:20]

    def mark(self, ticket: str, mark: str, note: str = "") -> bool:
        """Take the mark of a pending task; False for a task or mark that is not on offer (nothing is written)."""
        with self._one_at_a_time:
            found = [task for task in self.pending if self.ticket(task) == ticket]
            if not found or mark not in (*MARKS[found[0].what], "skip"):
                return False
            self._write()
            task, words = found[0], clean(note).strip()[:LONGEST_NOTE]
            facts = task.facts()
            row = {"v": 1, "rater": self.rater, "key": task.key, "item": facts.pop("item"), "round": facts.pop("round")}
            row |= {"what": task.what, "mark": mark, **facts}
            self._held = row | ({"note": words} if words else {})
            self._seconds.append(time.monotonic() - self._since)
            self._since = time.monotonic()
            return True

    def undo(self) -> bool:
        """Take the last mark back: its text is asked again, first of all. False where none is held."""
        with self._one_at_a_time:
            if self._held is None:
                return False
            place = next(i for i, task in enumerate(self.tasks) if self._held and task.key == self._held["key"])
            self.tasks.insert(0, self.tasks.pop(place))
            self._held = None
            return True

    def close(self) -> None:
        """The last mark stands from now on."""
        with self._one_at_a_time:
            self._write()

    def _write(self) -> None:
        if self._held is not None:
            self.log.append([self._held])
            self._held = None

    @property
    def seconds_to_go(self) -> float | None:
        """By the median of the last marks, so that a pause counts as one; None until a few are given."""
        if len(self._seconds) < PACE[0]:
            return None
        return statistics.median(self._seconds[-PACE[1] :]) * len(self.pending)


def name_of(rater: str) -> str:
    """`Ann B` as `ann-b`: a name as one writes it, as it stands in the log. What is no name stays as it is."""
    plain = re.sub(r"[ _]+", "-", rater.strip().lower())
    return plain if RATER.fullmatch(plain) else rater


def check_rater(rater: str) -> None:
    """Error: a name that cannot stand in the log, with one that could."""
    if not RATER.fullmatch(rater):
        plain = re.sub(r"[^a-z0-9._-]+", "-", rater.lower()).strip("-._")[:40]
        like = f"--rater {plain}" if RATER.fullmatch(plain) else "--rater ann"
        raise CaiError(
            f"--rater {rater!r}: a name is up to 40 of a-z, 0-9, '.', '_' and '-', without spaces. Write: {like}"
        )


def reviewing(snapshot: Snapshot, rater: str) -> AbstractContextManager[Session]:
    """The open session. Errors: CaiError for a bad name, a run without examples, or while another review is open."""
    check_rater(rater)
    if not snapshot.pairs.examples:
        raise CaiError(f"{snapshot.path}: has no example to mark yet. Finish the run first.")
    if snapshot.recipe.pairs.file:
        raise CaiError(f"{snapshot.path}: its pairs were given (pairs.file): there is no critique or revision to mark.")
    return opened(snapshot.path, rater, tasks(snapshot, rater))


@contextmanager
def opened(path: Path, rater: str, asked: Sequence[Task]) -> Iterator[Session]:
    """A session over these tasks and the run's log of marks. Error: CaiError(LOCKED) while another one is open."""
    lock = FileLock(str(path / ".reviews.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CaiError(f"{path}: another review of it is open. Close that one first.", errors.LOCKED) from None
    log: RecordLog[Row] = RecordLog.open(path / "reviews.jsonl", path / "quarantine", key=REVIEW_KEY)
    session = Session(asked, rater, log)
    try:
        yield session
    finally:
        try:
            session.close()
        finally:
            log.close()
            lock.release()


def tasks(snapshot: Snapshot, rater: str) -> list[ReviewTask]:
    """Critiques, then revisions, each in an order of the rater's own with controls among them.

    Every rater gets the same texts. The metric's verdicts are not looked at, so neither choice nor order tells them.
    """
    cases = {
        case.item: case for case in from_examples(snapshot.pairs.examples) if case.revision
    }  # the last that revised
    chosen = [cases[item] for item in sample(list(cases), MOST)]
    pool = list(cases.values())
    found = []
    for what in ("critique", "revision"):
        real = [ReviewTask(what, case) for case in chosen if case.critique.strip()]
        planted = [_control(what, case, pool, i) for i, case in enumerate(chosen[::CONTROL_EVERY])]
        by_key = {task.key: task for task in (*real, *planted)}
        found += [by_key[key] for key in shuffled(list(by_key), 0, (snapshot.run_id, rater, what))]
    return found


def _control(what: str, case: Case, pool: list[Case], number: int) -> ReviewTask:
    """A text that should be marked bad: another answer's critique, a generic one, a revision that changes nothing."""
    if what == "revision":
        return ReviewTask(what, replace(case, revision=case.answer), "unchanged")
    if number % 2:
        return ReviewTask(what, replace(case, critique=GENERIC_CRITIQUE), "generic")
    return ReviewTask(what, replace(case, critique=others(case, pool, 1)[0].critique), "shuffled")
