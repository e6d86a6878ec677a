"""What is known of a loss before training: what each pair counts, how sure its order is, the first value. Pure.

A pair may carry `margin`: the log-odds that its chosen text is the better one. Owns how a margin becomes a weight or a
probability; the formulas that use them are training/loss.py's. Invariant: where the recipe asks for neither, or all
margins are alike, the loss is the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cai import errors
from cai.errors import CaiError
from cai.recipe.settings import DpoSection
from cai.training.token_rows import PairRow

AT_START = {"sigmoid": math.log(2), "robust": math.log(2), "sigmoid_norm": math.log(2), "hinge": 1.0, "apo_zero": 1.0,
            "apo_down": 1.0}  # fmt: skip
MOST = 4.0  # log-odds from which a label counts no more: 98.2% sure, beyond it a check's own calibration is doubtful


def pair_weights(rows: Sequence[PairRow], dpo: DpoSection) -> list[float] | None:
    """Each pair's margin, cut to 0..4 and divided by the mean, so that the learning rate keeps its meaning."""
    if dpo.weight == "none":
        return None
    cut = [min(max(margin, 0.0), MOST) for margin in margins(rows, 'dpo.weight = "margin"', 'dpo.weight = "none"')]
    mean = sum(cut) / len(cut)
    if not mean > 0.0:
        raise CaiError(
            'dpo.weight = "margin": no pair has a margin above 0, so none would count. The label check sides with the '
            'original texts everywhere: look at the pairs, or set dpo.weight = "none".',
            errors.QUALITY,
        )
    return [value / mean for value in cut]


def label_probabilities(rows: Sequence[PairRow], dpo: DpoSection) -> list[float] | None:
    """Of each pair, the probability that its chosen text is the better one: sigmoid(margin)."""
    if not dpo.soft_labels:
        return None
    found = margins(rows, "dpo.soft_labels = true", "dpo.soft_labels = false")
    return [1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, margin)))) for margin in found]


def first_loss(dpo: DpoSection, weights: Sequence[float] | None, first: Sequence[int]) -> float | None:
    """The loss of the rows `first` while policy and reference are the same model; None where it hangs on the texts."""
    if not set(dpo.loss_type) <= set(AT_START) or not first:
        return None
    each = dpo.loss_weights or [1.0] * len(dpo.loss_type)
    value = sum(weight * AT_START[name] for name, weight in zip(dpo.loss_type, each, strict=True))
    return value if weights is None else value * sum(weights[i] for i in first) / len(first)


def margins(rows: Sequence[PairRow], asked: str, remedy: str) -> list[float]:
    """Every pair's margin; one that lacks it, or has no finite number there, ends the training before it starts."""
    bad = [row.item for row in rows if row.margin is None or not math.isfinite(row.margin)]
    if bad:
        raise CaiError(
            f"{asked}: {len(bad)} of {len(rows)} pairs have no number in `margin` (the first is item {bad[0]}). "
            f'Revisions have one where pairs.label = "judge", sampled pairs always; or set {remedy}.'
        )
    return [row.margin for row in rows if row.margin is not None]
