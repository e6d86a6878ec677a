"""Where a completion ends: at the first sign that the transcript goes on. Pure: no model, no state.

Owns the judgement whether a place in a text is a sign or only talks about cases and answers, and the strings at which
an engine may stop. Doesn't own what the signs of a prompt file are (`turnsigns`), whether the text that is left is any
good (`parsing`), nor what is done with a cut one (the stages).

Invariants: `cut` changes nothing in front of the sign but a turn head written again at the very start, and white space,
rules and headings left hanging at the end; `cut(cut(x)) == cut(x)`; a cut text has no sign; whatever holds an engine
stop is cut at it or before it.

A marked name ("### Case") is a sign in any place where nothing but the name stands in the heading. A label of two words
("Review request:") needs a capital, the start of a line or the start of a sentence; a label of one word, which sound
texts use too ("Response:"), needs the start of a line, or a capital behind the end of a sentence, and is spared in list
items, in rows of other labels and in code. Of 2,368 texts of a 1.5B model
778 held a sign, 639 of them `### Case` or `### Order` in mid-line.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from cai.recipe.turn_signs import Patterns, Signs, key, opening, patterns_of, signs_of

__all__ = ["Cut", "Signs", "cut", "engine_stops", "has_sign", "signs_of"]

FIXED = ("Instruction",)  # no row of labels and no code block makes a sound text of "Instruction: ..."
NEAR = 400  # characters around a place that are looked at, so that a hostile text costs no quadratic time
QUOTES = "\"“”'‘’`„«"

_HEADING_LINE = re.compile(r"[ \t]*#{1,6}[ \t]+.*", re.S)
_LAST_HEADING = re.compile(r"[ \t]*#{2,6}[ \t]+\S")  # one '#' may be a comment of code
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.M)
_HASHES = re.compile(r"(?<![#\\])(#{1,6})(?!#)([ \t]*[-–—:.]?[ \t]*[*_]{0,3}\[?)")
_ALONE = re.compile(r"[\]*_]{0,4}[ \t]*[:：.]?[*_]{0,3}[ \t]*#*[ \t]*(?:\r?\n|\Z)")
_COLON = re.compile(r"[\]*_]{0,4}[ \t]*[:：]")
_GAP = re.compile(r"[ \t]*")
_LINE_HEAD = re.compile(r"[ \t]*(?:>[ \t]*)*(?:[*_]{1,3})?\[?\Z")
_QUESTION = re.compile(r"\bQuestion\b[^\n:：]{0,10}[:：]")
_MORE = re.compile(r"[ \t>*_#]*(?:additional|another|new|next|other|further|second|following|more)[ \t]+\Z", re.I)
_GLUED = re.compile(r"(?<=[.!?…\"”'’)])([*_])\1*\Z")
_ANSWERED = re.compile(r"\b(?:Answer|Back|Reply|A)\b[^\n:：]{0,10}[:：]|^[ \t]*\(?[Aa1][.)]", re.M)
_ANNOUNCED = re.compile(
    r"\b(?:questions?|quiz\w*|riddles?|trivia|puzzles?|exercises?|tests?|exams?|FAQs?|cards?|flash\w*|practi[sc]\w+)\b"
    r"|[:：]\s*\Z|\A\s*\Z",
    re.I,
)
_OWN_REQUEST = re.compile(
    r"\s*(?:I(?:['’]m|['’]d| want| need| would| am| have| was)|(?:Can|Could|Would|Will) (?:you|I|we)"
    r"|How (?:do|can|should|would) I|(?:Please )?[Tt]ell me|(?:My|Our) [^.!?]{1,80}[.!?] (?:What|How|Can|Should))\b"
)
_BULLET = re.compile(r"[ \t>]*(?:[-*+•–]|\(?\d{1,3}[.)]|[A-Za-z][.)])[ \t]+[*_]{0,3}\[?\Z")
_INLINE_NUMBER = re.compile(r"(?:^|[.!?:;][ \t]+)\(?\d{1,2}[.)][ \t]+[*_]{0,3}\Z")
_SENTENCE_END = re.compile(  # a full stop and what closes behind it, a closing quotation mark, a dash, a symbol
    r"(?:[.!?…。！？:：][\"'”’»)\]*_`]*|[\"”»`*]|[-–—|•~\u2600-\u27bf\U0001f300-\U0001faff])"
    r"[ \t]*(?:[*_]{1,3}|>[ \t]*)?\[?\Z"
)
_ROW = re.compile(r"[ \t>*_]*[A-Z][\w'’-]*(?: [\w'’-]+){0,2}[*_]{0,3}[ \t]*:")
_BOLD_ROW = re.compile(r"\*\*[A-Z][\w'’ -]*(?::\*\*|\*\*:)[^.!?*]{1,60}[.!?;]?[ \t]*\*\*\Z")
_LABEL_ALONE = re.compile(r"^[*_]{0,3}[A-Z][\w ]{1,24}:[*_]{0,3}[ \t]*$", re.M)
_FENCE_NEXT = re.compile(r"\s*\n\s*(?:```|~~~)")
_FIRST_SENTENCE = re.compile(r"\s*[^.!?\n]*[.!?]?")
_ONE_ORDER = re.compile(r"[ \t]*[A-Z][^.!?\n]*[.!?]?\s*")
_HANGING = re.compile(r"#{1,6}|-{3,}|\*+|_+|={3,}|>+")


@dataclass(frozen=True, slots=True)
class Cut:
    """`marker`: the sign at which the text was cut, in one line; None: the text holds none."""

    text: str
    marker: str | None


def engine_stops(signs: Signs) -> tuple[str, ...]:
    """Strings at which an engine may stop: each is a sign wherever it stands, so none ends a sound text."""
    stops = [f"{'#' * level} {name}{end}" for level in signs.levels for name in signs.headings for end in ("\n", ":\n")]
    for name in dict.fromkeys((signs.user, *signs.labels, signs.assistant)):
        if not name or name in signs.headings:
            continue
        if " " in key(name) or name in FIXED:
            stops.append(f"\n{name}:")
        else:
            stops.append(f"\n\n{name}: ")  # behind one newline alone it may be a row of other labels
    return tuple(dict.fromkeys((*stops, *signs.literals)))


# --- cutting


def cut(text: str, signs: Signs) -> Cut:
    """The text up to its first sign. A turn's own head, written once more at the very start, is dropped."""
    marker: str | None = None
    while True:
        kept, found = _cut_once(text, signs)
        marker = found or marker
        if kept == text:
            return Cut(text, marker)
        text = kept


