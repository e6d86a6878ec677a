"""Where a completion ends: at the first sign that the transcript goes on. Pure: no model, no state.

Owns the signs of one prompt file (its cues, field labels and stops, found in the file and not listed here), their
spellings, and the judgement whether a place in a text is such a sign or only talks about cases and answers. Doesn't own
whether the text that is left is any good (`parsing`), nor what is done with a cut one (the stages).

Invariants: `cut` changes nothing in front of the sign but a turn head written again at the very start, and white space,
rules and headings left hanging at the end; `cut(cut(x)) == cut(x)`; a cut text has no sign; whatever holds an engine
stop is cut at it or before it.

A marked name ("### Case") is a sign in any place where nothing but the name stands in the heading. A label of two words
("Review request:") needs a capital, the start of a line or the start of a sentence; a label of one word, which sound
texts use too ("Response:"), needs the start of a line, or a capital behind the end of a sentence, and is spared in list
items, in rows of other labels and in code. Of 2,368 texts of a 1.5B model 671 held a sign; most were `... fine. ### Case`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from cai.prompts import Prompt

TURNS = ("Human", "User", "Assistant", "Instruction")  # what any model writes when it plays both sides
PAIR = ("Instruction", "Response")  # tuned models saw this form so often that they write it after any prompt
OPENING_WORDS = 3  # so many words of an example's field tell that "Instructions:" opens another one

_MARKS = " \t\r\n#*_>:：-=[]()|~`"
_LABEL_LINE = re.compile(r"^[ \t]*([^\W\d_][^:：\n{]{0,40}?)[ \t]*[:：][ \t]*(?:$|(?=\{\{))", re.M)
_HEADING_LINE = re.compile(r"^[ \t]*#{1,6}[ \t]+[^\n]*\Z", re.M)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.M)
_HASHES = re.compile(r"(?<![#\\])(#{1,6})(?!#)([ \t]*[-–—:.]?[ \t]*[*_]{0,3}\[?)")
_ALONE = re.compile(r"[\]*_]{0,4}[ \t]*[:：.]?[*_]{0,3}[ \t]*#*[ \t]*(?:\r?\n|\Z)")
_COLON = re.compile(r"[\]*_]{0,4}[ \t]*[:：]")
_HEAD = r"^[ \t]*(?:>[ \t]*)*(?:[*_]{1,3}(?=[^\s*_]))?\[?"
_LINE_HEAD = re.compile(r"[ \t]*(?:>[ \t]*)*(?:[*_]{1,3})?\[?\Z")
_BULLET = re.compile(r"[ \t>]*(?:[-*+•–]|\(?\d{1,3}[.)]|[A-Za-z][.)])[ \t]+[*_]{0,3}\[?\Z")
_INLINE_NUMBER = re.compile(r"(?:^|[.!?:;][ \t]+)\(?\d{1,2}[.)][ \t]+[*_]{0,3}\Z")
_SENTENCE_END = re.compile(
    r"(?:[.!?…。！？:：][\"'”’»)\]*_`]*|[\"”»`*]|[-–—|•~\u2600-\u27bf\U0001f300-\U0001faff])[ \t]*(?:[*_]{1,3}|>[ \t]*)?\[?\Z"
)
_ROW = re.compile(r"[ \t>*_]*[A-Z][\w'’-]*(?: [\w'’-]+){0,2}[*_]{0,3}[ \t]*:")
_BOLD_ROW = re.compile(r"\*\*[A-Z][\w'’ -]*(?::\*\*|\*\*:)[^.!?*]{1,60}[.!?;]?[ \t]*\*\*\Z")
_HANGING = re.compile(r"(?:(?<!\S)(?:#{1,6}|-{3,}|\*{3,}|_{3,}|={3,}|>)|(?<=\s)[*_]{1,2})\Z")


@dataclass(frozen=True, slots=True)
class Signs:
    """Names without their marks, as the file writes them: "Case", "Review request". `levels`: number of '#' of the cues.

    `user`, `assistant`: the names of the cues; `headings`: those of them that are marked with '#'; `labels`: of fields.
    `user_opens_labels`: a label follows the user's cue at once, so the bare cue means nothing in front of other text.
    `asking`: names whose fields hold questions; `openings`: the first words of the examples' fields.
    `literals`: what has no name to be respelt: the file's stops and cues like "<|user|>".
    """

    user: str
    assistant: str
    headings: tuple[str, ...]
    levels: tuple[int, ...]
    labels: tuple[str, ...]
    literals: tuple[str, ...]
    user_opens_labels: bool
    asking: tuple[str, ...] = ()
    openings: frozenset[tuple[str, ...]] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Cues, labels and the common pair, longest first."""
        found = dict.fromkeys(name for name in (self.user, self.assistant, *self.labels) if name)
        known = {name.lower() for name in found}
        found |= dict.fromkeys(name for name in PAIR if name.lower() not in known)
        return tuple(sorted(found, key=len, reverse=True))


