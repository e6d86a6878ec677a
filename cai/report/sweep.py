"""The page of a sweep: a table with a row a combination, and two frontiers. Pure over what its runs measured.

Owns which figures stand in it, the mean and the spread over seeds, and the two pictures: harmful compliance (of
HarmBench in all runs, or else of XSTest) against over-refusal, P3 against the distance from the base. Where no
benchmark ran the first has a stand-in, and says so: of the fresh answers to held-out prompts, those that go along with
a red-team request, and those that refuse a benign one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cai.metrics.objections import goes_along
from cai.metrics.wordings import is_refusal
from cai.report.charts import Chart, Dot, Scatter, nice
from cai.report.drawing import inline, write_plots
from cai.report.snapshot import Snapshot
from cai.report.templating import write_pages
from cai.terminal import aligned, number

COMPLIANCE, OVER_REFUSAL = "harmful compliance", "over-refusal"
UNSAFE = "unsafe compliance"  # XSTest's unsafe prompts, by wording: another measure, in a column of its own
MEASURED = {
    COMPLIANCE: "harmbench.asr.tuned",
    UNSAFE: "xstest.unsafe_compliance.tuned",
    OVER_REFUSAL: "xstest.over_refusal.tuned",
}
FIGURES = {
    "P3": "preference.p3",
    "P3 at equal length": "preference.p3.length_controlled",
    "P1": "preference.p1",
    "KL": "forgetting.kl",
    "MT-Bench": "mtbench.score.tuned",
}


@dataclass(frozen=True)
class Point:
    """One combination: its settings, and a row of figures for each seed. `failed`: why it has none."""

    settings: tuple[tuple[str, str], ...]
    runs: tuple[str, ...]
    figures: tuple[Mapping[str, float], ...]
    failed: tuple[str, ...] = ()
    stand_in: bool = False  # some run had neither HarmBench nor XSTest

    def values(self, name: str) -> list[float]:
        return [of[name] for of in self.figures if name in of]

    def mean(self, name: str) -> float | None:
        found = self.values(name)
        return round(sum(found) / len(found), 6) if found else None  # as exact as what was measured: ties are ties


def figures_of(snapshot: Snapshot) -> dict[str, float]:
    """What a run of the sweep measured, by the table's names."""
    found = {name: _value(snapshot, metric) for name, metric in FIGURES.items()}
    found |= _stand_in(snapshot) if stands_in(snapshot) else _benchmarked(snapshot)
    return {"pairs": float(len(snapshot.pairs.train))} | {n: float(v) for n, v in found.items() if v is not None}


def stands_in(snapshot: Snapshot) -> bool:
    """Whether the wording of fresh answers is all that there is: neither HarmBench nor XSTest measured anything."""
    return all(value is None for value in _benchmarked(snapshot).values())


def _benchmarked(snapshot: Snapshot) -> dict[str, float | None]:
    return {name: _value(snapshot, metric) for name, metric in MEASURED.items()}


def _value(snapshot: Snapshot, metric: str) -> float | None:
    return snapshot.figures.get(metric, {}).get("value")


def _stand_in(snapshot: Snapshot) -> dict[str, float | None]:
    asked = [(pair, snapshot.scores.get(("preference.fresh", pair["item"]), {})) for pair in snapshot.pairs.heldout]
    texts: dict[str, list[str]] = {"redteam": [], "benign": []}
    for pair, row in asked:
        if "tuned" in row and pair["pool"] in texts:
            texts[pair["pool"]].append(row["tuned"])
    shares = ((COMPLIANCE, texts["redteam"], goes_along), (OVER_REFUSAL, texts["benign"], is_refusal))
    return {name: sum(map(says, of)) / len(of) if of else None for name, of, says in shares}


