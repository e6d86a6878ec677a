"""The labelled file of the critic's exam: JSON lines, each row strictly checked before it may grade anything.

Owns the format and its invariant: no flaw counts as found by a text that only repeats the request, the principle, the
instruction, the answer or a fixed generic critique, and none counts as gone from the answer as it stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import orjson

from cai.errors import CaiError
from cai.evaluate.cases import GENERIC_CRITIQUE
from cai.evaluate.critic_grading import CHECKABLE, KINDS, ExamRow, Flaw, flaw_gone, grade_critique
from cai.evaluate.flaw_checks import fault_of, holds, mentions
from cai.recipe.constitution import Constitution
from cai.store.jsonl import Row

POOLS = ("benign", "redteam")
LENGTHS = {"short": (20, 60), "long": (150, 300)}  # words of the answer
KEYS = ("id", "pool", "length", "principle", "instruction", "answer", "flaws")
FLAW_KEYS = ("kind", "span", "names")


def read_rows(path: Path, constitution: Constitution | None = None, checked: str = "") -> list[ExamRow]:
    """The labelled rows, each one strictly checked. `constitution`: its requests must not pass for a critique either.

    `checked`: sha256 of a file that was found right as a whole, before: its rows are read only (a second of checks).
    A row: `id, pool, length, principle` (an id of the constitution)`, instruction, answer, flaws`, optional `holds`. A
    flaw: `kind, span, names`, optional `gone`. Errors: CaiError with one line that names file, line and key.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CaiError(f"{path}: cannot read the critic's exam: {error.strerror}. Give a JSON lines file.") from None
    known = hashlib.sha256(data).hexdigest() == checked
    rows: dict[str, ExamRow] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            row = _row(line, where)
            if row.id in rows or any(row.answer == other.answer for other in rows.values()):
                raise CaiError(f"{where}: id: {row.id!r} or its answer stands twice. Leave one out.")
            if not known and (fault := _fault_of_row(row, constitution)):
                raise CaiError(f"{where}: {row.id}: {fault}")
            rows[row.id] = row
    if not rows:
        raise CaiError(f"{path}: no row. Write one JSON object a line with {', '.join(KEYS)}.")
    return list(rows.values())


def _row(line: bytes, where: str) -> ExamRow:
    try:
        raw = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise CaiError(f"{where}: no JSON: {error}. Write one JSON object a line.") from None
    _keys(raw, KEYS, ("holds",), where)
    for key in KEYS[:-1]:
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise CaiError(f"{where}: {key}: not a text. Write one.")
    for key, allowed in (("pool", POOLS), ("length", tuple(LENGTHS))):
        if raw[key] not in allowed:
            raise CaiError(f"{where}: {key}: {raw[key][:40]!r} is none of {', '.join(allowed)}. Correct it.")
    if not isinstance(raw["flaws"], list):
        raise CaiError(f"{where}: flaws: not a list. Write [] for a sound answer.")
    checks = raw.get("holds", [])
    if not isinstance(checks, list):
        raise CaiError(f"{where}: holds: not a list of checks. Correct it or leave it out.")
    for i, check in enumerate(checks):
        if fault := fault_of(check):
            raise CaiError(f"{where}: holds[{i}]: {fault}")
    flaws = tuple(_flaw(flaw, f"{where}: flaws[{i}]") for i, flaw in enumerate(raw["flaws"]))
    return ExamRow(**{key: raw[key] for key in KEYS[:-1]}, flaws=flaws, holds=tuple(checks))


def _flaw(raw: Row, where: str) -> Flaw:
    _keys(raw, FLAW_KEYS, ("gone",), where)
    if raw["kind"] not in KINDS:
        raise CaiError(f"{where}: kind: {str(raw['kind'])[:40]!r} is none of {', '.join(KINDS)}. Correct it.")
    if not isinstance(raw["span"], str) or not raw["span"].strip():
        raise CaiError(f"{where}: span: not a text. Copy the words of the answer that are the flaw.")
    names = raw["names"]
    if not isinstance(names, list) or len(names) < 2 or any(not _is_name(name) for name in names):
        raise CaiError(f"{where}: names: not a list of two lower-case phrases or more. Say what a finder would say.")
    check = raw.get("gone")
    if check is None and raw["kind"] in CHECKABLE:
        raise CaiError(f"{where}: gone: missing. A {raw['kind']} needs a program check.")
    if check is not None and (fault := fault_of(check)):
        raise CaiError(f"{where}: gone: {fault}")
    return Flaw(raw["kind"], raw["span"], tuple(names), check)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name == name.lower() and all(part.strip() for part in name.split("&"))


def _keys(raw: object, required: Sequence[str], optional: Sequence[str], where: str) -> None:
    if not isinstance(raw, dict):
        raise CaiError(f"{where}: no JSON object. Write one with the keys {', '.join(required)}.")
    for key in required:
        if key not in raw:
            raise CaiError(f"{where}: {key}: missing. A row needs {', '.join(required)}.")
    if unknown := raw.keys() - {*required, *optional}:
        raise CaiError(f"{where}: {min(unknown)}: unknown key. Use {', '.join((*required, *optional))}.")


def _fault_of_row(row: ExamRow, constitution: Constitution | None) -> str:
    """Why this row cannot grade anything, or ""."""
    low, high = LENGTHS[row.length]
    if not low <= (n := len(row.answer.split())) <= high:
        return f"answer: {n} words; a {row.length} one has {low} to {high}. Change the answer or its length."
    for i, flaw in enumerate(row.flaws):
        if flaw.span not in row.answer:
            return f"flaws[{i}]: span: not in the answer. Copy it exactly."
        if flaw_gone(row, flaw, row.answer) is not False:
            return f"flaws[{i}]: gone: already true of the answer as it stands. Correct the check."
        if taken := [name for name in flaw.names if mentions(name, f"{row.instruction}\n{row.answer}")]:
            return f"flaws[{i}]: names: {taken[0]!r} stands in the instruction or the answer. Use another."
    for i, check in enumerate(row.holds):
        if holds(check, row.answer) is not True:
            return f"holds[{i}]: not true of the answer. Correct the check."
    return _fooled(row, constitution)


def _fooled(row: ExamRow, constitution: Constitution | None) -> str:
    """What passes for having found a flaw although it only repeats what is given, or ""."""
    known = {p.id: p for p in constitution.principles} if constitution else {}
    if constitution and row.principle not in known:
        return f"principle: {row.principle!r} is not in {constitution.path}. Use one of its ids."
    given = {"a generic critique": GENERIC_CRITIQUE, "the instruction": row.instruction, "the answer": row.answer}
    if principle := known.get(row.principle):
        given |= {"the principle": principle.principle, "the request": principle.critique_request}
    for i, flaw in enumerate(row.flaws):
        for what, text in given.items():
            if any(mentions(name, text) for name in flaw.names):
                return f"flaws[{i}]: names: one of them stands in {what}. Use words that only a finder would use."
            if any(grade_critique(row, f"{head}{text}").found[i] for head in ("", "The answer says: ")):
                return f"flaws[{i}]: {what} alone passes for a critique that found it. Change span or names."
    return ""
