"""JSON text -> entries with their lines: JSON lines, an array, one object, objects one after the other.

Owns the syntax only: an entry is whatever value stood there. A fault is a `Broken` with its line and a remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cai.store.jsonl import Row

SPACE = re.compile(r"[ \t\r\n]*")
COMMENT = re.compile(r"(?://|#)[^\r\n]*")
MOST_ENTRIES = 3_000_000  # of a file: each takes some hundred bytes of memory


@dataclass(frozen=True)
class Entry:
    """A value and the line of the file on which it begins."""

    line: int
    value: Any


class Broken(ValueError):
    """Not JSON at a line; `args`: the line, what is wrong with the remedy."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(line, why)
        self.line, self.why = line, why


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value: write null or a number")


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:40]!r} is given twice: remove one")
    return found


DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_pairs)


class Reader:
    """A place in a text. Lines are counted as it moves on, each line once."""

    def __init__(self, text: str, line: int = 1) -> None:
        self.text, self.at = text, 0
        self._counted, self._line, self._values = 0, line, 0

    def line_at(self, place: int) -> int:
        if place < self._counted:
            return self._line - self._ends(place, self._counted)
        self._line += self._ends(self._counted, place)
        self._counted = place
        return self._line

    def _ends(self, start: int, end: int) -> int:
        text = self.text
        both = text.count("\r\n", start, end)
        return text.count("\n", start, end) + text.count("\r", start, end) - both

    def skip(self) -> str:
        """Past white space; the next sign, "" at the end."""
        self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing too
        return self.text[self.at : self.at + 1]

    def value(self) -> Entry:
        line = self.line_at(self.at)
        self._values += 1
        if self._values > MOST_ENTRIES:
            raise Broken(line, f"more than {MOST_ENTRIES:,} entries. Give a smaller file")
        try:
            value, self.at = DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise Broken(self.line_at(max(error.pos, self.at)), self._why(error)) from None
        except RecursionError:
            raise Broken(line, "nested too deeply. Take the inner lists out") from None
        except ValueError as error:
            raise Broken(line, _first_line(error)) from None
        return Entry(line, value)

    def _why(self, error: json.JSONDecodeError) -> str:
        """What is wrong at the place, in the words of whoever wrote the file."""
        before, at = self.text[max(0, error.pos - 200) : error.pos].rstrip(), self.text[error.pos : error.pos + 5]
        kind = "not a JSON object" if self.text.startswith("{", self.at) else "not JSON"
        if before.endswith(",") and at[:1] in ("}", "]"):
            return f"{kind}: a comma before the closing bracket. Remove it"
        if at[:1] == "'":
            return f"{kind}: single quotes. JSON has double quotes"
        if at.startswith(("None", "True", "False")):
            return f"{kind}: a Python value ({at.rstrip(',}')}). JSON has null, true, false"
        return f"{kind} ({error.msg}). Correct the line"


def _first_line(error: ValueError) -> str:
    text = str(error).split(";")[0].split("\n")[0]
    return f"{text}. Write a smaller number" if text.startswith("Exceeds") else text


def array(text: str) -> list[Entry] | None:
    """The entries of a text that is one array; None if other text follows the array (then it is none)."""
    reader = Reader(text)
    reader.skip()
    reader.at += 1
    found: list[Entry] = []
    if reader.skip() == "]":
        return found
    while True:
        if reader.skip() == "]":
            raise Broken(reader.line_at(reader.at), "not JSON: a comma before the closing bracket. Remove it")
        found.append(reader.value())
        sign = reader.skip()
        line = reader.line_at(reader.at)
        reader.at += 1
        if sign == "]":
            return found if not reader.skip() else None
        if sign != ",":
            raise Broken(line, "not JSON (a comma or the closing bracket of the array is missing)")


def values(text: str) -> Iterator[Entry]:
    """Values one after the other, each on its line or lines; comment lines between them are passed over."""
    reader = Reader(text)
    while sign := reader.skip():
        if sign == ",":
            line = reader.line_at(reader.at)
            raise Broken(line, "a comma between the objects. Remove it, or put [ and ] around all of them")
        if comment := COMMENT.match(text, reader.at):
            reader.at = comment.end()
            continue
        yield reader.value()
