"""Critiques and revisions of the data made in this run: which of them are measured, their scores, their figures.

Owns the order of the scores and the nested seeded samples of them; what a critique's or a revision's score means is
`critiques`' and `revisions`'. All complete items are measured, kept or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai.data.pairs import PairSet
from cai.evaluate import critiques, judge, likelihood, revisions
from cai.evaluate.cases import FALLBACK, Case, from_examples, nearby
from cai.evaluate.scores import Evaluation, Key, Row, every_example
from cai.evaluate.verdict import score_rows
from cai.metrics.figure import Figures, finite_rows, sample, shuffled

Rows = list[Row]
SLICE = 8  # items scored between two writes: what a kill loses


@dataclass(frozen=True)
class Cases:
    """Every complete case by its key; `scored`: the sample that likelihood is asked about, `judged`: one of those."""

    by_key: dict[Key, Case]
    scored: list[Key]
    judged: list[Key]

    def of(self, keys: Sequence[Key]) -> list[Case]:
        return [self.by_key[key] for key in keys]

    def revised(self, keys: Sequence[Key]) -> list[Key]:
        return [key for key in keys if self.by_key[key].revision]

    @property
    def pool(self) -> list[Case]:
        """The cases that serve as other prompts, and as other critiques."""
        return self.of(self.scored)


def cases_of(evaluation: Evaluation, pairs: PairSet) -> Cases:
    by_key = {case.key: case for case in from_examples(every_example(pairs))}
    scored = sample(list(by_key), evaluation.section.likelihood_items)
    return Cases(by_key, scored, sample(scored, evaluation.section.judge_items) if evaluation.judges else [])


def gates(evaluation: Evaluation, cases: Cases) -> tuple[Rows, Rows]:
    """The checks that need no model, of every critique and every revision."""
    section, keys = evaluation.section, list(cases.by_key)
    requests = sorted({p.critique_request for p in evaluation.context.constitution.principles})
    shown = [example.assistant for example in evaluation.context.prompts["critiques"].examples]
    idf = critiques.weights(list(cases.by_key.values()))
    ring = cases.of(shuffled(keys, 0, "ring"))
    for part in evaluation.left("critiques.gates", keys, 64):
        found = [critiques.gate_row(c, nearby(c, ring), requests, section, idf, shown) for c in cases.of(part)]
        evaluation.write("critiques.gates", part, found)
    revised = cases.revised(keys)
    for part in evaluation.left("revisions.gates", revised, 64):
        evaluation.write("revisions.gates", part, [revisions.check_row(c) for c in cases.of(part)])
    return evaluation.rows("critiques.gates", keys), evaluation.rows("revisions.gates", revised)


def likelihoods(evaluation: Evaluation, cases: Cases) -> tuple[Rows, Rows]:
    """CSI of the sampled critiques and CRI of their revisions; the generic control is scored once a context.

    The shipped contexts stand in for missing neighbours.
    """
    contexts = dict(cases.by_key) | {case.key: case for case in FALLBACK}
    keys = [*cases.scored, *(case.key for case in FALLBACK)] if cases.scored else []
    for part in evaluation.left("critiques.generic_lp", keys, 16):
        with evaluation.base() as scorer:
            found = likelihood.generic_lps(scorer, [contexts[key] for key in part])
        lps = [{"metric": "critiques.generic_lp", "item": i, "round": r, "lp": lp} for (i, r), lp in found.items()]
        evaluation.write("critiques.generic_lp", part, lps)
    rows = finite_rows(evaluation.rows("critiques.generic_lp", keys), "lp")
    generic = {(row["item"], row["round"]): row["lp"] for row in rows}
    for part in evaluation.left("critiques.csi", cases.scored, SLICE):
        with evaluation.base() as scorer:
            specific = likelihood.specificity(scorer, cases.of(part), cases.pool, generic)
        evaluation.write("critiques.csi", part, critiques.specificity_rows(specific))
    revised = cases.revised(cases.scored)
    for part in evaluation.left("revisions.cri", revised, SLICE):
        with evaluation.base() as scorer:
            responsive = likelihood.responsiveness(scorer, cases.of(part), cases.pool)
        evaluation.write("revisions.cri", part, score_rows("revisions.cri", responsive))
    return evaluation.rows("critiques.csi", cases.scored), evaluation.rows("revisions.cri", revised)


def verdicts(evaluation: Evaluation, cases: Cases) -> tuple[Rows, Rows]:
    """The judge's word on the critiques and revisions that it is asked about; none where it is off."""
    prompts, revised = evaluation.judge, cases.revised(cases.judged)
    if prompts is None or not cases.judged:
        return [], []
    for part in evaluation.left("critiques.judge", cases.judged, SLICE):
        with evaluation.judging() as scorer:
            judged = judge.judge_critiques(scorer, prompts, cases.of(part), cases.pool)
        evaluation.write("critiques.judge", part, judged)
    for part in evaluation.left("revisions.judge", revised, SLICE):
        with evaluation.judging() as scorer:
            judged = judge.judge_revisions(scorer, prompts, cases.of(part))
        evaluation.write("revisions.judge", part, judged)
    return evaluation.rows("critiques.judge", cases.judged), evaluation.rows("revisions.judge", revised)


def figures(
    evaluation: Evaluation,
    pairs: PairSet,
    cases: Cases,
    checked: tuple[Rows, Rows],
    scored: tuple[Rows, Rows],
    judged: tuple[Rows, Rows],
) -> Figures:
    """The figures of what `gates`, `likelihoods` and `verdicts` gave."""
    of_critiques, of_revisions = zip(checked, scored, judged, strict=True)
    found = critiques.summarise(*of_critiques, evaluation.section, evaluation.judge_name)
    found |= revisions.summarise(*of_revisions, evaluation.section, evaluation.judge_name)
    found["critiques.meaningful"].facts["of"] = len(cases.scored)
    found["revisions.addresses"].facts["of"] = len(cases.revised(cases.scored))
    _note_kept(found, pairs, of_critiques, of_revisions, evaluation)
    return found


def _note_kept(figures: Figures, pairs: PairSet, of_critiques: Any, of_revisions: Any, evaluation: Evaluation) -> None:
    """Beside the two headlines, the same rate over kept pairs only, as a fact."""
    kept = {example["item"] for example in pairs.examples}
    for metric, rows, summarise in (
        ("critiques.meaningful", of_critiques, critiques.summarise),
        ("revisions.addresses", of_revisions, revisions.summarise),
    ):
        only = [[row for row in part if row["item"] in kept] for part in rows]
        found = summarise(only[0], only[1], only[2], evaluation.section, evaluation.judge_name)[metric]
        figures[metric].facts.update({"kept_only": found.value, "kept_n": found.n})
