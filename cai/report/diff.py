"""Word-level differences and marked passages as segments that a template can print. Pure.

Owns cutting texts into segments; owns no markup. Uses rapidfuzz's bit-parallel opcodes: difflib takes minutes on the
repetitive text that models write.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz
from rapidfuzz.distance import Indel

from cai.metrics.text import STOP_WORDS, quoted_spans, span_match

_PIECE = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]|\s+")
MATCH = 0.8  # as in the evaluation: a quotation counts as the answer's from this similarity on
MAX_WORDS = 6000  # above, the texts are shown without a difference
Span = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A stretch of text. `changed`: removed (left side) or added (right side). `quoted`: a critique quotes it."""

    text: str
    changed: bool = False
    quoted: bool = False


def word_diff(before: str, after: str, marks: Sequence[Span] = ()) -> tuple[list[Segment], list[Segment]]:
    """(segments of `before`, of `after`); joined they give the texts back. `marks`: quoted spans of `before`."""
    left, right = changes(before, after)
    return cut(before, left, marks), cut(after, right, ())


def changes(before: str, after: str) -> tuple[list[Span], list[Span]]:
    """Character spans only in `before`, and only in `after`; a lone function word between changes counts as changed."""
    a, b = _words(before), _words(after)
    if len(a) + len(b) > MAX_WORDS:
        return [], []
    opcodes = Indel.opcodes([w for w, _, _ in a], [w for w, _, _ in b])
    removed: list[Span] = []
    added: list[Span] = []
    for op in opcodes:
        alike = op.tag == "equal" and not _trivial([w for w, _, _ in a[op.src_start : op.src_end]], op, len(a), len(b))
        if not alike:
            _extend(removed, a, op.src_start, op.src_end)
            _extend(added, b, op.dest_start, op.dest_end)
    return removed, added


def _trivial(words: Sequence[str], op: object, left: int, right: int) -> bool:
    """One or two function words or signs between two changes: shown as changed, or the difference is confetti."""
    inside = op.src_start > 0 and op.src_end < left and op.dest_start > 0 and op.dest_end < right  # type: ignore[attr-defined]
    return inside and len(words) <= 2 and all(w in STOP_WORDS or not w.isalnum() for w in words)


def _extend(spans: list[Span], words: Sequence[tuple[str, int, int]], start: int, end: int) -> None:
    if start == end:
        return
    first, last = words[start][1], words[end - 1][2]
    if spans and start and spans[-1][1] == words[start - 1][2]:
        spans[-1] = (spans[-1][0], last)
    else:
        spans.append((first, last))


def _words(text: str) -> list[tuple[str, int, int]]:
    """(lower-case word or sign, start, end) without white space."""
    found = _PIECE.finditer(text)
    return [(m[0].lower(), m.start(), m.end()) for m in found if not m[0].isspace()]


def cut(text: str, changed: Iterable[Span], quoted: Iterable[Span]) -> list[Segment]:
    """The text in segments at every border of the two kinds of span."""
    changed, quoted = list(changed), list(quoted)
    borders = {0, len(text)} | {point for span in (*changed, *quoted) for point in span}
    points = sorted(point for point in borders if 0 <= point <= len(text))
    return [
        Segment(text[start:end], _inside(start, changed), _inside(start, quoted))
        for start, end in itertools.pairwise(points)
    ]


def _inside(point: int, spans: Sequence[Span]) -> bool:
    return any(start <= point < end for start, end in spans)


def find_span(span: str, text: str) -> Span | None:
    """Where the text holds the span: exactly, or the best fuzzy match of at least MATCH."""
    plain, wanted = _lower(text), _lower(span)
    at = plain.find(wanted)
    if at >= 0 and wanted:
        return at, at + len(wanted)
    if not wanted or len(wanted) > len(plain):
        return None
    found = fuzz.partial_ratio_alignment(wanted, plain, score_cutoff=MATCH * 100)
    return (found.dest_start, found.dest_end) if found else None


def _lower(text: str) -> str:
    """Lower case of the same length (a few letters grow when lowered; then the text stays as it is)."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else text


def quotations(critique: str, answer: str) -> tuple[list[Span], list[Span]]:
    """Spans in the critique and in the answer of every quotation that stands in the answer."""
    in_critique, in_answer = [], []
    for quote in quoted_spans(critique):
        if span_match(quote, answer) < MATCH:
            continue
        there, here = find_span(quote, answer), find_span(quote, critique)
        if there and here:
            in_answer.append(there)
            in_critique.append(here)
    return in_critique, in_answer
