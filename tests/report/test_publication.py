"""The publication table: rows, signs, escapes, rebuilt from the files alone, gates that a stand-in never passes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.benchmarks import write_files
from support.runs import ROOT

from cai import errors
from cai.evaluate.gates import decide
from cai.metrics.figure import Figure
from cai.recipe.load import read, resolve
from cai.recipe.settings_evaluation import GateSpec
from cai.report import publication
from cai.report.publication import HEAD, NONE, Table
from cai.report.table_text import UNKNOWN, without_empty

Runner = Callable[..., tuple[int, Path]]


def figure(name: str, value: float | None, **more: object) -> dict[str, object]:
    return Figure(name, value, **more).as_dict()  # type: ignore[arg-type]


def test_a_drop_is_shown_as_dpo_minus_base_with_its_interval_turned() -> None:
    facts = {"base": 0.5, "tuned": 0.3, "p": 0.04, "p_holm": 0.08}
    figures = {
        "harmbench.asr_drop": figure("harmbench.asr_drop", 0.2, low=0.1, high=0.4, n=60, unscored=2, facts=facts)
    }
    row = dict(zip(HEAD, publication.main_rows(figures)[0], strict=True))
    assert row["metric"] == "HarmBench attack success"
    assert (row["base"], row["SFT"], row["DPO"]) == ("0.5", NONE, "0.3")
    assert row["difference"].replace("−", "-") == "-0.2"
    assert row["95% interval"].replace("−", "-") == "-0.4 to -0.1"
    assert (row["n"], row["unscored"], row["p"], row["p (Holm)"]) == ("60", "2", "0.04", "0.08")


def test_every_figure_stands_in_exactly_one_row() -> None:
    figures = {
        "mtbench.delta": figure("mtbench.delta", 0.1, facts={"base": 5.0, "tuned": 5.1}),
        "mtbench.score.base": figure("mtbench.score.base", 5.0),
        "mtbench.score.tuned": figure("mtbench.score.tuned", 5.1),
        "harmbench.empty.base": figure("harmbench.empty.base", 0.0),
        "harmbench.empty.tuned": figure("harmbench.empty.tuned", 0.5),
        "preference.p1": figure("preference.p1", 0.9, n=60),
        "forgetting.kl": figure("forgetting.kl", None),
    }
    rows = publication.main_rows(figures)
    assert [row[0] for row in rows] == [
        "MT-Bench rating, all questions",
        "harmbench.empty",
        "forgetting.kl",
        "preference.p1",
    ]
    assert rows[1][1:4] == ("0", NONE, "0.5") or rows[1][1:4] == ("0.0", NONE, "0.5")
    assert rows[2][3] == NONE


def test_a_figure_stands_in_the_column_of_its_arm_and_one_of_no_arm_elsewhere() -> None:
    names = (
        "fresh.base.empty", "fresh.tuned.empty", "forgetting.nll_base", "preference.p2.before", "sft.last_loss",
        "dpo.loss", "critiques.csi", "guard.dropped", "preference.length_only",
    )  # fmt: skip
    figures = {name: figure(name, float(place)) for place, name in enumerate(names, 1)}
    rows = {row[0]: row[1:4] for row in publication.main_rows(figures)}
    assert rows == {
        "fresh.empty": ("1", NONE, "2"),
        "forgetting.nll_base": ("3", NONE, NONE),
        "preference.p2.before": ("4", NONE, NONE),
        "sft.last_loss": (NONE, "5", NONE),
        "dpo.loss": (NONE, NONE, "6"),
    }
    data = {row[0]: row[1] for row in publication.data_rows(figures)}
    assert data == {"critiques.csi": "7", "guard.dropped": "8", "preference.length_only": "9"}


def test_categories_have_every_arm_and_their_judge() -> None:
    def drop(tuned: float) -> dict[str, object]:
        cells = {"chemical": {"n": 3, "base": 0.5, "tuned": tuned}}
        return figure("harmbench.asr_drop", 0.1, judge="J", facts={"by_category": cells})

    figures = {"harmbench.asr_drop": drop(0.25), "harmbench.asr_drop.sft": drop(0.125)}
    assert publication.category_rows(figures) == [
        ("HarmBench attack success", "chemical", "3", "0.5", "0.125", "0.25", "J")
    ]


def test_what_the_guard_dropped_stands_by_pool_reason_and_category() -> None:
    facts = {
        "reasons": {"chosen_unsafe": 2, "not_safer": 1},
        "by_category": {"Violent": 2, "not_safer": 1},
        "by_pool": {"benign": {"n": 4, "dropped": 1}, "redteam": {"n": 6, "dropped": 2}},
    }
    rows = publication.guard_rows({"guard.dropped": figure("guard.dropped", 0.3, n=10, judge="G", facts=facts)})
    assert rows == [
        ("pool", "benign", "4", "1", "G"),
        ("pool", "redteam", "6", "2", "G"),
        ("reason", "chosen_unsafe", "10", "2", "G"),
        ("reason", "not_safer", "10", "1", "G"),
        ("category", "Violent", "10", "2", "G"),
    ]
    assert publication.guard_rows({}) == []


def test_latex_holds_no_letter_that_does_not_compile() -> None:
    tex = publication.latex([Table("DPO − SFT", ("a", "b"), [("base || tuned – é", "日本 ≤ 1"), ("«đ»", "")])])
    assert all(sign < "\u0180" for sign in tex) and not UNKNOWN.intersection(tex)
    assert (
        "DPO $-$ SFT" in tex and r"base \textbar{}\textbar{} tuned -- é" in tex and "[U+65E5][U+672C] [U+2264] 1" in tex
    )


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
def test_what_latex_is_given_compiles_and_fits_its_columns(tmp_path: Path) -> None:
    hostile = "50% & _x_ \\input{/etc} $1\n\\end{tabular}"
    names = ("a", hostile, "~^\\{}#", "日本 é – ≤", "[0.1, 0.2]", "* x", "dpo.loss_fall.heldout.of_a_long_name")
    rows = [(name, "-0.5 to 1.5", "rules", str(number)) for number, name in enumerate(names * 20)]
    wide = Table("run 100%_#1 & ^~", ("metric", "value [95%]", "judge", "n"), rows)
    (tmp_path / "table.tex").write_text(publication.latex([wide, Table("two", ("a", "b"), [("x", "y")])]))
    (tmp_path / "doc.tex").write_text(
        r"\documentclass[twocolumn]{article}\usepackage{booktabs,tabularx}\begin{document}\input{table}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "doc.tex"], cwd=tmp_path, capture_output=True,
        encoding="latin-1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    too_wide = [float(points) for points in re.findall(r"Overfull .hbox \(([\d.]+)pt too wide", done.stdout)]
    assert max(too_wide, default=0.0) < 2


@pytest.mark.parametrize("cell", ["[0.1, 0.2]", "* starred", "日"])
def test_a_bracket_at_the_beginning_of_a_row_is_no_argument_of_the_line_before(cell: str) -> None:
    tex = publication.latex([Table("t", ("a [b]", "c"), [("x", "y"), (cell, "z")])])
    assert not re.search(r"\\\\\s*[\[*]", tex)


def test_hostile_cells_are_inert_in_both_formats() -> None:
    content = [Table("a|b", ("x", "y"), [("<script>|`", "50% & _x_ \\input{/etc} $1\n\\end{tabular}")])]
    text, tex = publication.markdown(content), publication.latex(content)
    assert "<script>" not in text and "\\|" in text
    assert len(text.strip().splitlines()) == 5
    assert "\\input" not in tex and r"50\% \& \_x\_" in tex and tex.count(r"\end{tabular") == 1


def rows_of(tex: str) -> list[tuple[str, list[list[str]]]]:
    """(columns, rows of cells) of each tabularx of a LaTeX text, read strictly: only escaped & are part of a cell."""
    found = []
    assert tex.count(r"\begin{tabularx}") == tex.count(r"\end{tabularx}") == tex.count(r"\end{table")
    for body in re.findall(r"\\begin\{tabularx\}(.*?)\\end\{tabularx\}", tex, re.S):
        columns, *lines = body.strip().split("\n")
        kinds = re.fullmatch(r"\{\\(?:column|text)width\}\{@\{\}(.*)@\{\}\}", columns)
        assert kinds, columns
        kinds_of = kinds[1].replace(r">{\raggedright\arraybackslash}X", "X")
        assert set(kinds_of) <= {"X", "r", "l"} and "X" in kinds_of
        assert [lines[0], lines[2], lines[-1]] == [r"\toprule", r"\midrule", r"\bottomrule"]
        rows = []
        for line in [lines[1], *lines[3:-1]]:
            assert line.endswith(r" \\") and not re.search(r"(?<!\\)[%#_$]", line.replace("$-$", ""))
            assert line.count("{") == line.count("}")
            rows.append(re.split(r"(?<!\\) & ", line.removesuffix(r" \\")))
        found.append((kinds_of, rows))
    return found


@pytest.mark.runs
def test_every_row_of_a_run_has_a_cell_for_each_head_in_both_formats(run_fake: Runner) -> None:
    """The last rows of the data funnel had six cells under five heads: LaTeX stopped, Markdown was shifted."""
    _, run = run_fake("--milestone", "m1")
    found = rows_of((run / "eval/table.tex").read_text())
    assert len(found) >= 4 and any("hygiene" in row[0] for _, rows in found for row in rows)
    for kinds, rows in found:
        assert {len(row) for row in rows} == {len(kinds)}
    assert len(found[0][0]) <= 5 and r"\begin{table}" in (run / "eval/table.tex").read_text()  # fits a column
    for part in (run / "eval/table.md").read_text().split("\n\n**"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_row_that_does_not_fit_its_head_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cells under 2 heads"):
        Table("t", ("a", "b"), [("1", "2"), ("1", "2", "3")])


def test_the_headline_has_five_rows_of_what_was_measured() -> None:
    names = ("preference.p1", "preference.p3", "dpo.loss", "revisions.addresses", "critiques.meaningful")
    figures = {name: figure(name, 0.5, low=0.4, high=0.6, n=60) for name in names}
    figures["harmbench.asr_drop"] = figure("harmbench.asr_drop", None)
    figures["mtbench.delta"] = figure("mtbench.delta", -0.5, n=80, facts={"base": 6.0, "tuned": 5.5, "p_holm": 0.02})
    rows = publication.headline_rows(figures)
    assert [row[0].split(" (")[0] for row in rows] == [
        "MT-Bench rating, all questions",
        "Held-out pairs on which the tuned model prefers the revision",
        "Fresh answers judged better than the base's",
        "DPO loss after training",
        "Revisions that pass every check of form",
    ]
    assert rows[0][1:4] == ("6", "5.5", "-0.5") and rows[0][-1] == "0.02"
    assert rows[1][1:6] == (NONE, NONE, "0.5", "0.4 to 0.6", "60")


def test_a_column_that_says_nothing_is_left_out_and_an_equal_one_is_said_once() -> None:
    whole = Table("t", ("metric", "base", "SFT", "judge"), [("a", "1", NONE, "rules"), ("b", "2", NONE, "rules")])
    content = without_empty(whole)
    assert content.head == ("metric", "base", "judge")
    tex = publication.latex([content])
    assert rows_of(tex) == [("Xr", [["metric", "base"], ["a", "1"], ["b", "2"]])]
    assert r"\par\smallskip judge: rules" in tex


def test_a_long_table_is_cut_into_pages() -> None:
    found = rows_of(publication.latex([Table("t", ("a", "b"), [(str(i), "x") for i in range(95)])]))
    assert [len(rows) - 1 for _, rows in found] == [45, 45, 5]
    wrapped = rows_of(publication.latex([Table("t", ("a", "b"), [("of three lines, " * 4, "x")] * 20)]))
    assert [len(rows) - 1 for _, rows in wrapped] == [15, 5]


def test_a_long_name_may_be_broken_in_latex_and_a_minus_is_one() -> None:
    tex = publication.latex([Table("t", ("a", "b"), [("dpo.loss_fall.heldout", "-0.5 to 1.5")])])
    assert r"dpo.\allowbreak{}loss\_\allowbreak{}fall.\allowbreak{}heldout & $-$0.5 to 1.5 \\" in tex


@pytest.mark.runs
def test_tables_of_a_run_are_rebuilt_from_its_files_by_one_command(run_fake: Runner, project: Path) -> None:
    import runner

    files = write_files(project)
    _, run = run_fake("--milestone", "m1")
    asked = ("--benchmark", "harmbench,xstest,mtbench", "--resume", "runs/latest", *files)
    code, _ = run_fake(*asked, "--set", "benchmarks.judge=stand-in", "--set", "benchmarks.max_new_tokens=40")
    assert code == errors.DONE
    names = ("eval/table.md", "eval/table.tex")
    assert runner.main([str(project / "cai.toml"), "--report", "runs/latest"]) == errors.DONE
    first = {name: (run / name).read_bytes() for name in names}
    assert b"HarmBench attack success" in first["eval/table.md"] and b"STAND-IN" in first["eval/table.md"]
    assert b"Data funnel" in first["eval/table.md"] and b"By category" in first["eval/table.md"]
    for name in names:
        (run / name).unlink()
    assert runner.main([str(project / "cai.toml"), "--report", "runs/latest"]) == errors.DONE
    assert {name: (run / name).read_bytes() for name in names} == first
    assert "−" not in first["eval/table.tex"].decode()
    value = json.loads((run / "eval/benchmarks.json").read_text())["figures"]["mtbench.delta"]["facts"]["base"]
    assert f"{value:.3g}".encode() in first["eval/table.md"]


def test_a_gate_never_passes_on_the_stand_in() -> None:
    gate = GateSpec(metric="harmbench.improvement", at_least=1.0)
    real = Figure("harmbench.improvement", 2.0, n=60, facts={"stand_in": False})
    assert decide(real, gate).status == "PASS"
    assert decide(Figure("harmbench.improvement", 2.0, n=60, facts={"stand_in": True}), gate).status == "UNMEASURED"
    assert decide(Figure("harmbench.improvement", 2.0, n=60, facts={"trial": True}), gate).status == "UNDERPOWERED"


@pytest.mark.parametrize(
    "metric",
    ["harmbench.improvement", "harmbench.p", "xstest.over_refusal_rise", "mtbench.delta", "contamination.inputs"],
)
def test_the_shipped_m3_gates_name_the_benchmarks(metric: str) -> None:
    recipe = resolve(read(ROOT / "cai.toml"), milestone="m3")
    assert metric in [gate.metric for gate in recipe.gates.of("m3")]
