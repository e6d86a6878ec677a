"""Further trainings of DPO from the same pairs: the recipe's other seeds.

Owns the folders (train/seed-N/, adapter-seed-N/) and eval/seeds.json; training itself
is `cai.training.train`'s. The first seed is the run's own adapter and is not touched: it is back on the model when this
ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cai.data import on_policy
from cai.metrics.figure import Figure
from cai.recipe.settings import DpoSection
from cai.run.context import Context
from cai.store.files import write_json_atomic
from cai.store.row_types import Pair, SoundAnswer
from cai.training import sft
from cai.training import train as training


def train_seeds(
    context: Context, pairs: Sequence[Pair], heldout: Sequence[Pair], sound: Sequence[SoundAnswer] = ()
) -> dict[str, Figure]:
    """Train every seed after the first that has no result yet; gives the figures of all of them.

    Where DPO starts from SFT, each seed has an SFT stage of its own, on the same revisions and `sound` answers.
    """
    run, recipe = context.run, context.recipe
    seeds, trained = recipe.dpo.seeds[1:], False
    for seed in seeds:
        folder, adapter = places(run.path, seed)
        if training.load_result(folder) is not None:
            continue
        start = on_policy.start_of(context) if recipe.dpo.start == "adapter" else None
        if recipe.dpo.start == "sft":
            stage = adapter.with_name(f"adapter-sft-seed-{seed}")
            start = sft.train_stage(context, pairs, sound, folder / "sft", stage, seed)
        train_dpo(context, pairs, heldout, recipe.dpo, folder, adapter, seed, start, f"train seed {seed}")
        trained = True
    if trained:
        context.model().load_adapter(run.adapter, recipe.lora)
    figures = seed_figures(run.path, seeds)
    write_json_atomic(run.eval / "seeds.json", {"figures": {name: f.as_dict() for name, f in figures.items()}})
    return figures


def train_dpo(
    context: Context, pairs: Sequence[Pair], heldout: Sequence[Pair], dpo: DpoSection, folder: Path, adapter: Path,
    seed: int, start: Path | None, title: str,
) -> None:  # fmt: skip
    """One more DPO with the run's own model, LoRA and watching; its adapter stays on the model."""
    context.check_stop("before training")
    model = context.model()
    model.release()
    context.progress.begin(title, 0, total=0, unit="step")
    training.train(
        model,
        pairs,
        heldout,
        context.recipe.lora,
        dpo,
        folder,
        prompt=context.prompts["policy"],
        seed=seed,
        event=context.run.event,
        stopped=context.stopped,
        progress=context.progress.training,
        adapter=adapter,
        health=context.recipe.health,
        start=start,
    )
    context.progress.end()


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
