"""An adapter beside the run's own (SFT alone, DPO from the base), measured with its rows and metrics, and paired.

Owns eval/<arm>-scores.jsonl and eval/<arm>-answers.jsonl (each with its own fingerprint), the names of such an arm's
figures (`<metric>.<arm>`) and of what the run's adapter has over it (`dpo_over_<arm>.<metric>`: the difference over the
rows that both have). The metrics are those of `whole`, the adapters those of `cai.training.arms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai.data.pairs import PairSet
from cai.data.sound import shown_beside
from cai.evaluate import measure as whole
from cai.evaluate import prompted, started
from cai.evaluate.dpo_health import LOGPS
from cai.evaluate.lm_eval import tasks as harness
from cai.evaluate.preference import POLICY, implicit, normalised, summarise_fresh, win
from cai.evaluate.scores import KEY, Evaluation, fingerprint, load_judge
from cai.metrics.figure import Figure, Figures, by_metric, finite_rows, unmeasured
from cai.metrics.figure import paired as paired_difference
from cai.run import loop
from cai.run.context import Context
from cai.run.loop import open_marked
from cai.store import records
from cai.store.files import write_json_atomic
from cai.store.jsonl import Row
from cai.store.row_types import Pair
from cai.training import train as training
from cai.training.arms import Arm, from_base_arm, sft_arm, trained

SFT, FROM_BASE = "sft", "from_base"
KEPT = ("preference.p1", "preference.p1.train", "preference.p2.after", "forgetting.nll_delta", "forgetting.kl")
BASE_TEXT = ("base", "base_finish")


@dataclass(frozen=True)
class Series:
    """One value a row, compared between the arms. `rows`: the metric of the score log; `yes_no`: values 0, 0.5, 1.

    `of`: the numbers of a row that its value is made of; one that is not finite leaves the row unscored.
    """

    metric: str
    rows: str
    value: Callable[[Any], float]  # of a row of that metric
    yes_no: bool
    judge: str
    of: tuple[str, ...]


SERIES = (
    Series("preference.p1", "preference.pairs", implicit, True, POLICY, LOGPS),
    Series("preference.p2.after", "preference.pairs", lambda row: win(normalised(row)), True, "the arm's likelihood",
           LOGPS),
    Series("forgetting.nll_delta", "forgetting.nll", lambda row: row["tuned"] - row["base"], False, "against base",
           ("tuned", "base")),
    Series("forgetting.kl", "forgetting.kl", lambda row: row["kl"], False, "against base", ("kl",)),
)  # fmt: skip


def run_arms(context: Context, pairs: PairSet, training_pairs: Sequence[Pair]) -> Iterator[tuple[str, Path, Figures]]:
    """Name, adapter and figures of every arm of the recipe, one trained after the other where it is not there yet.

    What is added to an arm's figures before the next one is asked for goes with them into eval/<arm>.json.
    """
    recipe = context.recipe
    if not (recipe.has_sft or recipe.dpo.also_from_base):
        return
    sound = shown_beside(context, pairs, len(training_pairs))
    arms = [sft_arm(context, training_pairs, sound)] if recipe.has_sft else []
    arms += [from_base_arm(context, training_pairs, pairs.heldout)] if recipe.dpo.also_from_base else []
    for arm in arms:
        adapter, figures = trained(context, arm), of_training(arm)
        yield arm.name, adapter, figures
        content = {"figures": {name: figure.as_dict() for name, figure in figures.items()}}
        context.run.eval.mkdir(exist_ok=True)
        write_json_atomic(context.run.eval / f"{arm.name}.json", content)


def of_training(arm: Arm) -> Figures:
    result = training.load_result(arm.folder)
    if result is None:
        return {}
    facts = {"first_loss": result.first_loss, "steps": result.steps, "truncated": result.truncated}
    return by_metric(Figure(f"{arm.name}.last_loss", result.last_loss, n=result.pairs, facts=facts))


def measure(
    context: Context, pairs: PairSet, training_pairs: Sequence[Pair], arm: str, adapter: Path, folder: Path
) -> Figures:
    """The arm's figures on given texts. Resumes from its rows; with none missing, no model is loaded."""
    mark = fingerprint(context, pairs, adapter, None)
    with open_marked(context, context.run.eval / f"{arm}-scores.jsonl", mark, KEY) as log:
        evaluation = Evaluation(context, log, adapter, None)
        known = started.known(context) if arm == SFT else {}
        found = whole.preference_figures(evaluation, pairs, training_pairs, own=False, known=known)
        found |= whole.forgetting_figures(evaluation)
        tasks = _tasks(evaluation, arm, folder)
    return named({name: figure for name, figure in found.items() if name in KEPT}, arm) | tasks


