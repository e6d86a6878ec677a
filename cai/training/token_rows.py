"""Pairs as token ids, and the order in which training visits them. Pure: no torch, no files.

Owns the policy prompt's boundary (where the completion begins), the end token, truncation, the schedule, and how a
margin becomes a weight or a probability. Invariants:
model text never becomes a control id; the schedule depends on nothing but its arguments, so a resume repeats it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cai import errors
from cai.engine.tokenizers import Tokenizer
from cai.errors import CaiError
from cai.metrics.wordings import has_control_token
from cai.recipe.prompts import Prompt
from cai.recipe.settings import DpoSection
from cai.store.row_types import TrainingPair


@dataclass(frozen=True, slots=True)
class PairRow:
    """One pair as token ids. `chosen_ids` and `rejected_ids` end with the end token unless they were cut (`truncated`
    where one of the two was, `chosen_cut` where the chosen one was).

    Without `rejected_ids` it is prompt -> chosen, as supervised training reads it. `margin`: log-odds of the label
    check that the chosen text is the better one; None where no check was made.
    """

    item: int
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    truncated: bool = False
    flagged: bool = False
    margin: float | None = None
    chosen_cut: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that a trainer without prefix sharing computes: prompt and completion, for each completion."""
        prompts = 2 if self.rejected_ids else 1
        return prompts * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class PairRows:
    """`rows`, and the items that were left out because the prompt alone fills `max_length`."""

    rows: list[PairRow]
    too_long: list[int]

    @property
    def truncated(self) -> int:
        return sum(row.truncated for row in self.rows)

    @property
    def flagged(self) -> int:
        return sum(row.flagged for row in self.rows)


def tokenize_pairs(
    pairs: Sequence[TrainingPair],
    prompt: Prompt,
    *,
    format: Literal["base", "chat"],
    tokenizer: Tokenizer,
    max_length: int,
) -> PairRows:
    """Render each pair's instruction with the policy prompt and append the end token to both completions.

    A completion longer than `max_length` - len(prompt) is cut at its end (and then has no end token); a prompt that
    leaves no room for one token drops the pair.
    """
    eos, own, rows, too_long = tokenizer.eos_ids[0], tokenizer.control_strings, [], []
    for pair in pairs:
        rendered = prompt.render({"instruction": pair["prompt"]}, format=format, tokenizer=tokenizer)
        room = max_length - len(rendered.token_ids)
        if room < 1:
            too_long.append(pair["item"])
            continue
        lead = "" if rendered.text[-1:].isspace() else " "  # as generation writes it: "Assistant: text"
        chosen, rejected = ([*tokenizer.encode(lead + pair[key].strip()), eos] for key in ("chosen", "rejected"))
        rows.append(
            PairRow(
                item=pair["item"],
                prompt_ids=tuple(rendered.token_ids),
                chosen_ids=tuple(chosen[:room]),
                rejected_ids=tuple(rejected[:room]),
                truncated=max(len(chosen), len(rejected)) > room,
                flagged=any(has_control_token(pair[key], own) for key in ("prompt", "chosen", "rejected")),
                margin=_number(pair.get("margin")),
                chosen_cut=len(chosen) > room,
            )
        )
    return PairRows(rows, too_long)


def _number(value: object) -> float | None:
    """A margin as it stands in a row of a file: a number, or nothing that counts as one."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def revisions_only(found: PairRows) -> PairRows:
    """The same rows without the rejected texts; truncated is then what cut a chosen one."""
    rows = [replace(row, rejected_ids=(), truncated=row.chosen_cut) for row in found.rows]
    return PairRows(rows, found.too_long)


def token_counts(row: PairRow, end_weight: float) -> list[float]:
    """What each chosen token counts in a mean likelihood: the end token, where the text was not cut, `end_weight`."""
    last = 1.0 if row.chosen_cut else end_weight
    return [*[1.0] * (len(row.chosen_ids) - 1), last]


def steps_of(pairs: int, *, max_steps: int, epochs: float, effective_batch: int) -> int:
    """Optimizer steps: `max_steps` as given, else as many full batches as cover the epochs."""
    return max_steps or max(1, math.ceil(pairs * epochs / effective_batch))


def schedule(rows: Sequence[PairRow], *, steps: int, effective_batch: int, seed: int) -> list[int]:
    """Row indexes in training order, steps x effective_batch of them: one seeded permutation after another.

    Within each optimizer step the pairs stand by length, longest first, so that micro-batches hold like lengths and an
    out-of-memory shows at once. The order is the same whatever the micro-batch.
    """
    total, epoch = steps * effective_batch, 0
    order: list[int] = []
    while len(order) < total:
        permutation = list(range(len(rows)))
        random.Random(f"{seed}/{epoch}").shuffle(permutation)
        order += permutation
        epoch += 1
    chunks = (order[start : start + effective_batch] for start in range(0, total, effective_batch))
    return [index for chunk in chunks for index in sorted(chunk, key=lambda i: (-rows[i].tokens, i))]


def rows_sha(rows: Sequence[PairRow]) -> str:
    """16 hex of all token ids, in order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(repr((row.prompt_ids, row.chosen_ids, row.rejected_ids)).encode())
    return sha.hexdigest()[:16]


def ignore(*_args: object, **_fields: object) -> None:
    """The `event` and `progress` callback of a caller that wants none."""


# --- what is known of a loss before training: what each pair counts, how sure its order is, the first value. A pair may
# carry `margin`: the log-odds that its chosen text is the better one; the formulas that use weights and probabilities
# are training/loss.py's. Where the recipe asks for neither, or all margins are alike, the loss is the plain one.


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
