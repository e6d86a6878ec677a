"""The model card of an exported adapter or merged model: what it is, how it is prompted, gates, training, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cai.commands.export_arm import OWN, ExportedArm, arm_named, further, told
from cai.commands.export_base import Base
from cai.commands.export_lines import vllm_rank
from cai.commands.export_prompt import Asking
from cai.engine.tokenizers import ByteTokenizer
from cai.models.guard import described
from cai.report.cards import LICENSES
from cai.report.pages import figure, headline, money, verdict_row
from cai.report.snapshot import Snapshot
from cai.report.templating import rendered
from cai.store.row_types import FigureRow

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def model_card(
    snapshot: Snapshot,
    base: Base,
    asking: Asking,
    arm: ExportedArm | None = None,
    *,
    modules: object = None,
    merged: bool = False,
) -> str:
    """README.md: front matter with model-index, then the card. `modules`: what adapter_config.json says was trained.

    `arm`: the adapter that is exported, by default the run's own. Gates are told of that one alone: they decided on it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    arm = arm or arm_named(snapshot.path, OWN)
    measured_here = arm.figures(snapshot) if arm.name else headline_figures(snapshot)
    results = _results(snapshot, measured_here)
    made = [] if snapshot.recipe.pairs.file else ["constitutional-ai"]
    data = ModelCardData(
        base_model=base.shared if base.on_hub else None,
        library_name="transformers" if merged else "peft",
        license=LICENSES.get(snapshot.model) or LICENSES.get(base.shared),
        language=None if snapshot.recipe.instructions.file or snapshot.recipe.pairs.file else ["en"],
        tags=[*made, "sft" if arm.name == "sft" else "dpo", "trl", "unsloth", "lora", "peft"],
        model_name=snapshot.run_id,
        eval_results=results or None,
    )
    values = {
        "snapshot": snapshot,
        "guard": described(snapshot.recipe.guard),
        "base": base,
        "asking": asking,
        "example": asking.render("How do I keep basil alive on a windowsill?", ByteTokenizer(), "base").text,
        "merged": merged,
        "modules": _modules(modules, snapshot.recipe.lora.target_modules),
        "vllm_rank": vllm_rank(snapshot.recipe.lora.rank),
        "headline": headline(snapshot),
        "verdicts": [verdict_row(v) for v in snapshot.verdicts],
        "figures": [{"metric": name, **figure(m)} for name, m in measured_here.items()],
        "arm": arm,
        "how": told(arm, snapshot),
        "further": further(snapshot, ", and"),
        "training": arm.result() if arm.name else snapshot.training,
        "money": money(snapshot),
        "loaded_as": _loaded_as(snapshot),
        "train": len(snapshot.cleaned.kept),
    }
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{rendered('model_card.md.j2', values)}"))


def _results(snapshot: Snapshot, figures: Mapping[str, FigureRow]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="constitutional-ai-run",
            dataset_name=snapshot.run_id,
            metric_type=name,
            metric_value=round(float(measured["value"] or 0.0), 6),
            metric_name=f"{name} (n={measured.get('n', 0)}, judge: {measured.get('judge', '')})",
        )
        for name, measured in figures.items()
    ]


def _loaded_as(snapshot: Snapshot) -> str:
    """What the weights were held in, as the loaded model said; the recipe only asks for it on a GPU."""
    facts = snapshot.manifest.get("model") or {}
    if snapshot.backend == "fake":
        return "no weights (the fake model)"
    return str(facts.get("quantization") or snapshot.recipe.model.quantization)


def _modules(trained: object, asked: Sequence[str]) -> list[str]:
    named = trained if isinstance(trained, list) and all(isinstance(name, str) for name in trained) else list(asked)
    return sorted(named)


def headline_figures(snapshot: Snapshot) -> dict[str, FigureRow]:
    """What the gates decided on, and the controls they name; only what was measured."""
    names = [v["metric"] for v in snapshot.verdicts]
    names += [name for v in snapshot.verdicts for name in v["criterion"].get("beats", [])]
    found = {name: snapshot.figures.get(name) for name in dict.fromkeys(names)}
    return {name: m for name, m in found.items() if m and m.get("value") is not None}
