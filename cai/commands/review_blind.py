"""`--review RUN --blind`: two fresh answers beside each other, and nobody is told which model gave which.

Owns which answers are compared, on which side each stands and in which order they are asked; `review_session` owns the
queue, `cai.report.fresh` the answers. Invariants: side and order follow from run, rater and texts alone, never from
what an arm is; nothing that the page shows names an arm; of two equal answers nothing is asked.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cai.commands.review_session import MOST, Part, Session, check_rater, opened
from cai.data.marks import ANSWERS
from cai.errors import CaiError
from cai.metrics.figure import sample, seeded_index, shuffled
from cai.report.fresh import TUNED, Fresh, ordered, read_fresh
from cai.report.snapshot import Snapshot
from cai.run import lines
from cai.store.jsonl import Row

EMPTY = "(no text)"


@dataclass(frozen=True)
class Side:
    arm: str
    text: str


@dataclass(frozen=True)
class BlindTask:
    """Two answers to one prompt. Which arm stands on which side is in the row that a mark becomes, and nowhere else."""

    item: int
    prompt: str
    left: Side
    right: Side
    key: str
    what: str = ANSWERS
    beside: int = 2

    def facts(self) -> Row:
        return {"item": self.item, "round": 0, "control": "", "left": self.left.arm, "right": self.right.arm}

    def parts(self) -> list[Part]:
        sides = (("Left answer", self.left), ("Right answer", self.right))
        return [Part("Instruction", self.prompt), *(Part(name, side.text or EMPTY) for name, side in sides)]


@contextmanager
def reading(
    snapshot: Snapshot, rater: str, arms: str = "", say: Callable[[str], None] = lambda line: None
) -> Iterator[Session]:
    """The open session. Errors: CaiError for a bad name, no two arms, answers that are all alike, another review."""
    check_rater(rater)
    fresh = read_fresh(snapshot.path)
    pairs = compared(snapshot, fresh, arms)
    with opened(snapshot.path, rater, tasks(snapshot, fresh, pairs, rater)) as session:
        for line in opening(fresh, pairs):
            say(line)
        yield session


def compared(snapshot: Snapshot, fresh: Fresh, named: str = "") -> list[tuple[str, str]]:
    """The pairs of arms: every two of those named, else tuned against every other."""
    there, asked = fresh.arms, list(dict.fromkeys(arm.strip() for arm in named.split(",") if arm.strip()))
    if len(there) < 2:
        again = f"{lines.resume(snapshot.path)} --set evaluation.fresh_items=20"
        raise CaiError(
            f"{snapshot.path}: has no fresh answers of two arms to compare: they need held-out prompts "
            f"(heldout.items) and evaluation.fresh_items. With held-out prompts: {again}"
        )
    if unknown := [arm for arm in asked if arm not in there]:
        raise CaiError(f"--arms: {unknown[0]}: gave no fresh answer in this run. It has: {', '.join(there)}")
    if len(asked) == 1:
        raise CaiError(f"--arms: {named}: is one arm, and two are compared. This run has: {', '.join(there)}")
    pairs = [ordered(*two) for two in itertools.combinations(asked, 2)] if asked else of_all(fresh)
    if all(fresh.alike(*pair) == len(fresh.both(*pair)) for pair in pairs):
        raise CaiError(f"{snapshot.path}: {told(pairs)}: all answers are alike, letter by letter: nothing to compare.")
    return pairs


def of_all(fresh: Fresh) -> list[tuple[str, str]]:
    """Tuned against every other arm; where it gave no answer, every two that did."""
    there = fresh.arms
    if TUNED in there:
        return [ordered(TUNED, arm) for arm in there if arm != TUNED]
    return [ordered(*two) for two in itertools.combinations(there, 2)]


def told(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{first} and {second}" for first, second in pairs)


def tasks(snapshot: Snapshot, fresh: Fresh, pairs: Sequence[tuple[str, str]], rater: str) -> list[BlindTask]:
    """At most `MOST` in all, the same ones for every rater, in an order and on sides of the rater's own."""
    found = {task.key: task for task in sided(snapshot, fresh, pairs, rater, max(1, MOST // len(pairs)))}
    return [found[key] for key in shuffled(list(found), 0, (snapshot.run_id, rater, ANSWERS))]


def sided(
    snapshot: Snapshot, fresh: Fresh, pairs: Sequence[tuple[str, str]], who: str, most: int = sys.maxsize
) -> list[BlindTask]:
    """`most` prompts of each pair whose answers differ, on sides that are drawn for `who`."""
    found = []
    for first, second in pairs:
        one, two = fresh.texts[first], fresh.texts[second]
        differ = [item for item in fresh.both(first, second) if one[item] != two[item]]
        for item in sample(differ, most):
            key = fresh.key(first, second, item)
            left, right = Side(first, one[item]), Side(second, two[item])
            if seeded_index(2, (snapshot.run_id, who, key)):
                left, right = right, left
            found.append(BlindTask(item, fresh.prompts[item], left, right, key))
    return found


def opening(fresh: Fresh, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What is compared, and what is not asked, before the first pair is shown."""
    said = [f"blind: answers of {told(pairs)}, sides and order by chance"]
    alike = {pair: fresh.alike(*pair) for pair in pairs}
    said += [
        f"{count} prompts are answered alike by {told([pair])}: not asked" for pair, count in alike.items() if count
    ]
    return said
