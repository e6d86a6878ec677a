"""Which pictures a run has: the gates, the funnel, principles, the training's curves, lengths and edits. Pure.

Owns what is put into each chart and which are made at all: of a milestone of one item there is nothing to draw, and
drawing takes seconds. What a chart says is `charts`', how it looks `drawing`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cai.report import tables
from cai.report.charts import Chart, forest, funnel, heat_map, histogram, line_chart, pool_map
from cai.report.examples import edits, lengths
from cai.report.snapshot import Snapshot
from cai.store.jsonl import JsonObject, Row
from cai.store.row_types import FigureRow

CURVES = (  # title, unit, series
    ("Loss", "DPO loss, nats", {"loss": "loss"}),
    (
        "Implicit reward",
        "implicit reward (beta x nats)",
        {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"},
    ),
    ("Log-probability a token", "nats a token", {"chosen": "logps/chosen_token", "rejected": "logps/rejected_token"}),
    ("Gradient norm", "norm of the gradient", {"gradient norm": "grad_norm"}),
)
AFTER = {  # points at the end of a curve: one measurement over all pairs of a split, in the curve's own unit
    "Loss": {"held-out": "dpo.loss.heldout", "training pairs": "dpo.loss"},
    "Implicit reward": {"held-out margin": "dpo.margin.heldout"},
}


def charts_of(snapshot: Snapshot, principles: Sequence[Row]) -> Row:
    """The pictures; of a milestone of one item there is nothing to draw, and drawing takes seconds."""
    if snapshot.milestone == "m0":
        return {
            "forest": None,
            "funnel_chart": None,
            "heat_map": None,
            "pool_map": None,
            "curves": [],
            "histograms": [],
        }
    return {
        "forest": forest("What was measured, with its interval and its controls", snapshot.verdicts, snapshot.figures),
        "funnel_chart": funnel_chart(snapshot),
        "heat_map": heat_map("What became of each principle's items", principles),
        "pool_map": pool_map("Which principles the critiques of each pool were about", *tables.by_pool(snapshot)),
        "curves": curves(snapshot.log, snapshot.figures),
        "histograms": histograms(snapshot),
    }


def plots(content: JsonObject) -> list[Chart | None]:
    """Every chart of the page, in its order, for eval/plots; none where nothing was decided or measured."""
    one_by_one = (content["forest"], content["funnel_chart"], content["heat_map"], content["pool_map"])
    return [*one_by_one, *content["curves"], *content["histograms"]]


def funnel_chart(snapshot: Snapshot) -> Chart | None:
    """The stages, then what became pairs and what of these is trained on."""
    rows = [(row["name"], row["rows"], row["ok"]) for row in tables.funnel(snapshot)]
    pairs, train = snapshot.pairs, snapshot.pairs.train
    if rows and (pairs.kept or pairs.rejects):
        rows.append(("pairs", len(pairs.kept) + len(pairs.rejects), len(pairs.kept)))
        rows.append(("training pairs, cleaned", len(train), len(snapshot.cleaned.kept)))
    return funnel("From prompts to pairs", rows)


def curves(log: Sequence[Row], figures: Mapping[str, FigureRow]) -> list[Chart]:
    """The training log as charts, with what was measured after training; what a run did not log is left out."""
    found = []
    for title, unit, series in CURVES:
        points = {name: _points(log, key) for name, key in series.items()}
        shown = {name: values for name, values in points.items() if values}
        last = max((step for values in shown.values() for step, _ in values), default=0.0)
        after = {
            f"{name} after training": (last, *(figures[metric].get(key) for key in ("value", "low", "high")))
            for name, metric in AFTER.get(title, {}).items()
            if (figures.get(metric) or FigureRow()).get("value") is not None
        }
        chart = line_chart(title, shown, marks=after, y_label=unit)
        if chart is not None:
            found.append(chart)
    return found


def _points(log: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(step, value) of every entry that has both."""
    return [(float(e["step"]), float(e[key])) for e in log if "step" in e and isinstance(e.get(key), int | float)]


def histograms(snapshot: Snapshot) -> list[Chart]:
    found = [
        histogram("Length of answers and revisions", lengths(snapshot), "words"),
        histogram("How much a revision changes", edits(snapshot), "share of words changed (1 - ROUGE-L)"),
    ]
    return [chart for chart in found if chart is not None]
