"""The surface control: can a bag of characters tell chosen from rejected, without the prompt?

Owns a linear classifier over pairs, its accuracy on pairs it has not seen, and the features that decide it in a form a
person can read. Owns no gate and no file. What it tells apart, P1 can be told apart by: a preference that it explains
is a marker or a length, not a judgement. Invariants: the prompt is never read; a pair is never tested by a classifier
that was fitted on it or on one of its texts' twins; the same pairs in any order give the same figures.

Text -> character 2- to 5-grams (present or not, scaled to norm 1) and five features of length; a pair is the
difference chosen - rejected, and logistic regression without intercept is fitted on the differences and their mirror
images (Bradley and Terry 1952, linear in the features). What both texts of a pair share cancels out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cai.metrics.figure import Figure, Scored, rate, sample, shuffled, unmeasured
from cai.metrics.stats import wilson
from cai.metrics.text import words
from cai.store.jsonl import Row
from cai.store.row_types import TrainingPair

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SEED = 0
FOLDS = 5
MOST_PAIRS = 500  # fitted on at most so many, a seeded sample: 1,000 of 200 words took 63 s on two busy cores, 0.5 GB
STRENGTH = 10.0  # C of the logistic regression; from 1 to 1000 accuracy on real pairs differed by 0.02 or less
# What one standard deviation of a length counts beside a text's n-grams, which have norm 1. Told of 149 real pairs, 57
# of them held out: 0.95 at 0.2, 1.0 at 0.06; in five folds 0.95 and 0.98; with that run's marker cut off 0.83 and 0.90.
LENGTH_WEIGHT = 0.06
SHOWN = 8  # features of each direction
LONGEST = 40  # characters that a feature is widened to for the eye
LENGTHS = ("words", "characters", "lines", "list items", "characters a word")


@dataclass(frozen=True)
class Feature:
    """One feature that decides. `text`: the raw n-gram or a name of LENGTHS; `readable`: with its usual surroundings.

    `weight`: coefficient x mean difference over the training pairs, in log-odds a pair. `chosen`, `rejected`: share of
    the training texts that hold `readable`, or their mean where the feature is a length.
    """

    text: str
    readable: str
    weight: float
    chosen: float
    rejected: float

    @property
    def line(self) -> str:
        """`" ### Case"` in 70% of chosen, 0% of rejected` / `words: 131 in chosen, 98 in rejected`"""
        if self.text in LENGTHS:
            return f"{self.text}: {self.chosen:.3g} in chosen, {self.rejected:.3g} in rejected"
        return f"“{self.readable}” in {self.chosen:.0%} of chosen, {self.rejected:.0%} of rejected"


@dataclass(frozen=True)
class Surface:
    """Accuracy a pair with its Wilson interval; None and a `reason` where nothing could be tested.

    `tested_on`: "held-out pairs", or "training pairs, cross-validated": there the interval is a little too narrow, for
    the folds share training pairs. `for_chosen`, `for_rejected`: strongest first, fitted on the training pairs.
    """

    accuracy: float | None
    low: float | None
    high: float | None
    n: int
    fitted_on: int
    tested_on: str
    wins: tuple[tuple[int, float], ...] = ()
    for_chosen: tuple[Feature, ...] = ()
    for_rejected: tuple[Feature, ...] = ()
    reason: str = ""

    def as_measured(self, metric: str = "preference.surface") -> Figure:
        """The figure for a gate; the features stand in its facts."""
        judge = "linear classifier of characters and lengths"
        if self.accuracy is None:
            return unmeasured(metric, self.reason, judge)
        facts: Row = {"fitted_on": self.fitted_on, "tested_on": self.tested_on}
        facts |= {"for_chosen": [f.line for f in self.for_chosen], "for_rejected": [f.line for f in self.for_rejected]}
        return rate(metric, [Scored(win) for _, win in self.wins], judge=judge, facts=facts)


def fit_and_test(train_pairs: Sequence[TrainingPair], heldout_pairs: Sequence[TrainingPair]) -> Surface:
    """Fit on the training pairs, test on the held-out ones; without any, cross-validate on the training pairs.

    A pair: {"item", "chosen", "rejected", ...}. A held-out pair with a text that also stands in a training pair is left
    out, for it would be recognised, and so is a pair of two equal texts in fitting (tested, it is a tie: 0.5).
    """
    train = _at_most(_ordered(p for p in train_pairs if p["chosen"] != p["rejected"]), MOST_PAIRS)
    if not train:
        return _untested("no training pair of two different texts to fit on", 0)
    if heldout_pairs:
        known = {text for pair in train for text in _texts(pair)}
        test = [p for p in _ordered(heldout_pairs) if not known.intersection(_texts(p))]
        if not test:
            return _untested("every held-out pair has a text of a training pair", len(train))
        model = Classifier(train)
        return _tested(_wins(model, test), len(train), "held-out pairs", model)
    if len(train) < 2:
        return _untested("no held-out pair, and one training pair cannot be cross-validated", len(train))
    wins = [win for fit, test in _folds(train) for win in _wins(Classifier(fit), test)]
    if not wins:
        return _untested("no held-out pair, and the training pairs share their texts", len(train))
    return _tested(wins, len(train), "training pairs, cross-validated", Classifier(train))


def _untested(reason: str, fitted_on: int) -> Surface:
    return Surface(None, None, None, 0, fitted_on, "", reason=reason)


def _tested(wins: Sequence[tuple[int, float]], fitted_on: int, tested_on: str, model: Classifier) -> Surface:
    total, n = math.fsum(win for _, win in wins), len(wins)
    low, high = wilson(total, n)
    liked, disliked = model.strongest()
    return Surface(total / n, low, high, n, fitted_on, tested_on, tuple(wins), liked, disliked)


def _texts(pair: TrainingPair) -> tuple[str, str]:
    return pair["chosen"], pair["rejected"]


def _ordered(pairs: Iterable[TrainingPair]) -> list[TrainingPair]:
    return sorted(pairs, key=lambda pair: (pair["item"], *_texts(pair)))


def _at_most(pairs: list[TrainingPair], size: int) -> list[TrainingPair]:
    kept = set(sample([pair["item"] for pair in pairs], size, SEED))
    return [pair for pair in pairs if pair["item"] in kept]


def _folds(pairs: Sequence[TrainingPair]) -> Iterator[tuple[list[TrainingPair], list[TrainingPair]]]:
    """(fit, test) of each fold; a test pair whose text stands among those fitted on is left out."""
    order = shuffled(range(len(pairs)), SEED, "surface folds")
    count = min(FOLDS, len(pairs))
    for fold in range(count):
        inside = set(order[fold::count])
        fit = [pair for place, pair in enumerate(pairs) if place not in inside]
        known = {text for pair in fit for text in _texts(pair)}
        yield fit, [pairs[place] for place in sorted(inside) if not known.intersection(_texts(pairs[place]))]


def _wins(model: Classifier, pairs: Sequence[TrainingPair]) -> list[tuple[int, float]]:
    """(item, 1 where the chosen text scores higher, 0 where the rejected one does, 0.5 for a tie)."""
    margins = model.margins(pairs) if pairs else []
    return [(p["item"], 1.0 if m > 0 else 0.5 if m == 0 else 0.0) for p, m in zip(pairs, margins, strict=True)]


class Classifier:
    """Logistic regression on differences of features, chosen - rejected, of the pairs it is fitted on."""

    def __init__(self, pairs: Sequence[TrainingPair]) -> None:
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self.pairs = pairs
        texts = [text for pair in pairs for text in _texts(pair)]
        rare = 1 if len(texts) < 20 else 3  # an n-gram of one or two texts of many teaches only that text
        self.grams = (
            TfidfVectorizer(  # with counts and IDF 0.95, 0.95 and 0.90 in place of the 1.0, 0.98 and 0.90 above
                analyzer="char",
                ngram_range=(2, 5),
                lowercase=False,
                min_df=rare,
                binary=True,
                use_idf=False,
                dtype=np.float64,
            ).fit(texts)
        )
        lengths = np.array([_lengths(text) for text in texts])
        self.scale = lengths.std(axis=0)
        self.scale[self.scale == 0.0] = np.inf  # a length that never varies weighs nothing
        x = self._differences(pairs)
        both, signs = vstack([x, -x], format="csr"), np.repeat([1, 0], len(pairs))
        fitted = LogisticRegression(
            C=STRENGTH, fit_intercept=False, solver="liblinear", random_state=SEED, tol=1e-6, max_iter=1000
        ).fit(both, signs)
        self.weights = fitted.coef_[0]
        self.shift = np.asarray(x.mean(axis=0)).ravel()

    def margins(self, pairs: Sequence[TrainingPair]) -> list[float]:
        """Score of the chosen text minus that of the rejected one; a rounding error is a tie."""
        return [float(round(m, 12)) for m in self._differences(pairs) @ self.weights]

    def _differences(self, pairs: Sequence[TrainingPair]) -> csr_matrix:
        return self._features([p["chosen"] for p in pairs]) - self._features([p["rejected"] for p in pairs])

    def _features(self, texts: Sequence[str]) -> csr_matrix:
        from scipy.sparse import csr_matrix, hstack

        lengths = np.array([_lengths(text) for text in texts]) * LENGTH_WEIGHT / self.scale
        return hstack([self.grams.transform(texts), csr_matrix(lengths)], format="csr")

    def strongest(self) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
        """Features that speak for chosen and for rejected, by what they contribute to the mean margin."""
        names = [*self.grams.get_feature_names_out(), *LENGTHS]
        worth = self.weights * self.shift
        order = sorted(range(len(names)), key=lambda i: (-round(float(worth[i]), 9), names[i]))
        order = [i for i in order if worth[i] > 0]
        sides = ([i for i in order if self.weights[i] > 0], [i for i in order if self.weights[i] < 0])
        return (
            self._described(sides[0], names, worth, "chosen"),
            self._described(sides[1], names, worth, "rejected"),
        )

    def _described(
        self, order: Sequence[int], names: Sequence[str], worth: np.ndarray, side: str
    ) -> tuple[Feature, ...]:
        """The first of them, each in its usual surroundings; what stands inside one that is shown is passed over."""
        texts = {name: [pair[name] for pair in self.pairs] for name in ("chosen", "rejected")}
        found: list[Feature] = []
        for i in order[:500]:
            name, weight = names[i], round(float(worth[i]), 6)
            letters = len(re.sub(r"\W", "", name))
            if 0 < letters < 4:
                continue  # `lt` of adult, health and difficult tells a reader nothing
            if i >= len(names) - len(LENGTHS):
                column = LENGTHS.index(name)
                means = [float(np.mean([_measures(t)[column] for t in texts[s]])) for s in ("chosen", "rejected")]
                found.append(Feature(name, name, weight, *means))
            elif not any(name.strip() in f.readable or _near(name, f.readable) for f in found if f.text not in LENGTHS):
                wide = widened(name, texts[side])
                shares = [sum(wide in t for t in texts[s]) / len(texts[s]) for s in ("chosen", "rejected")]
                found.append(Feature(name, visible(wide), weight, *shares))
            if len(found) == SHOWN:
                break
        return tuple(found)


def _measures(text: str) -> tuple[float, ...]:
    """The five of LENGTHS, as counts."""
    count = len(words(text))
    lines = [line for line in text.splitlines() if line.strip()]
    listed = sum(bool(re.match(r"\s*([-*•]|\d+[.)])\s", line)) for line in lines)
    return (float(count), float(len(text)), float(len(lines)), float(listed), len(text) / max(1, count))


def _lengths(text: str) -> list[float]:
    """Logarithms: a text twice as long is as far from another at 20 words as at 200."""
    return [math.log1p(value) for value in _measures(text)]


def widened(gram: str, texts: Sequence[str]) -> str:
    """The n-gram with what nearly always (9 in 10) stands around it: ` ###` -> ` ### Case`."""
    text = gram
    while len(text) < LONGEST:
        places = [(t, m.start()) for t in texts for m in re.finditer(re.escape(text), t)]
        after = Counter(t[at + len(text)] for t, at in places if at + len(text) < len(t))
        before = Counter(t[at - 1] for t, at in places if at)
        found = [(count, sign, True) for sign, count in after.items()]
        found += [(count, sign, False) for sign, count in before.items()]
        count, sign, behind = max(found, default=(0, "", True))
        if not places or count < 0.9 * len(places):
            break
        text = text + sign if behind else sign + text
    return text


def visible(text: str) -> str:
    """Line ends and tabs as signs, so that a feature stays on one line."""
    return text.replace("\n", "↵").replace("\t", "⇥")


def _near(gram: str, shown: str) -> bool:
    """All but one sign of the n-gram stand in what is shown already: ` ##` and `## C` are one finding."""
    return len(gram) > 2 and (visible(gram)[1:].strip() in shown or visible(gram)[:-1].strip() in shown)
