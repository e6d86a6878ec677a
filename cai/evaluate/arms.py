"""The SFT arm measured with the rows and metrics of the DPO adapter, and DPO against it, paired row by row.

Owns eval/sft-scores.jsonl (its own fingerprint), the names of a second arm's figures (`<metric>.sft`) and of what DPO
adds (`dpo_over_sft.<metric>`: DPO minus SFT over the rows that both have). The metrics are those of `whole`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai.data.pairs import PairSet
from cai.data.sound import sound_rows
from cai.evaluate import measure as whole
from cai.evaluate.lm_eval import tasks as harness
from cai.evaluate.preference import POLICY, implicit, normalised, win
from cai.evaluate.scores import KEY, Evaluation, fingerprint
from cai.metrics.figure import Figure, unmeasured
from cai.metrics.stats import bootstrap_mean, mcnemar_exact, wilcoxon
from cai.run.context import Context
from cai.run.loop import open_marked
from cai.store import records
from cai.store.files import holds, json_bytes, write_json_atomic
from cai.store.jsonl import Row
from cai.store.row_types import Pair
from cai.training import train as training
from cai.training.arms import sft_arm, trained

Figures = dict[str, Figure]
OVER = "dpo_over_sft."
KEPT = ("preference.p1", "preference.p1.train", "preference.p2.after", "forgetting.nll_delta", "forgetting.kl")


@dataclass(frozen=True)
class Series:
    """One value a row, compared between the arms. `rows`: the metric of the score log; `yes_no`: values 0, 0.5, 1."""

    metric: str
    rows: str
    value: Callable[[Any], float]  # of a row of that metric
    yes_no: bool
    judge: str


SERIES = (
    Series("preference.p1", "preference.pairs", implicit, True, POLICY),
    Series("preference.p2.after", "preference.pairs", lambda row: win(normalised(row)), True, "the arm's likelihood"),
    Series("forgetting.nll_delta", "forgetting.nll", lambda row: row["tuned"] - row["base"], False, "against base"),
    Series("forgetting.kl", "forgetting.kl", lambda row: row["kl"], False, "against base"),
)


def measure(context: Context, pairs: PairSet, training_pairs: Sequence[Pair], adapter: Path, folder: Path) -> Figures:
    """The arm's figures and DPO's gain over it. Resumes from its rows; with none missing, no model is loaded."""
    mark = fingerprint(context, pairs, adapter, None)
    log = open_marked(context, context.run.eval / "sft-scores.jsonl", mark, KEY)
    try:
        evaluation = Evaluation(context, log, adapter, None)
        found = whole.preference_figures(evaluation, pairs, training_pairs) | whole.forgetting_figures(evaluation)
        mine = list(log.rows)
        tasks = _tasks(evaluation, folder)
    finally:
        log.close()
    figures = named({name: figure for name, figure in found.items() if name in KEPT}) | tasks
    return figures | added(mine, records.read(context.run.eval / "scores.jsonl", KEY))


def _tasks(evaluation: Evaluation, folder: Path) -> Figures:
    """lm_eval's tasks: the arm against the base's recorded scores, and DPO's recorded scores against the arm."""
    theirs = harness.stored(evaluation) if evaluation.section.lm_eval else {}
    mine = harness.measure(evaluation, folder, ("tuned",), harness.SECOND_STEM)
    against_base = {name: {"base": theirs[name]["base"], **arms} for name, arms in mine.items()}
    gain = {name: {"base": arms["tuned"], "tuned": theirs[name]["tuned"]} for name, arms in mine.items()}
    gains = [over(figure) for figure in harness.figures(gain).values()]
    return named(harness.figures(against_base)) | {figure.metric: figure for figure in gains}


def named(figures: Mapping[str, Figure]) -> Figures:
    """The tuned arm's figures under the second arm's names; the base's own are left out, they stand already."""
    found: Figures = {}
    for name, figure in figures.items():
        if not name.endswith(".base"):
            metric = f"{name.removesuffix('.tuned')}.sft"
            found[metric] = replace(figure, metric=metric)
    return found


def added(sft: Sequence[Row], dpo: Sequence[Row]) -> Figures:
    """DPO minus SFT of every series, over held-out pairs and neutral passages."""
    found = {}
    for series in SERIES:
        ours, theirs = ({r["item"]: series.value(r) for r in rows if _counts(r, series)} for rows in (sft, dpo))
        both = [item for item in ours if item in theirs]
        lost = len(ours.keys() ^ theirs.keys())
        figure = paired(series, [ours[item] for item in both], [theirs[item] for item in both], lost)
        found[figure.metric] = figure
    return found


def _counts(row: Row, series: Series) -> bool:
    return row["metric"] == series.rows and "skipped" not in row and row.get("split", "heldout") == "heldout"


def paired(series: Series, sft: Sequence[float], dpo: Sequence[float], lost: int = 0) -> Figure:
    """DPO - SFT, bootstrap interval over rows; exact McNemar for yes/no values, else Wilcoxon's signed ranks."""
    metric = OVER + series.metric
    if not sft:
        return unmeasured(metric, "no row was scored on both arms", series.judge, lost)
    deltas = [b - a for a, b in zip(sft, dpo, strict=True)]
    low, high = bootstrap_mean(deltas) or (None, None)
    if series.yes_no:
        p, test = mcnemar_exact([a == 1.0 for a in sft], [b == 1.0 for b in dpo]), "exact McNemar"
    else:
        p, test = wilcoxon(deltas), "Wilcoxon signed-rank"
    n = len(deltas)
    facts = {"sft": sum(sft) / n, "dpo": sum(dpo) / n, "p": p, "test": test}
    return Figure(metric, sum(deltas) / n, low, high, n, lost, series.judge, facts=facts)


def over(figure: Figure) -> Figure:
    """A figure computed with SFT in the base's place and DPO as tuned, under the name of what DPO adds."""
    facts = {name: value for name, value in figure.facts.items() if name not in ("base", "tuned", "by_category")}
    arms = {name: figure.facts[arm] for name, arm in (("sft", "base"), ("dpo", "tuned")) if arm in figure.facts}
    return replace(figure, metric=OVER + figure.metric, facts={**facts, **arms})


def run_arm(context: Context, pairs: PairSet, training_pairs: Sequence[Pair], recipe_folder: Path) -> dict[str, Figure]:
    """Train and measure what is not there yet; the arm's figures, also in eval/sft.json."""
    from_sft = context.recipe.dpo.start == "sft"
    sound = sound_rows(pairs, len(training_pairs)) if from_sft else ()
    adapter = trained(context, sft_arm(context, training_pairs, sound))
    figures = _trained(context)
    if context.recipe.evaluation.enabled:
        figures |= measure(context, pairs, training_pairs, adapter, recipe_folder)
    content = {"figures": {name: figure.as_dict() for name, figure in figures.items()}}
    path = context.run.eval / "sft.json"
    if not holds(path, json_bytes(content)):
        path.parent.mkdir(exist_ok=True)
        write_json_atomic(path, content)
    return figures


def _trained(context: Context) -> dict[str, Figure]:
    result = training.load_result(context.run.sft_train)
    if result is None:
        return {}
    facts = {"first_loss": result.first_loss, "steps": result.steps, "truncated": result.truncated}
    return {"sft.last_loss": Figure("sft.last_loss", result.last_loss, n=result.pairs, facts=facts)}
