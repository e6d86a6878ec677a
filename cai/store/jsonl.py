"""One row as one JSON line: what UTF-8 can carry, no NaN, nothing that acts on a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from cai import errors
from cai.errors import CaiError
from cai.terminal import UNSAFE

Row = dict[str, Any]  # one JSON object whose kind is not known here: a line of a log, a manifest, facts of an event
JsonObject = Mapping[str, Any]  # the same where it is only read; `cai.store.row_types` has the kinds
SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` as UTF-8 can carry it: lone surrogates become U+FFFD. Everything else (NUL, C1, U+2028) passes."""
    return SURROGATES.sub("\ufffd", text) if SURROGATES.search(text) else text


def encode(row: Mapping[str, object]) -> bytes:
    """The row's line with its newline. Refuses NaN and infinities (orjson would write null): CaiError(QUALITY).

    What `printable` would spell out (DEL, C1, bidi marks, Unicode line ends) is written as a JSON escape, as C0 always
    is: the value is the same, but `tail -f` shows a hostile text inert, and every reader sees one line a row.
    """
    _refuse_non_finite(row, "")
    try:
        line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        whole = _leaves(row, lambda leaf: clean(leaf) if isinstance(leaf, str) else leaf)
        line = orjson.dumps(whole, option=orjson.OPT_APPEND_NEWLINE)
    if line.isascii() and b"\x7f" not in line:
        return line
    return UNSAFE.sub(_escape, line.decode()).encode()


def _escape(match: re.Match[str]) -> str:
    """The JSON escape of a character: one \\uNNNN for each of its UTF-16 units."""
    units = match[0].encode("utf-16-be").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def _refuse_non_finite(value: object, where: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CaiError(f"record field {where[1:]} is {value}: not a number that can be stored", errors.QUALITY)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(inner, str):
                _refuse_non_finite(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _refuse_non_finite(inner, f"{where}.{index}")


def nulled(value: object) -> Any:
    """The value with null for every NaN and infinity: what could not be scored stands unscored in a measured row."""
    return _leaves(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def _leaves(value: object, change: Callable[[Any], object]) -> Any:
    """The value with every name and every value in it changed."""
    if isinstance(value, Mapping):
        return {change(name): _leaves(inner, change) for name, inner in value.items()}
    return [_leaves(inner, change) for inner in value] if isinstance(value, list | tuple) else change(value)


def read_object(path: Path) -> Row:
    """The JSON object in a file; {} where there is none, or it holds something else: for what decides nothing."""
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def one_line(value: object) -> str:
    return " ".join(str(value).split())
