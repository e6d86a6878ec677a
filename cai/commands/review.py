"""`--review RUN`: a person marks critiques and revisions, blind, on a local page or in the terminal.

Owns the queue of tasks (seeded a rater, controls mixed in), the two forms and the rows of reviews.jsonl; `marks` owns
what the marks mean. The page is served on the loopback only, under a random token, to requests for this very host. It
has no script. Marks are final: one row a rater and text, appended through the run's own kind of log.
"""

from __future__ import annotations

import argparse
import hmac
import re
import secrets
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from filelock import FileLock, Timeout

from cai import errors
from cai.data.dataset import lines, pair_row, write_if_changed
from cai.data.marks import CRITIQUE_MARKS, REVIEW_KEY, REVISION_MARKS, filter_pairs
from cai.errors import CaiError
from cai.evaluate.cases import GENERIC_CRITIQUE, Case, from_examples, others
from cai.metrics.figure import sample, shuffled
from cai.report.agreement import agreement
from cai.report.snapshot import Snapshot, read_story
from cai.report.tables import command_line
from cai.report.templating import environment
from cai.store.jsonl import Row
from cai.store.records import RecordLog
from cai.terminal import number, percent, printable

RATER = re.compile(r"^[a-z0-9][a-z0-9._-]{0,39}$")
MOST = 100  # examples a rater is asked about: above, a seeded sample, the same for every rater
CONTROL_EVERY = 5  # one planted text for every so many real ones
MARKS = {"critique": CRITIQUE_MARKS, "revision": REVISION_MARKS}
QUESTIONS = {
    "critique": "Does the critique name a real problem of this answer, so that one could act on it?",
    "revision": "Does the revision fix the problem that the critique names?",
}


@dataclass(frozen=True)
class ReviewTask:
    """One text to mark. `control`: "" for a real one, else what was planted; never shown to the rater."""

    what: str
    case: Case
    control: str = ""

    @property
    def key(self) -> str:
        return f"{self.what}/{self.case.item}/{self.case.round}/{self.control or 'real'}"


def command(args: argparse.Namespace) -> int:
    """Serve the page (or ask in the terminal) until everything is marked or Ctrl-C; then write the report again."""
    from cai.inputs import locate
    from cai.terminal import say

    path, rater = locate(args, args.review), args.rater or "me"
    snapshot = read_story(path)
    with reviewing(snapshot, rater) as session, suppress(KeyboardInterrupt), ended_by_signals():
        if args.terminal:
            ask(session, input, say)
        else:
            serve(session, say)
    finish(path, say)
    return errors.DONE


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A hangup and SIGTERM end a review like Ctrl-C: whoever marked is gone, and the lock must not stay."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Session:
    """A rater's queue over an open log: what is pending follows from the rows, so it can be left and taken up."""

    def __init__(self, snapshot: Snapshot, rater: str, log: RecordLog) -> None:
        self.rater, self.log = rater, log
        self._salt = secrets.token_bytes(16)
        self.tasks = tasks(snapshot, rater)
        self._one_at_a_time = threading.Lock()  # the page answers each connection in a thread of its own

    @property
    def pending(self) -> list[ReviewTask]:
        return [task for task in self.tasks if self.log.get(self.rater, task.key) is None]

    def ticket(self, task: ReviewTask) -> str:
        """The task's name on a form: its key would tell a control."""
        return hmac.new(self._salt, task.key.encode(), "sha256").hexdigest()[:20]

    def mark(self, ticket: str, mark: str) -> bool:
        """Append the mark of a pending task; False for a task or mark that is not on offer (nothing is written)."""
        with self._one_at_a_time:
            found = [task for task in self.pending if self.ticket(task) == ticket]
            if not found or mark not in (*MARKS[found[0].what], "skip"):
                return False
            task = found[0]
            row = {"v": 1, "rater": self.rater, "key": task.key, "item": task.case.item, "round": task.case.round}
            self.log.append([row | {"what": task.what, "mark": mark, "control": task.control}])
            return True


