"""What each stage of the chain is asked for an item: its text, its principle, and the unit to write or score.

Owns no stage (`chain`), no loop, no file. A round is one principle: critique of the current text, then revision of it;
a round that finds nothing leaves the text as it is. All of it is computed from the records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cai.data import parsing, slots
from cai.data.parsing import Parsed, Unparsed
from cai.data.stage import Unit
from cai.engine.model import Model
from cai.metrics.text import kept_of, quoted_of, rouge_l
from cai.metrics.wordings import finds_nothing
from cai.recipe.constitution import Constitution, Principle, choose
from cai.recipe.copies import Shots, copied, grams
from cai.recipe.intake.entries import POOLS
from cai.recipe.load import Recipe
from cai.recipe.panels import panel
from cai.recipe.prompts import Prompt, Shift
from cai.run.context import Context
from cai.store.row_types import Record, UnitExtra

ROTATIONS = (0, 2, 4)  # orders in which the examples are shown, by slot: few, so that prefixes stay shared


def principle_of(context: Context, item: int, round_: int) -> Principle | None:
    """The principle of an item's round; None where its text breaks none.

    Drawn by relevance it stands in the records; dealt blindly it is seeded, balanced over the run, never twice an item.
    """
    recipe = context.recipe
    if recipe.principles.choice == "uniform":
        return choose(context.constitution, recipe.seed, item, recipe.rounds)[round_]
    row = context.ok("relevance", item, round_)
    return context.constitution[row["principle"]] if row and row["principle"] else None


def current_text(context: Context, item: int, round_: int) -> str | None:
    """What round `round_` criticises: the latest revision before it, or the answer."""
    for earlier in reversed(range(round_)):
        if not _settled(context, item, earlier):
            return None
        if (row := context.ok("revisions", item, earlier)) is not None:
            return row["text"]
    row = context.ok("answers", item)
    return row["text"] if row else None


def _settled(context: Context, item: int, round_: int) -> bool:
    """Whether a round has come to its end: a revision, or nothing to revise."""
    if context.ok("revisions", item, round_) is not None:
        return True
    critique = context.ok("critiques", item, round_)
    if critique is not None:
        return keeps_text(context.recipe, critique)
    relevance = context.ok("relevance", item, round_)
    return relevance is not None and relevance["principle"] is None  # it breaks none: no critique is asked for


def keeps_text(recipe: Recipe, critique: Record) -> bool:
    """The critique finds nothing, and so the text stays as it is."""
    return recipe.critiques.no_issue == "keep" and found_nothing(critique)


def found_nothing(critique: Record) -> bool:
    """By the flag that it got when it was drawn (one that began with a quotation may only approve), or by its words."""
    return "no_issue" in critique.get("flags", ()) or finds_nothing(critique["text"])


def instruction_of(context: Context, item: int, stage: str = "instructions") -> Record | None:
    """The accepted instruction row of an item, whichever attempt produced it."""
    for attempt in range(context.recipe.instructions.max_tries):
        row = context.log.get(stage, item, attempt)
        if row is None:
            return None
        if row["status"] == "ok":
            return row
    return None


def shift_of(recipe: Recipe, item: int) -> int:
    """The order in which an item's prompt shows its examples."""
    return ROTATIONS[slots.slot_of(item) % len(ROTATIONS)] if recipe.few_shot.rotate else 0


def review_shots(context: Context, stage: str, item: int, principle: Principle, pool: str) -> Shift:
    """Which examples a critique or revision is shown: those of the principle's topic, or by slot where it has none.

    By slot, where one is shown, it is the first: rotated, a third of the items saw none but the one that finds nothing.
    """
    return shots_of(context.recipe, context.prompts, stage, item, principle, pool)


def shots_of(
    recipe: Recipe, prompts: Mapping[str, Prompt], stage: str, item: int, principle: Principle, pool: str
) -> Shift:
    """The same, of the inputs alone."""
    if recipe.few_shot.by_topic and (shots := panel(prompts[stage].examples, principle, pool)):
        return shots
    shown = recipe.few_shot.reviews if recipe.critiques.transcript == "joint" else recipe.few_shot.critiques
    return shift_of(recipe, item) if shown != 1 else 0


def every_shots(
    recipe: Recipe, prompts: Mapping[str, Prompt], stage: str, constitution: Constitution
) -> Iterator[tuple[Shift, Principle]]:
    """All that a critique or revision may be shown, each once a principle."""
    for principle in constitution.principles:
        pools = (principle.pools if recipe.principles.choice == "relevant" else ()) or POOLS  # dealt to any request
        items = range(len(ROTATIONS))
        each = (shots_of(recipe, prompts, stage, item, principle, pool) for pool in pools for item in items)
        for shift in dict.fromkeys(each):
            yield shift, principle


