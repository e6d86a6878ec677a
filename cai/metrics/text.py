"""Deterministic text measures: words, ROUGE-L, n-grams, IDF grounding, quotations, repetition.

Owns what can be counted in a text without a model (`wordings` owns the wordings of refusals and the like). Pure; the
same input gives the same float on every machine. Words are lower-cased runs of letters with their combining marks, in
NFC (an apostrophe inside a word stays); scripts without spaces (Chinese, Japanese, Thai) count by the character, and
their content words are pairs of them.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from cai.metrics.scripts import MARKS, NO_SPACES, composed, word_of

_PART = word_of(NO_SPACES)
_WORD = re.compile(rf"[{NO_SPACES}][{MARKS}]*+|{_PART}(?:['’]{_PART})?")
_CHARACTER = re.compile(f"[{NO_SPACES}][{MARKS}]*")
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")
_QUOTED = re.compile(
    r"[\"“„«「]([^\"“”„«»「」\n]{4,300})[\"”“»」]|(?<!\w)['‘‚]([^'‘’‚\n]{8,300})['’‘](?!\w)",
)

_STOP = """
a about above after again all also am an and any are as at be because been being below between both but by can could did
do does doing don't down during each few for from further had has have having he her here hers him his how i if in into
is isn't it it's its just like may me might more most must my no nor not now of off on once one only or other our out
over own s same she should so some such t than that the their them then there these they this those through to too under
until up us very was we were what when where which while who whom why will with would you your
answer answers assistant critique example example's human however instead principle question rather reply request
response responses specifically user users prompt
"""  # the last two lines: the vocabulary of critiques themselves, which grounds nothing
STOP_WORDS = frozenset(_STOP.split())


@lru_cache(maxsize=8192)
def words(text: str) -> tuple[str, ...]:
    """Lower-cased words in order. A word is one object wherever it stands: the cache stays small."""
    return tuple(map(sys.intern, _WORD.findall(composed(text).lower().replace("’", "'"))))


def rouge_l(left: str, right: str) -> float:
    """ROUGE-L F1 of two texts: 2 LCS / (m + n) over words (Lin 2004 with beta = 1). Two empty texts score 1."""
    a, b = words(left), words(right)
    if not a or not b:
        return float(a == b)
    return 2.0 * LCSseq.similarity(a, b) / (len(a) + len(b))


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def copied_share(text: str, source: str, n: int = 5) -> float:
    """Share of the text's n-grams that stand in the source; a text shorter than n has none (0)."""
    own = ngrams(words(text), n)
    if not own:
        return 0.0
    found = set(ngrams(words(source), n))
    return sum(gram in found for gram in own) / len(own)


