"""Charts to pictures by matplotlib: SVG inside the page, SVG and PDF for a paper.

Owns figures, colours and the clean-up of matplotlib's SVG. Invariants: the same chart gives the same bytes (fixed salt,
no date, no creator, matplotlib's own defaults whatever the machine's matplotlibrc says); text stays text (escaped by
matplotlib, never mathtext); in the page there is no style sheet, no script and no id that is not the chart's own, and
every colour is a variable of the page, so that a dark page has light lines. matplotlib is imported late: 1 s.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from cai.report.charts import Bars, Chart, Forest, Gate, Heat, LineSeries, Scatter, Steps, label
from cai.report.scatter import scatter
from cai.store.files import holds, write_atomic
from cai.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, DIM, RULE, BACK = "#1b1f24", "#57606a", "#d0d7de", "#ffffff"
SERIES = ("#0550ae", "#b35900", "#116329")
PASS, FAIL, WARN = "#116329", "#a40e26", "#7d4e00"
IN_PAGE = {
    INK: "--fg", DIM: "--dim", RULE: "--line", BACK: "--bg", FAIL: "--fail", WARN: "--warn",
    SERIES[0]: "--s0", SERIES[1]: "--s1", SERIES[2]: "--s2",
}  # fmt: skip
DASHES = ("-", (0, (7, 3)), (0, (2, 2)))
STATUS_COLOURS = {"PASS": PASS, "FAIL": FAIL}
Style = dict[str, Any]  # keywords of one of matplotlib's calls
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "cai", "pdf.fonttype": 42, "text.parse_math": False, "font.size": 11,
    "font.family": ["DejaVu Sans"], "axes.edgecolor": RULE, "axes.labelcolor": DIM, "text.color": INK,
    "xtick.color": DIM, "ytick.color": DIM, "xtick.major.size": 0, "ytick.major.size": 0, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": BACK, "axes.facecolor": BACK, "axes.linewidth": 1.0,
    "legend.frameon": False, "legend.fontsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10, "figure.dpi": 72,
    "xtick.major.pad": 6,
}  # fmt: skip


def inline(chart: Chart, id_: str) -> Markup:
    """The chart as SVG for the page; a forest plot twice, wide and for a phone (CSS shows one: .wide, .narrow)."""
    return Markup("\n").join(Markup(page_svg(chart, id_, form)) for form in forms(chart))


def forms(chart: Chart) -> tuple[str, ...]:
    return ("wide", "narrow") if isinstance(chart.drawn, Forest) else ("",)


def svg_file(chart: Chart) -> bytes:
    """For a paper: literal colours, a white ground, title and description."""
    raw = _raw(chart, "svg", "").decode()
    head = f"<title>{_shown(chart.title)}</title>\n<desc>{_shown(chart.summary)}</desc>\n"
    return re.sub(r"(<svg [^>]*>\n?)", lambda m: m[1] + head, raw, count=1).encode()


def pdf_file(chart: Chart) -> bytes:
    return _raw(chart, "pdf", "")


@lru_cache(maxsize=128)
def _raw(chart: Chart, kind: str, form: str) -> bytes:
    """matplotlib's bytes of a chart. Cached: the page, the files and the next report of a run draw the same ones."""
    from matplotlib.figure import Figure

    drawn = chart.drawn
    # Serif for a paper, and quicker: cutting DejaVu down to the letters used took 3.7 s for eight pictures, STIX 2.1 s.
    fonts: dict[Any, Any] = {"font.family": ["STIXGeneral", "DejaVu Sans"]} if kind == "pdf" else {}
    no_date = {"Date": None, "Creator": None, "Format": None, "Type": None}
    metadata = no_date if kind == "svg" else {"CreationDate": None, "Creator": None, "Producer": None}
    target = io.BytesIO()
    with _settings(fonts):
        figure = Figure()
        DRAW[type(drawn)](figure, drawn, form)
        figure.savefig(target, format=kind, metadata=metadata)
    return target.getvalue()


