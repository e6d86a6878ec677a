"""How long a stage will still take, as far as that is measured: a range, or nothing.

Owns that arithmetic alone: no clock, no files. Rows that run side by side finish together: the first row of a batch of
sixteen says little about the other fifteen, so a rate is taken only over as many rows as run at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# What one measured stretch says about the next: -30% / +50%; the margins shrink with the root of their number.
LOW, HIGH = 0.3, 0.5


@dataclass
class Pace:
    """`together`: items in flight at once. `left`: items still to do when the last stretch ended."""

    together: int = 1
    marks: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    left: int = 0

    def note(self, seconds: float, finished: int, left: int) -> None:
        """`finished` items after `seconds` of the stage; a stretch ends when as many are done as run at once."""
        if finished - self.marks[-1][1] >= max(self.together, 1):
            self.marks.append((seconds, finished))
            self.left = left

    def to_go(self, seconds: float) -> tuple[float, float] | None:
        """(low, high) seconds after `seconds` of the stage; None until one stretch is measured.

        The first stretch also warms up (kernels, an empty queue): it counts only while there is no second one.
        """
        if len(self.marks) < 2:
            return None
        (began, before), (ended, after) = self.marks[min(1, len(self.marks) - 2)], self.marks[-1]
        each, since = (ended - began) / (after - before), max(seconds - ended, 0.0)
        margin = 1.0 / math.sqrt(max(len(self.marks) - 2, 1))
        size = max(self.together, 1)
        late = max(each, since / size)  # the stretch in flight already takes that long for each of its items
        whole = math.ceil(self.left / size) * size  # a last batch may take as long as a full one
        low = self.left * each * (1.0 - LOW * margin) - since
        high = whole * late * (1.0 + HIGH * margin) - since
        return max(low, 0.0), max(high, 0.0)
