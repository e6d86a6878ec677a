"""Overlap of what is trained on with public benchmarks: found before training, removed and listed.

Owns the rules and the list; loads no file and no model. Rules, in this order: the same words (exact), 13 words in a row
in common (13-gram), a whole benchmark text of 6 to 12 words inside a longer one (contained), a text of 6 to 18 words
with one word put in, left out or exchanged (one word: the next rule sees that in longer texts only), Jaccard similarity
of word trigrams of at least 0.7. The last is what MinHash estimates: with some hundred benchmark texts an index of
trigrams gives it exactly, so nothing is estimated. Words are compared folded: without case, accents, apostrophes,
invisible signs and compatibility forms. Letters that only look alike (Cyrillic for Latin) are others. Pure.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from cai.metrics.figure import Figure
from cai.metrics.scripts import word_of
from cai.metrics.text import ngrams
from cai.recipe.constitution import Principle
from cai.recipe.prompts import Prompt, digest
from cai.store.jsonl import JsonObject, Row
from cai.store.row_types import Pair, SoundAnswer

GRAM, SHINGLE, SIMILAR = 13, 3, 0.7
SHORTEST, LONGEST = 6, 18  # words of a text that `contained` and `one word` are about; from 19 on `similar` sees a word
APOSTROPHES = dict.fromkeys(map(ord, "'’`"))
WORD = re.compile(word_of("_"))
VOWEL_SIGNS = "\u0900"  # from Devanagari on a mark is a vowel or a tone; before, an accent that people leave out
TEXTS: tuple[Literal["prompt", "chosen", "rejected"], ...] = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class BenchmarkText:
    """One benchmark text. `name`: its row's id, which is what is listed (never the text)."""

    benchmark: str
    name: str
    text: str


@dataclass(frozen=True)
class Overlap:
    """Which rule met which benchmark row. `value`: similarity, 1 for the first two rules."""

    rule: str
    benchmark: str
    name: str
    value: float = 1.0


def words(text: str) -> tuple[str, ...]:
    """The folded words of a text, in order."""
    folded = text.lower()
    if not text.isascii():
        signs = unicodedata.normalize("NFKD", text).casefold()
        kinds = ((sign, unicodedata.category(sign)) for sign in signs)
        folded = "".join(s for s, kind in kinds if kind != "Cf" and (kind != "Mn" or s >= VOWEL_SIGNS))
    return tuple(WORD.findall(folded.translate(APOSTROPHES)))


class OverlapIndex:
    """The benchmark texts by words, by 13-grams, whole or less a word where they are short, and by trigrams."""

    def __init__(self, sources: Iterable[BenchmarkText]) -> None:
        self.sources = list(sources)
        self.exact: dict[tuple[str, ...], int] = {}
        self.grams: dict[tuple[str, ...], int] = {}
        self.short: dict[tuple[str, ...], int] = {}
        self.less_one: dict[tuple[str, ...], int] = {}
        self.by_shingle: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.sizes: list[int] = []
        for number, source in enumerate(self.sources):
            tokens = words(source.text)
            shingles = _shingles(tokens)
            self.sizes.append(len(shingles))
            if tokens:
                self.exact.setdefault(tokens, number)
            for gram in ngrams(tokens, GRAM):
                self.grams.setdefault(gram, number)
            if SHORTEST <= len(tokens) < GRAM:
                self.short.setdefault(tokens, number)
            for part in _less_one(tokens):
                self.less_one.setdefault(part, number)
            for shingle in shingles:
                self.by_shingle[shingle].append(number)

    def find(self, text: str) -> Overlap | None:
        """The first rule that meets, or None."""
        tokens = words(text)
        if not tokens:
            return None
        if tokens in self.exact:
            return self._overlap("exact", self.exact[tokens])
        inside = (part for size in range(SHORTEST, GRAM) for part in ngrams(tokens, size))
        near = (tokens, *_less_one(tokens))  # less_one[tokens]: a word was left out
        for rule, parts, known in (
            ("13-gram", ngrams(tokens, GRAM), self.grams),
            ("contained", inside, self.short),
            ("one word", near, self.less_one),
            ("one word", near, self.exact if len(tokens) > SHORTEST else {}),  # a word was put in
        ):
            number = next((known[part] for part in parts if part in known), None)
            if number is not None:
                return self._overlap(rule, number)
        return self._similar(_shingles(tokens))

    def _similar(self, shingles: set[tuple[str, ...]]) -> Overlap | None:
        shared = Counter(number for shingle in shingles for number in self.by_shingle.get(shingle, ()))
        for number, count in sorted(shared.items(), key=lambda entry: (-entry[1], entry[0])):
            jaccard = count / (len(shingles) + self.sizes[number] - count)
            if jaccard >= SIMILAR:
                return self._overlap("similar", number, round(jaccard, 4))
        return None

    def _overlap(self, rule: str, number: int, value: float = 1.0) -> Overlap:
        source = self.sources[number]
        return Overlap(rule, source.benchmark, source.name, value)


