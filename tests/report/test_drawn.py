"""Pictures that stand are left as they are; one that is lost, damaged or of other numbers is drawn again, the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import orjson
import pytest

from cai.report import drawing, drawn
from cai.report.charts import Chart, forest, funnel, line_chart
from cai.report.drawn import Standing

GATE = {
    "metric": "critiques.meaningful",
    "status": "FAIL",
    "reason": "",
    "criterion": {"at_least": 0.7, "beats": [], "advisory": False},
    "measured": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 14},
}


def charts(kept: int = 4) -> list[Chart]:
    found = [forest("What was measured", [GATE], {}), funnel("To pairs", [("answers", 12, 10), ("pairs", 10, kept)])]
    return [chart for chart in found if chart is not None]


def written(run: Path, of: list[Chart]) -> bytes:
    """A page with these pictures, as a report is written: the folder's own ones first."""
    standing = Standing(run)
    page = "<main>" + "\n".join(standing.inline(chart, f"c{place}") for place, chart in enumerate(of)) + "</main>"
    (run / "report.html").write_text(page)
    standing.write_plots(run / "eval" / "plots", of)
    standing.write()
    return page.encode()


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which pictures were drawn: their titles and kinds. In matplotlib's place a line that depends on all numbers."""
    drew: list[str] = []

    def drawer(chart: Chart, kind: str, form: str) -> bytes:
        drew.append(f"{chart.title} {kind}{form}")
        return f'<svg viewBox="0 0 9.5 9.5">\n{hashlib.sha256(repr(chart).encode()).hexdigest()}{form}</svg>'.encode()

    monkeypatch.setattr(drawing, "_raw", drawer)
    monkeypatch.setattr(drawing, "page_svg", drawing.page_svg.__wrapped__)
    return drew


@pytest.fixture
def run(tmp_path: Path, count: list[str]) -> Path:
    written(tmp_path, charts())
    assert count
    count.clear()
    return tmp_path


def plots(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "eval" / "plots").iterdir()}


def test_what_stands_is_not_drawn_again(run: Path, count: list[str]) -> None:
    page, files = (run / "report.html").read_bytes(), plots(run)
    index = (run / "eval" / "pictures.json").stat().st_mtime_ns
    assert written(run, charts()) == page and plots(run) == files and not count
    assert page.decode() == "<main>" + "\n".join(drawing.inline(c, f"c{i}") for i, c in enumerate(charts())) + "</main>"
    assert (run / "eval" / "pictures.json").stat().st_mtime_ns == index


def test_a_picture_of_other_numbers_is_drawn_and_the_others_stay(run: Path, count: list[str]) -> None:
    page = written(run, charts(kept=5))
    assert sorted(count) == ["To pairs pdf", "To pairs svg", "To pairs svg"]  # in the page, and two files
    assert (
        page.decode() == "<main>" + "\n".join(drawing.inline(c, f"c{i}") for i, c in enumerate(charts(5))) + "</main>"
    )


@pytest.mark.parametrize(
    "name", ["report.html", "eval/pictures.json", "eval/plots/to-pairs.svg", "eval/plots/to-pairs.pdf"]
)
@pytest.mark.parametrize("how", ["lost", "a byte", "empty"])
def test_what_is_lost_or_damaged_is_drawn_again_to_the_same_bytes(
    run: Path, count: list[str], name: str, how: str
) -> None:
    page, files, index = (run / "report.html").read_bytes(), plots(run), (run / "eval/pictures.json").read_bytes()
    path, data = run / name, bytearray((run / name).read_bytes())
    if how == "a byte":
        data[len(data) // 2] ^= 1
    path.unlink() if how == "lost" else path.write_bytes(data if how == "a byte" else b"")
    assert written(run, charts()) == page and plots(run) == files and count
    assert (run / "eval/pictures.json").read_bytes() == index


def test_other_drawing_code_or_another_matplotlib_draws_all_again(
    run: Path, count: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn, "_drawn_by", lambda: "another version")
    written(run, charts())
    assert len(count) == 7  # of two charts: three pictures in the page, two files each


def test_an_index_that_is_no_index_counts_as_none(run: Path, count: list[str]) -> None:
    for odd in (b"[1]", b"{", orjson.dumps({"a": 1, "b": ["c"]}), b"\xff"):
        (run / "eval/pictures.json").write_bytes(odd)
        assert written(run, charts()) and count
        count.clear()


def test_nothing_drawn_leaves_no_index(tmp_path: Path) -> None:
    assert line_chart("Loss", {"loss": [(1, 0.69)]}) is None
    written(tmp_path, [])
    assert not (tmp_path / "eval").exists()
