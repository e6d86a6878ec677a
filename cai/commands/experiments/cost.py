"""What an experiment of fresh answers and judgements takes, from what the run before it took. Pure over events.

Owns the counts and the arithmetic; where nothing was measured it gives counts alone, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cai.recipe.load import Recipe
from cai.run.events import lineage, read_events
from cai.store.jsonl import Row
from cai.terminal import duration, usd

JUDGING = ("evaluate preference.p3", "evaluate against.judged", "evaluate attribution.judged")  # one comparison a row


def cost_lines(recipe: Recipe, run: Path | None, *, prompts: int, arms: int, judgements: int) -> list[str]:
    """`judgements`: comparisons a prompt, each in both orders."""
    tokens, compared = prompts * arms * recipe.evaluation.fresh_max_new_tokens, prompts * judgements
    found = [
        f"answers: {prompts} held-out prompts x {arms}, at most {tokens:,} tokens",
        f"judgements: {prompts} prompts x {judgements} principles (one is the judge's own wording), {compared:,} blind "
        f"comparisons in both orders, texts cut to {recipe.evaluation.max_text_tokens} tokens",
    ]
    logs = [read_events(path / "events.jsonl") for path in lineage(run)] if run else []
    per_token, per_row = _seconds(logs, ("answers",), "tokens"), _seconds(logs, JUDGING, "items")
    if per_token is None or per_row is None:
        return [*found, "time: no run of this recipe has measured both, so none is given"]
    seconds = tokens * per_token + compared * per_row
    price = recipe.budget.usd_per_hour
    money = f", {usd(seconds / 3600 * price)}" if price else ""
    of = f"{run.name if run else ''}{' and of what it was forked from' if len(logs) > 1 else ''}"
    return [*found, f"time: at most {duration(seconds)}{money}, at the rates of {of}"]


def _seconds(logs: Sequence[Sequence[Row]], labels: Sequence[str], unit: str) -> float | None:
    """Seconds a token or a row, over the stage events of these labels: the run's own, else those of the one before it
    whose rows it took over. None where there is none."""
    for events in logs:
        ended = [event for event in events if event.get("kind") == "stage" and event.get("stage") in labels]
        if count := sum(int(event.get(unit) or 0) for event in ended):
            return sum(float(event.get("seconds") or 0.0) for event in ended) / count
    return None
