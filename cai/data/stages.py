"""The stages of a run as data, in the order in which they run: what each fills its prompt with, needs and depends on.

Owns `CHAIN`; a new stage is one entry here. No loops, no files, no model: `stage_loop.run_stage` runs them, and `chain`
answers what is asked of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cai.data import labels, own_answers, parsing, principles, sampled
from cai.data import rounds as item_rounds
from cai.data.comparisons import PAIR_FIELDS
from cai.data.known_labels import LABEL_BAR
from cai.data.parsing import Parsed, Unparsed
from cai.data.rounds import _render_answer, _render_critique, _render_label, _render_relevance, _render_revision
from cai.data.stage import Inputs, Stage, Unit
from cai.recipe.arm_costs import shown_beside
from cai.recipe.load import Recipe
from cai.run.context import Context


def _texts(unit: Unit) -> tuple[str, ...]:
    """What a critique or revision may repeat: the texts of its case, not the wording of its request."""
    return tuple(text for name, text in unit.fields.items() if not name.endswith("_request"))


def _parse(parser: Callable[[str], Parsed | Unparsed]) -> Callable[[str, Unit], Parsed | Unparsed]:
    def parse(text: str, unit: Unit) -> Parsed | Unparsed:
        return parser(text)

    return parse


def _answer(round_: int) -> Inputs:
    return (("answers", 0),)


def _text_and_principle(round_: int) -> Inputs:
    """What a round criticises, and how its principle was found."""
    before: Inputs = (("revisions", round_ - 1),) if round_ else ()
    return (*before, ("relevance", round_))


def _revised(round_: int) -> Inputs:
    # of any round: what they depend on is the same
    return (("revisions", 1), ("relevance", 0), (LABEL_BAR.name, 0))


def _relevant(recipe: Recipe) -> bool:
    return recipe.principles.choice == "relevant"


def _checked(recipe: Recipe) -> bool:
    return recipe.pairs.label == "judge" and revises(recipe)


def revises(recipe: Recipe) -> bool:
    return "revision" in recipe.pairs.kinds


def _samples(recipe: Recipe) -> bool:
    return sampled.KIND in recipe.pairs.kinds


def _calibration(context: Context, items: Sequence[int]) -> Sequence[int]:
    return principles.calibration_items(context)


INSTRUCTIONS = Stage(
    "instructions",
    "instructions",
    lambda context, item, round_: None,  # `make_instructions` knows the grid
    _parse(parsing.instruction),
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
    _parse(parsing.answer),
    trims=lambda text, unit: parsing.bare(text, unit.fields["instruction"]),
    redraws_limit=True,
    needs=lambda round_: (("instructions", 0),),
    keys=("sampling.answers", "few_shot.answers", "few_shot.rotate", "on_policy.round", "on_policy.adapter"),
    fields=frozenset({"instruction"}),
)
SECOND_ANSWERS = Stage(
    sampled.SECOND,
    "answers",
    sampled.render_second,
    _parse(parsing.answer),
    trims=lambda text, unit: parsing.bare(text, unit.fields["instruction"]),
    redraws_limit=True,
    needs=lambda round_: (("instructions", 0),),
    keys=("sampling.answers", "few_shot.answers", "few_shot.rotate", "on_policy.round", "on_policy.adapter"),
    fields=frozenset({"instruction"}),
    sampling="answers",
    optional=True,
    enabled=_samples,
)
CALIBRATION = Stage(
    "calibration",
    "relevance",
    principles.calibration_unit,
    score=principles.calibrate,
    reads=_answer,
    keys=("principles", "critiques", "few_shot"),
    files=("constitution.yaml", "prompts/answers.yaml", "prompts/critiques.yaml", "prompts/reviews.yaml"),
    fields=principles.FIELDS,
    enabled=_relevant,
    items=_calibration,
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
    keys=(
        "rounds",
        "critiques",
        "sampling.critiques",
        "few_shot.critiques",
        "few_shot.reviews",
        "few_shot.rotate",
        "on_policy.critic",
    ),
    files=("constitution.yaml", "prompts/reviews.yaml"),
    fields=frozenset({"instruction", "answer", "critique_request"}),
    enabled=revises,
)
REVISIONS = Stage(
    "revisions",
    "revisions",
    _render_revision,
    item_rounds.parse_revision,
    trims=lambda text, unit: parsing.bare(text, unit.fields["instruction"]),
    inputs=_texts,
    redraws_limit=True,
    per_round=True,
    needs=lambda round_: (("critiques", round_),),
    reads=lambda round_: (*_answer(round_), *_text_and_principle(round_)),
    keys=(
        "rounds",
        "critiques",
        "sampling.revisions",
        "few_shot.revisions",
        "few_shot.reviews",
        "few_shot.rotate",
        "on_policy.critic",
    ),
    files=("constitution.yaml", "prompts/reviews.yaml"),
    fields=frozenset({"instruction", "answer", "critique", "revision_request"}),
    enabled=revises,
)
LABELS = Stage(
    "labels",
    "judge_pair",
    _render_label,
    score=labels.check,
    needs=_answer,
    reads=_revised,
    keys=("principles.max_text_tokens", "pairs.label"),
    files=("constitution.yaml",),
    fields=PAIR_FIELDS,
    enabled=_checked,
)
COMPARISONS = Stage(
    sampled.COMPARED,
    "judge_pair",
    sampled.render_comparison,
    score=sampled.compare,
    needs=lambda round_: (("answers", 0), (sampled.SECOND, 0)),
    reads=lambda round_: (("relevance", 0), (LABEL_BAR.name, 0)),
    keys=("rounds", "principles"),
    files=("constitution.yaml",),
    fields=PAIR_FIELDS,
    optional=True,
    enabled=_samples,
)
SFT_INSTRUCTIONS = replace(
    INSTRUCTIONS,
    name=own_answers.REQUESTS,
    sampling="instructions",
    optional=True,
    aside=True,
    enabled=shown_beside,
)
SFT_ANSWERS = replace(
    ANSWERS,
    name=own_answers.ANSWERS,
    render=own_answers.render_answer,
    needs=lambda round_: ((own_answers.REQUESTS, 0),),
    sampling="answers",
    optional=True,
    aside=True,
    enabled=shown_beside,
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
