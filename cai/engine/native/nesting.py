"""What requests share: a prefix in parts, and which score requests run behind which.

Pure host logic, no torch. Owns the grouping on two levels (the head of a stage's prompts, the text of a case), neither
the requests nor what is saved (`prefixes`). Invariant: a request's group depends on the requests beside it alone, never
on what was computed before: a resume gives the same scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cai.engine import ScoreRequest

MIN_PREFIX = 16  # a shorter shared part is not worth a group of its own


class Part(NamedTuple):
    """Where a piece of a prefix stands in the store, in tokens."""

    start: int
    length: int


Parts = tuple[Part, ...]  # of one prefix, in their order: a head, and what stands behind it
NOWHERE = Part(0, 0)


def parts_of(part: Part) -> Parts:
    """Those of a prefix in one piece; of none there are none."""
    return (part,) if part.length else ()


def length_of(parts: Parts) -> int:
    return sum(part.length for part in parts)


class Nested(NamedTuple):
    """A prefix whose first `head_len` tokens are a prefix of their own (0: it is computed in one piece)."""

    token_ids: tuple[int, ...]
    head_len: int = 0

    @property
    def outer(self) -> Nested:
        """What a request without this prefix's own part shares."""
        return Nested(self.token_ids[: self.head_len])

    @property
    def ends(self) -> tuple[int, ...]:
        """Where its parts end, the head's first."""
        return tuple(end for end in (self.head_len, len(self.token_ids)) if end)


NOTHING = Nested(())


def prefix_of(request: ScoreRequest) -> Nested:
    """What the request says that it shares, parts of MIN_PREFIX tokens and more; at least one token stays its own."""
    length = min(request.prefix_len, len(request.context_ids) - 1)
    head_len = request.head_len if request.head_len >= MIN_PREFIX else 0
    if length - head_len < MIN_PREFIX:
        length, head_len = min(length, head_len), 0
    return Nested(request.context_ids[:length], head_len)


def by_prefix(requests: Sequence[ScoreRequest]) -> Iterator[tuple[Nested, list[ScoreRequest]]]:
    """Requests grouped by the prefix that at least two of them share; a lone one runs behind its head.

    One that is alone with its head, too, has no prefix.
    """
    groups: dict[Nested, list[ScoreRequest]] = {}
    for request in requests:
        groups.setdefault(prefix_of(request), []).append(request)
    for prefix in [p for p, group in groups.items() if p.head_len and len(group) == 1]:
        groups.setdefault(prefix.outer, []).extend(groups.pop(prefix))
    heads = {prefix.outer for prefix in groups if prefix.head_len}
    for prefix in [p for p, group in groups.items() if p.token_ids and len(group) == 1 and p not in heads]:
        groups.setdefault(NOTHING, []).extend(groups.pop(prefix))
    yield from groups.items()
