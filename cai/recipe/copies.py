"""Text copied out of a prompt's few-shot examples: RUN words in a row that the item itself didn't bring. Pure.

Owns the word n-grams of one prompt file's examples and the search in a text. Doesn't own what a word is
(`evaluate.text`), nor what becomes of a text that copies (the stages).

Invariant: words that stand in the item's own inputs, in the preamble or in a request of the constitution are never
counted as copied, wherever else they stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cai.metrics.text import ngrams, words
from cai.recipe.prompts import Prompt

RUN = 8  # words in a row; shorter runs are idioms, and one wording of a fact ("the capital of France is Paris")

Grams = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Shots:
    """The runs of words that only the examples of one prompt file hold."""

    grams: Grams


def shots_of(prompt: Prompt, requests: Iterable[str] = ()) -> Shots:
    """`requests`: the principle texts and requests of the constitution, which any item may hold."""
    shown = grams(part for example in prompt.examples for part in (example.user, example.assistant))
    return Shots(shown - grams((prompt.preamble, *requests)))


def copied(text: str, shots: Shots, inputs: Sequence[str]) -> str | None:
    """The longest run of words that the text takes from an example and not from its inputs, or None."""
    if not shots.grams:
        return None
    own = words(text)
    runs = ngrams(own, RUN)
    places = [place for place, run in enumerate(runs) if run in shots.grams]
    if not places:
        return None
    known = grams(inputs)
    longest: tuple[int, int] = (0, 0)
    start = last = -2
    for place in places:
        if runs[place] in known:
            continue
        start, last = (start if place == last + 1 else place), place
        longest = max(longest, (last - start + RUN, -start))
    length, at = longest[0], -longest[1]
    return " ".join(own[at : at + length]) if length else None


def grams(texts: Iterable[str]) -> Grams:
    return frozenset(gram for text in texts for gram in ngrams(words(text), RUN))