def has_sign(text: str, signs: Signs) -> str | None:
    """The sign that the text holds, or None: for the assertion that no data set holds one."""
    if head := _own_head(text, signs):
        return " ".join(text[:head].split())
    return cut(text, signs).marker


def _cut_once(text: str, signs: Signs) -> tuple[str, str | None]:
    text = text[_own_head(text, signs) :]
    found = min(_places(text, signs), default=None)
    if found is None:
        return _tidied(text, behind=False), None
    start, end = found
    line = text.rfind("\n", 0, start) + 1
    before = text[: line if _MORE.match(text[line:start]) else start]
    glued = _GLUED.search(before)  # "website._instruction:", and not the end of "**Never do that.**"
    if glued and len(re.findall(re.escape(glued[1]) + "+", before[line:])) % 2:
        before = before[: glued.start()]
    return _tidied(before, behind=True), " ".join(text[start:end].split())


def _tidied(text: str, *, behind: bool) -> str:
    """Without white space, rules, marks and headings left hanging. `behind`: a sign followed.

    A heading with nothing under it is the beginning of what was not written ("### Final Revision": so ended 4 of 559
    revisions of a 1.5B model); the only line of a text stays.
    """
    while True:
        before, text = text, text.rstrip()
        last = text.rsplit(None, 1)[-1] if text else ""
        if last and _HANGING.fullmatch(last):
            text = text[: -len(last)]
        line = text.rfind("\n") + 1
        hanging = behind or (line > 0 and _LAST_HEADING.match(text, line) and not _in_fence(text, line))
        if hanging and _HEADING_LINE.match(text, line):
            text = text[:line]
        if text == before:
            return text


