"""Numbers to charts: what is drawn, in which units, and what it says in words. Pure; `drawing` makes the pictures.

Owns which numbers stand in a chart, its bins and ticks, and its sentence. Invariant: every chart carries a title and a
sentence that says what it shows, so nothing is told by the picture alone; the same numbers give the same chart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai.report.templating import number
from cai.store.jsonl import JsonObject
from cai.store.row_types import FigureRow
from cai.terminal import printable

POINTS = 400  # of a line; more are thinned evenly
NO_SHARES = ("dpo.", "forgetting.", "mtbench.", "sft.", "fresh.", "critiques.csi", "revisions.cri")
STATUS_WORDS = {"PASS": "pass", "FAIL": "not passed", "UNDERPOWERED": "too few to tell", "UNMEASURED": "not measured"}
IN_WORDS = {
    "pairs.kept": "Pairs that came through",
    "data.scaffolding": "Texts that run on into the prompt's form",
    "data.copied": "Texts that copy the prompts' examples",
    "data.nothing_found": "Pairs without a fault that was found",
    "labels.better": "Revisions judged better",
    "labels.known.better": "Known improvements that it sees",
    "critic.recall": "Planted flaws that the critic finds",
    "critic.false_alarms": "Sound answers that it blames",
    "critiques.meaningful": "Critiques pass every check",
    "revisions.addresses": "Revisions address them",
    "preference.p1": "Tuned prefers the revision (held-out)",
    "preference.p1.train": "Tuned prefers the revision (training)",
    "preference.p2.after": "By log-probability a token (held-out)",
    "preference.p2.gain": "Prefers more of them than before",
    "preference.p3": "Fresh answers judged better",
    "preference.p3.length_controlled": "Fresh answers judged better, by length",
    "fresh.tuned.stops": "Fresh answers end by themselves",
    "fresh.tuned.evades": "Benign requests that it evades",
    "preference.surface": "Told by characters and length alone",
    "pairs.yield": "Items that became pairs",
    "dpo.loss_fall": "Loss falls on the pairs, nats",
    "dpo.logged_fall": "Logged loss falls, nats",
    "dpo.first_loss_error": "First loss is ln 2: error, nats",
    "forgetting.nll_delta": "Loss on neutral text rises, nats a token",
    "forgetting.kl": "Distance from the base (KL), nats a token",
    "harmbench.improvement": "HarmBench attacks prevented",
    "xstest.over_refusal_rise": "Safe requests refused more (XSTest)",
    "mtbench.delta": "MT-Bench rating, tuned minus base",
}


@dataclass(frozen=True)
class Mark:
    """One measured point beside the lines, with its 95% interval if it has one."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class LineSeries:
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    marks: tuple[Mark, ...]
    x_label: str
    y_label: str
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]


@dataclass(frozen=True)
class Bars:
    """Counts in the bins between `edges`, one tuple a series."""

    series: tuple[tuple[str, tuple[int, ...]], ...]
    edges: tuple[float, ...]
    x_label: str
    y_label: str
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]


@dataclass(frozen=True)
class Gate:
    """A row of the forest plot. `place`: value, low, high, threshold and controls, on `axis` (left, right end)."""

    name: str
    status: str
    word: str
    text: str
    value: float | None
    low: float | None
    high: float | None
    threshold: float | None
    controls: tuple[float, ...]
    axis: tuple[float, float] | None


@dataclass(frozen=True)
class Forest:
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class Steps:
    """A funnel: name, rows that came in, rows that were accepted."""

    rows: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Heat:
    """`cells` by row and column: (hits, tried); nothing tried is an empty cell."""

    names: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Dot:
    """A point of a scatter; `name` is its row in a table. `xs`, `ys`: least and most over what it is the mean of."""

    name: str
    x: float
    y: float
    xs: tuple[float, float]
    ys: tuple[float, float]


@dataclass(frozen=True)
class Scatter:
    """`frontier`: the places of those dots that no other is ahead of in both, along the line through them."""

    dots: tuple[Dot, ...]
    frontier: tuple[int, ...]
    x_label: str
    y_label: str
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """`name`: of its files. `drawn`: what `drawing` makes a picture of."""

    name: str
    title: str
    summary: str
    drawn: LineSeries | Bars | Forest | Steps | Heat | Scatter


