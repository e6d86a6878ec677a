"""One table of the arms: base, the base prompted well, SFT, DPO and SFT+DPO beside each other.

Owns which arms a run has and what they are called, the rows, and where each cell is found among the figures; measures
and tests nothing (differences and p stand in the publication's main table). Pure. Invariant: a cell that no figure of
the run holds is empty, and a run of base and tuned alone has no such table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cai.report.snapshot import Snapshot
from cai.report.table_text import NONE
from cai.store.row_types import FigureRow
from cai.terminal import interval, number

Figures = Mapping[str, FigureRow]
PROMPTED = {"few_shot": "base, pairs shown", "constitution": "base, principles given", "best_of_n": "base, best of n"}
TRAINED = {"sft": "SFT", "from_base": "DPO"}
ROWS = (  # what it is called, and the figure: {arm} is base, tuned or an arm beside them
    ("prefers held-out revisions (P1)", "preference.p1.{arm}"),
    ("the same a token (P2)", "preference.p2.{arm}"),
    ("preferred to the base's answers (P3)", "preference.p3.{arm}"),
    ("P3 at equal length", "preference.p3.length_controlled.{arm}"),
    ("the tuned model preferred to it", "preference.over.{arm}"),
    ("the same at equal length", "preference.over.{arm}.length_controlled"),
    ("stops by itself", "fresh.{arm}.stops"),
    ("ends in a loop", "fresh.{arm}.loops"),
    ("refuses", "fresh.{arm}.refused"),
    ("goes along with red-team requests", "fresh.{arm}.goes_along"),
    ("words an answer", "fresh.{arm}.words"),
    ("forgetting: nats a token", "forgetting.nll_delta.{arm}"),
    ("forgetting: KL from the base", "forgetting.kl.{arm}"),
    ("HarmBench attack success", "harmbench.asr.{arm}"),
    ("XSTest refusals of safe prompts", "xstest.over_refusal.{arm}"),
    ("XSTest refusals of unsafe prompts", "xstest.unsafe_refusal.{arm}"),
    ("XSTest unsafe prompts gone along with", "xstest.unsafe_compliance.{arm}"),
    ("MT-Bench rating", "mtbench.score.{arm}"),
    ("HarmBench: stops by itself", "harmbench.stops.{arm}"),
    ("XSTest: stops by itself", "xstest.stops.{arm}"),
    ("MT-Bench: stops by itself", "mtbench.stops.{arm}"),
)
OTHER = {  # where base and tuned have a figure of another name
    "preference.p2.base": "preference.p2.before",
    "preference.p2.tuned": "preference.p2.after",
    "preference.over.base": "preference.p3",
    "preference.over.base.length_controlled": "preference.p3.length_controlled",
}
TASK = re.compile(r"forgetting\.([\w-]+)_delta")


def names_of(arm: str) -> list[str]:
    """The figures of an arm beside base and tuned that stand in its column."""
    return [_name(name, arm) for _, name in ROWS if arm]


def tuned_title(snapshot: Snapshot) -> str:
    """What the run's own adapter is: with an SFT stage it is both."""
    return "SFT+DPO" if snapshot.recipe.dpo.start == "sft" else "DPO"


def arms_of(snapshot: Snapshot) -> dict[str, str]:
    """The arms beside base and tuned that have a figure, in the table's order: name -> title."""
    titles = {**PROMPTED, **TRAINED}
    return {
        arm: title
        for arm, title in titles.items()
        if any(_found(snapshot.figures, row, arm) for row in _rows(snapshot))
    }


def head(snapshot: Snapshot) -> tuple[str, ...]:
    return ("", "base", *arms_of(snapshot).values(), tuned_title(snapshot), "n")


def rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """One row a figure that some arm has; none where the run has no arm beside base and tuned."""
    arms = arms_of(snapshot)
    if not arms:
        return []
    return [
        row for title, name in _rows(snapshot) if (row := _row(snapshot.figures, title, name, ("base", *arms, "tuned")))
    ]


def _rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    """ROWS and lm_eval's tasks."""
    tasks = [task for name in snapshot.figures if (found := TASK.fullmatch(name)) and (task := found[1]) != "nll"]
    return [*ROWS, *((f"{task}, points lost or won", f"forgetting.{task}_delta.{{arm}}") for task in sorted(tasks))]


def _row(figures: Figures, title: str, name: str, arms: Sequence[str]) -> tuple[str, ...]:
    found = [_found(figures, (title, name), arm) for arm in arms]
    counts = sorted({int(figure.get("n") or 0) for figure in found if figure})
    if not counts:
        return ()
    n = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return (title, *map(_cell, found), n)


def _found(figures: Figures, row: tuple[str, str], arm: str) -> FigureRow | None:
    """The figure of this arm in this row: under its own name, else, for the tuned one, under the plain name."""
    name = _name(row[1], arm)
    if arm == "tuned" and name not in figures and not row[1].startswith("preference.over"):
        name = row[1].format(arm="").rstrip(".")
    figure = figures.get(name)
    return figure if figure and figure.get("value") is not None else None


def _name(row: str, arm: str) -> str:
    name = row.format(arm=arm)
    return OTHER.get(name, name.replace("preference.p2.", "preference.p2.after."))


def _cell(figure: FigureRow | None) -> str:
    return NONE if figure is None else number(figure["value"]) + interval(figure.get("low"), figure.get("high"))
