"""Plain text -> requests with their lines: one a line, a Markdown list, or paragraphs that are plainly wrapped.

Owns what a line is. What could be read in two ways is a `Broken` with its line: a prompt that was cut in half, a
heading or an answer taken for a request would be trained on without a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cai.recipe.intake import frames
from cai.recipe.intake.jsontext import MOST_ENTRIES, Broken, Entry

LINE_END = re.compile(r"\r\n|\n|\r|\f|\v")
OTHER_END = re.compile("[\x85\u2028\u2029]")  # the line ends of a file that has none of the others
ALPACA = re.compile(
    r"#{2,4}\s*(?:instruction|input|response|human|assistant|user|system)\s*:?\s*$|#{2,4}\s*\w+:\s", re.I
)
HEADING = re.compile(r"#{1,6}\s+\S")
COMMENT = re.compile(r"//|<!--.*-->$")
BULLET = "[-*+•‣◦–—·▪▫■□●○◆◇★☆✓✔✗✘→⇒➔➜➤►▶›⁃∙\uf0a0-\uf0fe]"  # the last: Symbol's, as Word copies them
ITEM = re.compile(
    rf"(?:{BULLET}|o(?=\t)|\(?(?P<number>\d{{1,3}})[.)]|(?:Q|Question|Prompt|No\.?)\s?\d{{1,5}}\s?[.):])\s+"
    r"(?:\[[ xX]\]\s+)?(?P<text>\S.*)"
)
LATER_ITEM = re.compile(ITEM.pattern.replace(r"\d{1,3}", r"\d{1,6}"))  # the first is no year; item 1,000 may be one
ONE_A_LINE = "write one request a line, or a JSON object a line"
ROLES = "Human|User|Assistant|AI|System|GPT|Bot|Q|A|Question|Answer|Prompt|Response|Instruction|Input|Output"
FORM = "id|instruction|prompt|question|input|output|messages|pool|text"
REFUSED = (  # a line that is part of something else, what it is
    (ALPACA, "a frame around requests and answers"),
    (re.compile(r"```|~~~"), "a code fence: where the request begins and ends is not plain"),
    (re.compile(r"(?:[-=*_+]\s*){3,}$|-{4,}.*-{4,}$"), "a rule: whether it parts requests is not plain"),
    (re.compile(r"\|.*\|$"), "a Markdown table: save it as CSV with a header"),
    (re.compile(r"#[^\s#]|#$|--\s|/\*|[;%]\s|REM\s"), "a comment, or a request?"),
    (
        re.compile(r"<\|?/?\w+(?:\s[^<>]*)?\|?>|<｜[^<>]*｜>|\[/?(?:INST|gMASK|SYSTEM_PROMPT)\]"),
        "a tag or a chat token",
    ),
    (re.compile(r"(?:\+\+\+|---|@@)\s.*"), "a part of a patch"),
    (re.compile(r".*\\$"), "a line that ends with a backslash"),
    (re.compile(rf"(?:{ROLES})\s*:\s"), "a turn of a transcript"),
    (re.compile(rf"(?:-\s+)?(?:{FORM})\s*:(?:\s|$)"), "a key of YAML or of a form"),
    (re.compile(r"[\]}),]|'.*',$|\".*\",$|[\"{\[].*\":\s*[\"\[{\d]"), "a part of JSON or of code"),
    (
        re.compile(r"(?:export\s+)?(?:const|let|var)\s+\w+\s*=|\w+\s*=\s*[\[{(]\s*(?:$|[\"'].*[\"'],?\s*[\]})];?$)"),
        "code",
    ),
    (re.compile(r"(?![A-Z][^=(]*\?$).*(?:\"\"\"|''')"), "a quoted block of code"),
    (re.compile(r"\[{1,2}[A-Za-z][\w.-]*\]{1,2}$"), "a section of a TOML or INI file"),
    (re.compile(r"\\(?:begin|end|item|documentclass|usepackage|section)\b"), "LaTeX"),
    (re.compile(r"(?:\d\d:)?\d\d:\d\d[,.]\d{3}\s*-->"), "a subtitle's time"),
    (re.compile(r"(?!.*\?$)(?:INSERT INTO\s.*\bVALUES\b|CREATE TABLE\s.*\()", re.I), "a database's dump"),
    (re.compile(r">\s"), "a quoted line of Markdown or mail"),
)
ANY_REFUSED = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, _ in REFUSED[1:]))  # nearly every line has none
COLUMN = re.compile(
    r"(?:prompt|instruction|question|request|goal|behaviou?r|text|task|input|message|sentence|utterance|user)s?"
    r"|quer(?:y|ies)|content",
    re.IGNORECASE,
)
GLUED = re.compile(rf"(?:{BULLET}|[・»])(?=[^\W\d_]|[\"“'¿¡])")  # a mark without a space behind it
HEADING_WORDS = 3
TERMINATED = re.compile(r"[.?!…。？！؟।॥][\"'”’»)\]]*$")
ASKED = re.compile(r"[?？؟][\"'”’»)\]]*$")
HANGING = re.compile(
    r"(?:\b(?:a|an|the|of|and|or|to|for|with|about|in|on|at|by|from|that|which|my|your|his|her|its|our|their|is|are)|,)$"
)
ARTICLE = re.compile(  # no request ends so, however the next line begins: "in the" / "Alps", "in der" / "Küche"
    r"\b(?:the|an|my|your|their|der|den|dem|des|ein|eine[mnrs]?|und|oder|les?|du|des|une?|et|ou|los|las|unas?|y|il|gli|het|een|и|или)$"
)
JOINING = re.compile(r"(?:and|or|but|with|of|that|which|who|to|for|from|than|as|so|because|about|its|his|her)\b")
WRAP_WIDTH = 45  # characters: a line that was wrapped is seldom shorter


@dataclass
class Plain:
    """`entries`: the requests; `passed`: what else stood there, by name; `joined`: paragraphs over several lines."""

    entries: list[Entry] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    joined: int = 0
    how: str = "plain text, one a line"
    marks: str = ""  # that stood around every request and were taken off


def lines_of(text: str) -> list[tuple[int, str]]:
    """(number, line without what is white at its end); line ends of Unix, Windows and old Macs. Errors: Broken."""
    if text.count("\n") + text.count("\r") > MOST_ENTRIES:
        raise Broken(1, f"more than {MOST_ENTRIES:,} lines. Give a smaller file")
    end = LINE_END if LINE_END.search(text.rstrip()) else re.compile(f"{LINE_END.pattern}|{OTHER_END.pattern}")
    lines = [(number, line.rstrip()) for number, line in enumerate(end.split(text), 1)]
    return [(number, line if line and frames.visible(line) else "") for number, line in lines]


def passed_over(line: str) -> str:
    """What a line is that is no request and may be left out; "" for every other line."""
    bare = line.strip()
    if not bare.startswith(("#", "/", "<")):
        return ""
    if COMMENT.match(bare):
        return "comment"
    return "heading" if HEADING.match(bare) and not ALPACA.match(bare) else ""


def refuse(number: int, line: str, *, item: bool = True) -> None:
    """`Broken` for a line that stands for something else than a request. `item`: list items too."""
    bare = line.strip()
    for pattern, what in REFUSED if bare.startswith("#") or ANY_REFUSED.match(bare) else ():
        if pattern.match(bare):
            raise Broken(number, f"{what} ({bare[:40]!r}): {ONE_A_LINE}")
    if item and ITEM.match(bare):
        raise Broken(number, f"a list item among other lines ({bare[:40]!r}): {ONE_A_LINE}")


def parse(lines: Sequence[tuple[int, str]]) -> Plain:
    """The requests of a plain text, by its lines. Errors: Broken."""
    found = Plain()
    content = [(number, line) for number, line in lines if line.strip() and not passed_over(line)]
    found.passed.update(kind for _, line in lines if (kind := passed_over(line)))
    if not content:
        return found
    if all(line.lstrip().startswith(">") for _, line in content):
        return parse([(number, line.lstrip().removeprefix(">")) for number, line in lines])
    _of_content(content, lines, found)
    found.entries, found.marks = frames.unwrapped(found.entries)
    return found


def _of_content(content: Sequence[tuple[int, str]], lines: Sequence[tuple[int, str]], found: Plain) -> None:
    for number, line in content:
        refuse(number, line, item=False)
    if _is_list(content):
        _list(lines, found)
        return
    if len(content) > 1 and all(GLUED.match(line.strip()) and not line.rstrip().endswith("*") for _, line in content):
        found.entries = [Entry(number, line.strip()[1:].strip()) for number, line in content]
        found.how = "a list, its marks taken off"
        return
    if (entries := frames.unnumbered(content)) is not None:
        found.entries, found.how = entries, "a numbered list, its numbers taken off"
        return
    if len(content) > 1 and COLUMN.fullmatch(content[0][1].strip()):
        name = content[0][1].strip()
        raise Broken(content[0][0], f"reads as a column's name ({name!r}): take the line out, or {_key(name)}")
    for number, line in content:
        if len(content) > 1:
            refuse(number, line)
    _refuse_headings([(number, line.strip()) for number, line in content])
    blocks = _blocks(lines)
    if len(blocks) > 1 and any(len(block) > 1 for block in blocks):
        _paragraphs(blocks, found)
        return
    _refuse_wrapped([line for block in blocks for line in block])
    found.entries = [Entry(number, line.strip()) for number, line in content]


def _refuse_headings(lines: Sequence[tuple[int, str]]) -> None:
    """`Broken` for "Cooking:" or "COOKING" between requests; not where most lines look so."""
    cased = [any(sign.islower() for sign in line) for _, line in lines]
    found = []
    for number, line in lines:
        short = len(line.split()) <= HEADING_WORDS and (" " in line or len(line) > 2)
        loud = line.isupper() and not TERMINATED.search(line) and sum(cased) * 2 >= len(lines)
        if short and (loud or line.endswith((":", "："))):
            found.append((number, line))
    if found and len(found) * 2 <= len(lines):
        number, line = found[0]
        raise Broken(number, f"a heading, or a request ({line[:40]!r})? Put '# ' before a heading, or {ONE_A_LINE}")


def _key(name: str) -> str:
    return f"say that it is one: --set instructions.key={name}"


def _is_list(content: Sequence[tuple[int, str]]) -> bool:
    """Whether the first line is a list's item; a lone "2. ..." is none (an ordinal begins so in other languages)."""
    first = ITEM.match(content[0][1].strip())
    if first is None:
        return False
    return len(content) > 1 or first["number"] in (None, "1")


