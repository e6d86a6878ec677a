"""What a dry run says of the arms: what each one beside base and tuned takes, and whether an SFT stage is advised.

Owns those lines; the counts are `cai.recipe.arm_costs`'s, the times `cai.run.arm_rates`'s and `cai.run.budget`'s.
"""

from __future__ import annotations

from cai.inputs import Inputs, runs_root
from cai.recipe.arm_costs import TITLES
from cai.recipe.load import Recipe
from cai.run import arm_rates, budget
from cai.run.rates import Range, measured_before
from cai.run.standing import Standing
from cai.terminal import duration, number, usd

WHY = (  # measured on the embedded model in base form: mean log p of the end token after the chosen text
    "DPO alone does not teach a base model to stop (log p of its end token: -11.67 before, -11.63 after, while the "
    "loss fell from 0.693 to 0.302)"
)


def lines(inputs: Inputs, stands: Standing | None = None) -> list[str]:
    """Nothing where base and tuned stand alone and nothing is advised. `stands`: what a fork took over."""
    recipe, root = inputs.recipe, runs_root(inputs.source, inputs.recipe)
    earlier = None if recipe.pairs.file else measured_before(root, recipe, inputs.backend)
    told = []
    for arm in arm_rates.timed(recipe, inputs.backend, earlier, stands.own_answers if stands else 0):
        count, where = number(arm.cost.answers), arm.cost.where
        where = f"{count} {where}" if where == "fresh answers" else f"{where}, {count} answers"
        tokens = f"at most {number(arm.cost.tokens)} tokens"
        told.append(f"{arm.cost.title}: {where}, {tokens}{_took(arm.seconds, recipe)}")
    if recipe.dpo.also_from_base:
        more = _added(inputs, {"also_from_base": False}, {"also_from_base": True})
        told.append(f"{TITLES['from_base']}: trained beside SFT+DPO{_took(more, recipe)}")
    found = [f"{'of these' if not place else '':<13} {line}" for place, line in enumerate(told)]
    return [*found, *_advice(inputs)]


def _took(seconds: Range | None, recipe: Recipe) -> str:
    if seconds is None:
        return ", no rate was measured"
    price = recipe.budget.usd_per_hour / 3600
    money = f", {usd(seconds.low * price)} to {usd(seconds.high * price)}" if price else ""
    return f", {duration(seconds.low)} to {duration(seconds.high)}{money}"


def _added(inputs: Inputs, before: dict[str, object], after: dict[str, object]) -> Range | None:
    """Training seconds of the recipe with `after` over the same with `before`, keys of [dpo]."""
    recipe, root = inputs.recipe, runs_root(inputs.source, inputs.recipe)
    changed = [recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update=keys)}) for keys in (before, after)]
    less, with_it = (budget.estimate(r, inputs.backend, root, inputs.limit_tokens).training for r in changed)
    return Range(with_it.low - less.low, with_it.high - less.high) if less and with_it else None


def _advice(inputs: Inputs) -> list[str]:
    """An SFT stage for a base model that has none."""
    recipe = inputs.recipe
    if recipe.model.format != "base" or recipe.dpo.start == "sft":
        return []
    cost = _took(_added(inputs, {"start": "base"}, {"start": "sft"}), recipe)
    return [f"{'advised':<13} {WHY}: --set dpo.start=sft trains on the revisions first{cost}"]
