"""Which known texts are near a new one: token-sort ratio over all of them, or over candidates once there are many.

Owns the near-duplicate search. Up to `EXACT_CHARACTERS` of known text every pair is compared. Beyond, candidates come
from MinHash over byte trigrams (Broder 1997) in bands (Leskovec et al., Mining of Massive Datasets, 3.4), and only they
are compared: comparing all was quadratic, 160 s for 50,000 requests of 80 characters. Random English pairs have a ratio
of 0.42 and share 7% of their trigrams; at a ratio of 0.8 they share 40% or more, which two of 192 bands of 3 find
99.99% of the time. What was added last is always compared. Invariant: the answer depends on the texts and their order
alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rapidfuzz import fuzz, process

from cai.metrics.scripts import composed, word_of

COMPARED_CHARACTERS = 2000  # of an instruction; the comparison is quadratic: two lines of 1 MB took 74 s
EXACT_CHARACTERS = 400_000  # 5,000 requests of 80 characters: 1.6 s for all pairs
BANDS, ROWS, SHARED = 192, 3, 2  # a candidate shares two bands: 12 are expected at 40% common trigrams, 0.2 at 10%
MOST = (
    256  # candidates out of the index, those that share most: 16% of texts of few syllables share two bands by chance
)
UNINDEXED = 512  # texts added last, all of them candidates; then, and again at every 32nd part more, they are indexed
WORD = re.compile(word_of())
WIDTH = 3  # bytes of a shingle
SHORT = 48  # characters: up to these all are compared: other endings leave a quarter of the trigrams (1% missed at 32)
SEED = 0x9E3779B97F4A7C15


def normalise(text: str) -> str:
    """Lower case, words only, the beginning: what two instructions are compared by. A text without words: its signs."""
    text = composed(text).lower()
    return (" ".join(WORD.findall(text)) or "".join(text.split()))[:COMPARED_CHARACTERS]


def in_order(text: str) -> str:
    """The words of a normalised text sorted: the plain ratio of two of these is their token-sort ratio."""
    return " ".join(sorted(text.split()))


class NearDuplicates:
    """Accepted texts, and whether a new one is closer to any of them than the threshold (token-sort ratio, 0 to 1).

    A text's words are sorted once, when it is added.
    """

    def __init__(self, texts: Sequence[str], threshold: float, *, exact_characters: int = EXACT_CHARACTERS) -> None:
        self.known: list[str] = []
        self.threshold, self.exact_characters = threshold, exact_characters
        self._characters = 0
        self._index: BandIndex | None = None
        for text in texts:
            self.add(text)

    def nearest(self, text: str) -> float:
        """Similarity to the nearest known text, 0 if below the threshold."""
        ordered = in_order(normalise(text))
        index = self._indexed()
        if index is None:
            return self._best(ordered, self.known)
        best = self._best(ordered, [self.known[place] for place in index.candidates(ordered)])
        return max(best, self._best(ordered, index.short)) if len(ordered) <= SHORT else best

    def _best(self, ordered: str, known: Sequence[str]) -> float:
        found = process.extractOne(ordered, known, scorer=fuzz.ratio, score_cutoff=self.threshold * 100)
        return found[1] / 100 if found else 0.0

    def add(self, text: str) -> None:
        ordered = in_order(normalise(text))
        self.known.append(ordered)
        self._characters += len(ordered)

    def _indexed(self) -> BandIndex | None:
        """The index of all that is known; None as long as all can be compared."""
        if self._characters <= self.exact_characters:
            return None
        if self._index is None:
            self._index = BandIndex()
        self._index.extend(self.known)
        return self._index


class BandIndex:
    """Band keys of texts in one sorted array, and the texts behind it that are not in it yet.

    A key holds its band in the upper 8 bits; two texts are candidates of each other where `SHARED` keys are the same.
    """

    def __init__(self) -> None:
        import numpy as np

        self._np = np
        draw = np.random.default_rng(SEED)
        self._factors = draw.integers(1, 2**63, size=(BANDS * ROWS, 1), dtype=np.uint64) | np.uint64(1)
        self._bands = np.arange(BANDS, dtype=np.uint64) << np.uint64(56)
        self._keys, self._owners = np.empty(0, np.uint64), np.empty(0, np.uint32)
        self._texts: Sequence[str] = ()
        self._inside = 0  # how many of them are in the array
        self.short: list[str] = []  # the short ones among them

    def extend(self, texts: Sequence[str]) -> None:
        """Take the texts behind those that are known; the array is merged anew only now and then."""
        self._texts = texts
        if len(texts) - self._inside <= max(UNINDEXED, self._inside // 32):
            return
        np, fresh = self._np, texts[self._inside :]
        keys = np.concatenate([self.keys(text) for text in fresh])
        owners = np.repeat(np.arange(self._inside, len(texts), dtype=np.uint32), BANDS)
        keys, owners = np.concatenate([self._keys, keys]), np.concatenate([self._owners, owners])
        self.short += [text for text in fresh if len(text) <= SHORT]
        order = np.argsort(keys, kind="stable")
        self._keys, self._owners, self._inside = keys[order], owners[order], len(texts)

    def keys(self, text: str) -> Any:
        """The text's band keys: MinHash by multiplication, three minima folded into one key each."""
        np = self._np
        data = np.frombuffer(text.encode("utf-8", "replace").ljust(WIDTH), np.uint8).astype(np.uint64)
        grams = np.unique(data[:-2] << np.uint64(16) | data[1:-1] << np.uint64(8) | data[2:])
        mixed = (grams + np.uint64(1)) * np.uint64(SEED)
        minima = ((mixed ^ (mixed >> np.uint64(29))) * self._factors >> np.uint64(16)).min(axis=1)
        a, b, c = minima.reshape(BANDS, ROWS).T
        folded = (a * np.uint64(SEED) + b) * np.uint64(0xBF58476D1CE4E5B9) + c
        folded ^= folded >> np.uint64(31)
        return self._bands | (folded * np.uint64(0x94D049BB133111EB) >> np.uint64(8))

    def candidates(self, text: str) -> list[int]:
        """Places of the texts that share most keys, in rising order, and of all that are not in the array yet."""
        np, keys = self._np, self.keys(text)
        starts = np.searchsorted(self._keys, keys, "left")
        ends = np.searchsorted(self._keys, keys, "right")
        hits = [self._owners[start:end] for start, end in zip(starts, ends, strict=True) if end > start]
        shared = np.bincount(np.concatenate(hits)) if hits else np.empty(0, np.int64)
        owners = np.flatnonzero(shared >= SHARED)
        if len(owners) > MOST:
            owners = np.sort(owners[np.argsort(-shared[owners], kind="stable")[:MOST]])
        return [*owners.tolist(), *range(self._inside, len(self._texts))]


def mean_nearest(ordered: Sequence[str], most: int) -> tuple[float, int]:
    """Mean similarity of a text to its nearest other one, over all texts or `most` of them at even distances.

    Of 50,000 texts a thousand are asked: the time is then linear in the number of texts. Gives how many were asked.
    """
    import numpy as np

    count = len(ordered)
    if count < 2:
        return 0.0, count
    asked = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    nearest = []
    for start in range(0, len(asked), 256):  # never an n x n matrix
        part = asked[start : start + 256]
        scores = process.cdist([ordered[i] for i in part], ordered, scorer=fuzz.ratio, workers=1)
        scores[np.arange(len(part)), part] = 0
        nearest.append(scores.max(axis=1))
    return float(np.concatenate(nearest).mean()) / 100, len(asked)
