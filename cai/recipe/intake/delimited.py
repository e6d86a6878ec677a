"""CSV, TSV and their like -> rows by header; what looks like a table and has no readable header is refused.

Owns which delimiter and which header. The csv module does the quoting; a cell may hold line ends.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

from cai.recipe.intake.entries import CONTEXT, CONVERSATION, PAIR, REQUEST, normal
from cai.recipe.intake.jsontext import Broken, Entry
from cai.recipe.intake.plain import BULLET, LINE_END, TERMINATED
from cai.store.jsonl import Row
from cai.store.reading import MOST_BYTES

DELIMITERS = (",", "\t", ";", "|")
NAMES = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", "|": "a table with |", "\x1f": "one column"}
ALONE = "\x1f"  # unit separator: no cell has it, so a file of one column is read with its quoting
SEP = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
ONE_WORD = re.compile(r"\s*[\w.-]+\s*")
WORD = re.compile(r"[\w#%./ ()\[\]:*&+'-]{1,40}")
RULE = re.compile(r":?-{2,}:?")  # a cell of the line below a Markdown table's header
COMMENT_LINES = re.compile(r"(?:[ \t]*(?:(?:#|//)[^\r\n]*)?(?:\r\n|\n|\r))+")
MARK = re.compile(rf"{BULLET}|o|\(?(?:\d{{1,6}}|[A-Za-z])[.)]")
GAPS = re.compile(r"[ \u00a0]{2,}")
# id^prompt, id & prompt
OTHER = re.compile(r"\w+([^\w\s\"'.,;|-])\1?\w+(?:\1{1,2}\w+)*|\w+ ([&^~:]) \w+(?: \2 \w+)*(?: \\\\)?")
LONGEST_HEADER = 20_000  # characters: a longer first line is no header
LINES_ABOVE = 10  # a header is looked for below as many lines
SAMPLE_ROWS = 200
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as in YAML
KNOWN = frozenset((*REQUEST, *CONTEXT, *CONVERSATION, *PAIR))


class CellTable:
    """`how`: what it was read as; `rows`: a mapping a row, by the header's names as they stand."""

    def __init__(self, how: str, rows: list[Entry]) -> None:
        self.how, self.rows = how, rows


def parse(text: str, key: str = "") -> CellTable | None:
    """The table, or None if the text is none. Errors: Broken (ragged rows, bad quoting, a header that says nothing)."""
    lines, skipped = text, 0
    wanted = ""
    if found := SEP.match(text):  # Excel's first line
        wanted, lines, skipped = found[1], text[found.end() :], 1
    delimiter, header = _header(lines, key, wanted)
    if not header and not wanted and (above := COMMENT_LINES.match(text)):
        skipped = len(LINE_END.findall(above[0]))
        lines = text[above.end() :]
        delimiter, header = _header(lines, key, wanted)
    bound = csv.field_size_limit(MOST_BYTES)  # of the process; the length of a request is bounded in entries
    try:
        if not header:
            _refuse_parted_otherwise(text, key)
            _refuse_below(text, key)
            _refuse_unnamed(text)
            return None
        rows = list(_rows(lines, delimiter, header, skipped))
    finally:
        csv.field_size_limit(bound)
    _refuse_single_quotes(rows)
    return CellTable(f"{NAMES.get(delimiter, 'CSV')} with the columns {', '.join(header)[:120]}", rows)


def headed(text: str, key: str) -> bool:
    """Whether the first line is a header of more than one column, one of which is called `key`."""
    first = next((line for line in LINE_END.split(text, 50) if line.strip() and not line.lstrip().startswith("#")), "")
    rows = [next(csv.reader([first[:LONGEST_HEADER]], delimiter=delimiter), []) for delimiter in DELIMITERS]
    return any(len(cells) > 1 and key in map(normal, cells) for cells in rows)


def typed(row: Mapping[str, str], kinds: Mapping[str, type]) -> Row:
    """A row without its empty cells, those of `kinds` read as in YAML; a cell that is not of its kind stays text."""
    cells: Row = {name: text for name, text in row.items() if name and text.strip()}
    for name, text in cells.items():
        kind, said = kinds.get(normal(name)), text.strip().lower()
        if kind is bool and said in TRUTHS:
            cells[name] = TRUTHS[said]
        elif kind is int and re.fullmatch(r"[+-]?[0-9]{1,9}", said):
            cells[name] = int(said)
        elif kind is list:
            cells[name] = re.findall(r"[^\s,;|]+", said)
    return cells


