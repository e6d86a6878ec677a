"""Numbers to the geometry of small charts; the template draws them as inline SVG. Pure, no plotting library.

Owns scales, ticks, polylines and bins. Every chart carries a title and a sentence that says what it shows in words, so
nothing is told by the picture alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 34


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    name: str
    points: str
    last: tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One measured point beside the lines."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    series: int


@dataclass(frozen=True)
class Chart:
    """`lines` or `bars` within a frame of WIDTH x HEIGHT; `baseline`: y of the zero line, if it is inside."""

    title: str
    summary: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    names: list[str]
    lines: list[Line]
    bars: list[Bar]
    baseline: float | None = None
    marks: list[Mark] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


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
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str = "step",
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Chart | None:
    """Lines over a shared x axis; None without two points anywhere. At most 400 points a line are drawn.

    `marks`: name -> (x, y), single points with a place on the axes of the lines.
    """
    points_of = {name: at for name, at in (marks or {}).items() if math.isfinite(at[1])}
    shown = {name: _thin([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not any(len(points) > 1 for points in shown.values()):
        return None
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points] + [y for _, y in points_of.values()]
    y_values, x_values = nice(min(ys), max(ys)), nice(min(xs), max(xs))
    whole = all(x.is_integer() for x in map(float, xs))  # steps have no halves
    x_values = [v for v in x_values if min(xs) <= v <= max(xs) and (not whole or float(v).is_integer())]
    to_x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    to_y = _scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
    drawn = {name: [(to_x(x), to_y(y)) for x, y in points] for name, points in shown.items()}
    lines = [Line(name, " ".join(f"{x:.1f},{y:.1f}" for x, y in at), at[-1]) for name, at in drawn.items()]
    told = [f"{name} from {label(points[0][1])} to {label(points[-1][1])}" for name, points in shown.items()]
    told += [f"{name} {label(y)}" for name, (_, y) in points_of.items()]
    return Chart(
        title, f"{'; '.join(told)}.", x_label,
        [Tick(to_x(v), label(v)) for v in x_values], [Tick(to_y(v), label(v)) for v in y_values],
        list(shown), lines, [], to_y(0.0) if y_values[0] < 0 < y_values[-1] else None,
        [Mark(name, to_x(x), to_y(y)) for name, (x, y) in points_of.items()],
    )  # fmt: skip


def histogram(title: str, series: Mapping[str, Sequence[float]], x_label: str, bins: int = 12) -> Chart | None:
    """Counts in equal bins, the series side by side in each bin; None without a value."""
    values = [v for points in series.values() for v in points]
    if not values:
        return None
    edges = nice(min(values), max(values), bins)
    if edges[1] - edges[0] < 1 and all(float(v).is_integer() for v in values):  # half a word is no bin
        edges = [float(edge) for edge in range(math.floor(edges[0]), math.ceil(edges[-1]) + 1)]
    if edges[-1] == edges[-2] or max(values) >= edges[-1]:
        edges.append(round(2 * edges[-1] - edges[-2], 12))
    counts = {name: _counts(points, edges) for name, points in series.items()}
    y_values = [v for v in nice(0, max(max(c) for c in counts.values())) if float(v).is_integer()]
    to_x, to_y = _scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT), _scale(0, y_values[-1], HEIGHT - BOTTOM, TOP)
    bars = []
    for index, bin_counts in enumerate(counts.values()):
        for i, count in enumerate(bin_counts):
            width = (to_x(edges[i + 1]) - to_x(edges[i])) / len(counts)
            y = to_y(count)
            if count:
                bars.append(Bar(to_x(edges[i]) + index * width, y, max(width - 1, 0.5), HEIGHT - BOTTOM - y, index))
    summary = "; ".join(f"{name}: {_five(points)}" for name, points in series.items() if points)
    every = max(1, len(edges) // 6)
    return Chart(
        title, f"{summary}.", x_label,
        [Tick(to_x(v), label(v)) for v in edges[::every]], [Tick(to_y(v), label(v)) for v in y_values],
        list(series), [], bars,
    )  # fmt: skip


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


def _thin(points: list[tuple[float, float]], keep: int = 400) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / keep))
    thinned = points[::step]
    return thinned if not points or thinned[-1] == points[-1] else [*thinned, points[-1]]


def _scale(low: float, high: float, start: float, end: float):  # type: ignore[no-untyped-def]
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)
