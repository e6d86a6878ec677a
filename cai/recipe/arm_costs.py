"""What the arms beside base and tuned answer, in answers and tokens at most: said before a run, and in its estimate.

Owns that arithmetic over a recipe. Reads no file: a benchmark has the rows of its published file, or
`benchmarks.limit`. Times and prices are `cai.run.budget`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cai.recipe.load import Recipe

BENCHMARK_ANSWERS = {"harmbench": 60, "xstest": 450, "mtbench": 160}  # of the published files; MT-Bench has two turns
ASIDE = ("sft_instructions", "sft_answers")  # stages of no slot: what an SFT stage alone is shown
TITLES = {"few_shot": "base with pairs shown", "constitution": "base with the principles", "sft": "SFT",
          "from_base": "DPO from the base"}  # fmt: skip


@dataclass(frozen=True)
class ArmCost:
    """`label`: how the events of such a measurement begin, by which an earlier run tells that it had it."""

    label: str
    title: str
    where: str
    answers: int
    tokens: int  # at most


def costs(recipe: Recipe) -> list[ArmCost]:
    """Of every arm beside base and tuned that the recipe switches on: own answers, fresh answers, each benchmark."""
    return [*_own(recipe), *_fresh(recipe), *_benchmarks(recipe)]


def _own(recipe: Recipe) -> Iterator[ArmCost]:
    """What SFT is shown beside the revisions: a request and its answer each."""
    if answers_further_requests(recipe):
        longest = recipe.sampling.instructions.max_new_tokens + recipe.sampling.answers.max_new_tokens
        yield ArmCost(ASIDE[-1], TITLES["sft"], "further requests", recipe.sft.answers, recipe.sft.answers * longest)


def answers_further_requests(recipe: Recipe) -> bool:
    """Whether the model answers further requests for an SFT stage: with pairs of the user's own nothing is drawn."""
    return recipe.dpo.start == "sft" and recipe.sft.answers > 0 and not recipe.pairs.file


def _fresh(recipe: Recipe) -> Iterator[ArmCost]:
    section = recipe.evaluation
    prompts = min(section.fresh_items, recipe.heldout.items) if section.enabled else 0
    if not prompts:
        return
    asked = [(f"evaluate prompted.{arm}", str(arm)) for arm in section.prompted if section.judge != "off"]
    # by the judging: the answers' label is base's
    asked += [(f"evaluate over.{arm}", arm) for arm in _measured(recipe)]
    for label, arm in asked:
        answers = prompts * _drawn(recipe, arm)
        yield ArmCost(label, _title(recipe, arm), "fresh answers", answers, answers * section.fresh_max_new_tokens)


def _benchmarks(recipe: Recipe) -> Iterator[ArmCost]:
    section = recipe.benchmarks
    for name in section.run:
        rows = BENCHMARK_ANSWERS[name]
        turns = 2 if name == "mtbench" else 1
        rows = min(rows, section.limit * turns) if section.limit else rows
        longest = section.mtbench_max_new_tokens if name == "mtbench" else section.max_new_tokens
        for arm in (*_trained(recipe), *section.prompted):
            answers = rows * _drawn(recipe, arm)
            yield ArmCost(f"{name} {arm} ", _title(recipe, arm), name, answers, answers * longest)


def _measured(recipe: Recipe) -> list[str]:
    """With DPO's own SFT stage, which is measured but has no benchmarks unless [sft] asks for the arm."""
    return list(dict.fromkeys([*(["sft"] if recipe.has_sft else []), *_trained(recipe)]))


def _trained(recipe: Recipe) -> list[str]:
    on = {"sft": recipe.sft.enabled, "from_base": recipe.dpo.also_from_base}
    return [arm for arm, enabled in on.items() if enabled]


def _drawn(recipe: Recipe, arm: str) -> int:
    return recipe.evaluation.best_of if arm == "best_of_n" else 1


def _title(recipe: Recipe, arm: str) -> str:
    return TITLES.get(arm) or f"base, best of {recipe.evaluation.best_of}"
