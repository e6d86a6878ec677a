"""The trainings of a run as data, and the one call that makes their adapters: DPO, its seeds, SFT, DPO from the base.

Owns which folder, adapter, seed and texts an arm has (train/, train/sft/, train/from_base/, train/seed-N/), and
eval/seeds.json and train/sft/inputs.json (what the SFT arm's adapter depends on, settled before its first step: later
calls must bring the same); training itself is `cai.training.train`'s. Invariant: an arm whose result stands on disk
loads no model and changes no byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson

from cai import errors
from cai.data import on_policy
from cai.data.sound import imitable
from cai.errors import CaiError
from cai.metrics.figure import Figure
from cai.recipe.load import flatten
from cai.recipe.settings import DpoSection
from cai.run.context import Context
from cai.run.folder import Run
from cai.store.files import write_json_atomic
from cai.store.row_types import Pair, SoundAnswer, TrainingPair
from cai.terminal import say
from cai.training import train as training
from cai.training.job import Objective


@dataclass(frozen=True)
class Arm:
    """One training. `start`: the arm whose adapter it goes on from, which is then its reference; None: the base."""

    title: str
    pairs: Sequence[TrainingPair]
    folder: Path
    adapter: Path
    dpo: DpoSection
    seed: int
    heldout: Sequence[Pair] = ()
    objective: Objective = "dpo"
    start: Arm | None = None
    reference: Path | None = None  # instead of `start`: an adapter that stands already, that of the round before
    name: str = ""  # of its events and figures; "": the run's own training and its seeds
    inputs: Mapping[str, str] = field(default_factory=dict)  # settled in `folder`; DPO's are the run's own identity


def trained(context: Context, arm: Arm) -> Path:
    """The adapter of this arm, its start's before it: trained, resumed, or found finished.

    Killed anywhere, the same call goes on where it was. Errors: as `cai.training.train.train`; DRIFT (3) for an SFT arm
    of other inputs.
    """
    if done(arm):
        return arm.adapter
    for stage in (arm.start, arm):
        if stage is None or done(stage):
            continue
        context.check_stop(f"before {stage.title}")
        model = context.model()
        model.release()
        context.progress.begin(stage.title, 0, total=0, unit="step")
        result = training.train(
            model,
            stage.pairs,
            stage.heldout,
            context.recipe.lora,
            stage.dpo,
            stage.folder,
            prompt=context.prompts["policy"],
            seed=stage.seed,
            event=_events(context.run, stage),
            stopped=context.stopped,
            progress=context.progress.training,
            adapter=stage.adapter,
            objective=stage.objective,
            health=context.recipe.health if stage.objective == "dpo" else training.WATCHED,
            start=stage.start.adapter if stage.start else stage.reference,
        )
        context.progress.end()
        what = "pairs" if stage.objective == "dpo" else "texts"
        say(
            f"{stage.title}: {result.steps} steps on {result.pairs} {what} in {result.seconds:.0f} s, "
            f"first loss {result.first_loss:.4f}, last {result.last_loss:.4f}"
        )
    return arm.adapter


def done(arm: Arm) -> bool:
    """Whether its result stands on disk; the inputs of an SFT arm are compared, or written, before."""
    if arm.inputs:
        settle_inputs(arm.folder, arm.adapter, arm.inputs)
    result = training.load_result(arm.folder)
    return result is not None and result.adapter == arm.adapter


def _events(run: Run, arm: Arm) -> Callable[..., None]:
    """`run.event`, which also says a sign of ill health aloud, and names an arm beside the run's own training."""

    def event(kind: str, **facts: object) -> None:
        run.event(kind, **({**facts, "arm": arm.name} if arm.name else facts))
        if kind == "health":
            say(f"{arm.title}: WARNING at step {facts['step']}: {facts['text']}")

    return event


def dpo_arm(context: Context, pairs: Sequence[Pair], heldout: Sequence[Pair], sound: Sequence[SoundAnswer] = ()) -> Arm:
    """The run's own training: train/ and adapter/, from the base or from SFT on the revisions and `sound` answers.

    `heldout` is scored on the way and at the end where `dpo.eval_steps` asks for it.
    """
    run, dpo = context.run, context.recipe.dpo
    start = sft_arm(context, pairs, sound) if dpo.start == "sft" else None
    return Arm(
        "train", pairs, run.train, run.adapter, dpo, dpo.seeds[0], heldout if dpo.eval_steps else (), start=start,
        reference=on_policy.start_of(context) if dpo.start == "adapter" else None,
    )  # fmt: skip