def _header(text: str, key: str, wanted: str) -> tuple[str, list[str]]:
    """(delimiter, names) of the first line, where one of its cells names what a request may be under."""
    first = next((line for line in LINE_END.split(text, 50) if line.strip()), "")
    for delimiter in (wanted,) if wanted else (*DELIMITERS, ALONE):
        try:
            cells = next(csv.reader([first[:LONGEST_HEADER]], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if any(cell.startswith(" ") for cell in cells) and not all(ONE_WORD.fullmatch(cell) for cell in cells):
            continue  # a sentence: "Question, please"
        if (len(cells) > 1 or delimiter == ALONE or wanted) and _names_something(cells, key):
            return delimiter, [cell.strip() for cell in cells]
    return "", []


def _names_something(names: Sequence[str], key: str) -> bool:
    known: Collection[str] = {*KNOWN, normal(key)} if key else KNOWN
    return any(normal(name) in known for name in names) and all(len(name) <= 60 for name in names)


def _rows(text: str, delimiter: str, header: Sequence[str], skipped: int) -> Iterator[Entry]:
    if len({normal(name) for name in header if name}) < len([name for name in header if name]):
        raise Broken(skipped + 1, f"a column is named twice in the header ({', '.join(header)[:60]}): rename one")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    before, seen = skipped, False
    try:
        for cells in reader:
            line, before = before + 1, skipped + reader.line_num
            if not any(cell.strip() for cell in cells) or (delimiter == "|" and all(map(RULE.fullmatch, _bare(cells)))):
                continue
            if not seen:
                seen = True
            elif _bare(cells) == list(header):
                raise Broken(line, "the header stands here once more (two tables in one file?): take this line out")
            elif len(cells) > len(header):
                extra = f"{len(cells)} cells, the header has {len(header)}"
                raise Broken(line, f"{extra}: put quotes around the cell that holds the delimiter {delimiter!r}")
            else:
                yield Entry(line, dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True)))
    except csv.Error as error:
        raise Broken(
            before + 1, f"bad quoting ({error}): double each quote within a quoted cell, and close it"
        ) from None


def _refuse_single_quotes(rows: Sequence[Entry]) -> None:
    """`Broken` for a column whose every cell is in single quotes: csv knows double ones, so they would be text."""
    for name in rows[0].value if len(rows) > 1 else ():
        cells = [row.value[name].strip() for row in rows]
        if all(len(cell) > 2 and cell[0] == cell[-1] == "'" and "'" not in cell[1:-1] for cell in cells):
            raise Broken(rows[0].line, f"single quotes around every cell of {name!r}. A CSV has double quotes")


