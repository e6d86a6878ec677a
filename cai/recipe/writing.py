"""How a value that was refused is written: `.00005` -> 0.00005, `True` -> true, `xstest` -> ["xstest"], `1e5` -> "1e5".

Owns these remedies. Pure. Does not decide what is valid (settings do).
"""

from __future__ import annotations

import math
import re

BOOLEANS = {"true": "true", "yes": "true", "on": "true", "1": "true", "false": "false", "no": "false", "off": "false"}
BOOLEANS["0"] = "false"
GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")


def remedy(kind: str, value: object, raw: str | None) -> str:
    """What to write instead, "" where it is not plain. `kind`: pydantic's error type; `raw`: the text behind --set."""
    text = raw if raw is not None else value if isinstance(value, str) else str(value)
    text = text.strip()
    if kind.startswith("bool"):
        return BOOLEANS.get(text.lower().strip("\"'"), "")
    if kind.startswith("float") or kind == "finite_number":
        return _number(text, whole=False)
    if kind.startswith("int"):
        return _number(text, whole=True)
    if kind.startswith(("tuple", "list")):
        return _list(text, value)
    if kind.startswith("string") and not isinstance(value, dict | list | tuple):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if len(text) <= 60 else ""
    return ""


def _number(text: str, whole: bool) -> str:
    bare = text.strip("\"'").replace("_", "")
    bare = bare.replace(",", "") if GROUPED.fullmatch(bare) else bare.replace(",", ".", 1)
    try:
        number = float(bare)
    except (ValueError, OverflowError):
        return ""
    if not math.isfinite(number):
        return ""
    if whole:
        return f"{int(number)}" if number.is_integer() and abs(number) < 1e15 else ""
    shown = repr(number)
    return shown if "e" not in shown or re.fullmatch(r"-?\d(?:\.\d+)?e[+-]?\d+", shown) else ""


def _list(text: str, value: object) -> str:
    if isinstance(value, bool | int | float):
        return f"[{text}]"
    if not isinstance(value, str):
        return ""
    inner = text.strip().strip("[]()").strip()
    parts = [part.strip().strip("\"'") for part in re.split(r"[,\s]+", inner) if part.strip()]
    if not parts or len(inner) > 200:
        return ""
    return "[" + ", ".join(part if re.fullmatch(r"-?\d+(?:\.\d+)?", part) else f'"{part}"' for part in parts) + "]"
