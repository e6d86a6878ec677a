"""What a fork need not do again, for its estimate: the drawing that it took over, and scores of the base.

Owns the share of the drawing that stands and how an estimate shrinks by it. What is taken over is the fork's matter
(cai.commands.fork), which notes it in the run's event "forked". Pure over events.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cai.run.events import read_events
from cai.run.rates import Range, Speed


@dataclass(frozen=True)
class Standing:
    """`share` of what drawing so many `slots` takes stands; `scored`: so do the scores of the base.

    `own_answers`: how many answers to further requests do, which are no slot's.
    """

    share: float
    slots: int
    scored: bool = False
    own_answers: int = 0

    def left(self, slots: int) -> float:
        """The share of the drawing of `slots` that is still to do."""
        return max(0.0, 1.0 - self.share * self.slots / max(slots, 1))

    def drawing(self, whole: Range, slots: int) -> Range:
        return whole.times(self.left(slots))

    def rest(self, whole: Range, earlier: Speed | None, slots: int) -> Range:
        """Loading and evaluation; how much of them the base's scores are, only an earlier run says."""
        if earlier is None or not self.scored or slots != self.slots or earlier.rest_seconds <= 0:
            return whole
        return whole.times(max(0.0, 1.0 - earlier.base_seconds / earlier.rest_seconds))


def of_run(path: Path) -> Standing | None:
    """What the run took over as a fork; None of a run that is none, or was forked before it was noted."""
    for event in read_events(path / "events.jsonl"):
        share, slots = event.get("share"), event.get("slots")
        if event.get("kind") == "forked" and isinstance(share, int | float) and isinstance(slots, int):
            own = event.get("own_answers")
            return Standing(float(share), slots, bool(event.get("scored")), own if isinstance(own, int) else 0)
    return None