def _bare(cells: Sequence[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _refuse_parted_otherwise(text: str, key: str) -> None:
    """`Broken` for a header whose cells another sign parts, if the line below has that sign as well."""
    lines = [(number, line.strip()) for number, line in enumerate(LINE_END.split(text, LINES_ABOVE), 1) if line.strip()]
    for (number, line), (_, below) in pairwise(lines[:2]):
        if (found := OTHER.fullmatch(line)) is None:
            continue
        sign = found[1] or found[2]
        if sign in below and _names_something([cell.strip(" \\") for cell in line.split(sign)], key):
            raise Broken(number, f"a table whose cells are parted by {sign!r}. Save it as CSV: commas, with a header")


def _refuse_below(text: str, key: str) -> None:
    """`Broken` for a header that other lines stand above, and for columns that are parted by spaces alone."""
    lines = [(number, line) for number, line in enumerate(LINE_END.split(text, LINES_ABOVE + 2), 1) if line.strip()]
    for number, line in lines[:1]:
        cells = GAPS.split(line.strip())
        if len(cells) > 1 and all(map(WORD.fullmatch, cells)) and _names_something(cells, key):
            raise Broken(number, "columns parted by spaces: where a cell ends is not plain. Save it as CSV")
    for (number, line), (_, below) in pairwise(lines[: LINES_ABOVE + 1]):
        for delimiter in DELIMITERS:
            cells = line.split(delimiter)
            short = len(cells) > 1 and all(ONE_WORD.fullmatch(cell.strip('"')) for cell in cells)
            if short and _names_something(cells, key) and below.count(delimiter) >= len(cells) - 1:
                raise Broken(number, "a table's header, and other lines stand above it: take those out")


def _refuse_unnamed(text: str) -> None:
    """`Broken` for lines that are a table's: as many cells in each, and a header, quoted cells or numbers in front."""
    for delimiter in DELIMITERS:
        rows = _filled(_sample(text, delimiter))
        if len(rows) < 2 or len(rows[0]) < 2 or len({len(row) for row in rows}) > 1 or _is_marked_list(rows):
            continue
        named = all(WORD.fullmatch(cell) and len(cell.split()) <= 3 for cell in rows[0])
        spaced = all(cell.startswith(" ") for row in rows for cell in row[1:])
        tight = _is_tight(text, rows, delimiter)
        headed = named and not any(cell.startswith(" ") for cell in rows[0]) and not _goes_on(rows[0])
        quoted = re.search(rf'(?:^|{re.escape(delimiter)})"', text, re.MULTILINE) is not None
        quoted = quoted and not (spaced and f'{delimiter} "' not in text)  # '"Carpe diem", what does it mean?'
        if headed or quoted or tight or delimiter == "\t" or _is_numbered(rows, tight, spaced):
            shown = ", ".join(cell.strip() for cell in rows[0])[:80]
            raise Broken(
                1,
                f"a table (cells: {shown}) in which no column is called instruction, prompt or question: name the one "
                "that holds the requests, --set instructions.key=COLUMN, and give a header line if there is none",
            )


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Without the columns that are empty in every row: tabs in front of lines or behind them part nothing."""
    if len({len(row) for row in rows}) != 1:
        return [list(row) for row in rows]
    kept = [place for place in range(len(rows[0])) if any(row[place].strip() for row in rows)]
    return [[row[place] for place in kept] for row in rows]


def _is_marked_list(rows: Sequence[Sequence[str]]) -> bool:
    """A list as word processors copy it: its mark, a tab, the text."""
    return len(rows[0]) == 2 and all(MARK.fullmatch(row[0].strip()) for row in rows)


def _is_tight(text: str, rows: Sequence[Sequence[str]], delimiter: str) -> bool:
    """Nothing stands behind a delimiter as in a sentence; f(a,b) is code, 3,5 a number, and a clause may go on."""
    if any(cell.startswith(" ") for row in rows for cell in row[1:]) or not all(c.strip() for row in rows for c in row):
        return False
    bare = re.sub(r"\([^()\r\n]*\)|\[[^\[\]\r\n]*\]", "", text)
    if re.search(rf"\d{re.escape(delimiter)}\d", text) or len(bare.split(delimiter)) <= len(rows):
        return False
    return not all(map(_goes_on, rows)) or len({row[0] for row in rows}) < len(rows)


def _goes_on(cells: Sequence[str]) -> bool:
    """One sentence on both sides of each delimiter: "What does a|b match?"."""
    opens = len(cells[0].split()) >= (3 if len(cells) == 2 else 2) and cells[0][:1].isupper()
    within = not any(map(TERMINATED.search, cells[:-1])) and all(cell[:1].islower() for cell in cells[1:])
    return opens and within and len(cells[-1].split()) >= 2 and TERMINATED.search(cells[-1]) is not None


def _is_numbered(rows: Sequence[Sequence[str]], tight: bool, spaced: bool) -> bool:
    """Numbers in front of every row, where they count rows: neither years nor sequences to go on with."""
    below = rows[tight:]  # a header may stand above the numbers
    if not all(row[0].strip().isdigit() for row in below):
        return False
    if all(
        len(row) > 2 and row[-1].strip()[:1].isdigit() and all(c.strip().isdigit() for c in row[:-1]) for row in below
    ):
        return False  # "2, 4, 8, 16: what comes next?"
    first = int(below[0][0])
    return not spaced or (first in (0, 1) and [int(row[0]) for row in below] == [*range(first, first + len(below))])


def _sample(text: str, delimiter: str) -> list[list[str]]:
    """The first rows as csv reads them; [] where its quoting is not a table's."""
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            rows += [row] if any(cell.strip() for cell in row) else []
            if len(rows) == SAMPLE_ROWS:
                break
    except csv.Error:
        return []
    return rows