def without_room(
    recipe: Recipe, prompts: Mapping[str, Prompt], constitution: Constitution, model: Model
) -> dict[str, list[str]]:
    """Stage -> the principles under which the examples leave no room for what it draws: all its rows are refused."""
    found: dict[str, dict[str, None]] = {}
    for stage in ("critiques", "revisions"):
        empty = dict.fromkeys(prompts[stage].fields, "")
        room = model.max_seq_length - getattr(recipe.sampling, stage).max_new_tokens
        for shift, principle in every_shots(recipe, prompts, stage, constitution):
            rendered = prompts[stage].render(empty, format=model.format, tokenizer=model.tokenizer, shift=shift)
            if len(rendered.token_ids) > room:
                found.setdefault(stage, {})[principle.id] = None
    return {stage: list(ids) for stage, ids in found.items()}


def _render_answer(context: Context, item: int, round_: int, stage: str = "instructions") -> Unit | None:
    row = instruction_of(context, item, stage)
    return Unit(item, 0, {"instruction": row["text"]}, shift=shift_of(context.recipe, item)) if row else None


def _render_relevance(context: Context, item: int, round_: int) -> Unit | None:
    row, text = instruction_of(context, item), current_text(context, item, round_)
    if row is None or text is None:
        return None
    return Unit(item, round_, {"instruction": row["text"], "answer": text}, extra={"pool": row["pool"]})


def _render_critique(context: Context, item: int, round_: int) -> Unit | None:
    row, text = instruction_of(context, item), current_text(context, item, round_)
    principle = principle_of(context, item, round_)
    if row is None or text is None or principle is None:
        return None
    fields = {"instruction": row["text"], "answer": text, "critique_request": principle.critique_request}
    shots = review_shots(context, "critiques", item, principle, row["pool"])
    return Unit(item, round_, fields, principle.id, shift=shots, prefill=opening(context.recipe))


def opening(recipe: Recipe) -> str:
    """How a critique begins: with a quotation, where whether there is something to criticise is decided elsewhere."""
    return "" if recipe.critiques.found == "drawn" else '"'


def _render_revision(context: Context, item: int, round_: int) -> Unit | None:
    row, text = instruction_of(context, item), current_text(context, item, round_)
    critique, principle = context.ok("critiques", item, round_), principle_of(context, item, round_)
    if row is None or text is None or critique is None or principle is None:
        return None
    if keeps_text(context.recipe, critique):
        return None
    fields = {
        "instruction": row["text"],
        "answer": text,
        "critique": critique["text"],
        "revision_request": principle.revision_request,
    }
    if context.recipe.critiques.transcript == "joint":
        fields["critique_request"] = principle.critique_request
    shots = review_shots(context, "revisions", item, principle, row["pool"])
    wrong = context.recipe.pairs.reject_unrepaired and not found_nothing(critique)  # what praise quotes may stay
    return Unit(item, round_, fields, principle.id, shift=shots, repairs=wrong)


def _render_label(context: Context, item: int, round_: int) -> Unit | None:
    """A chain that has come to its end with another text than it began with."""
    row, answer = instruction_of(context, item), context.ok("answers", item)
    rounds = context.recipe.rounds
    text = current_text(context, item, rounds) if rounds else None
    revised = [one for r in range(rounds) if (one := context.ok("revisions", item, r)) is not None]
    if row is None or answer is None or text is None or not revised:
        return None
    used = dict.fromkeys(str(one["principle"]) for one in revised)
    before = context.ok("relevance", item, 0)
    extra: UnitExtra = {"used": tuple(used), "before": before["scores"] if before else {}}
    return Unit(item, 0, {"instruction": row["text"], "chosen": text, "rejected": answer["text"]}, extra=extra)


def parse_revision(text: str, unit: Unit) -> Parsed | Unparsed:
    """A new answer that says neither its critique's judgement nor the wording of its request again, and repairs."""
    case = (unit.fields["instruction"], unit.fields["answer"])
    found = parsing.revision(text, unit.fields["critique"], "\n".join(case))
    if isinstance(found, Unparsed):
        return found
    if run := copied(found.text, Shots(grams((unit.fields["revision_request"],))), case):
        return Unparsed(f"copied_request: {run}")
    if unit.repairs and (left := unrepaired(found.text, unit.fields["critique"], unit.fields["answer"])):
        return Unparsed(f"unrepaired: {left[:80]}")
    return found


MUCH_AS_BEFORE = 0.6  # ROUGE-L; of 66 such revisions of a 1.5B model, read blind, 7 were better and 35 worse


def unrepaired(text: str, critique: str, answer: str) -> str:
    """What the critique quotes first, where all that it quotes stands in a text that is much as before; or ""."""
    quoted = quoted_of(critique, answer)
    kept = kept_of(quoted, text)
    return kept[0] if kept and len(kept) == len(quoted) and rouge_l(text, answer) >= MUCH_AS_BEFORE else ""
