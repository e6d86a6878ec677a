"""Pairs as token ids, and the order in which training visits them. Pure: no torch, no files.

Owns the policy prompt's boundary (where the completion begins), the end token, truncation and the schedule. Invariants:
model text never becomes a control id; the schedule depends on nothing but its arguments, so a resume repeats it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cai.metrics.wordings import has_control_token
from cai.store.row_types import TrainingPair

if TYPE_CHECKING:
    from cai.engine.tokenizers import Tokenizer
    from cai.recipe.prompts import Prompt


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


def never() -> bool:
    """The `stopped` callback of a caller that never stops."""
    return False


def ignore(*_args: object, **_fields: object) -> None:
    """The `event` and `progress` callback of a caller that wants none."""
