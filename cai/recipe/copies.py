"""Text copied out of a prompt's few-shot examples: RUN words in a row, or a whole sentence of SENTENCE, that the item
itself didn't bring. Pure.

Owns the word n-grams and short sentences of one prompt file's examples and the search in a text. Doesn't own what a
word is (`metrics.text`), nor what becomes of a text that copies (the stages).

Invariant: words that stand in the item's own inputs, in the preamble, in a request of the constitution or in a stock
refusal are never counted as copied, wherever else they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from cai.metrics.text import ngrams, words
from cai.recipe.prompts import Prompt

RUN = (
    8  # words in a row ("won't" is two); shorter runs are idioms, and one wording of a fact ("Paris is the capital of")
)
SENTENCE = 6  # words of a whole one; 3 of 639 revisions of a 1.5B model had "Whole numbers and decimals both work."
_SORRY = ("I'm sorry, but", "I am sorry, but", "I'm sorry.", "I am sorry.")
_DECLINES = product(
    _SORRY,
    ("can't", "cannot", "can not"),
    ("help", "assist"),
    ("", " you"),
    ("that", "that request", "this", "your request"),
)
STOCK = (  # refusals that any model knows: an example that holds one lends nothing
    *(f"{sorry} I {can} {help}{whom} with {what}." for sorry, can, help, whom, what in _DECLINES),
    *(f"I'm sorry, but I {can} {do} that for you." for can, do in product(("can't", "cannot"), ("do", "provide"))),
    *(f"I'm sorry, but as an AI language model, I {can} provide that." for can in ("can't", "cannot")),
)
_ENDS = re.compile(r"(?<=[.!?:])[\"”'’)]*\s+|\n+")

Grams = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Shots:
    """The runs of words that only the examples of one prompt file hold."""

    grams: Grams
    sentences: Grams = frozenset()

    def __or__(self, other: Shots) -> Shots:
        return Shots(self.grams | other.grams, self.sentences | other.sentences)


def shots_of(prompt: Prompt, requests: Iterable[str] = ()) -> Shots:
    """`requests`: the principle texts and requests of the constitution, which any item may hold."""
    shown = [part for example in prompt.examples for part in (example.user, example.assistant)]
    free = (prompt.preamble, *requests, *STOCK)
    known = [f" {' '.join(words(one))} " for one in free]
    short = (one for one in _short(shown) if not any(f" {' '.join(one)} " in text for text in known))
    return Shots(grams(shown) - grams(free), frozenset(short))


def copied(text: str, shots: Shots, inputs: Sequence[str]) -> str | None:
    """The longest run of words that the text takes from an example and not from its inputs, or None.

    Where there is none, a whole sentence that is shorter.
    """
    if not shots.grams and not shots.sentences:
        return None
    own, parts = words(text), _split(text)
    runs = ngrams(parts, RUN)
    places = [place for place, run in enumerate(runs) if run in shots.grams]
    if not places:
        return _sentence_of(text, shots, inputs)
    known = grams(inputs)
    longest: tuple[int, int] = (0, 0)
    start = last = -2
    for place in places:
        if runs[place] in known:
            continue
        start, last = (start if place == last + 1 else place), place
        longest = max(longest, (last - start + RUN, -start))
    length, at = longest[0], -longest[1]
    if not length:
        return _sentence_of(text, shots, inputs)
    word_of = [n for n, word in enumerate(own) for part in word.split("'") if part]
    return " ".join(own[word_of[at] : word_of[at + length - 1] + 1])


def _sentence_of(text: str, shots: Shots, inputs: Sequence[str]) -> str | None:
    found = [" ".join(one) for one in sorted(_short((text,)) & shots.sentences)]
    known = [f" {' '.join(words(one))} " for one in inputs] if found else []
    return next((said for said in found if not any(f" {said} " in text for text in known)), None)


def _short(texts: Iterable[str]) -> Grams:
    """The sentences of at least SENTENCE words that are too short for a run; of scripts without spaces none."""
    found = (tuple(words(one)) for text in texts for one in _ENDS.split(text))
    return frozenset(one for one in found if SENTENCE <= len(one) < RUN and len("".join(one)) >= 3 * SENTENCE)


def grams(texts: Iterable[str]) -> Grams:
    return frozenset(gram for text in texts for gram in ngrams(_split(text), RUN))


def _split(text: str) -> tuple[str, ...]:
    """The words, parted at apostrophes: "is something I won't help with. It" was seven of an example's."""
    return tuple(part for word in words(text) for part in word.split("'") if part)
