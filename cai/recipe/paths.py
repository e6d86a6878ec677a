"""`~` in the recipe's paths and in those of the command line, in one place for all of them.

Owns which keys are or may be paths. Does not look whether anything is there.
"""

from __future__ import annotations

import os
from typing import Any

from cai.errors import CaiError
from cai.recipe.settings import Section

PATH_KEYS = (
    "runs",
    "constitution",
    "prompts",
    "instructions.file",
    "pairs.file",
    "model.name",
    "guard.model",
    "evaluation.lm_eval_include",
    *(f"benchmarks.{name}" for name in ("harmbench", "xstest", "mtbench", "mtbench_prompts", "xstest_prompt")),
    *(f"benchmarks.{name}" for name in ("judge", "harmbench_judge", "xstest_judge", "mtbench_judge")),
)


def at_home(recipe: Section, file: str) -> Any:
    """`~` in every key that is or may be a path: a shell leaves it alone within --set and in the file."""
    for path in PATH_KEYS:
        *sections, name = path.split(".")
        section = getattr(recipe, sections[0]) if sections else recipe
        if str(value := getattr(section, name)).startswith("~"):
            try:
                whole = expanded(value)
            except CaiError as error:
                raise CaiError(f"{file}: {path}: {error}") from None
            changed = section.model_copy(update={name: whole})
            recipe = recipe.model_copy(update={sections[0]: changed}) if sections else changed
    return recipe


def expanded(path: str) -> str:
    """`~` and `~user` at the beginning as the folder that they mean; any other text as it is."""
    if not path.startswith("~"):
        return path
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise CaiError(f"{path[:80]!r}: no such user's folder. Write the path out.")
    return whole
