"""How far the base agrees with the judge of another family (`evaluation.judge_model`), on a seeded subset.

Owns the rows `X.base`, the base's own verdicts on texts that the judge read, and the figures `X.agreement`: Cohen's
kappa of yes and no (log-odds above 0) with a bootstrap interval. Without such a judge it measures nothing. Invariant: a
verdict that one of the two did not give is unscored and agrees with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cai.evaluate import judge, prompted
from cai.evaluate.chain_figures import Cases
from cai.evaluate.scores import Evaluation
from cai.metrics.figure import Figure, Figures, by_metric, finite_rows, sample, unmeasured
from cai.metrics.stats import kappa, kappa_interval
from cai.store.jsonl import Row
from cai.store.row_types import Pair

AGREEMENT = 40  # verdicts of the base beside the judge's: at a true kappa of 0.6 the interval is about 0.35 to 0.85
SLICE = 8  # texts judged between two writes


def of_texts(evaluation: Evaluation, cases: Cases) -> Figures:
    """J1 and J2 of critiques, J3 and J4 of revisions: the judge's word against the base's."""
    prompts = evaluation.judge
    if evaluation.external is None or prompts is None or not cases.judged:
        return {}
    subset = sample(cases.judged, AGREEMENT)
    revised = cases.revised(subset)
    for part in evaluation.left("critiques.judge.base", subset, SLICE):
        with evaluation.base() as scorer:
            rows = judge.judge_critiques(scorer, prompts, cases.of(part), cases.pool, controls=False)
        evaluation.write("critiques.judge.base", part, [row | {"metric": "critiques.judge.base"} for row in rows])
    for part in evaluation.left("revisions.judge.base", revised, SLICE):
        with evaluation.base() as scorer:
            rows = judge.judge_revisions(scorer, prompts, cases.of(part))
        evaluation.write("revisions.judge.base", part, [row | {"metric": "revisions.judge.base"} for row in rows])
    found: Figures = {}
    for name in ("j1", "j2"):
        judged, base = (
            _flat(evaluation.rows(metric, subset), name) for metric in ("critiques.judge", "critiques.judge.base")
        )
        found |= by_metric(agreement(f"critiques.{name}.agreement", judged, base, name, evaluation.judge_name))
    for metric, name in (("j3", "j3"), ("improves", "j4_log_odds")):
        judged, base = (evaluation.rows(of, revised) for of in ("revisions.judge", "revisions.judge.base"))
        found |= by_metric(agreement(f"revisions.{metric}.agreement", judged, base, name, evaluation.judge_name))
    return found


def of_answers(evaluation: Evaluation, wanted: Mapping[int, Pair], answers: Sequence[Row]) -> Figures:
    """P3: which fresh answer the judge prefers, against which the base does."""
    texts_of = {row["item"]: row for row in answers}
    if evaluation.external is None or evaluation.judge is None or not wanted:
        return {}
    subset = sample([(item, 0) for item in wanted], AGREEMENT)
    both = {item: (wanted[item], texts_of[item]["tuned"], texts_of[item]["base"]) for item, _ in subset}
    base = prompted.judged(evaluation, "preference.p3.base", both, by_base=True)
    judged = evaluation.rows("preference.p3", subset)
    return by_metric(agreement("preference.p3.agreement", judged, base, "log_odds", evaluation.judge_name))


def _flat(rows: Sequence[Row], name: str) -> list[Row]:
    """The verdicts on the real critiques, out of the rows that hold a control beside them."""
    return [{"item": row["item"], "round": row["round"], name: row["real"][name]} for row in rows]


def agreement(metric: str, judged: Sequence[Row], base: Sequence[Row], name: str, judge: str) -> Figure:
    """Kappa of two judges' log-odds under `name`; `facts.raw`: the share on which they agree.

    Not measured where both always say the same one thing: they agree then, and nothing shows that it is by judgement.
    """
    theirs = {(row["item"], row["round"]): row[name] for row in finite_rows(base, name)}
    scored = [row for row in finite_rows(judged, name) if (row["item"], row["round"]) in theirs]
    both = [(row[name] > 0, theirs[row["item"], row["round"]] > 0) for row in scored]
    missing, shown = len(base) - len(both), f"{judge} and the base"
    if not both:
        return unmeasured(metric, "no verdict of both", shown, missing)
    value = kappa(*map(list, zip(*both, strict=True)))
    facts: Row = {"raw": sum(a == b for a, b in both) / len(both)}
    if value is None:
        note = "one of the two has one answer for all"
        return Figure(metric, None, n=0, unscored=missing, judge=shown, note=note, facts=facts)
    low, high = kappa_interval(both, kappa)
    return Figure(metric, value, low, high, len(both), missing, shown, facts=facts)
