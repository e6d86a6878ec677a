"""Phrases that are far more common in chosen than in rejected: what DPO would learn instead of the principles.

Owns which phrases those are; what goes because of them is cai.data.hygiene's. Pure. Only what can be common is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cai.metrics.stats import gained_exact
from cai.metrics.text import words
from cai.recipe.settings_evaluation import HygieneSection
from cai.store.row_types import Pair

Entry = tuple[str, str]  # place, phrase
LEAK_SIZES = (3, 4, 5, 6)
LEAK_MIN_PAIRS = 3  # a phrase in fewer chosen texts than this is no pattern


@dataclass(frozen=True)
class Leak:
    """A phrase that is far more common in chosen than in rejected. `place`: opener, closer or anywhere.

    `p`: exact McNemar over pairs (in chosen only against in rejected only), times the number of phrases tried.
    """

    place: str
    phrase: str
    chosen: int
    rejected: int
    lift: float
    p: float


def find_leaks(pairs: Sequence[Pair], section: HygieneSection) -> list[Leak]:
    """Phrases in at least `leak_min_share` of chosen with the wanted lift over rejected, most common first.

    Openers are the first four words, closers the last four; elsewhere n-grams of 3 to 6 words. Of nested phrases with
    the same count the longest stays. The lift is (c + 0.5) / (r + 0.5): both sides have the same number of texts. It
    must be no accident either: of a hundred phrases, some stand in three of ten chosen and in no rejected by chance.
    A phrase is no more common than its rarest word, nor than the rarest two that meet in it, so only phrases of common
    words that commonly meet are counted: the others of 5,000 texts are millions.
    """
    least = max(LEAK_MIN_PAIRS, section.leak_min_share * len(pairs))
    texts_with, chosen = Counter[str](), Counter[Entry]()
    rejected, both = Counter[Entry](), Counter[Entry]()
    for pair in pairs:
        texts_with.update(set(words(pair["chosen"])))
    common = {word for word, count in texts_with.items() if count >= least}
    meeting = Counter[tuple[str, str]]()
    for pair in pairs:
        tokens = words(pair["chosen"])
        meeting.update({two for two in pairwise(tokens) if two[0] in common and two[1] in common})
    together = {two for two, count in meeting.items() if count >= least}
    del meeting
    for pair in pairs:
        chosen.update(phrases(pair["chosen"], common, together))
    often = _without_nested({entry: count for entry, count in chosen.items() if count >= least})
    for pair in pairs:
        if held := often.keys() & phrases(pair["rejected"], common, together):
            rejected.update(held)
            both.update(held & phrases(pair["chosen"], common, together))
    found = []
    for entry, count in often.items():
        lift = (count + 0.5) / (rejected[entry] + 0.5)
        if lift < section.leak_min_lift:
            continue
        p = min(1.0, len(often) * gained_exact(count - both[entry], rejected[entry] - both[entry]))
        if p <= section.leak_max_p:
            found.append(Leak(*entry, count, rejected[entry], round(lift, 3), float(f"{p:.3g}")))
    return found


def phrases(
    text: str, among: Collection[str] | None = None, together: Collection[tuple[str, str]] | None = None
) -> set[Entry]:
    """(place, phrase) of a text, each once; if given, of words of `among` alone, each two of them in `together`."""
    tokens, grams = words(text), set[Entry]()
    start = 0
    for end in range(len(tokens) + 1):
        word = end < len(tokens) and (among is None or tokens[end] in among)
        if word and (end == start or together is None or (tokens[end - 1], tokens[end]) in together):
            continue
        run = tokens[start:end]  # no phrase reaches beyond a word that is left out
        start = end if word else end + 1
        grams |= {("anywhere", " ".join(run[i : i + n])) for n in LEAK_SIZES for i in range(len(run) - n + 1)}
    if len(tokens) >= 4:
        for place, four in (("opener", tokens[:4]), ("closer", tokens[-4:])):
            if (among is None or all(w in among for w in four)) and (
                together is None or all(two in together for two in pairwise(four))
            ):
                grams.add((place, " ".join(four)))
    return grams


def _without_nested(counts: Mapping[Entry, int]) -> dict[Entry, int]:
    """Most common and longest first, without what stands only inside a longer phrase: it would be tried twice."""
    order = sorted(counts.items(), key=lambda item: (-item[1], -len(item[0][1]), item[0]))
    kept: dict[Entry, int] = {}
    longer: dict[int, str] = {}  # count -> the phrases kept with that count, for a search within them
    for (place, phrase), count in order:
        if place != "anywhere" or f" {phrase} " not in longer.get(count, ""):
            kept[place, phrase] = count
            longer[count] = f"{longer.get(count, '')}| {phrase} "
    return kept