def _list(lines: Sequence[tuple[int, str]], found: Plain) -> None:
    """Items without their marks. A line that is further in continues its item."""
    base, blank = None, False
    for number, line in lines:
        if not line.strip() or passed_over(line):
            blank = True
            continue
        indent = len(line) - len(line.lstrip())
        item = LATER_ITEM.match(line.strip())
        base = indent if base is None else base
        if item and indent <= base:
            found.entries.append(Entry(number, item["text"].strip()))
        elif item:
            raise Broken(number, f"a list within a list: {ONE_A_LINE}")
        elif indent > base or (not blank and continues(found.entries[-1].value, line.strip())):
            last = found.entries[-1]
            found.entries[-1] = Entry(last.line, f"{last.value} {line.strip()}")
            found.joined += 1
        else:
            raise Broken(number, f"neither an item of the list nor a heading ({line.strip()[:40]!r}): {ONE_A_LINE}")
        blank = False
    found.how = "a list, its marks taken off"


def _blocks(lines: Sequence[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, line in lines:
        if line.strip() and not passed_over(line):
            blocks[-1].append((number, line.strip()))
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def continues(before: str, line: str) -> bool:
    return line[:1].islower() and not TERMINATED.search(before)


def _paragraphs(blocks: Sequence[Sequence[tuple[int, str]]], found: Plain) -> None:
    """Blocks parted by blank lines, some over several lines: joined where each line plainly goes on with the last."""
    for block in blocks:
        texts = [line for _, line in block]
        if len(block) > 1 and all(ASKED.search(text) for text in texts):  # questions in groups
            found.entries += [Entry(number, text) for number, text in block]
            continue
        plain = all(continues(before, line) for before, line in pairwise(texts))
        if len(block) > 1 and (not plain or texts[0][:1].islower()):
            raise Broken(
                block[1][0],
                "blank lines stand between groups of lines, so it is not plain whether this line is a request or the "
                "rest of one: write one request a line without blank lines, or a JSON object a line",
            )
        found.entries.append(Entry(block[0][0], " ".join(texts)))
        found.joined += len(block) > 1
    found.how = "plain text, a paragraph each"


def _refuse_wrapped(lines: Sequence[tuple[int, str]]) -> None:
    """`Broken` where a line reads as the rest of the line before; not where requests begin in lower case anyway."""
    pairs = list(pairwise(lines))
    begins = [lines[0][1], *(line for (_, before), (_, line) in pairs if TERMINATED.search(before))]
    if sum(line[:1].islower() for line in begins) * 2 > len(begins):
        return
    longest = max(len(line) for _, line in lines)
    for (_, before), (number, line) in pairs:
        full = len(before) + 1 + len(line.split(" ", 1)[0]) > longest  # one word more would not have gone into it
        hangs = (len(before) >= WRAP_WIDTH and full) or HANGING.search(before) or JOINING.match(line)
        if (hangs and continues(before, line)) or ARTICLE.search(before):
            raise Broken(number, f"reads as the rest of the line before ({line[:40]!r}): {ONE_A_LINE}")