@dataclass(frozen=True, slots=True)
class Cut:
    """`marker`: the sign at which the text was cut, in one line; None: the text holds none."""

    text: str
    marker: str | None


# --- the signs of a file


def signs_of(prompt: Prompt) -> Signs:
    cues = (prompt.user_cue.strip(), prompt.assistant_cue.strip())
    names = tuple(cue.strip(_MARKS) for cue in cues)
    headings = tuple(name for name, cue in zip(names, cues, strict=True) if name and cue.startswith("#"))
    symbols = tuple(cue for cue in cues if not re.match(r"[#*_>\w]", cue) or not cue.strip(_MARKS))
    labels = _labels(prompt)
    fields = [(names[0], example.user) for example in prompt.examples]
    fields += [field for example in prompt.examples for field in _fields(example.user, labels)]
    asking = [name for name, value in fields if "?" in value]
    if not labels:
        asking.append(names[0])  # the whole turn is the request
    return Signs(
        user=names[0],
        assistant=names[1],
        headings=headings,
        levels=tuple(sorted({len(cue) - len(cue.lstrip("#")) for cue in cues if cue.startswith("#")})),
        labels=labels,
        literals=tuple(dict.fromkeys((*prompt.stop, *symbols))),
        user_opens_labels=bool(re.match(_LABEL_LINE, prompt.final)),
        asking=tuple(dict.fromkeys(name for name in asking if name)),
        openings=frozenset(_opening(value) for _, value in fields),
    )


def _labels(prompt: Prompt) -> tuple[str, ...]:
    """Labels of `final`, and those that stand in every example (one of them alone may well write "Ingredients:")."""
    found = _LABEL_LINE.findall(prompt.final)
    sets = [set(_LABEL_LINE.findall(f"{example.user}\n\n{example.assistant}")) for example in prompt.examples]
    shared = set.intersection(*sets) if len(sets) > 1 else set()
    names = (label.strip(_MARKS) for label in (*found, *sorted(shared)))
    return tuple(dict.fromkeys(name for name in names if name))


