"""DPO again with the recipe's further seeds, from the same pairs: how much of a result is the seed's.

Owns the folders (train/seed-N/, adapter-seed-N/) and eval/seeds.json; training itself is `cai.training.train`'s. The
first seed is the run's own adapter and is not touched: it is back on the model when this ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cai.metrics.figure import Measured
from cai.run.context import Context
from cai.store.files import write_json_atomic
from cai.store.jsonl import Row
from cai.training import train as training


def train_seeds(context: Context, pairs: Sequence[Row], heldout: Sequence[Row]) -> dict[str, Measured]:
    """Train every seed after the first that has no result yet; gives the figures of all of them."""
    run, recipe = context.run, context.recipe
    seeds, trained = recipe.dpo.seeds[1:], False
    for seed in seeds:
        folder, adapter = places(run.path, seed)
        if training.load_result(folder) is not None:
            continue
        context.check_stop("before training")
        model = context.model()
        model.release()
        context.progress.begin(f"train seed {seed}", 0, total=0, unit="step")
        training.train(
            model,
            pairs,
            heldout,
            recipe.lora,
            recipe.dpo,
            folder,
            prompt=context.prompts["policy"],
            seed=seed,
            event=run.event,
            stopped=context.stopped,
            progress=context.progress.training,
            adapter=adapter,
            health=recipe.health,
        )
        context.progress.end()
        trained = True
    if trained:
        context.model().load_adapter(run.adapter, recipe.lora)
    figures = seed_figures(run.path, seeds)
    write_json_atomic(run.eval / "seeds.json", {"figures": {name: f.as_dict() for name, f in figures.items()}})
    return figures


def places(run: Path, seed: int) -> tuple[Path, Path]:
    """A seed's training folder and its adapter."""
    return run / "train" / f"seed-{seed}", run / f"adapter-seed-{seed}"


def seed_figures(run: Path, seeds: Sequence[int]) -> dict[str, Measured]:
    """Last loss of each seed, and its accuracy and margin on held-out pairs where there are any."""
    found: dict[str, Measured] = {}
    for seed in seeds:
        result = training.load_result(places(run, seed)[0])
        if result is None:
            continue
        metric = f"dpo.last_loss.seed_{seed}"
        found[metric] = Measured(metric, result.last_loss, n=result.pairs, facts={"first_loss": result.first_loss})
        for what in ("accuracy", "margin"):
            if what in result.heldout:
                metric = f"dpo.heldout_{what}.seed_{seed}"
                n = int(result.heldout["n"])
                found[metric] = Measured(metric, result.heldout[what], n=n, judge="likelihood of the policy")
    return found
