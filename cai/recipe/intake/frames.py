"""What stands around a request and is no part of it: numbers, quotation marks, emphasis, a chat template's frame.

Owns these marks. They are taken off where every request of a file has them, so that nothing is a matter of taste; a
frame around one request, or JSON within a text, is a `Broken`. Pure.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from cai.recipe.intake.jsontext import Broken, Entry

INVISIBLE = re.compile(r"[\s\u00ad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe0f\ufeff]*")
LONGEST_END = 100  # characters of a text's end in which a frame's last mark stands
CJK = "一二三四五六七八九十"
ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii", "xiii", "xiv", "xv", "xvi", "xvii",
         "xviii", "xix", "xx")  # fmt: skip
NUMBERINGS: tuple[tuple[re.Pattern[str], Callable[[str], int]], ...] = (  # a line's number, its value
    (re.compile(r"[(\[（【#]?(\d{1,5})\s?(?:[.)\]:：、．）】](?!\d)|\s[-–—]\s)\s*(?=\S)"), int),
    (re.compile(rf"[(（]?([{CJK}]{{1,3}})[、.．)）]\s*(?=\S)"), lambda sign: _cjk(sign)),
    (re.compile(r"([\u2460-\u2473\u2474-\u2487\u2488-\u249b\u2776-\u277f])\s*(?=\S)"),
     lambda sign: int(unicodedata.numeric(sign))),
    (re.compile(r"\(?([a-z])[.)]\s+(?=\S)", re.IGNORECASE), lambda sign: ord(sign.lower()) - ord("a") + 1),
    (re.compile(r"\(?([ivx]{1,5})[.)]\s+(?=\S)", re.IGNORECASE), lambda sign: _roman(sign)),
    (re.compile(r"(\d)\ufe0f?\u20e3\s*(?=\S)"), int),  # an emoji's key
    (re.compile(r"[A-Z]{1,3}[ _-]?(\d{1,5})\s?[.):]\s+(?=\S)"), int),
    (re.compile(r"(?:Instruction|Task|Example|Request|Item|Query)\s?(\d{1,5})\s?[.):]\s*(?=\S)", re.IGNORECASE), int),
)  # fmt: skip
SECTION = re.compile(r"(\d{1,3})\.(\d{1,3})[.)]?\s+(?=\S)")
WRAPS = (("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ("“", "”"), ("„", "“"), ("«", "»"), ("「", "」"),
         ('"', '"'), ("'", "'"))  # fmt: skip
TEMPLATE = re.compile(
    r"\s*(?:<s>\s*(?:\[INST\]|<|###|Human|User)|<\|?begin[_▁]of[_▁]\w+\|?>|<bos>|\[INST\]|<<SYS>>|<start_of_turn>"
    r"|<\|(?:im_start|start_header_id|user|system|assistant|prompter|endoftext|start|[A-Z_]+_TOKEN)\|>"
    r"|<｜[^｜>\n]{1,40}｜>|\[gMASK\]|\[/?SYSTEM_PROMPT\]|\[AVAILABLE_TOOLS\]"
    r"|Below is an instruction that describes a task|###\s*(?:Instruction|Input|Question|Prompt)\s*:)"
)
CLOSING = re.compile(r"(?<=\S)(?:</s>|<\|\w+\|>|<｜[^｜>\n]{1,40}｜>|<end_of_turn>|<eos>|\[/INST\])\s*$|\s\[/INST\]$")
ASKED = re.compile(r"(?:^|\s)(?:user|human|q|question|instruction|input)\s?:\s", re.IGNORECASE)
LEFT_OPEN = re.compile(r"\s(?:assistant|ai|bot|gpt|a|answer|response|output)\s?:\s*$", re.IGNORECASE)
PYTHONS = re.compile(r"\s*(?:\[\s*|array\(\[)?\{'(?:role|content|from|value|messages|prompt|instruction)':")
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,5}|#x[0-9a-fA-F]{1,5});")
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}|\{[A-Za-z_]\w*\}")


def _cjk(sign: str) -> int:
    tens, ten, ones = sign.partition("十")
    if not ten:
        return CJK.index(sign) + 1 if len(sign) == 1 else 0
    return 10 * (CJK.index(tens) + 1 if tens else 1) + (CJK.index(ones) + 1 if ones else 0)


def _roman(sign: str) -> int:
    return ROMAN.index(sign.lower()) + 1 if sign.lower() in ROMAN else 0


def visible(text: str) -> bool:
    return INVISIBLE.fullmatch(text) is None


def unnumbered(lines: Sequence[tuple[int, str]]) -> list[Entry] | None:
    """The lines without their numbers, where they are numbered upwards from 0 or 1; None where they are not.

    Errors: Broken where the first lines are and another is not: whether it is a request of its own is not plain.
    """
    for pattern, value in NUMBERINGS:
        found = [(number, line, pattern.match(line.strip())) for number, line in lines]
        counted = [value(match[1]) if match else None for _, _, match in found]
        if len(counted) < 2 or counted[0] not in (0, 1) or counted[1] != (counted[0] or 0) + 1:
            continue
        for number, line, match in found:
            if match is None:
                raise Broken(
                    number, f"no number, and lines before have one ({line.strip()[:40]!r}): one request a line"
                )
        if all(a is not None and b is not None and a < b for a, b in pairwise(counted)):
            return [Entry(number, line.strip()[match.end() :].strip()) for number, line, match in found if match]
    return _unnumbered_sections(lines)


def _unnumbered_sections(lines: Sequence[tuple[int, str]]) -> list[Entry] | None:
    """1.1, 1.2, 2.1: each number follows the one before, in its section or in the next."""
    found = [(number, line.strip(), SECTION.match(line.strip())) for number, line in lines]
    counted = [(int(match[1]), int(match[2])) for _, _, match in found if match]
    if len(counted) < max(2, len(found)) or counted[0] not in ((0, 1), (1, 0), (1, 1)):
        return None
    if not all(b in ((a[0], a[1] + 1), (a[0] + 1, 0), (a[0] + 1, 1)) for a, b in pairwise(counted)):
        return None
    return [Entry(number, line[match.end() :].strip()) for number, line, match in found if match]


def unwrapped(entries: Sequence[Entry]) -> tuple[list[Entry], str]:
    """(entries without the marks that stand around every one of them, what was taken off: "" for nothing)."""
    texts = [entry.value for entry in entries]
    for left, right in WRAPS if len(texts) > 1 else ():
        size = len(left)
        if not all(text.startswith(left) and text.endswith(right) and len(text) > 2 * size for text in texts):
            continue
        inner = [text[size : len(text) - len(right)] for text in texts]
        if any(left in text or right in text for text in inner):
            if left not in "\"'":
                continue
            place = next(i for i, text in enumerate(inner) if left in text)
            raise Broken(entries[place].line, "quotation marks within quotation marks: write a JSON string a line")
        return [Entry(entry.line, text.strip()) for entry, text in zip(entries, inner, strict=True)], left + right
    return list(entries), ""


def refuse(text: str, line: int) -> None:
    """`Broken` for a text that is a request in another tool's frame, or a value as Python prints it."""
    if found := TEMPLATE.match(text):
        raise Broken(line, f"a chat template's frame around the request ({found[0].strip()!r}): give the request alone")
    end = text[-LONGEST_END:]
    if (found := CLOSING.search(end)) or ((found := LEFT_OPEN.search(end)) and ASKED.search(text)):
        shown = found[0].strip()[-24:]
        raise Broken(line, f"a prompt's frame around the request (it ends with {shown!r}): give the request alone")
    if PYTHONS.match(text):
        raise Broken(line, "a value as Python prints it, not a request. Save the file as JSON lines")


def within(text: str) -> Any:
    """The JSON list or object that a text is, as a table's cell may hold one; None for every other text."""
    bare = text.strip()
    if not (bare.startswith(("[", "{")) and bare.endswith(("]", "}"))):
        return None
    try:
        return json.loads(bare)
    except (ValueError, RecursionError):
        return None


def oddities(texts: Sequence[str]) -> list[str]:
    """What is worth a look and no fault: requests without a word, placeholders that nothing fills in."""
    wordless = [text for text in texts if not any(sign.isalpha() for sign in text)]
    held = [found[0] for text in texts if "{" in text and (found := PLACEHOLDER.search(text))]
    notes = [f"{len(wordless)} request(s) without a letter, such as {wordless[0][:20]!r}"] if wordless else []
    spelt = [found[0] for text in texts if "&" in text and (found := ENTITY.search(text))]
    notes += (
        [f"{len(spelt)} request(s) hold signs spelt as in HTML, such as {spelt[0]}, taken as they are"] if spelt else []
    )
    return notes + (
        [f"{len(held)} request(s) hold a placeholder such as {held[0][:30]}, taken as it is"] if held else []
    )
