"""The steps of a run in words that a user knows, and where each stands: `step 5 of 14, critiques, round 2`.

Owns these words and the count; the names that records, events and status.json have stay as they are. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.recipe.arm_costs import ASIDE
from cai.terminal import stage_name

Step = tuple[str, int]  # stage, round; a stage's beginning stands for all that begins with it
PROMPTED = {"few_shot": "examples", "constitution": "the constitution", "best_of_n": "the best of several answers"}
ARMS = {"base": "the base", "tuned": "the tuned model", "a": "A", "b": "B", "without": "the fork without"}
GLOSSES = {
    "load the model": "loading the model",
    "calibration": "where the critic draws its line",
    "label_bar": "where the comparison draws its line",
    "relevance": "which principle is broken",
    "labels": "is the revision better",
    "second_answers": "a second answer",
    "sft_instructions": "further requests, for SFT",
    "sft_answers": "the model's own answers to them",
    "comparisons": "which answer is better",
    "guard": "is the pair safe (guard)",
    "train": "training",
    "train sft": "training on the revisions alone (SFT)",
    "train from base": "training from the base (DPO)",
    "evaluate over.sft": "measuring: tuned against SFT",
    "evaluate over.from_base": "measuring: tuned against DPO from the base",
    "evaluate critiques.gates": "measuring: form of critiques",
    "evaluate revisions.gates": "measuring: form of revisions",
    "evaluate critiques.generic_lp": "measuring: a critique that fits any answer (control)",
    "evaluate critiques.csi": "measuring: do critiques fit their own answers (CSI)",
    "evaluate revisions.cri": "measuring: do revisions follow their critiques (CRI)",
    "evaluate critiques.judge": "measuring: a judge reads critiques",
    "evaluate revisions.judge": "measuring: a judge reads revisions",
    "evaluate preference.start": "measuring: what DPO began from on the pairs",
    "evaluate preference.pairs": "measuring: does the tuned model prefer revisions",
    "evaluate preference.fresh": "measuring: fresh answers of base and tuned",
    "evaluate preference.p3": "measuring: which fresh answer is better",
    **{f"evaluate prompted.{name}": f"measuring: the base, prompted well ({said})" for name, said in PROMPTED.items()},
    **{f"evaluate prompted.{name}.judged": f"measuring: tuned against it ({said})" for name, said in PROMPTED.items()},
    **{f"evaluate against.answers.{arm}": f"held-out prompts, answered by {said}" for arm, said in ARMS.items()},
    **{f"evaluate attribution.answers.{arm}": f"held-out prompts, answered by {said}" for arm, said in ARMS.items()},
    "evaluate against.judged": "which of two answers is better, under each principle",
    "evaluate attribution.judged": "is tuned better, under each principle",
    "evaluate forgetting.nll": "measuring: loss on neutral text",
    "evaluate forgetting.kl": "measuring: distance from the base",
    "probes, base": "before and after: the base answers",
    "probes, tuned": "before and after: the tuned model answers",
}
LATER: tuple[Step, ...] = (("train", 0), ("critic's exam", 0), ("evaluate", 0), ("probes", 0))


def in_words(stage: str, round_: int = 0, per_round: bool = False) -> str:
    """A stage's round for the eye."""
    return stage_name(GLOSSES.get(stage, stage), round_, per_round)


def plan(chain: Sequence[Step], guard: bool, exam: bool, probes: bool) -> tuple[Step, ...]:
    """Every step of a run in order: the chain's, then training and what is measured."""
    left_out = {name for name, on in (("critic's exam", exam), ("probes", probes)) if not on}
    steps = [*chain, *((("guard", 0),) if guard else ())]
    return (*steps, *(step for step in LATER if step[0] not in left_out))


def place(steps: Sequence[Step], stage: str, round_: int) -> int:
    """The number of a step, from one; 0 for what is no step of its own."""
    for number, (name, of) in enumerate(steps, start=1):
        if stage == name and (round_ == of or stage in ("instructions", ASIDE[0])):
            return number
    return next(
        (n for n, (name, _) in enumerate(steps, start=1) if stage.startswith((f"{name} ", f"{name},", f"{name}:"))), 0
    )