def answered(context: Context, pairs: PairSet, arm: str, adapter: Path) -> Figures:
    """The arm's fresh answers where base and tuned gave theirs: how they end, and judged by the base against both."""
    theirs = records.read(context.run.eval / "scores.jsonl", KEY)
    given = {r["item"]: r for r in theirs if r["metric"] == "preference.fresh" and "skipped" not in r}
    wanted = {pair["item"]: pair for pair in pairs.heldout if pair["item"] in given}
    if not wanted:
        return {}
    prompts, keys = load_judge(context), [(item, 0) for item in wanted]
    mark = fingerprint(context, pairs, adapter, prompts)
    with open_marked(context, context.run.eval / f"{arm}-answers.jsonl", mark, KEY) as log:
        evaluation = Evaluation(context, log, adapter, prompts)
        for part in evaluation.left("preference.fresh", keys, loop.together(context, 2 * whole.SLICE, len(keys))):
            rows = whole.answers(evaluation, [wanted[item] for item, _ in part], (("tuned", True),))
            known = [{name: given[row["item"]][name] for name in BASE_TEXT} for row in rows]
            evaluation.write("preference.fresh", part, [row | base for row, base in zip(rows, known, strict=True)])
        rows = evaluation.rows("preference.fresh", keys)
        p3 = prompted.judged(evaluation, "preference.p3", whole.of_p3(evaluation, wanted, rows))
        found = whole.fresh_figures(rows, wanted) | summarise_fresh(p3, evaluation.judge_name)
        both = {row["item"]: (wanted[row["item"]], given[row["item"]]["tuned"], row["tuned"]) for row in rows}
        over = prompted.judged(evaluation, f"over.{arm}", both) if evaluation.judges else None
    return named(found, arm) | (prompted.against(over, evaluation.judge_name, arm) if over is not None else {})


def gains(context: Context, arm: str) -> Figures:
    """What the run's adapter has over the arm's, by the rows of both."""
    mine, theirs = (records.read(context.run.eval / f"{name}.jsonl", KEY) for name in (f"{arm}-scores", "scores"))
    return added(mine, theirs, arm)


def _tasks(evaluation: Evaluation, arm: str, folder: Path) -> Figures:
    """lm_eval's tasks: the arm against the base's recorded scores, and the run's recorded scores against the arm."""
    theirs = harness.stored(evaluation) if evaluation.section.lm_eval else {}
    mine = harness.measure(evaluation, folder, ("tuned",), f"{arm}-{harness.STEM}")
    against_base = {name: {"base": theirs[name]["base"], **arms} for name, arms in mine.items()}
    gain = {name: {"base": arms["tuned"], "tuned": theirs[name]["tuned"]} for name, arms in mine.items()}
    gains = by_metric(*(over(figure, arm) for figure in harness.figures(gain).values()))
    return named(harness.figures(against_base), arm) | gains


def named(figures: Mapping[str, Figure], arm: str = SFT) -> Figures:
    """The tuned arm's figures under another arm's name; the base's own are left out, they stand already."""
    found: Figures = {}
    for name, figure in figures.items():
        if name.endswith(".base") or name.startswith("fresh.base."):
            continue
        inside = name.startswith("fresh.tuned.")
        metric = name.replace(".tuned.", f".{arm}.") if inside else f"{name.removesuffix('.tuned')}.{arm}"
        found[metric] = replace(figure, metric=metric)
    return found


def over_name(arm: str) -> str:
    return f"dpo_over_{arm}."


def added(mine: Sequence[Row], dpo: Sequence[Row], arm: str = SFT) -> Figures:
    """The run's adapter minus the arm's, of every series, over held-out pairs and neutral passages."""
    found: Figures = {}
    for series in SERIES:
        tried = [[row for row in rows if _counts(row, series)] for rows in (mine, dpo)]
        ours, theirs = ({r["item"]: series.value(r) for r in finite_rows(rows, *series.of)} for rows in tried)
        both = [item for item in ours if item in theirs]
        lost = len({row["item"] for rows in tried for row in rows}) - len(both)
        figure = paired(series, [ours[item] for item in both], [theirs[item] for item in both], lost, arm)
        found |= by_metric(figure)
    return found


def _counts(row: Row, series: Series) -> bool:
    return row["metric"] == series.rows and "skipped" not in row and row.get("split", "heldout") == "heldout"


def paired(series: Series, mine: Sequence[float], dpo: Sequence[float], lost: int = 0, arm: str = SFT) -> Figure:
    """DPO - arm, bootstrap interval over rows; exact McNemar for yes/no values, else Wilcoxon's signed ranks."""
    if not mine:
        return unmeasured(over_name(arm) + series.metric, "no row was scored on both arms", series.judge, lost)
    return over(paired_difference(series.metric, mine, dpo, series.judge, lost, yes_no=series.yes_no), arm)


def over(figure: Figure, arm: str = SFT) -> Figure:
    """A figure computed with an arm in the base's place and DPO as tuned, under the name of what DPO adds."""
    facts = {name: value for name, value in figure.facts.items() if name not in ("base", "tuned", "by_category")}
    arms = {name: figure.facts[of] for name, of in ((arm, "base"), ("dpo", "tuned")) if of in figure.facts}
    return replace(figure, metric=over_name(arm) + figure.metric, facts={**facts, **arms})