def _own_head(text: str, signs: Signs) -> int:
    """Length of the assistant's cue, or of a role's, that opens the text."""
    found = patterns_of(signs).own.match(text, len(text) - len(text.lstrip()))
    return found.end() if found else 0


def _places(text: str, signs: Signs) -> Iterator[tuple[int, int]]:
    """Start and end of the first sign of each kind."""
    patterns = patterns_of(signs)
    for pattern in (*patterns.literals, patterns.lone):
        if found := pattern.search(text):
            yield found.span()
    headings = ((found.start(), _heading_sign(text, found, signs, patterns)) for found in _HASHES.finditer(text))
    labels = (found.span() for found in patterns.label.finditer(text) if _label_sign(text, found, signs))
    turns = (found.span() for found in patterns.turn.finditer(text) if _turn_sign(text, found))
    for spans in ((span for span in headings if span[1]), labels, turns):
        yield from [span for span in [next(spans, None)] if span]


@dataclass(frozen=True, slots=True)
class _Place:
    """What stands in front of a place, in its line: at most NEAR characters of it."""

    line_start: int
    before: str
    opens_line: bool
    after_sentence: bool


def _place(text: str, start: int) -> _Place:
    line_start = text.rfind("\n", 0, start) + 1
    before = text[max(line_start, start - NEAR) : start]
    opens_line = start - line_start < NEAR and bool(_LINE_HEAD.match(before))
    return _Place(line_start, before, opens_line, bool(_SENTENCE_END.search(before[-20:])))


# --- is it a sign?


def _heading_sign(text: str, hashes: re.Match[str], signs: Signs, patterns: Patterns) -> int:
    """Where the sign ends that these '#' begin; 0 if they begin none."""
    place, level, rest = _place(text, hashes.start()), len(hashes[1]), hashes.end()
    opens_line, before = not place.before.strip(" \t>*_"), place.before
    if level == 1 and 1 not in signs.levels:  # a comment or a hashtag, more often than not
        code = before[:1] in (" ", "\t") or _in_fence(text, hashes.start())
        if not hashes[2][:1].isspace() or code or not (opens_line or place.after_sentence):
            return 0
    in_line = not opens_line and level in signs.levels
    if phrase := patterns.phrase.match(text, rest):
        end = phrase.end()
        next_label = patterns.label.match(text, _GAP.match(text, end).end())  # type: ignore[union-attr]  # matches ""
        opens_only = signs.user_opens_labels and key(phrase[0]) == key(signs.user)
        colon = _COLON.match(text, end) and not (opens_only and opens_line)  # "### Case: Brown v. Board"
        if _ALONE.match(text, end) or next_label or colon:
            return end
        follows = text[end : end + 2].lstrip(" \t")[:1]
        if in_line and not (follows.islower() or follows.isdigit() or follows in QUOTES):
            return end
    glued = in_line and place.after_sentence and before[-1] not in QUOTES
    return rest if glued and level > 1 and text[rest : rest + 1].isupper() else 0  # this is no Markdown


