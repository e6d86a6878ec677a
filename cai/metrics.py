"""The names of the figures that a run can measure: a gate on a misspelt one is refused before a run, not after hours.

Owns the list and the nearest name; the figures are made where they are measured. A new figure is named here
(`tests/test_metrics.py` fails on one that is not). `{x}` stands for any word: a task, an arm, a seed, a category.
"""

from __future__ import annotations

import difflib
import re

_CONTROLLED = ("gates", "csi", "specific", "meaningful")
_DPO = ("loss", "loss_fall", "margin", "chosen_fall")
_ANSWERS = ("empty", "repeated", "cut", "refused")

NAMES = (
    "pairs.kept",
    "pairs.yield",
    "critiques.finds_nothing",
    *(f"critiques.{name}{kind}" for name in _CONTROLLED for kind in ("", ".shuffled", ".generic")),
    *(f"critiques.{name}{kind}" for name in ("j1", "j2") for kind in ("", ".shuffled")),
    *(f"revisions.{name}" for name in ("gates", "r1", "r2", "r3", "r4", "r5", "j3", "improves")),
    *(f"revisions.{name}{kind}" for name in ("cri", "responsive", "addresses") for kind in ("", ".shuffled")),
    *(f"preference.{name}" for name in ("p1", "p1.train", "p1.permuted", "p2.before", "p2.after")),
    *(f"preference.{name}" for name in ("p3", "p3.length_controlled", "length_only", "refusal_only")),
    *(f"dpo.{name}" for name in ("first_loss_error", "logged_fall", "grad_norm_max", "finite", "truncated")),
    *(f"dpo.{name}{split}" for name in _DPO for split in ("", ".heldout")),
    *(f"dpo.{name}.seed_{{x}}" for name in ("last_loss", "heldout_accuracy", "heldout_margin")),
    *(f"forgetting.{name}" for name in ("nll_delta", "nll_base", "kl", "{x}_delta")),
    *(f"fresh.{{x}}.{name}" for name in ("empty", "at_limit", "repeats", "distinct_2")),
    *(f"harmbench.{name}" for name in ("asr.{x}", "asr_drop", "asr_drop.{x}", "p", "improvement")),
    *(f"xstest.{name}" for name in ("over_refusal.{x}", "over_refusal_rise", "partial_refusal.{x}")),
    *(f"xstest.{name}" for name in ("unsafe_refusal.{x}", "unsafe_refusal_rise")),
    *(f"mtbench.{name}" for name in ("score.{x}", "delta", "delta_without_wrong", "delta.turn_{x}")),
    *(f"{bench}.{name}.{{x}}" for bench in ("harmbench", "xstest", "mtbench") for name in _ANSWERS),
    *(f"{bench}.same_as_base" for bench in ("harmbench", "xstest", "mtbench")),
    *(f"checks.{{x}}.{name}" for name in ("kappa", "sensitivity", "specificity")),
    "guard.dropped",
    "guard.chosen_unsafe",
    "contamination.removed",
    "contamination.inputs",
    "sft.last_loss",
)
_KNOWN = re.compile("|".join(re.escape(name).replace(r"\{x\}", r"[\w-]+") for name in NAMES))


def fault(name: str) -> str:
    """What is wrong with a figure's name and what to write instead; "" if a run can measure it.

    The second arm's figures are `<name>.sft`, or `dpo_over_sft.<name>`; `.tuned` in a name gives way to `.sft`.
    """
    plain = name.removeprefix("dpo_over_sft.").removesuffix(".sft")
    if _KNOWN.fullmatch(plain) or (plain != name and _KNOWN.fullmatch(f"{plain}.tuned")):
        return ""
    near = difflib.get_close_matches(plain, NAMES, 1, 0.6)
    hint = f"Did you mean {near[0]}?" if near else "eval/measured.json of a run lists the names."
    return f"{name!r} is no figure that a run measures. {hint}"