def nice(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round tick values that cover [low, high]."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.4g}"


def named(text: str) -> str:
    """A name from a run, on one line and short enough to be drawn."""
    shown = printable(str(text), one_line=True)
    return shown if len(shown) <= 44 else shown[:43] + "…"


def slug(title: str) -> str:
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in title.lower()).split())


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str = "training step",
    marks: Mapping[str, Sequence[Any]] | None = None,
    y_label: str = "",
) -> Chart | None:
    """Lines over a shared x axis; None without two points anywhere. At most POINTS points a line are drawn.

    `marks`: name -> (x, y) or (x, y, low, high), single measurements with a place on the axes of the lines.
    """
    single = tuple(Mark(named(name), *at) for name, at in (marks or {}).items() if math.isfinite(at[1]))
    thin = {name: _thin([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    shown = {name: points for name, points in thin.items() if points}
    if not any(len(points) > 1 for points in shown.values()):
        return None
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    ys += [y for m in single for y in (m.y, m.low, m.high) if y is not None]
    whole = all(float(x).is_integer() for x in xs)  # steps have no halves
    x_ticks = [v for v in nice(min(xs), max(xs), 6) if min(xs) <= v <= max(xs) and (not whole or float(v).is_integer())]
    told = [f"{name} from {label(points[0][1])} to {label(points[-1][1])}" for name, points in shown.items()]
    told += [f"{m.name} {label(m.y)}" for m in single]
    drawn = tuple((named(name), tuple(points)) for name, points in shown.items())
    y_ticks = tuple(nice(min(ys), max(ys)))
    lines = LineSeries(drawn, single, named(x_label), named(y_label or title.lower()), tuple(x_ticks), y_ticks)
    return Chart(slug(title), title, f"{'; '.join(told)}.", lines)


def histogram(
    title: str, series: Mapping[str, Sequence[float]], x_label: str, bins: int = 12, y_label: str = "pairs"
) -> Chart | None:
    """Counts in equal bins, the series side by side in each bin; None without a value."""
    values = [v for points in series.values() for v in points]
    if not values:
        return None
    edges = nice(min(values), max(values), bins)
    if edges[1] - edges[0] < 1 and all(float(v).is_integer() for v in values):  # half a word is no bin
        edges = [float(edge) for edge in range(math.floor(edges[0]), math.ceil(edges[-1]) + 1)]
    if min(values) == max(values) and float(values[0]).is_integer():
        edges = [float(values[0])]  # one bar needs one bin, not an axis of three
        edges.append(edges[0] + 1)
    elif edges[-1] == edges[-2] or max(values) >= edges[-1]:
        edges.append(round(2 * edges[-1] - edges[-2], 12))
    counts = tuple((named(name), tuple(_counts(points, edges))) for name, points in series.items())
    y_ticks = [v for v in nice(0, max(max(c) for _, c in counts)) if float(v).is_integer()]
    summary = "; ".join(f"{name}: {_five(points)}" for name, points in series.items() if points)
    x_ticks = tuple(edges[:: max(1, len(edges) // 6)])
    return Chart(
        slug(title), title, f"{summary}.", Bars(counts, tuple(edges), x_label, y_label, x_ticks, tuple(y_ticks))
    )


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    step = edges[1] - edges[0]
    for value in values:
        counts[min(max(int((value - edges[0]) / step + 1e-9), 0), len(counts) - 1)] += 1
    return counts


def _five(values: Sequence[float]) -> str:
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    return f"n={len(ordered)}, lowest {label(ordered[0])}, median {label(middle)}, highest {label(ordered[-1])}"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / POINTS))
    thinned = points[::step]
    return thinned if not points or thinned[-1] == points[-1] else [*thinned, points[-1]]


# --- gates


def forest(title: str, verdicts: Sequence[JsonObject], figures: Mapping[str, FigureRow]) -> Chart | None:
    """Each gate: value, 95% interval, what is wanted, its controls; shares on one axis, other units each on its own.

    `verdicts`: as eval/gates.json has them; `figures`: metric -> measured, for the controls that gates name.
    """
    if not verdicts:
        return None
    gates = tuple(_gate(verdict, figures) for verdict in verdicts)
    told = [f"{gate.name}: {gate.text}, {gate.word}" for gate in gates]
    return Chart(slug(title), title, f"{'; '.join(told)}.", Forest(gates))


def _gate(verdict: JsonObject, figures: Mapping[str, FigureRow]) -> Gate:
    metric, criterion, measured = str(verdict["metric"]), verdict["criterion"], verdict.get("measured") or {}
    value, low, high = (_finite(measured.get(key)) for key in ("value", "low", "high"))
    threshold = next((_finite(criterion[key]) for key in ("at_least", "at_most", "above", "below")
                      if criterion.get(key) is not None), None)  # fmt: skip
    values = [_finite((figures.get(name) or FigureRow()).get("value")) for name in criterion.get("beats") or []]
    controls = tuple(v for v in values if v is not None)
    every = [v for v in (value, low, high, threshold, *controls) if v is not None]
    status = str(verdict["status"])
    word = STATUS_WORDS.get(status, status.lower())
    word = "not decided" if status == "UNMEASURED" and value is not None else word  # a figure stands beside it
    word += " (advisory)" if criterion.get("advisory") and status != "PASS" else ""
    interval = "" if low is None or high is None else f" [{number(low, 2)}, {number(high, 2)}]"
    text = "no figure" if value is None else f"{number(value, 2)}{interval}, n={measured.get('n', 0)}"
    name = named(IN_WORDS.get(metric, metric))
    return Gate(name, status, word, text, value, low, high, threshold, controls, _axis(metric, every))


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _axis(metric: str, values: Sequence[float]) -> tuple[float, float] | None:
    """None for a share (0 to 100%, one axis for all); else the round ends that hold every number of the row and 0."""
    if not metric.startswith(NO_SHARES) and all(0.0 <= v <= 1.0 for v in values):
        return None
    ticks = nice(min([0.0, *values]), max([0.0, *values]))
    return ticks[0], ticks[-1]


# --- counts


def funnel(title: str, rows: Sequence[tuple[str, int, int]]) -> Chart | None:
    """`rows`: (stage, rows that came in, rows that were accepted), in order."""
    if not rows:
        return None
    told = [f"{name}: {ok} of {count}" for name, count, ok in rows]
    return Chart(slug(title), title, f"{'; '.join(told)}.", Steps(tuple((named(name), n, ok) for name, n, ok in rows)))


PRINCIPLE_COLUMNS = (  # head, counted, of how many; a column that no row has is left out
    ("kept as pairs", "kept", "tried"),
    ("critique passes", "meaningful", "meaningful_n"),
    ("revision passes", "addresses", "addresses_n"),
    ("judged better", "better", "better_n"),
)


def heat_map(title: str, rows: Sequence[JsonObject]) -> Chart | None:
    """Principle by what became of it, as `tables.by_principle` counts; a column that is empty is left out."""
    columns = [column for column in PRINCIPLE_COLUMNS if any(row.get(column[2]) for row in rows)]
    if not columns:
        return None
    cells = [tuple((int(row.get(hits, 0)), int(row.get(of, 0))) for _, hits, of in columns) for row in rows]
    return _heat(title, [row["id"] for row in rows], [head for head, _, _ in columns], cells)


def pool_map(title: str, pools: Sequence[str], rows: Sequence[JsonObject]) -> Chart | None:
    """Principle by pool, as `tables.by_pool` counts: the share of a pool's critiques that were about it."""
    if len(pools) < 2:
        return None
    heads = [{"redteam": "red-team"}.get(pool, pool) for pool in pools]
    return _heat(title, [row["id"] for row in rows], heads, [row["cells"] for row in rows])


def _heat(title: str, rows: Sequence[str], heads: Sequence[str], cells: Sequence[tuple[tuple[int, int], ...]]) -> Chart:
    names = tuple(map(named, rows))
    told = [f"{name}: {', '.join(f'{head} {hits} of {of}' for head, (hits, of) in zip(heads, line, strict=True))}"
            for name, line in zip(names, cells, strict=True)]  # fmt: skip
    return Chart(slug(title), title, f"{'; '.join(told)}.", Heat(names, tuple(heads), tuple(cells)))
