"""The bytes of a user's file of instructions -> requests with pool and line, and what is to be said about it.

Owns which format a file is, by its content and never by its name. Pure: the caller reads the file, once. Invariant:
every request is one that somebody wrote as a request; what could be something else ends with one line that
names the place and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai.errors import CaiError
from cai.recipe.intake import delimited, frames, jsontext, plain
from cai.recipe.intake.decoding import text_of
from cai.recipe.intake.entries import LONGEST, Given, Tally, counted, given, is_row
from cai.recipe.intake.jsontext import Broken, Entry
from cai.store.jsonl import JsonObject

KEY = "instructions.file"


@dataclass(frozen=True)
class Intake:
    """`requests` in file order, at least one; `how`: what the file was read as; `notes`: what else is to be said."""

    requests: tuple[Given, ...]
    how: str
    notes: tuple[str, ...] = ()
    pooled: int = 0  # rows that name their pool themselves

    @property
    def by_pool(self) -> dict[str, int]:
        """{"benign": n, "redteam": m}."""
        return {pool: sum(row.pool == pool for row in self.requests) for pool in ("benign", "redteam")}


def read(data: bytes, name: str, *, key: str = "", pool: str = "") -> Intake:
    """The requests of a file. `name`: as faults name it; `key`: instructions.key; `pool`: for rows without one.

    Errors: CaiError of one line, with the file, the line and the remedy.
    """
    text, packed = text_of(data, f"{name}: {KEY}")
    tally = Tally()
    try:
        entries, how, notes = _entries(text, key)
        if not entries:
            raise CaiError(
                f"{name}: {KEY}: no instruction in it. Write one a line, or a JSON object with `instruction`."
            )
        requests = tuple(given(entry, key=key, pool=pool, tally=tally) for entry in entries)
    except Broken as broken:
        raise CaiError(f"{name}: line {broken.line}: {' '.join(broken.why.split())}.") from None
    except RecursionError:
        raise CaiError(f"{name}: {KEY}: nested too deeply. Write one JSON object a line.") from None
    said = [*notes, *_said(tally), *frames.oddities([row.text for row in requests])]
    return Intake(requests, f"{how} ({packed})" if packed else how, tuple(said), tally.pooled)


def _entries(text: str, key: str) -> tuple[Sequence[Entry], str, list[str]]:
    """(entries, how they were read, notes)."""
    text = text.removeprefix("\ufeff")
    first = _first_sign(text)
    if first == "[" and BRACKETED.search(text):
        first = ""
    if first == "[":
        found = jsontext.array(text)
        if found is not None:
            return _of_array(found)
    if first in ("{", "["):
        try:
            values = list(jsontext.values(text))
        except Broken as broken:
            if first == "[":
                raise
            return _mixed_or(text, broken)
        return _of_values(values, key, text)
    if first == '"' and (strings := _strings(text)):
        return strings, "JSON strings, one a line", []
    lines = plain.lines_of(text)
    _refuse_long(lines)
    if (table := delimited.parse(text, key)) is not None:
        return table.rows, table.how, []
    _refuse_half_quoted(lines)
    if key:
        raise Broken(
            1, f"plain text has no key {key!r} (instructions.key). Leave the key out, or give JSON lines or CSV"
        )
    if not BRACKETED.search(text) and (mixed := _mixed(lines)):
        return mixed
    found_lines = plain.parse(lines)
    if not found_lines.entries and found_lines.passed:
        raise Broken(1, "nothing but headings and comments (lines with # or //). Take these signs off the requests")
    return found_lines.entries, found_lines.how, _plain_notes(found_lines)


LINE = re.compile(r"[^\r\n]*\S[^\r\n]*")
# "[1] ...", TOML's "[a]"
BRACKETED = re.compile(r"\A\s*(?:\[\d+\][ \t]+\S|\[{1,2}[A-Za-z][\w.-]*\]{1,2}[ \t]*(?:[\r\n]|\Z))")


def _refuse_long(lines: Sequence[tuple[int, str]]) -> None:
    """`Broken` for a line that no model reads, before it is looked at in detail."""
    number, line = max(lines, key=lambda pair: len(pair[1]))
    if len(line) > LONGEST:
        raise Broken(number, f"{len(line):,} characters, more than any model reads. Shorten it, or take the line out")


def _first_sign(text: str) -> str:
    """The first sign that is neither white nor in a comment line."""
    for found in LINE.finditer(text):
        line = bare = found[0].strip()
        if bare and not (plain.passed_over(line) or bare.startswith("#")):
            return bare[0]
    return ""


def _of_array(entries: list[Entry]) -> tuple[Sequence[Entry], str, list[str]]:
    if entries and all(isinstance(entry.value, Mapping) for entry in entries):
        turns = [entry.value for entry in entries]
        if all({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys() for turn in turns):
            return [Entry(entries[0].line, turns)], "one conversation", []
    return entries, "a JSON array", []


def _of_values(entries: list[Entry], key: str, text: str) -> tuple[Sequence[Entry], str, list[str]]:
    notes = _comment_note(plain.lines_of(text)) if "//" in text or "#" in text else []
    if len(entries) == 1 and isinstance(entries[0].value, Mapping) and not is_row(entries[0].value, key):
        inner, where = _inside(entries[0].value, entries[0].line)
        if inner is not None:
            return [Entry(entries[0].line, value) for value in inner], f"one JSON object, its {where}", notes
    return entries, "JSON lines" if len(entries) > 1 else "one JSON object", notes


def _inside(table: JsonObject, line: int) -> tuple[Sequence[Any] | None, str]:
    """The list that an object is around: under its one key with a list, by columns, or an object a name."""
    lists = {name: value for name, value in table.items() if isinstance(value, list) and value}
    texts = {name: v for name, v in lists.items() if all(isinstance(inner, str | Mapping | list) for inner in v)}
    named = {delimited.normal(name) for name in table}
    if named & {"instruction", "prompt", "question"} and len(lists) == len(table):
        if len({len(value) for value in lists.values()}) > 1:
            raise Broken(line, "columns of different lengths. Write one JSON object a line")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)], "columns"
    if named & {"instruction", "prompt", "question"} and all(isinstance(value, Mapping) for value in table.values()):
        indexes = next(iter(table.values())).keys()  # pandas: {"prompt": {"0": ..., "1": ...}}
        numbered = all(str(index).isdigit() for index in indexes)
        if numbered and all(value.keys() == indexes for value in table.values()):
            return [{name: value[index] for name, value in table.items()} for index in indexes], "columns"
        return None, ""
    if len(texts) == 1:
        name = next(iter(texts))
        return texts[name], f"list {str(name)[:40]!r}"
    if len(texts) > 1:
        raise Broken(
            line, f"lists under {', '.join(map(str, texts))[:80]}: which holds the requests? Give that list alone"
        )
    if len(table) > 1 and all(isinstance(value, Mapping) for value in table.values()):
        return list(table.values()), "objects"
    return None, ""


def _strings(text: str) -> list[Entry]:
    """A JSON string a line; [] if a line is none."""
    try:
        found = list(jsontext.values(text))
    except Broken:
        return []
    return found if all(isinstance(entry.value, str) for entry in found) else []


QUOTED = re.compile(r'"[^"]*"(,?)$')


def _refuse_half_quoted(lines: Sequence[tuple[int, str]]) -> None:
    """`Broken` for a list of quoted texts without its brackets, and for a quoted line where others are not."""
    lines = [(number, line.strip()) for number, line in lines if line.strip()]
    quoted = [(number, match) for number, line in lines if (match := QUOTED.match(line))]
    if quoted and len(quoted) == len(lines) and any(match[1] for _, match in quoted):
        raise Broken(quoted[0][0], "quoted texts with commas behind them. Put [ and ] around all of them")
    quoted = [] if any(match[1] for _, match in quoted) else quoted
    if quoted and len(quoted) < len(lines) and not any("," in line for _, line in lines if not line.startswith('"')):
        raise Broken(quoted[0][0], "in quotes, and other lines are not. Take the quotes off, or put every line in them")


OBJECT = re.compile(r"\s*[{\[]")


def _mixed(lines: Sequence[tuple[int, str]]) -> tuple[Sequence[Entry], str, list[str]] | None:
    """JSON objects and plain requests line by line; None if no line begins as JSON, or an object spans lines."""
    lines = [(number, line) for number, line in lines if line.strip()]
    if not any(OBJECT.match(line) for _, line in lines):
        return None
    entries, others = [], 0
    for number, line in lines:
        if OBJECT.match(line):
            entries.append(_object(number, line.strip()))
        elif not (plain.passed_over(line) or line.lstrip().startswith("#")):
            plain.refuse(number, line)
            entries.append(Entry(number, line.strip()))
            others += 1
    notes = [f"{others} lines are plain text among JSON objects"] if others else []
    return entries, "JSON lines", [*notes, *_comment_note(lines)]


def _mixed_or(text: str, broken: Broken) -> tuple[Sequence[Entry], str, list[str]]:
    """Line by line, where the whole is no JSON; of two faults the later is the file's (an object may span lines)."""
    try:
        found = _mixed(plain.lines_of(text))
    except Broken as other:
        raise (broken if broken.line > other.line else other) from None
    if found is None:
        raise broken
    return found


