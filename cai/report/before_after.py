"""Before and after: the probes' answers of base and tuned beside each other, for the page and for the last lines.

Owns which of the run's probe rows belong together and how the difference is told in a line; the rows are `probes`',
the differences `diff`'s. Pure. Red-team ones are folded on the page and counted on the screen.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cai.evaluate.probes import BASE, STAGE
from cai.report.diff import Compared, Segment, compared
from cai.store.row_types import Record
from cai.store.rows import of_stages

SHOWN = 220  # characters of an answer on the screen: two lines
LEAD = 40  # of them before the first difference, where that stands too far on to be seen
WIDTH = 100


@dataclass(frozen=True)
class Probed:
    """One prompt with both answers. `cut`: which of the arms ran to its limit."""

    id: str
    pool: str
    prompt: str
    both: Compared
    cut: Mapping[str, bool]

    @property
    def folded(self) -> bool:
        return self.pool != "benign"

    @property
    def same(self) -> bool:
        return self.both.share == 0.0

    @property
    def difference(self) -> str:
        """In words, with what is marked."""
        if self.same:
            return "the same answer, word for word"
        share = f"{self.both.share:.0%} of the words changed"
        told = {"words": "", "sentences": "; whole sentences are marked", "nothing": "; not a sentence stayed"}
        return share + told[self.both.by]


def probed(rows: Iterable[Record]) -> list[Probed]:
    """The probes that both arms answered, in order; of several adapters the last one's answers."""
    base: dict[int, Record] = {}
    tuned: dict[int, Record] = {}
    for row in of_stages(rows, (STAGE,)):
        if row["round"] == BASE:
            base[row["item"]] = row
        elif row["item"] not in tuned or row["round"] >= tuned[row["item"]]["round"]:
            tuned[row["item"]] = row
    last = max((row["round"] for row in tuned.values()), default=BASE)
    both = [(base[item], tuned[item]) for item in sorted(base) if item in tuned and tuned[item]["round"] == last]
    return [
        Probed(
            str(one["probe"]),
            str(one["pool"]),
            str(one["prompt"]),
            compared(str(one["text"]), str(other["text"])),
            {"base": one.get("finish") == "length", "tuned": other.get("finish") == "length"},
        )
        for one, other in both
    ]


def first_shown(found: Sequence[Probed]) -> Probed | None:
    """The one for the first screen, from its first difference on: benign, and changed if any of these is."""
    benign = [probe for probe in found if not probe.folded]
    first = next((probe for probe in benign if not probe.same), benign[0] if benign else None)
    if first is None or first.same:
        return first
    before, after = _from_change(first.both.before), _from_change(first.both.after)
    return replace(first, both=replace(first.both, before=before, after=after))


def summary(found: Sequence[Probed]) -> str:
    """`5 of 6 answers changed.`"""
    changed = sum(not probe.same for probe in found)
    return f"{changed} of {len(found)} answers changed" if changed else f"all {len(found)} answers are the same"


def lines(found: Sequence[Probed], report: Any, columns: int = 0) -> list[str]:
    """The screen's: each benign prompt with both answers, what changed in brackets; of the red-team ones a count.

    `columns`: of the terminal, 0 of none.
    """
    width = min(WIDTH, columns or WIDTH)
    if not found:
        return []
    told = [f"before and after ({summary(found)}; [-left out-], {{+new+}}):"]
    for probe in (probe for probe in found if not probe.folded):
        told += ["", f"  {_short(probe.prompt, SHOWN)}"]
        if probe.same:
            told += _indented("both", _short("".join(s.text for s in probe.both.before), SHOWN), width)
            continue
        told += _indented("base", _marked(_from_change(probe.both.before), "[-", "-]"), width)
        told += _indented("tuned", _marked(_from_change(probe.both.after), "{+", "+}"), width)
    if folded := [probe for probe in found if probe.folded]:
        changed, several = sum(not probe.same for probe in folded), "s" * (len(folded) != 1)
        told += ["", f"  {len(folded)} red-team probe{several}, {changed} answered otherwise: folded, read in {report}"]
    return told


def _from_change(segments: Sequence[Segment]) -> list[Segment]:
    """Without most of what stands before the first difference, where that lies in the second half of what is shown."""
    first, *rest = segments or [Segment("")]
    if first.changed or len(first.text) <= SHOWN // 2:
        return list(segments)
    return [replace(first, text="…" + first.text[-LEAD:].split(" ", 1)[-1]), *rest]


def _marked(segments: Sequence[Segment], left: str, right: str) -> str:
    """Up to SHOWN characters, with what changed between the marks."""
    parts, room = [], SHOWN
    for segment in segments:
        text = " ".join(segment.text.split()) if segment.text.strip() else ""
        lead = " " if segment.text[:1].isspace() else ""
        tail = " " if segment.text[-1:].isspace() and text else ""
        if len(text) > room:
            text, tail = text[: max(room - 1, 0)].rstrip() + "…", ""
        parts.append(f"{lead}{left}{text}{right}{tail}" if segment.changed and text else f"{lead}{text}{tail}")
        room -= len(text)
        if room <= 0:
            break
    return "".join(parts).strip()


def _short(text: str, room: int) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= room else plain[: room - 1].rstrip() + "…"


def _indented(name: str, text: str, width: int) -> list[str]:
    head = f"    {name + ':':<7}"
    return textwrap.wrap(text or "(nothing)", width, initial_indent=head, subsequent_indent=" " * len(head))