def _less_one(tokens: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A short text with each of its words left out: two that share one differ in that word at most."""
    if not SHORTEST <= len(tokens) <= LONGEST:
        return []
    return [tokens[:i] + tokens[i + 1 :] for i in range(len(tokens))]


def _shingles(tokens: Sequence[str]) -> set[tuple[str, ...]]:
    """Word trigrams; a shorter text is one shingle."""
    return set(ngrams(tokens, SHINGLE)) or ({tuple(tokens)} if tokens else set())


def sources_of(benchmark: str, name: str, texts: Iterable[str]) -> list[BenchmarkText]:
    """The texts of a benchmark's row, each once; an empty one is none."""
    return [BenchmarkText(benchmark, name, text) for text in dict.fromkeys(texts) if text.strip()]


def clean(pairs: Sequence[Pair], index: OverlapIndex) -> tuple[list[Pair], list[Row]]:
    """(kept, removed): a pair goes if its prompt or one of its answers overlaps; removed rows say which and where."""
    kept: list[Pair] = []
    removed: list[Row] = []
    for pair in pairs:
        found = next(((part, hit) for part in TEXTS if (hit := index.find(pair[part]))), None)
        if found is None:
            kept.append(pair)
        else:
            removed.append({"item": pair["item"], "part": found[0], **asdict(found[1])})
    assert len(pairs) == len(kept) + len(removed)
    return kept, removed


def request_sha(row: SoundAnswer) -> str:
    return digest(row["prompt"].encode())


def of_answers(answers: Sequence[SoundAnswer], index: OverlapIndex) -> list[Row]:
    """Of own answers that an SFT stage would be shown those whose request or text overlaps; `sha` of the request."""
    found: list[Row] = []
    for row in answers:
        hits = ((part, index.find(text)) for part, text in (("prompt", row["prompt"]), ("chosen", row["chosen"])))
        hit = next(((part, overlap) for part, overlap in hits if overlap), None)
        if hit is not None:
            found.append({"sha": request_sha(row), "part": hit[0], **asdict(hit[1])})
    return found


def check_inputs(texts: Mapping[str, str], index: OverlapIndex) -> list[Row]:
    """Overlaps of few-shots and principles: listed, for only their author can change them."""
    return [{"input": name, **asdict(hit)} for name, text in texts.items() if (hit := index.find(text))]


def input_texts(prompts: Mapping[str, Prompt], principles: Iterable[Principle]) -> dict[str, str]:
    """name -> text of every few-shot turn and principle."""
    found = {}
    for name, prompt in prompts.items():
        for number, example in enumerate(prompt.examples, 1):
            found[f"prompts/{name}.yaml example {number} user"] = example.user
            found[f"prompts/{name}.yaml example {number} assistant"] = example.assistant
    for principle in principles:
        found[f"constitution.yaml {principle.id}"] = principle.principle
    return found


def result(
    pairs: int, removed: Sequence[Row], inputs: Sequence[Row], checked: JsonObject, missing: Sequence[str]
) -> Row:
    """What eval/contamination.json holds: what was checked and what was not, each overlap, two figures for gates."""
    note = f"not checked: {', '.join(missing)}" if missing else ""
    by_rule = dict(sorted(Counter(row["rule"] for row in removed).items()))
    seen = {"checked": dict(checked), "not_checked": list(missing)}
    facts = {"by_rule": by_rule, **seen}
    n = pairs if checked else 0
    figures = [
        Figure("contamination.removed", len(removed) if checked else None, n=n, note=note, facts=facts),
        Figure("contamination.inputs", len(inputs) if checked else None, n=n, note=note),
    ]
    told = {figure.metric: figure.as_dict() for figure in figures}
    return {**seen, "removed": list(removed), "inputs": list(inputs), "figures": told}