def sft_arm(context: Context, pairs: Sequence[Pair], sound: Sequence[SoundAnswer] = ()) -> Arm:
    """SFT on the revisions (train/sft/, adapter-sft/) and on `sound` answers, which no principle objects to."""
    run, recipe = context.run, context.recipe
    shown, seed = imitable(pairs, recipe), recipe.dpo.seeds[0]
    rows = [*shown, *(TrainingPair(**row, rejected="") for row in sound)]
    return Arm(
        "train sft", rows, run.sft_train, run.sft_adapter, recipe.sft.recipe(recipe.dpo), seed, objective="sft",
        name="sft", inputs=sft_inputs(context, shown, sound, seed),
    )  # fmt: skip


def from_base_arm(context: Context, pairs: Sequence[Pair], heldout: Sequence[Pair]) -> Arm:
    """DPO alone (train/from_base/, adapter-from-base/) beside DPO from SFT: the run's settings but for the start."""
    run, dpo = context.run, context.recipe.dpo.model_copy(update={"start": "base", "also_from_base": False})
    places = run.train / "from_base", run.path / "adapter-from-base"
    watched = heldout if dpo.eval_steps else ()
    return Arm("train from base", pairs, *places, dpo, dpo.seeds[0], watched, name="from_base")


def seed_arm(
    context: Context, pairs: Sequence[Pair], heldout: Sequence[Pair], sound: Sequence[SoundAnswer], seed: int
) -> Arm:
    """The run's training from another seed; its SFT stage, where it has one, is its own."""
    folder, adapter = places(context.run.path, seed)
    arm, title = dpo_arm(context, pairs, heldout, sound), f"train seed {seed}"
    if start := arm.start:
        stage, inputs = adapter.with_name(f"adapter-sft-seed-{seed}"), {**start.inputs, "seed": str(seed)}
        start = replace(start, folder=folder / "sft", adapter=stage, seed=seed, inputs=inputs)
    return replace(arm, title=title, folder=folder, adapter=adapter, seed=seed, heldout=heldout, start=start)


def train_seeds(
    context: Context, pairs: Sequence[Pair], heldout: Sequence[Pair], sound: Sequence[SoundAnswer] = ()
) -> dict[str, Figure]:
    """Train every seed after the first that has no result yet; gives the figures of all of them.

    The first seed is the run's own adapter and is not touched: it is back on the model when this ends.
    """
    run, recipe = context.run, context.recipe
    seeds = recipe.dpo.seeds[1:]
    arms = [seed_arm(context, pairs, heldout, sound, seed) for seed in seeds]
    missing = [arm for arm in arms if training.load_result(arm.folder) is None]
    for arm in missing:
        trained(context, arm)
    if missing:
        context.model().load_adapter(run.adapter, recipe.lora)
    figures = seed_figures(run.path, seeds)
    write_json_atomic(run.eval / "seeds.json", {"figures": {name: f.as_dict() for name, f in figures.items()}})
    return figures


def places(run: Path, seed: int) -> tuple[Path, Path]:
    """A seed's training folder and its adapter."""
    return run / "train" / f"seed-{seed}", run / f"adapter-seed-{seed}"


def seed_figures(run: Path, seeds: Sequence[int]) -> dict[str, Figure]:
    """Last loss of each seed, and its accuracy and margin on held-out pairs where there are any."""
    found: dict[str, Figure] = {}
    for seed in seeds:
        result = training.load_result(places(run, seed)[0])
        if result is None:
            continue
        metric = f"dpo.last_loss.seed_{seed}"
        found[metric] = Figure(metric, result.last_loss, n=result.pairs, facts={"first_loss": result.first_loss})
        for what in ("accuracy", "margin"):
            if what in result.heldout:
                metric = f"dpo.heldout_{what}.seed_{seed}"
                n = int(result.heldout["n"])
                found[metric] = Figure(metric, result.heldout[what], n=n, judge="likelihood of the policy")
    return found


def sft_inputs(context: Context, pairs: Sequence[Pair], sound: Sequence[SoundAnswer], seed: int) -> dict[str, str]:
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
    path = folder / "inputs.json"
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
