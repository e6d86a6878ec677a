"""Program checks of a text: numbers, words, list items, JSON, spelling, code that parses, phrases said or left out.

Owns the checks that the critic's exam names in its file, and the checking of their arguments. A check reads a text and
answers yes or no; None where there is nothing that it could count. Pure: code is parsed and searched, never run.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from cai.metrics.text import words
from cai.store.jsonl import JsonObject

Check = JsonObject
_NUMBER = re.compile(r"(?:(?<![\w)])[-−])?\d+(?:,\d{3})*(?:\.\d+)?")
_MARKER = re.compile(r"^[ \t]*(?:\d{1,2}[.)]|[-*•])[ \t]+", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]{0,3}\d{1,2}[.)][ \t]+\S", re.MULTILINE)
_BULLET = re.compile(r"^[ \t]{0,3}[-*•][ \t]+\S", re.MULTILINE)
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def numbers(text: str) -> list[float]:
    """The numbers written in digits, without the markers of a numbered list; "1,250" is one number."""
    found = _NUMBER.findall(_MARKER.sub("", text))
    return [float(number.replace(",", "").replace("−", "-")) for number in found]


def list_items(text: str) -> int:
    """Items of the outer list: its numbers, or its bullets where nothing is numbered."""
    return len(_NUMBERED.findall(text)) or len(_BULLET.findall(text))


def fenced_blocks(text: str) -> list[str]:
    return [block for block in _FENCED.findall(text) if block.strip()]


def mentions(phrase: str, text: str) -> bool:
    """The phrase stands in the text, from the start of a word; the parts of "a & b" stand in one sentence.

    Case, kinds of apostrophe and thousands commas do not count; a phrase that ends in a digit is a whole number there.
    """
    plain, asked = _plain(text), phrase.split("&")
    if not all(word in plain for part in asked for word in _plain(part).split()):
        return False  # most phrases stand in few texts: a pattern is made for those alone
    parts = [_pattern(part) for part in asked]
    if len(parts) == 1:
        return bool(parts[0].search(plain))
    return any(all(part.search(sentence) for part in parts) for sentence in re.split(r"(?<=[.!?])\s+|\n", plain))


@lru_cache(maxsize=4096)
def _pattern(phrase: str) -> re.Pattern[str]:
    body = r"\s+".join(re.escape(word) for word in _plain(phrase).split())
    whole = r"(?!\w|[.,]\d)" if phrase.rstrip()[-1:].isdigit() else ""
    before = r"(?<![\w.])" if phrase.lstrip()[:1].isdigit() else r"(?<!\w)"
    return re.compile(before + body + whole)


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3})", "", text.lower().replace("’", "'"))


def _number(check: Check, text: str) -> bool:
    own, within = numbers(text), check.get("within", 0.005)
    stands = lambda value: any(math.isclose(value, n, rel_tol=0.0, abs_tol=within) for n in own)  # noqa: E731 - one use
    return any(map(stands, check["right"])) and not any(map(stands, check.get("wrong", ())))


def _words(check: Check, text: str) -> bool:
    return check.get("least", 1) <= len(words(text)) <= check["most"]


def _items(check: Check, text: str) -> bool | None:
    found = list_items(text)
    return found == check["count"] if found else None


def _json(check: Check, text: str) -> bool:
    return any(_has_keys(block, check.get("keys", ())) for block in fenced_blocks(text) or [_braced(text)])


def _braced(text: str) -> str:
    """From the first opening brace or bracket to the last closing one; no pattern, which takes n^2 on a row of "["."""
    starts = [place for bracket in "{[" if (place := text.find(bracket)) >= 0]
    return text[min(starts) : max(text.rfind("}"), text.rfind("]")) + 1] if starts else ""


def _has_keys(block: str, keys: Sequence[str]) -> bool:
    try:
        value = json.loads(block)
    except (ValueError, RecursionError):
        return False
    entries = value if isinstance(value, list) else [value]
    return bool(entries) and all(isinstance(entry, dict) and set(keys) <= entry.keys() for entry in entries)


def _spelled(check: Check, text: str) -> bool:
    stands = lambda name: re.search(rf"(?<!\w){re.escape(name)}", text)  # noqa: E731 - one use
    return bool(stands(check["right"])) and not any(map(stands, check["wrong"]))


def _code(check: Check, text: str) -> bool:
    """All of the fenced code: Python that parses, where the check says so, has every pattern and none of the others."""
    blocks = fenced_blocks(text)
    if not blocks or (check.get("python") and not all(map(_parses, blocks))):
        return False
    code = "\n".join(blocks)
    has, lacks = check.get("has", ()), check.get("lacks", ())
    return all(re.search(p, code) for p in has) and not any(re.search(p, code) for p in lacks)


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _says(check: Check, text: str) -> bool:
    says, lacks = check.get("any", ()), check.get("none", ())
    return (not says or any(mentions(p, text) for p in says)) and not any(mentions(p, text) for p in lacks)


NUMBERS, TEXTS = "a list of numbers", "a list of texts"
CHECKS: dict[str, tuple[Callable[[Check, str], bool | None], dict[str, str], dict[str, str]]] = {
    "number": (_number, {"right": NUMBERS}, {"wrong": NUMBERS, "within": "a number"}),
    "words": (_words, {"most": "a whole number"}, {"least": "a whole number"}),
    "items": (_items, {"count": "a whole number"}, {}),
    "json": (_json, {}, {"keys": TEXTS}),
    "spelled": (_spelled, {"right": "a text", "wrong": TEXTS}, {}),
    "code": (_code, {}, {"python": "true or false", "has": TEXTS, "lacks": TEXTS}),
    "says": (_says, {}, {"any": TEXTS, "none": TEXTS}),
}  # name: the check, its required and its optional arguments


def holds(check: Check, text: str) -> bool | None:
    """The check's answer on a text; None where the text has nothing that it counts (a list that became prose)."""
    return CHECKS[check["check"]][0](check, text)


def fault_of(check: object) -> str:
    """What is wrong with a check as written in a file, or ""."""
    if not isinstance(check, dict) or check.get("check") not in CHECKS:
        return f"no check of this name. Use an object with check: {', '.join(CHECKS)}."
    _, required, optional = CHECKS[check["check"]]
    allowed = required | optional
    for key in check.keys() - {"check"}:
        if key not in allowed:
            return f"{key}: unknown argument of {check['check']}. It takes {', '.join(allowed)}."
        if not _is(check[key], allowed[key]):
            return f"{key}: not {allowed[key]}. Correct it."
    if missing := required.keys() - check.keys():
        return f"{sorted(missing)[0]}: missing. The check {check['check']} needs {', '.join(required)}."
    if not required and len(check) == 1 and check["check"] != "json":
        return f"checks nothing. Give one of {', '.join(optional)}."
    return _bad_pattern(check)


def _is(value: object, what: str) -> bool:
    if what in (NUMBERS, TEXTS):
        each = "a number" if what == NUMBERS else "a text"
        return isinstance(value, list) and bool(value) and all(_is(entry, each) for entry in value)
    if what == "a text":
        return isinstance(value, str) and bool(value.strip())
    if what == "true or false":
        return isinstance(value, bool)
    kinds = int if what == "a whole number" else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _bad_pattern(check: Check) -> str:
    for key in ("has", "lacks"):
        for pattern in check.get(key, ()):
            try:
                re.compile(pattern)
            except re.error as error:
                return f"{key}: {pattern!r} is no regular expression: {error}. Correct it."
    return ""
