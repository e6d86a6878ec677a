"""Names of runs, models and principles in the tables: every sign is text, in Markdown and in LaTeX."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cai.report.table_text import Table, latex, markdown

NAMES = (
    "[2pt] a",
    "*b",
    "中文 first",
    "~~struck~~ $x$ &lt; &amp;",
    "a|b`c`\\d",
    "#{%}^_<>\n\u202e\u2028x",
    "\\\\[3cm]",
    "",
)
TABLE = Table("caption [x] * 50%", ("model", "value"), [(name, name) for name in NAMES])


def test_no_row_of_latex_begins_with_an_argument() -> None:
    rows = [line for line in latex([TABLE]).splitlines() if line.endswith(r" \\") and "&" in line]
    assert len(rows) == len(NAMES) + 1
    assert not [row for row in rows if row.startswith(("[", "*"))]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {1}


def test_no_sign_of_markdown_acts() -> None:
    text = markdown([TABLE])
    assert r"\~\~struck\~\~ \$x\$ &amp;lt; &amp;amp;" in text
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")} == {3}


def test_latex_compiles_with_names_that_begin_like_arguments(tmp_path: Path) -> None:
    program = shutil.which("pdflatex")
    if not program:
        pytest.skip("no pdflatex")
    body = "\\documentclass{article}\\usepackage{booktabs,tabularx}\\begin{document}\n" + latex([TABLE])
    (tmp_path / "t.tex").write_text(body + "\\end{document}\n")
    argv = [program, "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    said = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert said.returncode == 0, said.stdout[-1500:]