def stem(word: str) -> str:
    """Light suffix stripping, enough to let "claims" ground "claim"; not a linguistic stem."""
    for suffix in ("'s", "ing", "ied", "ies", "ed", "es", "s", "ly"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            return word[: -len(suffix)]
    return word


def content_words(text: str) -> tuple[str, ...]:
    """Stems of the words that say something; of a script without spaces, each two neighbouring characters."""
    own = words(text)
    found = [stem(word) for word in own if word not in STOP_WORDS and len(word) > 1]
    if _CHARACTER.search(text):
        found += [a + b for a, b in pairwise(own) if _CHARACTER.fullmatch(a) and _CHARACTER.fullmatch(b)]
    return tuple(found)


class Weights(dict[str, float]):
    """IDF by content word; `unseen`: of a word in no document, the largest there is."""

    @cached_property
    def unseen(self) -> float:
        return max(self.values(), default=1.0)


def idf(documents: Iterable[str]) -> Weights:
    """Smoothed inverse document frequency, ln((1 + N) / (1 + df)) + 1, over content words."""
    total, frequency = 0, Counter[str]()
    for document in documents:
        frequency.update(set(content_words(document)))
        total += 1
    return Weights({word: math.log((1 + total) / (1 + count)) + 1.0 for word, count in frequency.items()})


def grounding(text: str, source: str, weights: Weights) -> float:
    """IDF-weighted share of the text's distinct content words that stand in the source; unseen words weigh most."""
    own = set(content_words(text))
    if not own:
        return 0.0
    unseen = weights.unseen
    present = set(content_words(source))
    total = math.fsum(sorted(weights.get(word, unseen) for word in own))
    return math.fsum(sorted(weights.get(word, unseen) for word in own & present)) / total


def sentences(text: str) -> list[str]:
    return [s.strip() for s in _SENTENCE.findall(text) if words(s)]


def appends_only(answer: str, revision: str, critique: str = "") -> bool:
    """The revision is the whole answer with something put around it that mends nothing.

    That is at most two sentences; or, where the critique is given, any text that takes up less than a tenth of its own
    content words from the critique (a disclaimer of any length).
    """
    a, r = words(answer), words(revision)
    start = _place_of(a, r)
    if start is None or len(r) == len(a):
        return False
    if len(sentences(revision)) - len(sentences(answer)) <= 2:
        return True
    added = content_words(" ".join(r[:start] + r[start + len(a) :]))
    return bool(critique) and 10 * len(set(added) & set(content_words(critique))) < len(set(added))


def _place_of(answer: tuple[str, ...], revision: tuple[str, ...]) -> int | None:
    """Where the answer's words stand in a row in the revision; None if nowhere. A few words only count at an end."""
    n, last = len(answer), len(revision) - len(answer)
    if n == 0 or last < 0:
        return None
    if n >= 8:
        before, found, _ = f" {' '.join(revision)} ".partition(f" {' '.join(answer)} ")
        return len(before.split()) if found else None
    return next((i for i in sorted({0, last}) if revision[i:][:n] == answer), None)


def quoted_spans(text: str) -> list[str]:
    """What the text puts in quotation marks, in order."""
    return [(double or single).strip() for double, single in _QUOTED.findall(text)]


def span_match(span: str, text: str) -> float:
    """Best fuzzy-substring similarity of the span in the text, 0 to 1, case-insensitive."""
    if not span.strip() or not text.strip():
        return 0.0
    span, text = composed(span), composed(text)
    if len(span) > len(text):  # partial_ratio would match the text inside the span
        return fuzz.ratio(span.lower(), text.lower()) / 100.0
    return fuzz.partial_ratio(span.lower(), text.lower()) / 100.0


QUOTE_WORDS = 3  # shorter quotations are terms, titles and scare quotes


def misquoted_share(critique: str, sources: Sequence[str], minimum: float = 0.8) -> float:
    """Share of the critique's quotations (QUOTE_WORDS and more) that stand in none of the sources; 0 without any."""
    quotes = [span for span in quoted_spans(critique) if len(words(span)) >= QUOTE_WORDS]
    absent = [span for span in quotes if all(span_match(span, source) < minimum for source in sources)]
    return len(absent) / len(quotes) if quotes else 0.0


STILL_THERE = 0.95  # similarity from which on a quoted span stands in the revision: a changed word in five is less


def quoted_of(critique: str, answer: str, minimum: float = 0.8) -> list[str]:
    """What the critique quotes of the answer."""
    return [span for span in quoted_spans(critique) if span_match(span, answer) >= minimum]


def kept_of(quoted: Iterable[str], revision: str) -> list[str]:
    """The quoted spans of two words and more that stand in the revision still."""
    return [span for span in quoted if len(words(span)) >= 2 and span_match(span, revision) >= STILL_THERE]


def best_span(critique: str, answer: str, minimum: float = 0.8) -> str:
    """The passage of the answer that the critique is about, or "".

    The longest quotation of the critique that is a fuzzy substring of the answer. One that quotes nothing is about the
    answer's sentence that shares the largest part of its content words, if that is at least two words and a third; one
    that quotes only what the answer does not say is about no passage of it.
    """
    quotes = [span for span in quoted_spans(critique) if span_match(span, answer) >= minimum]
    if quotes:
        return max(quotes, key=len)
    if misquoted_share(critique, [answer], minimum):
        return ""
    named = set(content_words(critique))
    stems = [(set(content_words(s)), s) for s in sentences(answer)]
    scored = [(len(own & named) / len(own), len(own & named), s) for own, s in stems if own]
    share, shared, sentence = max(scored, default=(0.0, 0, ""), key=lambda entry: entry[:2])
    return sentence if shared >= 2 and share >= 1 / 3 else ""


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of the texts (Li et al. 2016); 0 with none."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeats(text: str, n: int = 8) -> bool:
    """Some n-gram of words stands at least twice in the text."""
    grams = ngrams(words(text), n)
    return len(set(grams)) < len(grams)


def loops(text: str, n: int = 12) -> bool:
    """The text ends in what it said before: its last n words stand earlier, too (3n characters where spaces are rare).

    The very last word does not count: a limit may have cut it.
    """
    units: list[str] | str = list(words(text))[:-1]
    if len(units) < len(text) / 30:  # a script without spaces, or one endless word
        units, n = text.lower()[:-1], 3 * n
    end = len(units) - n
    return any(units[i : i + n] == units[end:] for i in range(end)) if end > 0 else False


def repetition(text: str, n: int = 6) -> float:
    """Share of the n-word sequences that stood there before, 0 to 1; of 3n-character ones where spaces are rare."""
    units: list[str] | str = text.lower().split()
    if len(units) < len(text) / 30:  # a script without spaces, or one endless word
        units, n = text.lower(), 3 * n
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= n else 0.0
