"""Differences of two texts and marked passages as segments that a template can print: by words where a text was
edited, by sentences where most words changed, none where no sentence stayed. Pure.

Owns cutting texts into segments; owns no markup. Uses rapidfuzz's bit-parallel opcodes: difflib takes minutes on the
repetitive text that models write.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rapidfuzz import fuzz
from rapidfuzz.distance import Indel

from cai.metrics.text import STOP_WORDS, quoted_spans, span_match

_PIECE = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]|\s+")
MATCH = 0.8  # as in the evaluation: a quotation counts as the answer's from this similarity on
REWRITTEN = 0.6  # share of changed words above which a text was written anew, not edited
ALIKE = 0.85  # likeness of two sentences that are the same but for a word or two
_SENTENCE = re.compile(r"\S(?:[^\n]*?)(?:[.!?…。！？]+[\"'”’)\]]*(?=\s|$)|(?=\n)|$)")
MAX_WORDS = 6000  # above, the texts are shown without a difference
Span = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A stretch of text. `changed`: removed (left side) or added (right side). `quoted`: a critique quotes it."""

    text: str
    changed: bool = False
    quoted: bool = False


@dataclass(frozen=True)
class Compared:
    """Two texts beside each other. `share`: of the words that changed; `by`: what is marked."""

    before: list[Segment]
    after: list[Segment]
    share: float
    by: Literal["words", "sentences", "nothing"]


def compared(before: str, after: str, marks: Sequence[Span] = ()) -> Compared:
    """Word by word; above REWRITTEN by sentence, for words that two texts share by accident are no likeness."""
    left, right = changes(before, after)
    share = _share(before, after, left, right)
    by: Literal["words", "sentences", "nothing"] = "words"
    if share > REWRITTEN:
        left, right = changed_sentences(before, after)
        by = "sentences"
        if sum(end - start for start, end in left) >= len(before.strip()):  # not one stayed: all marked is none marked
            left, right, by = [], [], "nothing"
    return Compared(cut(before, left, marks), cut(after, right, ()), share, by)


def _share(before: str, after: str, left: Sequence[Span], right: Sequence[Span]) -> float:
    """Of both texts' words, how many stand in a changed span."""
    words = [(word, changed) for text, changed in ((before, left), (after, right)) for word in _words(text)]
    touched = sum(_inside(start, changed) for (_, start, _), changed in words)
    return touched / len(words) if words else 0.0


def changed_sentences(before: str, after: str) -> tuple[list[Span], list[Span]]:
    """Spans of the sentences of each text that the other does not hold, or nearly."""
    one, other = sentences(before), sentences(after)
    return _without_like(one, before, other, after), _without_like(other, after, one, before)


def sentences(text: str) -> list[Span]:
    """Where sentences and lines stand, without the white space around them."""
    return [(m.start(), m.end()) for m in _SENTENCE.finditer(text)]


def _without_like(spans: Sequence[Span], text: str, others: Sequence[Span], their: str) -> list[Span]:
    theirs = [_lower(their[start:end]) for start, end in others]
    found: list[Span] = []
    for start, end in spans:
        mine = _lower(text[start:end])
        if any(fuzz.ratio(mine, other, score_cutoff=ALIKE * 100) for other in theirs):
            continue
        if found and not text[found[-1][1] : start].strip():  # one mark for neighbours
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


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