@contextmanager
def _settings(fonts: dict[Any, Any]) -> Iterator[None]:
    """matplotlib's defaults and ours, for as long as one figure is drawn."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a principle named in Chinese: the text stays
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS | fonts)
        yield


@lru_cache(maxsize=128)
def page_svg(chart: Chart, place: str, form: str) -> str:
    """The clean-up: no prolog, metadata, style sheet, font or foreign id; colours as variables; a name and a text."""
    id_ = place + form[:1]
    raw = _raw(chart, "svg", form).decode()
    body = raw[raw.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]*;? ?|font-stretch: [^;\"]*;? ?", "", body).replace("xlink:href", "href")
    used = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", body))
    body = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{id_}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r"(href=\"|url\()#([\w.-]+)", rf"\1#{id_}-\2", body)
    body = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda m: f"var({IN_PAGE[m[0]]})" if m[0] in IN_PAGE else m[0], body)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert size, "matplotlib writes a viewBox"
    classes = " ".join(filter(None, ["plot", form]))
    root = (
        f'<svg class="{classes}" viewBox="{size[0][9:-1]}" role="img" aria-labelledby="{id_}-t {id_}-d" '
        f'style="max-width: {float(size[1]) * 1.25:.0f}px; stroke-linejoin: round; stroke-linecap: butt">'
        f'<title id="{id_}-t">{_shown(chart.title)}</title><desc id="{id_}-d">{_shown(chart.summary)}</desc>'
    )
    body = re.sub(r"<svg [^>]*>", lambda m: root, body, count=1)
    lines = (line.strip() for line in body.splitlines())
    return "\n".join(line for line in lines if line)


def _shown(text: str) -> Markup:
    """Escaped, with control characters spelled out, which no XML may hold."""
    return escape(printable(text, one_line=True))


# --- axes


def _axes(figure: Figure, drawn: LineSeries | Bars | Scatter, height: float) -> Axes:
    """Axes with labels, ticks and faint lines across, in a frame 440 wide."""
    figure.set_size_inches(440 / 72, height / 72)
    axes = figure.add_axes((64 / 440, 46 / height, 362 / 440, (height - 46 - 34) / height))
    axes.set_xlabel(drawn.x_label)
    axes.set_ylabel(drawn.y_label)
    axes.set_xticks(drawn.x_ticks, [label(v) for v in drawn.x_ticks])
    axes.set_yticks(drawn.y_ticks, [label(v) for v in drawn.y_ticks])
    axes.set_ylim(drawn.y_ticks[0], drawn.y_ticks[-1])
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _legend(axes: Axes, names: Sequence[str]) -> None:
    """Above the axes, in one line where it fits, else in two columns; none for one series."""
    count = len(names) if sum(map(len, names)) + 6 * len(names) < 76 else 2
    if len(names) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=count, columnspacing=1.2, borderpad=0.2)


def _lines(figure: Figure, drawn: LineSeries, form: str) -> None:
    axes = _axes(figure, drawn, 270)
    xs = [x for _, points in drawn.series for x, _ in points]
    axes.set_xlim(min(xs), max(xs) + (max(xs) - min(xs)) * 0.03)
    for place, (name, points) in enumerate(drawn.series):
        colour, dash = SERIES[place % 3], DASHES[place % 3]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.8, label=name)
    for place, mark in enumerate(drawn.marks):
        colour = SERIES[(place + 1) % 3]
        if mark.low is not None and mark.high is not None:
            axes.vlines(mark.x, mark.low, mark.high, color=colour, linewidth=1.8, clip_on=False)
        size = 9 - 3 * (place % 2)  # two that coincide are both seen
        style: Style = {"marker": "os"[place % 2], "markersize": size, "markerfacecolor": BACK, "markeredgewidth": 2}
        axes.plot([mark.x], [mark.y], color=colour, linestyle="none", label=mark.name, clip_on=False, **style)
    if drawn.y_ticks[0] < 0 < drawn.y_ticks[-1]:
        axes.axhline(0, color=DIM, linewidth=0.8)
    _legend(axes, [name for name, _ in drawn.series] + [mark.name for mark in drawn.marks])


def _bars(figure: Figure, drawn: Bars, form: str) -> None:
    axes = _axes(figure, drawn, 270)
    step = drawn.edges[1] - drawn.edges[0]
    axes.set_xlim(drawn.edges[0], drawn.edges[-1])
    for place, (name, counts) in enumerate(drawn.series):
        width = step / len(drawn.series)
        left = [edge + place * width for edge in drawn.edges[:-1]]
        hatch: Style = (
            {"hatch": "///", "edgecolor": BACK} if place else {"edgecolor": SERIES[0]}
        )  # told apart without colour
        axes.bar(left, counts, width * 0.92, align="edge", color=SERIES[place % 3], linewidth=0.0, label=name, **hatch)
    _legend(axes, [name for name, _ in drawn.series])


# --- free pictures: one unit is a point, y goes down


def _canvas(figure: Figure, width: float, height: float) -> Axes:
    figure.set_size_inches(width / 72, height / 72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return axes


def _forest(figure: Figure, drawn: Forest, form: str) -> None:
    """Wide: name, intervals and verdict in three columns. Narrow: the intervals below name and verdict."""
    narrow = form == "narrow"
    row, width = (62.0, 340.0) if narrow else (38.0, 860.0)
    left, right = (14.0, 322.0) if narrow else (282.0, 600.0)
    shares = any(gate.axis is None for gate in drawn.gates)
    ordered = [*(g for g in drawn.gates if g.axis is None), *(g for g in drawn.gates if g.axis is not None)]
    own = [g.axis is not None for g in ordered]
    height = row * len(ordered) + 12.0 * sum(own) + (24.0 if shares else 0.0) + (52.0 if narrow else 34.0)
    axes = _canvas(figure, width, height)
    y = 4.0
    for place, gate in enumerate(ordered):
        if own[place] and (place == 0 or not own[place - 1]) and shares:
            y = _percents(axes, left, right, y)
        middle = y + (46.0 if narrow else row / 2)
        _names(axes, gate, narrow, y + 14 if narrow else middle, width)
        _interval(axes, gate, left, right, middle)
        y += row + 12.0 * own[place]
    if not any(own):
        y = _percents(axes, left, right, y)
    _key(axes, 12.0 if narrow else 0.0, height, narrow)


def _percents(axes: Axes, left: float, right: float, y: float) -> float:
    for share in (0, 25, 50, 75, 100):
        axes.text(left + (right - left) * share / 100, y + 12, f"{share}%", ha="center", fontsize=10, color=DIM)
    return y + 24


def _names(axes: Axes, gate: Gate, narrow: bool, y: float, width: float) -> None:
    colour = STATUS_COLOURS.get(gate.status, WARN)
    axes.text(0, y, gate.name, va="center", fontsize=11 if narrow else 13)
    if narrow:
        axes.text(0, y + 13, gate.word, va="center", fontsize=10, color=colour, fontweight="bold")
        axes.text(width, y + 13, gate.text, va="center", ha="right", fontsize=10, color=DIM)
    else:
        axes.text(628, y - 7, gate.word, va="center", fontsize=12, color=colour, fontweight="bold")
        axes.text(628, y + 9, gate.text, va="center", fontsize=11, color=DIM)


def _interval(axes: Axes, gate: Gate, left: float, right: float, y: float) -> None:
    """Rule, threshold, whisker, controls, dot; and, where the row has a unit of its own, the ends of its axis."""
    low, high = gate.axis or (0.0, 1.0)
    colour = STATUS_COLOURS.get(gate.status, WARN)

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / ((high - low) or 1.0)

    axes.plot([left, right], [y, y], color=RULE, linewidth=1)
    if gate.threshold is not None:
        axes.plot([x(gate.threshold)] * 2, [y - 10, y + 10], color=INK, linewidth=1.4, linestyle=(0, (3, 2)))
    if gate.low is not None and gate.high is not None:
        axes.plot([x(gate.low), x(gate.high)], [y, y], color=colour, linewidth=3.2, solid_capstyle="round")
    hollow: Style = {
        "marker": "o",
        "linestyle": "none",
        "markerfacecolor": BACK,
        "markeredgewidth": 1.8,
        "markersize": 7,
    }
    for control in gate.controls:
        axes.plot([x(control)], [y], color=SERIES[1], clip_on=False, **hollow)
    if gate.value is not None:
        axes.plot([x(gate.value)], [y], marker="o", markersize=10, color=colour, linestyle="none", clip_on=False)
    for value, place in ((low, "left"), (high, "right")) if gate.axis else ():
        axes.text(x(value), y + 21, label(value), ha=place, va="center", fontsize=9, color=DIM)


def _key(axes: Axes, left: float, height: float, narrow: bool) -> None:
    """What dot, circle and line mean."""
    words = ("measured, with its 95% interval", "control: should be far from it", "what the gate wants")
    starts = ((0.0, -34.0), (0.0, -20.0), (0.0, -6.0)) if narrow else ((6.0, -10.0), (238.0, -10.0), (462.0, -10.0))
    for place, (word, (dx, dy)) in enumerate(zip(words, starts, strict=True)):
        x, y = left + dx, height + dy
        if place == 2:
            axes.plot([x, x], [y - 6, y + 6], color=INK, linewidth=1.4, linestyle=(0, (3, 2)))
        else:
            edge, face = (DIM, DIM) if place == 0 else (SERIES[1], BACK)
            ring: Style = {"markerfacecolor": face, "markeredgewidth": 1.8, "linestyle": "none"}
            axes.plot([x], [y], marker="o", markersize=7, color=edge, **ring)
        axes.text(x + 10, y, word, va="center", fontsize=10, color=DIM)


def _steps(figure: Figure, drawn: Steps, form: str) -> None:
    """A bar a stage: accepted solid, the rest hollow, on one scale."""
    row, left, right = 26.0, 178.0, 352.0
    axes = _canvas(figure, 440, row * len(drawn.rows) + 30)
    most = max(1, *(count for _, count, _ in drawn.rows))
    for place, (name, count, ok) in enumerate(drawn.rows):
        y, scale = row * place + 4, (right - left) / most
        axes.text(left - 8, y + 9, name if len(name) < 28 else name[:26] + "…", ha="right", va="center", fontsize=10)
        axes.barh(y + 9, count * scale, 16, left=left, facecolor=BACK, edgecolor=DIM, linewidth=1)
        axes.barh(y + 9, ok * scale, 16, left=left, facecolor=SERIES[0], edgecolor=SERIES[0], linewidth=1)
        text = f"{ok:,} of {count:,}"
        axes.text(left + count * scale + 6, y + 9, text, va="center", fontsize=10, color=DIM)
    y = row * len(drawn.rows) + 18
    for x, face, edge, word in ((left, SERIES[0], SERIES[0], "accepted"), (left + 90, BACK, DIM, "rejected")):
        axes.barh(y, 10, 10, left=x, facecolor=face, edgecolor=edge, linewidth=1)
        axes.text(x + 16, y, word, va="center", fontsize=10, color=DIM)


def _heat(figure: Figure, drawn: Heat, form: str) -> None:
    """Share in each cell, as colour and as number, with how many of how many."""
    from matplotlib.patches import Rectangle

    row, left, cell = 24.0, 150.0, 96.0
    axes = _canvas(figure, left + cell * len(drawn.columns) + 4, row * len(drawn.names) + 26)
    for column, head in enumerate(drawn.columns):
        axes.text(left + cell * (column + 0.5), 12, head, ha="center", va="center", fontsize=10, color=DIM)
    for line, name in enumerate(drawn.names):
        y = 22 + row * line
        axes.text(
            left - 8, y + row / 2, name if len(name) < 24 else name[:22] + "…", ha="right", va="center", fontsize=10
        )
        for column, (hits, tried) in enumerate(drawn.cells[line]):
            middle = left + cell * (column + 0.5)
            share = hits / tried if tried else 0.0
            pale = round(0.42 * share, 3)  # ink stays readable on it, in light and in dark
            corner = (left + cell * column + 1, y + 1)
            axes.add_patch(Rectangle(corner, cell - 2, row - 2, facecolor=SERIES[0], alpha=pale, linewidth=0))
            text = f"{share:.0%}  ({hits}/{tried})" if tried else "none tried"
            axes.text(middle, y + row / 2, text, ha="center", va="center", fontsize=10, color=INK if tried else DIM)


DRAW: dict[type, Callable[[Figure, Any, str], None]] = {
    LineSeries: _lines,
    Bars: _bars,
    Forest: _forest,
    Steps: _steps,
    Heat: _heat,
    Scatter: lambda figure, drawn, form: scatter(_axes(figure, drawn, 300), drawn, SERIES[0], DIM, BACK),
}


def write_plots(folder: Path, charts: Sequence[Chart | None]) -> list[Path]:
    """`folder`/<name>.svg and .pdf of each chart, for a paper; files that are right are left alone."""
    written = []
    for chart in filter(None, charts):
        svg, pdf = (folder / f"{chart.name}.{ending}" for ending in ("svg", "pdf"))
        content = svg_file(chart)
        if not (holds(svg, content) and pdf.is_file()):  # the same numbers: the PDF, four times as slow, is right too
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(pdf, pdf_file(chart))
            write_atomic(svg, content)
        written += [svg, pdf]
    return written
