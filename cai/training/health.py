"""Signs of ill health that a DPO training shows while it runs: read from its log, worded with their remedy. Pure.

Owns which signs there are and when one is there; `guarded.HealthWatch` asks after each step, `evaluate.health` says
the same of the finished adapter. What is never tolerated (a non-finite step, a first loss that is not log 2) is
`guarded`'s and `trainer`'s. Steps are noisy, so a sign is judged on the mean of the last `window` of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cai.recipe.settings import HealthSection

FALL = "logps/chosen_fall"  # log key: reference minus policy on the chosen text, nats a token
REMEDY = 'set dpo.loss_type = ["sigmoid", "sft"] (an SFT term on chosen), or a smaller learning rate'


@dataclass(frozen=True)
class Sign:
    """`name` as in `health.stop`; `text` is one line with the remedy. What was not measured (NaN) is no sign."""

    name: str
    value: float
    text: str


def displacement(fall: float, health: HealthSection) -> Sign | None:
    if not fall > health.max_chosen_fall:
        return None
    text = f"likelihood displacement: the chosen texts lost {fall:.2f} nats a token"
    return Sign("displacement", fall, f"{text} (more than {health.max_chosen_fall:g}); {REMEDY}")


def truncation(share: float, health: HealthSection) -> Sign | None:
    if not share > health.max_truncated:
        return None
    text = f"{share:.1%} of the pairs were truncated (more than {health.max_truncated:.0%}); raise dpo.max_length"
    return Sign("truncation", share, text)


def rising_loss(rise: float, health: HealthSection) -> Sign | None:
    if not rise > health.max_loss_rise:
        return None
    text = f"the loss rose by {rise:.2f} over the first one (more than {health.max_loss_rise:g})"
    return Sign("rising_loss", rise, f"{text}; lower dpo.learning_rate, or raise the effective batch")


def in_log(log: Sequence[Mapping[str, float]], health: HealthSection) -> list[Sign]:
    """The signs after the steps logged so far; none before the first whole window."""
    if len(log) < health.window:
        return []
    recent = log[-health.window :]

    def mean(key: str) -> float | None:
        values = [entry[key] for entry in recent if key in entry]
        return sum(values) / len(values) if values else None

    found: list[Sign | None] = []
    if (fall := mean(FALL)) is not None:
        found.append(displacement(fall, health))
    if (loss := mean("loss")) is not None and "loss" in log[0]:
        found.append(rising_loss(loss - log[0]["loss"], health))
    return [sign for sign in found if sign]
