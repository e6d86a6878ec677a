"""Signs of ill health that a DPO training shows, while it runs and after: worded with their remedy. Pure.

Owns which signs there are and when one is there; `callbacks.HealthWatch` asks after each step, `evaluate.dpo_health`
says the same of the finished adapter; that it barely moved, or too far, is read from figures that the caller measured.
What is never tolerated (a non-finite step, a first loss that is not log 2) is `guards`' and `trainers`'. Steps are
noisy, so a sign is judged on the mean of the last `window` of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cai.recipe.settings import HealthSection

FALL = "logps/chosen_fall"  # log key: reference minus policy on the chosen text, nats a token
HELDOUT = "heldout/loss"
SHORTEST = 0.25  # of the words before DPO that an answer has at least
SHORTEST_STAGE = 0.2  # of the base's words that an SFT stage's answer has at least
REMEDY = 'set dpo.loss_type = ["sigmoid", "sft"] (an SFT term on chosen), or a smaller learning rate'


@dataclass(frozen=True)
class Sign:
    """`name` as in `health.stop`; `text` is one line with the remedy. What was not measured (NaN) is no sign."""

    name: str
    value: float
    text: str


def displacement(fall: float, health: HealthSection) -> Sign | None:
    text = f"likelihood displacement: the chosen texts lost {fall:.2f} nats a token"
    sign = Sign("displacement", fall, f"{text} (more than {health.max_chosen_fall:g}); {REMEDY}")
    return sign if fall > health.max_chosen_fall else None


def truncation(share: float, health: HealthSection) -> Sign | None:
    text = f"{share:.1%} of the pairs were truncated (more than {health.max_truncated:.0%}); raise dpo.max_length"
    return Sign("truncation", share, text) if share > health.max_truncated else None


def rising_loss(rise: float, health: HealthSection) -> Sign | None:
    text = f"the loss rose by {rise:.2f} over the first one (more than {health.max_loss_rise:g})"
    sign = Sign("rising_loss", rise, f"{text}; lower dpo.learning_rate, or raise the effective batch")
    return sign if rise > health.max_loss_rise else None


def heldout_rise(log: Sequence[Mapping[str, float]], health: HealthSection) -> Sign | None:
    """The held-out loss, last against lowest: what is learnt of the training pairs alone."""
    losses = [entry[HELDOUT] for entry in log if HELDOUT in entry]
    rise = losses[-1] - min(losses) if losses else math.nan
    text = f"the held-out loss rose by {rise:.3f} over its lowest (more than {health.max_heldout_rise:g})"
    sign = Sign("heldout_rise", rise, f'{text}; set dpo.keep = "best", or fewer dpo.epochs')
    return sign if rise > health.max_heldout_rise else None


def barely_moved(margin: float, kl: float, same_answers: float, health: HealthSection) -> Sign | None:
    """A finished adapter that is nearly its start. NaN for what was not measured.

    `margin`: held-out, times beta. `kl`: nats a token from the base on neutral text. `same_answers`: share of fresh
    greedy answers that are the start's, letter by letter.
    """
    same = f"{same_answers:.0%} of the fresh answers unchanged ({health.max_same_answers:.0%} or more)"
    signs = {
        f"held-out margin x beta {margin:.3f} (below {health.min_margin:g})": abs(margin) < health.min_margin,
        f"KL {kl:.4f} nats a token (below {health.min_kl:g})": kl < health.min_kl,
        same: same_answers >= health.max_same_answers,
    }
    remedy = "raise dpo.learning_rate where it is below 5e-5, or train longer (dpo.max_steps, dpo.epochs)"
    return _of_all("barely_moved", "the adapter barely moved", signs, remedy)


def _of_all(name: str, said: str, signs: Mapping[str, bool], remedy: str) -> Sign | None:
    """One sign of those that are there; its value is how many they are."""
    seen = [text for text, there in signs.items() if there]
    return Sign(name, float(len(seen)), f"{said}: {'; '.join(seen)}; {remedy}") if seen else None


def learnt_by_heart(trained: float, heldout: float, health: HealthSection) -> Sign | None:
    """A finished adapter that prefers the chosen texts it was trained on, and the rejected ones it was not.

    Both are margins, times beta. Longer training makes both larger, so `barely_moved` would advise the wrong way.
    """
    text = f"learnt by heart: margin x beta {trained:.2f} on them, {heldout:.2f} on held-out ones"
    remedy = 'fewer dpo.max_steps or dpo.epochs, dpo.eval_steps with dpo.keep = "best", more pairs (items), or labels'
    told = f'the training pairs were {text}; {remedy} that were checked (pairs.label = "judge")'
    there = trained >= health.min_margin and heldout <= -health.min_margin
    return Sign("learnt_by_heart", heldout, told) if there else None


def moved_too_far(kl: float, fall: float, health: HealthSection) -> Sign | None:
    """A finished adapter that left the base's language. `fall`: nats a token that held-out chosen texts lost."""
    lost = f"held-out chosen texts lost {fall:.2f} nats a token (more than {health.max_chosen_fall:g})"
    signs = {
        f"KL {kl:.3f} nats a token (more than {health.max_kl:g})": kl > health.max_kl,
        lost: fall > health.max_chosen_fall,
    }
    remedy = 'lower dpo.learning_rate or raise dpo.beta, and set dpo.loss_type = ["sigmoid", "sft"]'
    return _of_all("moved_too_far", "the adapter moved too far", signs, remedy)


