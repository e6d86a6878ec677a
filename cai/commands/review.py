"""`--review RUN`: a person marks critiques and revisions, or with --blind fresh answers, on a page or in the terminal.

Owns the command, the terminal form and what follows a review; `review_session` owns the queue, `review_blind` which
answers stand beside each other, `review_page` the page, `marks` what the marks mean.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from cai import errors
from cai.commands.review_page import page, serve
from cai.commands.review_session import MARKS, QUESTIONS, ReviewTask, Session, Task, name_of, reviewing, tasks
from cai.data.dataset import lines, pair_row, write_if_changed
from cai.data.marks import filter_pairs, of_texts
from cai.report import people
from cai.report.agreement import agreement
from cai.report.snapshot import Snapshot, read_story
from cai.run.lines import command as runner_line
from cai.run.lines import near
from cai.store.records import refuse_missing
from cai.terminal import duration, printable, say, word

__all__ = ["ReviewTask", "Session", "ask", "command", "finish", "page", "reviewing", "serve", "tasks"]


def command(args: argparse.Namespace) -> int:
    """Serve the page (or ask in the terminal) until everything is marked or Ctrl-C; then write the report again."""
    from cai.inputs import locate

    path, rater = locate(args, args.review), name_of(args.rater or "me")
    refuse_missing(path / "records.jsonl")
    snapshot = read_story(path)
    with _asked(args, snapshot, rater, say) as session, suppress(KeyboardInterrupt), ended_by_signals():
        if args.terminal:
            ask(session, input, say)
        else:
            serve(session, say, port=args.port)
    finish(path, say)
    return errors.DONE


def _asked(
    args: argparse.Namespace, snapshot: Snapshot, rater: str, say: Callable[[str], None]
) -> AbstractContextManager[Session]:
    """What is marked: the texts that pairs are made of, or with --blind two fresh answers beside each other."""
    if not args.blind:
        return reviewing(snapshot, rater)
    from cai.commands import review_blind

    return review_blind.reading(snapshot, rater, args.arms, say)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A hangup and SIGTERM end a review like Ctrl-C: whoever marked is gone, and the lock must not stay."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(path: Path, say: Callable[[str], None]) -> None:
    """Agreement on screen, the report again, and the training pairs without those that somebody refused."""
    from cai.report.pages import write_pages

    snapshot = read_story(path)
    for row in agreement(snapshot):
        say(printable(f"{row['who']}, {row['what']}: {people.agreed(row)}"))
    for line in people.lines(people.people(snapshot)):
        say(line)
    if of_texts(snapshot.reviews):
        kept = [pair_row(pair) for pair in filter_pairs(snapshot.cleaned.kept, snapshot.reviews)]
        write_if_changed(path / "dataset" / "reviewed.jsonl", lines(kept))
        total = len(snapshot.cleaned.kept)
        say(f"{len(kept)} of {total} training pairs are not marked as bad: {word(path / 'dataset' / 'reviewed.jsonl')}")
        say(f"to train on these alone: {_train_on_marks(snapshot)}")
    write_pages(path)


def _train_on_marks(snapshot: Snapshot) -> str:
    """The command that leaves out what was refused: a resume before training, a fork (which keeps all text) after."""
    flag, run = "--fork" if "training_identity" in snapshot.manifest else "--resume", near(snapshot.path)
    return runner_line(run / "recipe.toml", flag, run, "--set", "hygiene.reviews=true")


# --- the terminal form


def ask(session: Session, read: Callable[[str], str], say: Callable[[str], None]) -> None:
    """One task after the other on the terminal; an empty line or end of input leaves."""
    say("Some texts may be harmful or offensive. Enter alone stops; u takes the last mark back.")
    while session.pending:
        task, place = session.pending[0], len(session.tasks) - len(session.pending) + 1
        to_go = session.seconds_to_go
        left = f", about {duration(to_go)} to go" if to_go else ""
        say(f"\n--- {place} of {len(session.tasks)}, {task.what}{left}")
        say("\n".join(printable(f"{part.name}: {part.text}") for part in task.parts()))
        if not _answered(session, task, read):
            return


def _answered(session: Session, task: Task, read: Callable[[str], str]) -> bool:
    """Ask until a mark is given or taken back; False where the person leaves. By number or by first letter."""
    marks = (*MARKS[task.what], "skip")
    keys = {mark[0]: mark for mark in marks} | {str(number): mark for number, mark in enumerate(marks, 1)}
    choice = ", ".join(f"{number} = {mark}" for number, mark in enumerate(marks, 1))
    while True:
        try:
            answer = read(f"{QUESTIONS[task.what]} ({choice}) ").strip()
        except (EOFError, KeyboardInterrupt):
            return False
        if not answer:
            return False
        key, _, note = answer.partition(" ")
        key = key.lower() if key.lower() in (*marks, "undo") else key[:1].lower()
        if key in ("u", "undo") and session.undo():
            return True
        mark = key if key in marks else keys.get(key, "")
        if mark and session.mark(session.ticket(task), mark, note):
            return True