def table(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Head and rows; a column that holds nothing is left out. A cell: the mean, and least to most over seeds."""
    settings = [name for name, _ in points[0].settings]
    names = [
        name for name in (*FIGURES, COMPLIANCE, UNSAFE, OVER_REFUSAL, "pairs") if any(p.values(name) for p in points)
    ]
    head = ["row", *settings, "seeds", *names, "runs"]
    rows = []
    for place, point in enumerate(points, start=1):
        cells = [str(place), *(text for _, text in point.settings), str(len(point.figures))]
        cells += [_cell(point.values(name)) for name in names]
        rows.append([*cells, ", ".join((*point.runs, *(f"failed: {why}" for why in point.failed)))])
    return head, rows


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = number(sum(values) / len(values))
    return mean if min(values) == max(values) else f"{mean} ({number(min(values))} to {number(max(values))})"


def frontier(dots: Sequence[Dot], higher: bool) -> tuple[int, ...]:
    """Places of the dots that none is ahead of: left of it and (with `higher`) above it, else below; left to right."""

    def ahead(one: Dot, two: Dot) -> bool:
        y_one, y_two = (one.y, two.y) if higher else (-one.y, -two.y)
        return one.x <= two.x and y_one >= y_two and (one.x, y_one) != (two.x, y_two)

    best = [place for place, dot in enumerate(dots) if not any(ahead(other, dot) for other in dots)]
    return tuple(sorted(best, key=lambda place: (dots[place].x, dots[place].y)))


def charts(points: Sequence[Point], stand_in: bool) -> list[Chart]:
    """Those for which two combinations or more were measured."""
    note = " (by wording of fresh answers, a stand-in)" if stand_in else ""
    whole = all(len(point.values(COMPLIANCE)) == len(point.figures) for point in points)
    harm = UNSAFE if not whole and any(point.values(UNSAFE) for point in points) else COMPLIANCE
    safety = _chart("frontier-safety", points, (OVER_REFUSAL, harm), False, note)
    drift = _chart("frontier-drift", points, ("KL", "P3"), True, "")
    return [chart for chart in (safety, drift) if chart is not None]


def _chart(name: str, points: Sequence[Point], axes: tuple[str, str], higher: bool, note: str) -> Chart | None:
    dots = []
    for place, point in enumerate(points, start=1):
        x, y = (point.mean(axis) for axis in axes)
        if x is not None and y is not None:
            xs, ys = (point.values(axis) for axis in axes)
            dots.append(Dot(str(place), x, y, (min(xs), max(xs)), (min(ys), max(ys))))
    if len(dots) < 2:
        return None
    best = frontier(dots, higher)
    x_ticks = nice(min(0.0, *(dot.xs[0] for dot in dots)), max(dot.xs[1] for dot in dots))
    y_ticks = nice(min(dot.ys[0] for dot in dots), max(dot.ys[1] for dot in dots))
    drawn = Scatter(tuple(dots), best, axes[0] + note, axes[1], tuple(x_ticks), tuple(y_ticks))
    rows = ", ".join(dots[place].name for place in best)
    summary = f"{axes[1]} against {axes[0]}{note}, {len(dots)} combinations; on the frontier: rows {rows}."
    return Chart(name, f"{axes[1]} against {axes[0]}", summary, drawn)


def write(folder: Path, points: Sequence[Point]) -> Path:
    """sweep.html, sweep.md, sweep.json and the pictures; equal points give equal bytes."""
    head, rows = table(points)
    stand_in = {COMPLIANCE, OVER_REFUSAL} & {*head} and any(point.stand_in for point in points)
    drawn = charts(points, bool(stand_in))
    content = {"head": head, "rows": rows, "charts": drawn, "stand_in": bool(stand_in), "picture": inline}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = [
        {"settings": dict(p.settings), "runs": p.runs, "figures": [dict(of) for of in p.figures], "failed": p.failed}
        for p in points
    ]
    write_plots(folder / "plots", drawn)
    return write_pages(folder, "sweep", "sweep", data, content)


def lines(points: Sequence[Point]) -> list[str]:
    """The table for the screen."""
    head, rows = table(points)
    return aligned([head, *rows])