@contextmanager
def reviewing(snapshot: Snapshot, rater: str) -> Iterator[Session]:
    """The open session. Errors: CaiError for a bad name, a run without examples, or while another review is open."""
    if not RATER.fullmatch(rater):
        plain = re.sub(r"[^a-z0-9._-]+", "-", rater.lower()).strip("-._")[:40]
        like = f"--rater {plain}" if RATER.fullmatch(plain) else "--rater ann"
        raise CaiError(
            f"--rater {rater!r}: a name is up to 40 of a-z, 0-9, '.', '_' and '-', without spaces. Write: {like}"
        )
    if not snapshot.pairs.examples:
        raise CaiError(f"{snapshot.path}: has no example to mark yet. Finish the run first.")
    lock = FileLock(str(snapshot.path / ".reviews.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CaiError(f"{snapshot.path}: another review of it is open. Close that one first.", errors.LOCKED) from None
    log: RecordLog[Row] = RecordLog.open(snapshot.path / "reviews.jsonl", snapshot.path / "quarantine", key=REVIEW_KEY)
    try:
        yield Session(snapshot, rater, log)
    finally:
        log.close()
        lock.release()


def tasks(snapshot: Snapshot, rater: str) -> list[ReviewTask]:
    """Critiques, then revisions, each in an order of the rater's own with controls among them.

    Every rater gets the same texts. The metric's verdicts are not looked at, so neither choice nor order tells them.
    """
    cases = {case.item: case for case in from_examples(snapshot.pairs.examples)}
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


def finish(path: Path, say: Callable[[str], None]) -> None:
    """Agreement on screen, the report again, and the training pairs without those that somebody refused."""
    from cai.report.pages import write_pages

    snapshot = read_story(path)
    for row in agreement(snapshot):
        kappa = "" if row["kappa"] is None else f", kappa {number(row['kappa'], 2)}"
        say(printable(f"{row['who']}, {row['what']}: n={row['n']}, {percent(row['raw'])}{kappa}"))
    if snapshot.reviews:
        kept = [pair_row(pair) for pair in filter_pairs(snapshot.cleaned.kept, snapshot.reviews)]
        write_if_changed(path / "dataset" / "reviewed.jsonl", lines(kept))
        total = len(snapshot.cleaned.kept)
        say(f"{len(kept)} of {total} training pairs are not marked as bad: {path}/dataset/reviewed.jsonl")
        say(f"to train on these alone: {_train_on_marks(snapshot)}")
    write_pages(path)


def _train_on_marks(snapshot: Snapshot) -> str:
    """The command that leaves out what was refused: a resume before training, a fork (which keeps all text) after."""
    begun = "training_identity" in snapshot.manifest
    run = shlex.quote(f"{snapshot.path.parent.name}/{snapshot.run_id}")
    return f"{command_line(snapshot)} {'--fork' if begun else '--resume'} {run} --set hygiene.reviews=true"


# --- the terminal form


def ask(session: Session, read: Callable[[str], str], say: Callable[[str], None]) -> None:
    """One task after the other on the terminal; an empty line or end of input leaves."""
    say("Some texts may be harmful or offensive. Enter alone stops; a mark that is given stands.")
    for place, task in enumerate(session.pending, 1):
        case, marks = task.case, MARKS[task.what]
        parts = [("Instruction", case.instruction), ("Principle", case.principle), ("Answer", case.answer)]
        parts += [("Critique", case.critique)] + ([("Revision", case.revision)] if task.what == "revision" else [])
        say(f"\n--- {place} of {len(session.pending) + place - 1}, {task.what}")
        say("\n".join(printable(f"{name}: {text}") for name, text in parts))
        letters = {mark[0]: mark for mark in (*marks, "skip")}
        choice = ", ".join(f"{letter} = {mark}" for letter, mark in letters.items())
        while True:
            try:
                answer = read(f"{QUESTIONS[task.what]} ({choice}) ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                return
            if not answer:
                return
            if answer[0] in letters and session.mark(session.ticket(task), letters[answer[0]]):
                break


# --- the page


def serve(session: Session, say: Callable[[str], None], ready: Callable[[HTTPServer, str], None] | None = None) -> None:
    """Serve on 127.0.0.1, a free port, under a random token, until Ctrl-C (or `server.shutdown()`)."""
    token = secrets.token_urlsafe(24)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(session, token))  # browsers open spare connections
    url = f"http://127.0.0.1:{server.server_address[1]}/{token}/"
    say(f"{len(session.pending)} texts to mark as {session.rater}. Open {url}")
    say("Only this machine can reach it. Ctrl-C ends it; what is marked stays.")
    try:
        if ready:
            ready(server, url)
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
    finally:
        server.server_close()


def _handler(session: Session, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """GET shows the next task, POST marks it. Anything without token or host of ours is refused."""

        timeout = 20
        server_version, sys_version = "cai-review", ""

        def allowed(self) -> bool:
            port = self.connection.getsockname()[1]
            hosts = (f"127.0.0.1:{port}", f"localhost:{port}")  # another name is a rebound one
            origin = self.headers.get("Origin")
            mine = origin in (None, "null", *(f"http://{host}" for host in hosts))
            asked = self.path.encode("utf-8", "replace")
            right = hmac.compare_digest(asked, f"/{token}/".encode())
            return right and mine and self.headers.get("Host", "") in hosts

        def do_GET(self) -> None:
            if self.allowed():
                self.send(200, page(session))
            else:
                self.send(404, "not here\n", "text/plain")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self.allowed() or not (length.isascii() and length.isdigit()) or int(length[:9]) > 10_000:
                self.send(404, "not here\n", "text/plain")
                return
            form = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
            if session.mark(form.get("ticket", [""])[0], form.get("mark", [""])[0]):
                self.send(303, "", location=f"/{token}/")
            else:
                self.send(409, page(session, "That text is marked already, or no mark was chosen."))

        def send(self, code: int, body: str, kind: str = "text/html", location: str = "") -> None:
            data = body.encode("utf-8", "replace")
            self.send_response(code)
            for name, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(data)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
                "frame-ancestors 'none'; base-uri 'none'",
                **({"Location": location} if location else {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: the token would be in every line."""

    return Handler


def page(session: Session, note: str = "") -> str:
    pending = session.pending
    task = pending[0] if pending else None
    return (
        environment()
        .get_template("review.html.j2")
        .render(
            task=task,
            ticket=session.ticket(task) if task else "",
            question=QUESTIONS[task.what] if task else "",
            marks=MARKS[task.what] if task else (),
            done=len(session.tasks) - len(pending),
            total=len(session.tasks),
            rater=session.rater,
            note=note,
        )
    )
