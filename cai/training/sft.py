"""What an SFT arm's adapter depends on, settled before its first step: later calls must bring the same.

Owns train/sft/inputs.json. The arm itself is `cai.training.arms`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError
from cai.recipe.load import flatten
from cai.run.context import Context
from cai.store.files import write_json_atomic
from cai.store.row_types import Pair, SoundAnswer

INPUTS = "inputs.json"


def inputs(context: Context, pairs: Sequence[Pair], sound: Sequence[SoundAnswer], seed: int) -> dict[str, str]:
    """Everything the arm's adapter depends on: name -> value."""
    recipe = context.recipe
    settings = {k: v for k, v in recipe.sft.recipe(recipe.dpo).deciding().items() if k != "beta"}
    answers = {"sound": _texts_sha(sound)} if sound else {}
    return {
        "revisions": _texts_sha(pairs),
        **answers,
        "prompts/policy.yaml": context.prompts["policy"].sha,
        "model.name": recipe.model.name,
        "model.revision": recipe.model.revision,
        "model.quantization": recipe.model.quantization,
        "seed": str(seed),
        **flatten(recipe.lora.model_dump(mode="json"), "lora."),
        **flatten(settings, "sft."),
    }


def _texts_sha(rows: Sequence[Pair] | Sequence[SoundAnswer]) -> str:
    texts = orjson.dumps([[row["prompt"], row["chosen"]] for row in rows])
    return hashlib.sha256(texts).hexdigest()[:16]


def settle_inputs(folder: Path, adapter: Path, now: Mapping[str, str]) -> None:
    """Write the inputs before the first training; later ones must be the same (exit 3 with what differs)."""
    path = folder / INPUTS
    try:
        then = orjson.loads(path.read_bytes())["inputs"]
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256(orjson.dumps(dict(now), option=orjson.OPT_SORT_KEYS)).hexdigest()
        write_json_atomic(path, {"v": 1, "sha256": digest, "inputs": dict(now)})
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaiError(
            f"{path}: cannot be read ({str(error)[:80]}), so it is unknown what the SFT arm was trained on. "
            f"Remove {folder} and {adapter} to train it anew.",
            errors.CORRUPT,
        ) from None
    changed = [name for name in sorted({**then, **now}) if then.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name}: {then.get(name)} then, {now.get(name)} now" for name in changed)
        raise CaiError(
            f"{folder}: the SFT arm was trained with other inputs ({told}). "
            f"Restore them, or remove {folder} and {adapter} to train it anew.",
            errors.DRIFT,
        )
