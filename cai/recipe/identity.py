"""What counts as "the same recipe" on a resume: the keys that made the data, and those that made the adapter.

Owns which keys belong to the identity and how a key that came later stays out of the identity of runs made before.
Reads no file; the hashes of files are handed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cai.recipe.load import RETIRED, Recipe, flatten
from cai.recipe.settings import ADDED, DpoSection

_DATA_KEYS = (
    "rounds",
    "seed",
    "model",
    "sampling",
    "few_shot",
    "engine.batch_size",
    "engine.backend",
    "instructions",
    "principles",
    "critiques",
    "pairs",
    *(f"on_policy.{name}" for name in ("round", "parent", "adapter", "critic")),
)
_TRAINING_KEYS = ("lora", "dpo", "hygiene", "heldout", "items")


def identity(recipe: Recipe, files: Mapping[str, str], *, training: bool = False) -> dict[str, str]:
    """What made the data (and, with `training`, the adapter): dotted key -> value; `files`: name -> sha.

    Price, budget, gates, evaluation and, until training began, the number of items may change on a resume.
    """
    wanted = _DATA_KEYS + (_TRAINING_KEYS if training else ())
    flat = {key: repr(value) for key, value in RETIRED.items()} | flatten(recipe.model_dump(mode="json"))
    keep = {k: v for k, v in flat.items() if any(k == name or k.startswith(name + ".") for name in wanted)}
    for name in ("model.backend", "dpo.also_from_base"):  # an arm beside the run's own adapter may come later
        keep.pop(name, None)
    if not recipe.hygiene.reviews:
        keep.pop("hygiene.reviews", None)
    drop_unset(keep)
    keep |= rounding(recipe)
    if recipe.guard.enabled:
        keep |= {k: v for k, v in flat.items() if k.startswith("guard.")}
    if training and recipe.dpo.start == "sft":
        came_later = {("sft.select", repr("all")), ("sft.answers", "0"), ("sft.end_weight", "1.0")}
        keep |= {k: v for k, v in flat.items() if k.startswith("sft.") and (k, v) not in came_later}
    return keep | {f"sha256({name})": sha for name, sha in files.items()}


LATER_KEYS = {
    "instructions.key": "",
    "instructions.pool": "",
    "principles.choice": "uniform",
    "principles.by": "rule_check",
    "principles.over": "known",
    "critiques.transcript": "separate",
    "critiques.no_issue": "revise",
    "critiques.found": "drawn",
    "pairs.label": "always",
    "pairs.by": "comparison",
    "pairs.false_labels": 0.0,
    "pairs.max_added_repetition": 1.0,
    "pairs.reject_unrepaired": False,
    "pairs.mended_refusals": False,
    "pairs.file": "",
    "pairs.kind": "revision",
    "on_policy.round": 1,
    **dict.fromkeys(("on_policy.parent", "on_policy.adapter"), ""),
    "on_policy.critic": "base",
    "few_shot.reviews": -1,
    "few_shot.relevance": -1,
    "few_shot.rotate": False,
    "few_shot.by_topic": False,
    "hygiene.without_principles": [],
    **{f"dpo.{name}": DpoSection.model_fields[name].default for name in (*ADDED, "save_minutes", "eval_steps", "keep")},
}


def drop_unset(keep: dict[str, str]) -> None:
    """Keys that came later and say nothing where they have these values: a run of before has none of them."""
    for name, value in LATER_KEYS.items():
        if keep.get(name) == repr(value):
            del keep[name]
    if "critiques.found" not in keep:
        keep.pop("critiques.false_alarms", None)
    if "principles.choice" not in keep:
        for name in [name for name in keep if name.startswith("principles.")]:
            del keep[name]


def rounding(recipe: Recipe) -> dict[str, str]:
    """8 bits change what is drawn; the other ways of the linears draw the same text."""
    engine = recipe.engine
    found = {"engine.linears": repr(engine.linears)} if engine.rounded_products else {}
    return found | ({"engine.kv": repr(engine.kv)} if engine.kv != "auto" else {})


def short_hash(values: Mapping[str, str]) -> str:
    text = "\n".join(f"{key}={values[key]}" for key in sorted(values))
    return hashlib.sha256(text.encode()).hexdigest()[:6]