def _label_sign(text: str, found: re.Match[str], signs: Signs) -> bool:
    name, place, rest = found["name"], _place(text, found.start()), text[found.end() : found.end() + NEAR]
    before, capital = place.before, not found["name"][:1].islower()
    if before and before[-1] in QUOTES:
        return False  # quoted or spelt out, not written as a turn
    if " " in key(name):
        if "_" in name and not capital:
            return False  # `review_request: >-`
        bold = before.endswith(("**", "__"))
        return place.opens_line or bool(_BULLET.match(before)) or capital or bold or place.after_sentence
    own = next((known for known in signs.names if key(known) == key(name)), name)
    if own in FIXED and _MORE.match(before):
        first = _FIRST_SENTENCE.match(rest)
        return bool(_OWN_REQUEST.match(rest) or (first and first[0].endswith("?")))
    if found["plural"]:
        return capital and (place.opens_line or place.after_sentence) and _asks(before, rest, own, signs)
    if _BULLET.match(before) or _INLINE_NUMBER.search(before[-20:]):
        return False
    if own == signs.user and signs.user_opens_labels and own in signs.headings:
        return False  # "Case: Brown v. Board"; a label behind it is its own sign, and `lone` takes the name before it
    fixed = own in (signs.user, *FIXED)
    if place.opens_line:
        return _line_label(text, place.line_start, found, fixed=fixed)
    return (capital or own in FIXED) and place.after_sentence and _mid_label(before, rest, fixed=fixed)


def _turn_sign(text: str, found: re.Match[str]) -> bool:
    if found["asked"]:  # the second of two belongs to a list of them, and one that is answered to a riddle
        rest = text[found.end() : found.end() + NEAR]
        alone = not (_QUESTION.search(text, 0, found.start()) or _ANSWERED.search(rest))
        if text.endswith("\n\n", 0, found.start()):  # a paragraph that nothing in front of it has announced
            return alone and not (_ANNOUNCED.search(text, 0, found.start()) or _in_fence(text, found.start()))
        return alone and bool(_OWN_REQUEST.match(rest) or re.search(r"\binstruction\b", rest))
    return found["name"].title() in FIXED or not _in_row(text, text.rfind("\n", 0, found.start("name")) + 1)


def _line_label(text: str, line_start: int, found: re.Match[str], *, fixed: bool) -> bool:
    """A label of one word at the start of a line; `fixed`: of a name that nothing around it excuses."""
    if found["name"][:1].islower() and (text[line_start] in " \t" or _in_fence(text, line_start)):
        return False  # a key or a field in code
    if fixed:
        return True
    if _ALONE.match(text, found.end()):  # "Request:", "Response:" and a block of code behind each: a protocol
        return not (_FENCE_NEXT.match(text, found.end()) and _LABEL_ALONE.search(text, 0, line_start))
    return not _in_row(text, line_start)


def _mid_label(before: str, rest: str, *, fixed: bool) -> bool:
    """A label of one word, with a capital, behind a sentence in its line."""
    follows = rest.lstrip()[:1]
    if before[-1] in ".!?" and not (rest[:1] == " " and follows.isupper()):
        return False  # `-> requests.Response:`
    return fixed or not (follows.islower() or _BOLD_ROW.search(before))


def _in_row(text: str, line_start: int) -> bool:
    """The line just before begins with a label too, and is no sentence: "Stimulus: a bell", "Response: salivation"."""
    if line_start == 0:
        return False
    previous = text[text.rfind("\n", 0, line_start - 1) + 1 : line_start - 1].rstrip()
    return len(previous) < 80 and not previous.endswith((".", "!", "?")) and bool(_ROW.match(previous))


def _asks(before: str, rest: str, name: str, signs: Signs) -> bool:
    """ "Instructions: What is ...?" opens a case, "Instructions: Preheat the oven. Mix ..." a recipe."""
    if opening(rest) in signs.openings:
        return True
    if name not in (*signs.asking, *FIXED):
        return False
    first = _FIRST_SENTENCE.match(rest)
    if first and first[0].endswith("?"):
        return True
    last_of_all = len(rest) < NEAR and _ONE_ORDER.fullmatch(rest)  # one sentence behind another: no steps follow
    return bool(before.strip() and last_of_all and not re.search(r"\w:", before))


def _in_fence(text: str, place: int) -> bool:
    return bisect_right(_fences(text), place) % 2 == 1


@lru_cache(maxsize=4)
def _fences(text: str) -> tuple[int, ...]:
    return tuple(found.start() for found in _FENCE.finditer(text))
