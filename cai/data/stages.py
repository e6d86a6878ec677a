"""The stages of a run as data, in the order in which they run: what each fills its prompt with, needs and depends on.

Owns `CHAIN`; a new stage is one entry here. No loops, no files, no model: `stage_loop.run_stage` runs them, and `chain`
answers what is asked of all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cai.data import labels, own_answers, parsing, principles, sampled
from cai.data import rounds as item_rounds
from cai.data.comparisons import PAIR_FIELDS
from cai.data.labels import LABEL_BAR
from cai.data.rounds import _render_answer, _render_critique, _render_label, _render_relevance, _render_revision
from cai.data.stage import Inputs, Stage, Unit
from cai.recipe.arm_costs import answers_further_requests
from cai.recipe.load import Recipe
from cai.recipe.settings import FewShotSection


def _texts(unit: Unit) -> tuple[str, ...]:
    """What a critique or revision may repeat: the texts of its case, not the wording of its request."""
    return tuple(text for name, text in unit.fields.items() if not name.endswith("_request"))


def _answer(round_: int) -> Inputs:
    return (("answers", 0),)


def _text_and_principle(round_: int) -> Inputs:
    """What a round criticises, and how its principle was found."""
    before: Inputs = (("revisions", round_ - 1),) if round_ else ()
    return (*before, ("relevance", round_))


def _relevant(recipe: Recipe) -> bool:
    return recipe.principles.choice == "relevant"


def revises(recipe: Recipe) -> bool:
    return "revision" in recipe.pairs.kinds


def _samples(recipe: Recipe) -> bool:
    return sampled.KIND in recipe.pairs.kinds


def _bare(text: str, unit: Unit) -> str:
    return parsing.bare(text, unit.fields["instruction"])


REVIEW_KEYS = ("rounds", "critiques", "few_shot.reviews", "few_shot.rotate", "few_shot.by_topic", "on_policy.critic")
# of [few_shot], what runs have had among calibration's keys; `by_topic` is of what is drawn, not of what is scored
SHOWN = tuple(f"few_shot.{name}" for name in FewShotSection.model_fields if name != "by_topic")
INSTRUCTIONS = Stage(
    "instructions",
    "instructions",
    lambda context, item, round_: None,  # `make_instructions` knows the grid
    lambda text, unit: parsing.instruction(text),
    limit_is_fault=True,
    redraws=False,
    attempts=True,
    keys=(
        "seed",
        "model",
        "instructions",
        "sampling.min_p",
        "sampling.no_repeat_ngram",
        "sampling.instructions",
        "few_shot.instructions",
    ),
    files=("prompts/grid.yaml", "instructions.file"),
    fields=frozenset({"topic", "kind", "persona", "tone"}),
)
ANSWERS = Stage(
    "answers",
    "answers",
    _render_answer,
    lambda text, unit: parsing.answer(text),
    trims=_bare,
    redraws_limit=True,
    needs=lambda round_: (("instructions", 0),),
    keys=("sampling.answers", "few_shot.answers", "few_shot.rotate", "on_policy.round", "on_policy.adapter"),
    fields=frozenset({"instruction"}),
)
# the same prompt as the first answer's; the stage's name makes its seed another one
SECOND_ANSWERS = replace(ANSWERS, name=sampled.SECOND, sampling="answers", optional=True, enabled=_samples)
CALIBRATION = Stage(
    "calibration",
    "relevance",
    principles.calibration_unit,
    score=principles.calibrate,
    reads=_answer,
    keys=("principles", "critiques", *SHOWN),
    files=("constitution.yaml", "prompts/answers.yaml", "prompts/critiques.yaml", "prompts/reviews.yaml"),
    fields=principles.FIELDS,
    enabled=_relevant,
    items=lambda context, items: principles.calibration_items(context),
)
RELEVANCE = Stage(
    "relevance",
    "relevance",
    _render_relevance,
    score=principles.relevance,
    per_round=True,
    needs=_answer,
    reads=lambda round_: (
        ("calibration", 0),
        *((("revisions", round_ - 1), ("relevance", round_ - 1)) if round_ else ()),
    ),
    keys=("rounds", "principles", "critiques", "few_shot.relevance", "few_shot.critiques"),
    files=("constitution.yaml", "prompts/critiques.yaml", "prompts/reviews.yaml"),
    fields=principles.FIELDS,
    enabled=_relevant,
)
CRITIQUES = Stage(
    "critiques",
    "critiques",
    _render_critique,
    lambda text, unit: parsing.critique(text, opened=bool(unit.prefill)),
    trims=lambda text, unit: parsing.before_repetition(text),
    inputs=_texts,
    per_round=True,
    needs=_answer,
    reads=_text_and_principle,
    keys=(*REVIEW_KEYS, "sampling.critiques", "few_shot.critiques"),
    files=("constitution.yaml", "prompts/reviews.yaml"),
    fields=frozenset({"instruction", "answer", "critique_request"}),
    enabled=revises,
)
REVISIONS = replace(
    CRITIQUES,
    name="revisions",
    prompt="revisions",
    render=_render_revision,
    parse=item_rounds.parse_revision,
    trims=_bare,
    redraws_limit=True,
    needs=lambda round_: (("critiques", round_),),
    reads=lambda round_: (*_answer(round_), *_text_and_principle(round_)),
    keys=(*REVIEW_KEYS, "sampling.revisions", "few_shot.revisions", "pairs.reject_unrepaired"),
    fields=frozenset({"instruction", "answer", "critique", "revision_request"}),
)
LABELS = Stage(
    "labels",
    "judge_pair",
    _render_label,
    score=labels.check,
    needs=_answer,
    # of any round: what they depend on is the same
    reads=lambda round_: (("revisions", 1), ("relevance", 0), (LABEL_BAR.name, 0)),
    keys=("principles.max_text_tokens", "pairs.label", "pairs.by"),
    files=("constitution.yaml",),
    fields=PAIR_FIELDS,
    chosen=labels.chosen,
    enabled=lambda recipe: recipe.pairs.label == "judge" and revises(recipe),
)
COMPARISONS = replace(
    LABELS,
    name=sampled.COMPARED,
    render=sampled.render_comparison,
    score=sampled.compare,
    needs=lambda round_: (("answers", 0), (sampled.SECOND, 0)),
    reads=lambda round_: (("relevance", 0), (LABEL_BAR.name, 0)),
    keys=("rounds", "principles", "pairs.by"),
    optional=True,
    enabled=_samples,
)
SFT_INSTRUCTIONS = replace(
    INSTRUCTIONS,
    name=own_answers.REQUESTS,
    sampling="instructions",
    optional=True,
    aside=True,
    enabled=answers_further_requests,
)
SFT_ANSWERS = replace(
    SECOND_ANSWERS,
    name=own_answers.ANSWERS,
    render=partial(_render_answer, stage=own_answers.REQUESTS),
    needs=lambda round_: ((own_answers.REQUESTS, 0),),
    aside=True,
    enabled=answers_further_requests,
)
CHAIN: tuple[Stage, ...] = (
    INSTRUCTIONS,
    ANSWERS,
    SECOND_ANSWERS,
    CALIBRATION,
    LABEL_BAR,
    RELEVANCE,
    CRITIQUES,
    REVISIONS,
    LABELS,
    COMPARISONS,
    SFT_INSTRUCTIONS,
    SFT_ANSWERS,
)