def cut_short(tuned: float, start: float, stage: bool = False) -> Sign | None:
    """A finished adapter whose fresh answers end too early, which passes for one that stops by itself. In mean words.

    `start`: those of what DPO began from, the base or (`stage`) the SFT stage.

    DPO takes probability from the rejected texts, and after an SFT stage whose end tokens count much more than others
    it goes to the end token of every sentence (1.5B model, weight 10: 276 words, 99 after SFT, 17 after DPO). A chat
    model at a learning rate of 2e-5 made short evasions of everything: 97 words, 22 after DPO.
    """
    if not tuned < SHORTEST * start:
        return None
    whose, first = ("the SFT stage's", "sft.end_weight, ") if stage else ("the base's", "")
    text = f"fresh answers have {tuned:.0f} words where {whose} have {start:.0f}: they end at the first occasion"
    remedy = f'lower {first}dpo.learning_rate, set dpo.loss_type = ["sigmoid", "sft"], or train less (dpo.max_steps)'
    return Sign("cut_short", tuned / start, f"{text}; {remedy}")


def stage_cut_short(stage: float, base: float) -> Sign | None:
    """The same of an SFT stage, in mean words: nobody would see it in what DPO makes of it, which is held against it.

    A base model rambles (276 to 347 words where sound stages have 78 to 157), so less than before is no sign yet.
    """
    if not stage < SHORTEST_STAGE * base:
        return None
    text = f"the SFT stage's answers have {stage:.0f} words where the base's have {base:.0f}: they end at once"
    return Sign("cut_short", stage / base, f"{text}; lower sft.end_weight, or show it more whole texts (sft.answers)")


def in_log(log: Sequence[Mapping[str, float]], health: HealthSection) -> list[Sign]:
    """The signs after what was logged so far: of held-out entries, and of steps from the first whole window."""
    held = heldout_rise(log, health)
    steps = [entry for entry in log if "loss" in entry]
    if len(steps) < health.window:
        return [held] if held else []
    recent = steps[-health.window :]
    falls = [entry[FALL] for entry in recent if FALL in entry]
    fallen = displacement(sum(falls) / len(falls), health) if falls else None
    loss = sum(entry["loss"] for entry in recent) / len(recent)
    return [sign for sign in (held, fallen, rising_loss(loss - steps[0]["loss"], health)) if sign]
