"""SFT on the revisions: an arm beside DPO, so that the report says what DPO adds, or the stage that DPO starts from.

Owns its inputs file and its order: train on the one loaded base (train/sft/, adapter-sft/), measure, eval/sft.json. As
a first stage (`dpo.start = "sft"`) it also reads sound answers that the caller hands in: rows of `prompt`, `chosen`.
Training is `cai.training.train`'s, measuring `cai.evaluate.arms`'s. Invariant: the run's own adapter, its score log and
its figures keep their bytes whether this arm is on or off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from cai import errors
from cai.data import on_policy
from cai.errors import CaiError
from cai.recipe.load import flatten
from cai.run.context import Context
from cai.store.files import write_json_atomic
from cai.store.row_types import Pair, SoundAnswer, TrainingPair
from cai.terminal import say
from cai.training import train as training

INPUTS = "inputs.json"


def start_of(context: Context, pairs: Sequence[Pair], sound: Sequence[SoundAnswer] = ()) -> Path | None:
    """What `train` wants as `start`: None for the base, adapter-sft/ of these revisions and answers, adapter-start/.

    `sound`: rows with `item`, `prompt` and `chosen`, answers that no principle objects to. Killed anywhere, the same
    call goes on where it was; its adapter is DPO's start and the reference's.
    """
    if context.recipe.dpo.start == "adapter":
        return on_policy.start_of(context)
    return train_arm(context, pairs, sound) if context.recipe.dpo.start == "sft" else None


def train_arm(context: Context, pairs: Sequence[Pair], sound: Sequence[SoundAnswer] = ()) -> Path:
    """adapter-sft/ of these pairs' revisions: trained, resumed, or found finished."""
    run = context.run
    return train_stage(context, pairs, sound, run.sft_train, run.sft_adapter, context.recipe.dpo.seeds[0])


def train_stage(
    context: Context, pairs: Sequence[Pair], sound: Sequence[SoundAnswer], folder: Path, adapter: Path, seed: int
) -> Path:
    """The same into any folder and from any seed."""
    recipe = context.recipe
    settle_inputs(folder, adapter, inputs(context, pairs, sound, seed))
    if training.load_result(folder) is not None:
        return adapter
    context.check_stop("before training the SFT arm")
    model = context.model()
    model.release()
    context.progress.begin("train sft", 0, total=0, unit="step")
    result = training.train(
        model,
        [*pairs, *(TrainingPair(**row, rejected="") for row in sound)],
        [],
        recipe.lora,
        recipe.sft.recipe(recipe.dpo),
        folder,
        prompt=context.prompts["policy"],
        seed=seed,
        event=lambda kind, **fields: context.run.event(kind, **{**fields, "arm": "sft"}),
        stopped=context.stopped,
        progress=context.progress.training,
        adapter=adapter,
        objective="sft",
    )
    context.progress.end()
    say(
        f"train sft: {result.steps} steps on {result.pairs} revisions in {result.seconds:.0f} s, "
        f"first loss {result.first_loss:.4f}, last {result.last_loss:.4f}"
    )
    return adapter


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