def _fields(user: str, labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """The labelled fields of an example's user turn."""
    if not labels:
        return []
    heads = list(re.finditer(rf"^[ \t]*({'|'.join(map(re.escape, labels))})[ \t]*:", user, re.M))
    ends = [head.start() for head in heads[1:]] + [len(user)]
    return [(head[1], user[head.end() : end].strip()) for head, end in zip(heads, ends, strict=True)]


def _opening(text: str) -> tuple[str, ...]:
    return tuple(text.lower().split()[:OPENING_WORDS])


def engine_stops(signs: Signs) -> tuple[str, ...]:
    """Strings at which an engine may stop: each is a sign wherever it stands, so none ends a sound text."""
    stops = [f"{'#' * level} {name}{end}" for level in signs.levels for name in signs.headings for end in ("\n", ":\n")]
    for name in dict.fromkeys((signs.user, *signs.labels, signs.assistant)):
        if not name or name in signs.headings:
            continue
        if len(name.split()) > 1 or name in TURNS[3:]:
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
    return _tidied(text[:start], behind=True), " ".join(text[start:end].split())


def _tidied(text: str, *, behind: bool) -> str:
    """Without white space, rules and heading marks left hanging; `behind`: a sign followed, so a last heading goes too."""
    while True:
        before, text = text, text.rstrip()
        text = _HANGING.sub("", text)
        if behind and (heading := _HEADING_LINE.search(text)):
            text = text[: heading.start()]
        if text == before:
            return text


def _own_head(text: str, signs: Signs) -> int:
    """Length of the assistant's cue, or of a role's, that opens the text."""
    found = _patterns(signs).own.match(text)
    return found.end() if found else 0


def _places(text: str, signs: Signs) -> Iterator[tuple[int, int]]:
    """Start and end of every sign, in no order."""
    patterns = _patterns(signs)
    for pattern in (*patterns.literals, patterns.lone):
        yield from ((found.start(), found.end()) for found in pattern.finditer(text))
    for found in _HASHES.finditer(text):
        if end := _heading_sign(text, found, signs, patterns):
            yield found.start(), end
    for found in patterns.label.finditer(text):
        if _label_sign(text, found, signs):
            yield found.start(), found.end()
    for found in patterns.turn.finditer(text):
        if not _in_row(text, text.rfind("\n", 0, found.start("name")) + 1) or found["name"].title() in TURNS[3:]:
            yield found.start(), found.end()


@dataclass(frozen=True, slots=True)
class _Patterns:
    own: re.Pattern[str]
    literals: tuple[re.Pattern[str], ...]
    lone: re.Pattern[str]  # the name of a cue alone on its line, without its '#'
    phrase: re.Pattern[str]  # words of names only, the last one that of a name
    label: re.Pattern[str]
    turn: re.Pattern[str]


QUOTES = "\"“”'‘’`„«"
NEVER = re.compile(r"(?!)")


@lru_cache(maxsize=64)
def _patterns(signs: Signs) -> _Patterns:
    names = signs.names
    any_name = "|".join(map(_spelt, names))
    words = sorted({word for name in names for word in name.split()}, key=len, reverse=True)
    lasts = sorted({name.split()[-1] for name in names}, key=len, reverse=True)
    word, last = ("|".join(map(re.escape, group)) for group in (words, lasts))
    own = _spelt(signs.assistant) if signs.assistant else "(?!)"
    roles = "|".join(TURNS[:3])
    lone = []
    for name in signs.headings:
        exact = rf"(?:{_spelt(name)}|{_spelt(name.upper())})"
        behind = rf"(?=\s*\Z|\s*[#>*_ \t]*(?i:{any_name})[*_]*[ \t]*[:：])"
        needs = behind if name == signs.user and signs.user_opens_labels else ""
        lone.append(rf"{_HEAD}{exact}[\]*_]{{0,4}}[ \t]*[:：]?[*_]{{0,3}}[ \t]*$" + needs)
    return _Patterns(
        own=re.compile(
            rf"\s*(?:(?:#{{1,6}}[ \t]*[*_]{{0,3}}{own}[ \t]*[:：]?[*_]{{0,3}}[ \t]*(?:\n\s*|\Z))"
            rf"|(?:[#*_>\[ \t]*(?:{own}|{roles})[\]*_]{{0,4}}[ \t]*[:：][*_]{{0,3}}\s*))",
            re.I,
        ),
        literals=tuple(map(_literal, signs.literals)),
        lone=re.compile("|".join(lone), re.M) if lone else NEVER,
        phrase=re.compile(rf"(?:(?:{word})[ \t_-]+)*(?:{last})(?![^\W_])|{_plural(names)}", re.I) if names else NEVER,
        label=re.compile(
            rf"(?<![^\W_])(?<![^\W_]_)(?<!-)(?P<name>{any_name})(?P<plural>s?)[\]*_]{{0,4}}[ \t]*[:：][*_]{{0,3}}", re.I
        )
        if names
        else NEVER,
        turn=re.compile(
            rf"{_HEAD}(?P<name>{'|'.join((*TURNS, *map(str.upper, TURNS)))})[\]*_]{{0,4}}[ \t]*[:：]", re.M
        ),
    )


def _spelt(name: str) -> str:
    return r"[ \t_-]+".join(map(re.escape, name.split()))


def _plural(names: tuple[str, ...]) -> str:
    return "|".join(rf"{_spelt(name)}s(?![^\W_])" for name in names if len(name.split()) > 1) or "(?!)"


def _literal(stop: str) -> re.Pattern[str]:
    """The stop as it is written; one that begins a line also begins a text."""
    return re.compile(rf"(?:\A\s*|\n[ \t]*){re.escape(stop[1:])}" if stop[:1] == "\n" and stop[1:] else re.escape(stop))


def _heading_sign(text: str, hashes: re.Match[str], signs: Signs, patterns: _Patterns) -> int:
    """Where the sign ends that these '#' begin; 0 if they begin none."""
    start, level = hashes.start(), len(hashes[1])
    line = text[text.rfind("\n", 0, start) + 1 : start]
    opens_line, after_sentence = not line.strip(" \t>*_"), bool(_SENTENCE_END.search(line))
    if level == 1 and 1 not in signs.levels:  # a comment or a hashtag, more often than not
        code = line[:1] in (" ", "\t") or _in_fence(text, start)
        if not hashes[2][:1].isspace() or code or not (opens_line or after_sentence):
            return 0
    rest = hashes.end()
    phrase = patterns.phrase.match(text, rest)
    if phrase:
        end = phrase.end()
        alone, colon = _ALONE.match(text, end), _COLON.match(text, end)
        next_label = patterns.label.match(text, end + len(text[end:]) - len(text[end:].lstrip(" \t")))
        opens_only = signs.user_opens_labels and phrase[0].lower() == signs.user.lower()
        if alone or next_label or (colon and not (opens_only and opens_line)):
            return end
        follows = text[end : end + 2].lstrip(" \t")[:1]
        if not opens_line and level in signs.levels and not (follows.islower() or follows in "0123456789\"'”’`"):
            return end
    title = text[rest : rest + 1]
    in_line = after_sentence and not opens_line and line[-1] not in QUOTES
    return rest if in_line and level in signs.levels and level > 1 and title.isupper() else 0  # this is no Markdown


def _label_sign(text: str, found: re.Match[str], signs: Signs) -> bool:
    name, start = found["name"], found.start()
    line_start = text.rfind("\n", 0, start) + 1
    before, rest = text[line_start:start], text[found.end() :]
    if before[-1:] and before[-1:] in QUOTES:
        return False  # quoted or spelt out, not written as a turn
    opens_line, after_sentence = bool(_LINE_HEAD.match(before)), bool(_SENTENCE_END.search(before))
    capital = not name[:1].islower()
    if len(name.split()) > 1:
        bold = before.endswith(("**", "__"))
        return opens_line or bool(_BULLET.match(before)) or capital or bold or after_sentence
    own = next(n for n in signs.names if n.lower() == " ".join(re.split(r"[ \t_-]+", name)).lower())
    if found["plural"]:
        return capital and (opens_line or after_sentence) and _asks(before, rest, own, signs)
    if _BULLET.match(before) or _INLINE_NUMBER.search(before):
        return False
    if own == signs.user and signs.user_opens_labels and own in signs.headings:
        return False  # "Case: Brown v. Board"; a label behind it is its own sign, and `lone` takes the name before it
    if opens_line:
        return _line_label(text, line_start, found, fixed=own in (signs.user, *TURNS[3:]))
    return capital and after_sentence and _mid_label(before, rest, fixed=own in (signs.user, *TURNS[3:]))


def _line_label(text: str, line_start: int, found: re.Match[str], *, fixed: bool) -> bool:
    """A label of one word at the start of a line; `fixed`: of a name that no row of labels excuses."""
    if found["name"][:1].islower() and (text[line_start : line_start + 1].isspace() or _in_fence(text, line_start)):
        return False  # a key or a field in code
    if fixed:
        return True
    answered_in_code = re.match(r"\s*\n\s*(?:```|~~~)", text[found.end() :])  # "Request:", "Response:" of a protocol
    labelled_before = re.search(r"^[*_]{0,3}[A-Z][\w ]{1,24}:[*_]{0,3}[ \t]*$", text[:line_start], re.M)
    alone = not text[found.end() :].split("\n", 1)[0].strip()
    return not ((_in_row(text, line_start) and not alone) or (answered_in_code and labelled_before))


def _mid_label(before: str, rest: str, *, fixed: bool) -> bool:
    """A label of one word, with a capital, behind a sentence in its line."""
    glued = before[-1:] in ".!?"
    follows = rest.lstrip()[:1]
    if glued and not (rest[:1] == " " and follows.isupper()):
        return False  # `-> requests.Response:`
    if fixed:
        return True
    return not follows.islower() and not _BOLD_ROW.search(before)


def _in_row(text: str, line_start: int) -> bool:
    """The line just before begins with a label too, and is no sentence: "Stimulus: a bell", "Response: salivation"."""
    if line_start == 0:
        return False
    previous = text[text.rfind("\n", 0, line_start - 1) + 1 : line_start - 1]
    return len(previous) < 80 and previous.rstrip()[-1:] not in (*".!?",) and bool(_ROW.match(previous))


def _asks(before: str, rest: str, name: str, signs: Signs) -> bool:
    """ "Instructions: What is ...?" opens a case, "Instructions: Preheat the oven. Mix ..." a recipe."""
    if _opening(rest) in signs.openings:
        return True
    if name not in (*signs.asking, PAIR[0]):
        return False
    first = re.match(r"[^.!?\n]*[.!?]?", rest.lstrip())
    if first and first[0].endswith("?"):
        return True
    one_order = re.fullmatch(
        r"[ \t]*[A-Z][^.!?\n]*[.!?]?\s*", rest
    )  # behind a sentence and last of all: no steps follow
    return bool(before.strip() and one_order and not re.search(r"\w:", before))


def _in_fence(text: str, place: int) -> bool:
    return len(_FENCE.findall(text, 0, place)) % 2 == 1
