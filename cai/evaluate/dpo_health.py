"""DPO health: pure functions over the training log and the per-pair log-probs. Watches nothing, stops nothing.

Owns the figures `dpo.*` and the warnings with their remedies. A loss that falls on ten pairs falls for permuted labels
too: it shows the plumbing, no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cai.metrics.figure import Figure, Scored, by_metric, count, finite_rows, mean, unmeasured, unscored, worst_rows
from cai.recipe.settings import HealthSection
from cai.store.row_types import PairScore
from cai.training import health

LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def losses(log: Sequence[Mapping[str, float]]) -> list[float]:
    return [float(entry["loss"]) for entry in log if "loss" in entry]


def from_log(
    log: Sequence[Mapping[str, float]], *, truncated: int, pairs: int, expected: float | None = math.log(2)
) -> dict[str, Figure]:
    """Figures that need the log only: first loss, the logged fall, gradient norms, truncated pairs.

    `expected`: the first loss where policy and reference are the same model; None where the loss hangs on the texts
    (a mix with SFT), and then the first reward margin is looked at, which must be 0.
    """
    values = losses(log)
    if not values:
        return {"dpo.first_loss_error": unmeasured("dpo.first_loss_error", "the training log holds no loss")}
    norms = [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    steps = len(values)
    figures = [
        _first_loss(log, values[0], steps, expected),
        count("dpo.grad_norm_max", max(norms, default=0.0), len(norms)),
        count("dpo.finite", float(all(map(math.isfinite, values + norms))), steps),
        count("dpo.truncated", truncated / pairs if pairs else 0.0, pairs),
    ]
    third = max(1, steps // 3)
    fall = sum(values[:third]) / third - sum(values[-third:]) / third
    note = "one step: nothing can fall" if steps == 1 else "first third of the steps minus the last"
    figures.append(count("dpo.logged_fall", fall, steps, note=note))
    return by_metric(*figures)


def _first_loss(log: Sequence[Mapping[str, float]], first: float, steps: int, expected: float | None) -> Figure:
    metric, facts = "dpo.first_loss_error", {"first_loss": first}
    if expected is not None:
        return count(metric, abs(first - expected), steps, facts={**facts, "expected": expected})
    if "rewards/margins" not in log[0]:
        return unmeasured(metric, "this loss hangs on the texts, and the log holds no reward margin")
    note = "the loss hangs on the texts: this is the first reward margin, which must be 0"
    return count(metric, abs(log[0]["rewards/margins"]), steps, note=note, facts=facts)


def margin(row: PairScore) -> float:
    """Implicit reward margin over beta: (policy - reference) of chosen minus the same of rejected."""
    return (row["chosen"] - row["ref_chosen"]) - (row["rejected"] - row["ref_rejected"])


def pair_loss(row: PairScore, beta: float) -> float:
    """-log sigmoid(beta * margin), the DPO loss (Rafailov et al. 2023, equation 7)."""
    scaled = beta * margin(row)
    return math.log1p(math.exp(-abs(scaled))) + max(-scaled, 0.0)


def chosen_fall(row: PairScore) -> float:
    """How much the chosen text lost, nats a token; negative where it gained."""
    return (row["ref_chosen"] - row["chosen"]) / row["chosen_tokens"]


def from_pairs(
    rows: Sequence[PairScore], beta: float, split: str = "train", judge: str = "policy against its base"
) -> dict[str, Figure]:
    """Eval-mode figures over pairs: the loss before is ln 2 for each, so the fall is paired. `judge`: the reference."""
    tail = "" if split == "train" else f".{split}"
    tried, rows = len(rows), finite_rows(rows, *LOGPS)
    missing = unscored(tried - len(rows))
    if not rows:
        why = "no log-probability is finite" if missing else f"no {split} pair"
        return {f"dpo.loss{tail}": unmeasured(f"dpo.loss{tail}", why, judge, len(missing))}
    worst = tuple({"item": r["item"], "margin": round(margin(r), 4)} for r in worst_rows(rows, margin))
    series = {
        "dpo.loss": [pair_loss(row, beta) for row in rows],
        "dpo.loss_fall": [math.log(2) - pair_loss(row, beta) for row in rows],
        "dpo.margin": [beta * margin(row) for row in rows],
        "dpo.chosen_fall": [chosen_fall(row) for row in rows],
    }
    outcomes = {f"{name}{tail}": [*map(Scored, values), *missing] for name, values in series.items()}
    found = {name: mean(name, values, judge=judge) for name, values in outcomes.items()}
    margins = f"dpo.margin{tail}"
    return found | {margins: mean(margins, outcomes[margins], judge=judge, worst=worst)}


def warnings(figures: Mapping[str, Figure], watched: HealthSection, start: str = "base") -> list[str]:
    """One line for each sign of ill health, with the remedy. `start`: `dpo.start`; "adapter" counts as the base."""
    staged = start == "sft"

    def value(name: str) -> float:
        found = figures.get(name)
        return math.nan if found is None or found.value is None else found.value

    lines = []
    if value("dpo.first_loss_error") > 0.01:
        lines.append("the first loss was not what it must be (ln 2): policy and reference differ before training")
    if value("dpo.finite") == 0.0:
        lines.append("a loss or gradient norm was not finite")
    if value("dpo.loss_fall") <= 0.0:
        lines.append("the loss over the pairs did not fall; raise dpo.learning_rate or the number of steps")
    seen = (
        health.displacement(value("dpo.chosen_fall"), watched),
        health.truncation(value("dpo.truncated"), watched),
        health.barely_moved(
            value("dpo.margin.heldout"), value("forgetting.kl"), value("fresh.tuned.same_as_base"), watched
        ),
        health.learnt_by_heart(value("dpo.margin"), value("dpo.margin.heldout"), watched),
        health.moved_too_far(value("forgetting.kl"), value("dpo.chosen_fall.heldout"), watched),
        health.cut_short(value("fresh.tuned.words"), value(f"fresh.{'sft' if staged else 'base'}.words"), staged),
        health.stage_cut_short(value("fresh.sft.words") if staged else math.nan, value("fresh.base.words")),
    )
    return [*(sign.text for sign in seen if sign), *lines]
