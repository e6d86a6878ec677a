"""Charts: their words and ticks; pictures that are the same bytes, safe in the page, and light or dark with it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from cai.report import drawing
from cai.report.charts import Chart, forest, funnel, heat_map, histogram, line_chart, nice
from cai.report.drawing import write_plots

NAMESPACE = "{http://www.w3.org/2000/svg}"


def verdict(metric: str, status: str, value: float | None, **more: object) -> dict:
    criterion = {"beats": [], "advisory": False} | more
    low, high = (None, None) if value is None else (value - 0.1, min(1.0, value + 0.1))
    return {
        "metric": metric,
        "status": status,
        "reason": "",
        "criterion": criterion,
        "measured": {"value": value, "low": low, "high": high, "n": 14},
    }


VERDICTS = [
    verdict("critiques.meaningful", "FAIL", 0.5, at_least=0.7, beats=["critiques.meaningful.shuffled", "absent"]),
    verdict("dpo.loss_fall", "PASS", 0.4, above=0.0),
    verdict("forgetting.kl", "UNMEASURED", None, at_most=0.1, advisory=True),
]
FIGURES = {"critiques.meaningful.shuffled": {"value": 0.05}}


def each_kind() -> list[Chart]:
    principles = [{"id": "honesty", "kept": 3, "tried": 4, "meaningful": 0, "meaningful_n": 0}]
    found = [
        forest("What was measured", VERDICTS, FIGURES),
        funnel("From prompts to pairs", [("instructions", 12, 10), ("pairs", 10, 4)]),
        heat_map("Principles", principles),
        line_chart("Loss", {"loss": [(1, 0.69), (2, 0.5)]}, marks={"held-out": (2, 0.6, 0.5, 0.7)}, y_label="nats"),
        histogram("Length", {"answers": [1.0, 2.0, 2.0], "revisions": [9.0]}, "words"),
    ]
    return [chart for chart in found if chart is not None]


def texts(svg: str) -> list[str]:
    return [(node.text or "").strip() for node in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text")]


def test_ticks_cover_the_range() -> None:
    assert nice(0.42, 0.69)[0] <= 0.42
    assert nice(0.42, 0.69)[-1] >= 0.69
    assert nice(5, 5)
    assert nice(0, 0)


def test_charts_say_in_words_what_they_show() -> None:
    chart = line_chart("Loss", {"loss": [(1, 0.69), (2, 0.5)]})
    assert chart is not None
    assert chart.summary == "loss from 0.69 to 0.5."
    assert line_chart("Loss", {"loss": [(1, 0.69)]}) is None
    bars = histogram("Length", {"a": [1.0, 2.0, 2.0], "b": [9.0]}, "words")
    assert bars is not None
    assert "n=3, lowest 1, median 2, highest 2" in bars.summary
    assert histogram("Length", {"a": []}, "words") is None
    assert line_chart("Loss", {"loss": [(1, float("nan")), (2, 1.0), (3, 2.0)]}) is not None
    gates = forest("Gates", VERDICTS, FIGURES)
    assert gates is not None
    assert "Critiques pass every check: 0.5 [0.4, 0.6], n=14, not passed" in gates.summary
    assert "no figure, not measured (advisory)" in gates.summary
    assert forest("Gates", [], {}) is None and funnel("Funnel", []) is None and heat_map("Heat", []) is None


def test_one_value_has_one_bin_and_whole_numbers_have_no_half_bins() -> None:
    alike = histogram("Length", {"a": [27.0, 27.0]}, "words")
    assert alike is not None and alike.drawn.edges == (27.0, 28.0)  # type: ignore[union-attr]
    near = histogram("Length", {"a": [1.0, 3.0]}, "words")
    assert near is not None and near.drawn.edges == (1.0, 2.0, 3.0, 4.0)  # type: ignore[union-attr]
    assert near.drawn.series[0][1] == (1, 0, 1)  # type: ignore[union-attr]


def test_a_gate_in_shares_stands_on_the_common_axis_and_another_unit_on_its_own() -> None:
    chart = forest("Gates", VERDICTS, FIGURES)
    assert chart is not None
    share, fall, kl = chart.drawn.gates  # type: ignore[union-attr]
    assert share.axis is None and share.controls == (0.05,) and share.threshold == 0.7
    assert fall.axis == (0.0, 0.6) or (fall.axis[0] <= 0.0 and fall.axis[1] >= 0.5)
    assert kl.value is None and kl.axis is not None and kl.axis[1] >= 0.1


@pytest.mark.runs
def test_every_picture_is_named_and_described_for_a_screen_reader_and_its_text_is_text() -> None:
    for chart in each_kind():
        for svg in re.findall(r"<svg.*?</svg>", drawing.inline(chart, "c"), re.S):
            root = ElementTree.fromstring(svg.replace("<svg ", f'<svg xmlns="{NAMESPACE[1:-1]}" ', 1)
                                          if "xmlns=" not in svg else svg)  # fmt: skip
            title, text = root.find(f"{NAMESPACE}title"), root.find(f"{NAMESPACE}desc")
            assert root.get("role") == "img" and title is not None and text is not None
            assert root.get("aria-labelledby") == f"{title.get('id')} {text.get('id')}"
            assert (title.text, text.text) == (chart.title, chart.summary)
            assert len(list(root.iter(f"{NAMESPACE}text"))) >= 3, chart.name


def test_axes_carry_their_units() -> None:
    lines, bars = each_kind()[3:]
    assert {"training step", "nats", "loss", "held-out"} <= set(texts(drawing.svg_file(lines).decode()))
    assert {"words", "pairs", "answers", "revisions"} <= set(texts(drawing.svg_file(bars).decode()))


def test_in_the_page_every_colour_is_a_variable_and_nothing_reaches_beyond_the_picture() -> None:
    whole = "".join(drawing.inline(chart, f"c{place}") for place, chart in enumerate(each_kind()))
    assert not re.search(r"#[0-9a-f]{3,6}\b(?=[;\"])", whole) and "var(--fg)" in whole and "var(--bg)" in whole
    assert not re.search(r"<style|<script|<metadata|<!|font-family|xlink|http(?!://www.w3.org)", whole)
    ids = re.findall(r' id="([^"]+)"', whole)
    assert len(ids) == len(set(ids)) and all(id_.startswith("c") for id_ in ids)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', whole))
    assert used and used <= set(ids)


def test_hostile_names_are_text_and_mathematics_is_not_set() -> None:
    hostile = '</text><script>alert("1")</script> $\\frac{1}{2}$ & \u202egnp'
    charts = [
        line_chart(hostile, {hostile: [(1, 1), (2, 2)], "b": [(1, 2), (2, 3)]}, x_label="$x$"),
        forest(hostile, [verdict(hostile, "FAIL", 0.3, above=0.5)], {}),
        heat_map(hostile, [{"id": hostile, "kept": 1, "tried": 2}]),
        funnel(hostile, [(hostile, 2, 1)]),
    ]
    for chart in charts:
        assert chart is not None
        for content in (drawing.inline(chart, "c"), drawing.svg_file(chart).decode()):
            assert "<script" not in content and "\u202e" not in content.split("</desc>", 1)[1]
    assert charts[0] is not None and "$x$" in texts(drawing.svg_file(charts[0]).decode())
    assert any(text.startswith("</text><script>") for text in texts(drawing.svg_file(charts[1]).decode()))  # type: ignore[arg-type]


@pytest.mark.runs
def test_the_same_numbers_give_the_same_bytes_whatever_matplotlib_was_told_before(tmp_path) -> None:
    import matplotlib

    first = [path.read_bytes() for path in write_plots(tmp_path / "a", each_kind())]
    drawing._raw.cache_clear()
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "svg.hashsalt": None, "axes.labelpad": 40}):
        second = [path.read_bytes() for path in write_plots(tmp_path / "b", each_kind())]
        assert matplotlib.rcParams["font.size"] == 30
    assert first == second and len(first) == 10
    for content in first:
        assert b"CreationDate" not in content and b"<dc:date>" not in content and b"Matplotlib" not in content


def test_plots_are_written_once_and_again_where_one_is_missing_or_changed(tmp_path) -> None:
    chart = each_kind()[1]
    svg, pdf = write_plots(tmp_path, [chart, None])
    assert (svg.name, pdf.name) == ("from-prompts-to-pairs.svg", "from-prompts-to-pairs.pdf")
    assert pdf.read_bytes().startswith(b"%PDF-")
    before = svg.stat().st_mtime_ns, pdf.stat().st_mtime_ns
    write_plots(tmp_path, [chart])
    assert before == (svg.stat().st_mtime_ns, pdf.stat().st_mtime_ns)
    pdf.unlink()
    svg.write_text("spoilt")
    write_plots(tmp_path, [chart])
    assert pdf.is_file() and svg.read_bytes() == drawing.svg_file(chart)


def test_a_figure_is_drawn_once_however_often_it_is_asked_for() -> None:
    drawing._raw.cache_clear()
    chart = each_kind()[1]
    drawing.inline(chart, "a"), drawing.inline(chart, "b"), drawing.svg_file(chart)
    assert drawing._raw.cache_info().misses == 1


@pytest.mark.runs
def test_charts_are_made_without_loading_matplotlib() -> None:
    import subprocess
    import sys

    code = "import cai.report.pages, cai.report.drawing, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("count", [401, 5000])
def test_long_series_are_thinned_and_keep_their_ends(count: int) -> None:
    chart = line_chart("Loss", {"loss": [(i, i / 7) for i in range(count)]})
    assert chart is not None
    ((_, points),) = chart.drawn.series  # type: ignore[union-attr]
    assert len(points) <= 401 and (points[0], points[-1]) == ((0, 0.0), (count - 1, (count - 1) / 7))
