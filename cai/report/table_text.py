"""Tables to text: GitHub's Markdown, and LaTeX that compiles and fits a column.

Owns layout and escapes; owns no row. Invariants: every row has as many cells as its head, a cell cannot end its cell,
row or table, and what LaTeX has no letter for in its oldest font encoding (OT1) is written by its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cai.terminal import printable

NONE = "–"
LINES = 45  # of one LaTeX table, wrapped ones counted: a longer one would run off its page
COLUMNS = 5  # a table of more, or with two columns that wrap, is as wide as the page (table*, in two columns)
WORDS = ("judge", "reasons", "verdict", "which", "category", "model")  # columns that begin at the left
SAME = ("judge", "unscored")  # a column that is equal in every row of LaTeX's table is said once, below it
LONG = 24  # letters; a column with a longer cell wraps, the others keep to one line


@dataclass(frozen=True)
class Table:
    """A caption, a head and rows of text cells, as many in each as there are heads."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"{self.caption}: {len(row)} cells under {len(self.head)} heads: {row}")


def without_empty(table: Table) -> Table:
    """Without the columns that say nothing in any row; the first one stays."""
    return _columns(table, [i for i in _places(table) if i == 0 or any(row[i] not in ("", NONE) for row in table.rows)])


def _places(table: Table) -> range:
    return range(len(table.head))


def _columns(table: Table, kept: Sequence[int]) -> Table:
    rows = [tuple(row[i] for i in kept) for row in table.rows]
    return Table(table.caption, tuple(table.head[i] for i in kept), rows)


def markdown(content: Sequence[Table]) -> str:
    """GitHub's tables, each under its caption."""
    parts = []
    for table in content:
        lines = [f"**{_markdown(table.caption)}**", "", _line(table.head), _line(["---"] * len(table.head))]
        lines += [_line([_markdown(cell) for cell in row]) for row in table.rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    text = printable(text, one_line=True).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\|`*\[_~$]", r"\\\g<0>", text)  # a pair of ~ strikes through, a pair of $ is a formula


# --- LaTeX

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$", "|": r"\textbar{}",
    "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
UNKNOWN = frozenset("«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ")  # pdfLaTeX 2022 with its default OT1 stops at these (all tried)


def latex(content: Sequence[Table]) -> str:
    """`table` environments as wide as a column, or as the page; they need the packages booktabs and tabularx."""
    parts = ["% needs \\usepackage{booktabs,tabularx}; made from eval/*.json, do not edit"]
    parts += [_environment(part, note) for table in content for part, note in _pages(table)]
    return "\n\n".join(parts) + "\n"


def _pages(table: Table) -> Iterator[tuple[Table, str]]:
    """Tables of at most LINES lines, without the columns of SAME that are equal in all rows: those are in the note."""
    same = [i for i in _places(table) if table.head[i] in SAME and len({row[i] for row in table.rows}) == 1]
    said = "; ".join(f"{table.head[i]}: {table.rows[0][i]}" for i in same if table.rows[0][i] not in ("", NONE))
    narrow = _columns(table, [i for i in _places(table) if i not in same])
    page: list[tuple[str, ...]] = []
    height, caption = 0, narrow.caption
    for row in narrow.rows:
        lines = max(-(-len(cell) // LONG) for cell in (*row, "-"))
        if page and height + lines > LINES:
            yield Table(caption, narrow.head, page), said
            page, height, caption = [], 0, f"{narrow.caption} (continued)"
        page, height = [*page, row], height + lines
    yield Table(caption, narrow.head, page), said


def _environment(table: Table, note: str) -> str:
    """Small type; the first column and those with long cells share the width that the others leave, and wrap."""
    wide = [i for i in _places(table) if i == 0 or any(len(row[i]) > LONG for row in table.rows)]
    wrapped = r">{\raggedright\arraybackslash}X"
    kinds = "".join(wrapped if i in wide else "l" if table.head[i] in WORDS else "r" for i in _places(table))
    narrow = len(table.head) <= COLUMNS and len(wide) == 1
    name, width = ("table", r"\columnwidth") if narrow else ("table*", r"\textwidth")
    lines = [rf"\begin{{{name}}}", r"\centering\scriptsize\setlength{\tabcolsep}{3pt}"]
    lines += [rf"\caption{{{_latex(table.caption)}}}", rf"\begin{{tabularx}}{{{width}}}{{@{{}}{kinds}@{{}}}}"]
    lines += [r"\toprule", _row([_head(name) for name in table.head]), r"\midrule"]
    lines += [_row([_latex(cell) for cell in row]) for row in table.rows]
    lines += [r"\bottomrule", r"\end{tabularx}"]
    lines += [rf"\par\smallskip {_latex(note)}"] if note else []
    return "\n".join([*lines, rf"\end{{{name}}}"])


def _row(cells: Sequence[str]) -> str:
    return " & ".join([_opening(cells[0]), *cells[1:]]) + r" \\"


def _opening(text: str) -> str:
    """What stands behind a line's end: a bracket or a star there would be the end's own argument."""
    return "{}" + text if text.startswith(("[", "*")) else text


def _head(name: str) -> str:
    """A head of several words stands on as many lines, so that it makes no column wider than its figures."""
    if " " not in name:
        return _latex(name)
    return r"\shortstack{" + r"\\".join(_opening(_latex(word)) for word in name.split(" ")) + "}"


def _latex(text: str) -> str:
    """Escaped; a name of several parts (`dpo.loss.heldout`, `length_only`) may be broken behind each."""
    signs = re.sub(r"(?<!\w)-(?=\d)", "−", printable(text, one_line=True))
    known = ((sign < "\u0180" and sign not in UNKNOWN) or sign in LATEX for sign in signs)
    shown = [LATEX.get(sign, sign if good else f"[U+{ord(sign):04X}]") for sign, good in zip(signs, known, strict=True)]
    breaks = {match.end() - 1 for match in re.finditer(r"[A-Za-z0-9][._](?=[A-Za-z])", signs)}
    return "".join(sign + r"\allowbreak{}" if place in breaks else sign for place, sign in enumerate(shown))
