"""The table of the report that compares the kinds of pairs of a run that made both. Pure over its figures."""

from __future__ import annotations

from collections.abc import Mapping

from cai.store.jsonl import Row
from cai.store.row_types import FigureRow
from cai.terminal import interval, number

HEAD = ("kind", "pairs", "of items", "yield", "margin, nats", "P1 held out", "n", "P1 trained on", "n")
SAID = {"revision": "revision against its answer", "sampled": "the better of two sampled answers"}


def compared(figures: Mapping[str, FigureRow]) -> Row:
    """{} for a run of one kind."""
    kinds = [kind for kind in SAID if f"pairs.yield.{kind}" in figures]
    return {"head": HEAD, "rows": [_row(figures, kind) for kind in kinds]} if kinds else {}


def _row(figures: Mapping[str, FigureRow], kind: str) -> list[str]:
    made = figures[f"pairs.yield.{kind}"]
    cells = [SAID[kind], number((made.get("facts") or {}).get("kept")), number(made.get("n")), _cell(made)]
    cells.append(_cell(figures.get(f"labels.margin.{kind}", {})))
    for name in ("preference.p1", "preference.p1.train"):
        figure = figures.get(f"{name}.{kind}", {})
        cells += [_cell(figure), number(figure.get("n")) if figure else "–"]
    return cells


def _cell(figure: FigureRow) -> str:
    """Value and interval."""
    value = figure.get("value")
    return "–" if value is None else number(value) + interval(figure.get("low"), figure.get("high"))