def _object(number: int, line: str) -> Entry:
    try:
        found = list(jsontext.values(line))
    except Broken as broken:
        raise Broken(number, broken.why) from None
    if len(found) != 1:
        raise Broken(number, "more than one JSON value on a line among plain lines. Write one a line")
    return Entry(number, found[0].value)


def _comment_note(lines: Sequence[tuple[int, str]]) -> list[str]:
    count = sum(line.lstrip().startswith(("//", "#")) for _, line in lines)
    return [f"passed over: {count} comment line(s)"] if count else []


def _plain_notes(found: plain.Plain) -> list[str]:
    notes = [f"passed over: {', '.join(f'{n} {kind}(s)' for kind, n in found.passed.items())}"] if found.passed else []
    notes += [f"{found.joined} line(s) or paragraph(s) joined into one request"] if found.joined else []
    return notes + ([f"the marks {found.marks} around every request are taken off"] if found.marks else [])


def _said(tally: Tally) -> Iterable[str]:
    if tally.joined:
        yield f"joined to the request: {counted(tally.joined)}"
    if tally.ignored:
        yield f"keys ignored: {counted(tally.ignored)}"
    if tally.systems:
        yield f"a system prompt is not read ({tally.systems} rows): put it into the request if it belongs to it"
    if tally.more_turns:
        yield f"{tally.more_turns} row(s) have more turns: the first of the user is taken"
