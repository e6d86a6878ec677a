"""The signs by which one prompt file's transcript can be told: read from the file, compiled to patterns. Pure.

Owns what counts as a name (cues, field labels, stops) and the spellings of a name. Doesn't own which place in a text is
a sign and which only uses the same words: that is `ends`.

Invariant: nothing here lists words of the shipped prompts; a file in another language has its own signs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from cai.recipe.prompts import Prompt

TURNS = ("Human", "User", "Assistant", "Instruction")  # what any model writes when it plays both sides
PAIR = ("Instruction", "Response")  # tuned models saw this form so often that they write it after any prompt
OPENING_WORDS = 3  # so many words of an example's field tell that "Instructions:" opens another one

_MARKS = " \t\r\n#*_>:：-=[]()|~`"
_LABEL_LINE = re.compile(r"^[ \t]*([^\W\d_][^:：\n{]{0,40}?)[ \t]*[:：][ \t]*(?:$|(?=\{\{))", re.M)
_LINE_HEAD = r"^[ \t]*(?:>[ \t]*)*(?:[*_]{1,3}(?=[^\s*_]))?\[?"
_NAME_END = r"[\]*_]{0,4}"
_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Signs:
    """Names without their marks, as the file writes them: "Case", "Review request". `levels`: how many '#' cues have.

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


@lru_cache(maxsize=64)
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
        openings=frozenset(opening(value) for _, value in fields),
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


@dataclass(frozen=True, slots=True)
class Patterns:
    """`own`: the assistant's cue or a role's, at the start of a text; `lone`: a cue's name on a line, without its '#';
    `phrase`: words of names only, ending as a name does; `label`: a name and its colon; `turn`: a role and its
    colon, or the question of another case behind a sentence or as a paragraph.
    """

    own: re.Pattern[str]
    literals: tuple[re.Pattern[str], ...]
    lone: re.Pattern[str]
    phrase: re.Pattern[str]
    label: re.Pattern[str]
    turn: re.Pattern[str]


@lru_cache(maxsize=64)
def patterns_of(signs: Signs) -> Patterns:
    own = _spelt(signs.assistant) if signs.assistant else "(?!)"
    colon = rf"{_NAME_END}[ \t]*[:：]"
    roles, turns = "|".join(TURNS[:3]), "|".join((*TURNS, *map(str.upper, TURNS)))
    any_name = "|".join(map(_spelt, signs.names))
    asked = r"(?:(?<=[.!?][ \t])|(?<=\n\n)[*_]{0,3})"
    return Patterns(
        own=re.compile(
            rf"#{{1,6}}[ \t]*[*_]{{0,3}}{own}[ \t]*[:：]?[*_]{{0,3}}[ \t]*(?:\n\s*|\Z)"
            rf"|[#*_>\[ \t]*(?:{own}|{roles}){colon}[*_]{{0,3}}\s*",
            re.I,
        ),
        literals=tuple(map(_literal, signs.literals)),
        lone=_lone(signs, any_name),
        phrase=_phrase(signs.names),
        label=re.compile(rf"(?<![^\W_])(?<![^\W_]_)(?<!-)(?P<name>{any_name})(?P<plural>s?){colon}[*_]{{0,3}}", re.I),
        turn=re.compile(rf"{_LINE_HEAD}(?P<name>{turns}){colon}|{asked}(?P<asked>Question){colon}", re.M),
    )


def key(name: str) -> str:
    """One form for all spellings of a name."""
    return " ".join(re.split(r"[\s_-]+", name)).lower()


def opening(text: str) -> tuple[str, ...]:
    return tuple(text.lower().split(maxsplit=OPENING_WORDS)[:OPENING_WORDS])


def _spelt(name: str) -> str:
    return r"[ \t_-]+".join(map(re.escape, key(name).split()))


def _literal(stop: str) -> re.Pattern[str]:
    """The stop as it is written; one that begins a line also begins a text."""
    return re.compile(rf"(?:\A\s*|\n){re.escape(stop[1:])}" if stop[:1] == "\n" and stop[1:] else re.escape(stop))


def _phrase(names: tuple[str, ...]) -> re.Pattern[str]:
    """Also the plural of a name of two words: "Revision requests" is no more a heading of sound text than the name."""
    words = {word for name in names for word in key(name).split()}
    lasts = {key(name).split()[-1] for name in names}
    word, last = ("|".join(map(re.escape, sorted(group, key=len, reverse=True))) for group in (words, lasts))
    plurals = "".join(rf"|{_spelt(name)}s(?![^\W_])" for name in names if " " in key(name))
    return re.compile(rf"(?:(?:{word})[ \t_-]+)*(?:{last})(?![^\W_]){plurals}", re.I)


def _lone(signs: Signs, any_name: str) -> re.Pattern[str]:
    lone = []
    for name in signs.headings:
        exact = rf"(?:{re.escape(name)}|{re.escape(name.upper())})"
        label_next = rf"(?=\s*\Z|\s*(?:[#>*_]+[ \t]*)*(?i:{any_name}){_NAME_END}[ \t]*[:：])"
        needs = label_next if name == signs.user and signs.user_opens_labels else ""
        lone.append(rf"{_LINE_HEAD}{exact}{_NAME_END}[ \t]*[:：]?[*_]{{0,3}}[ \t]*$" + needs)
    return re.compile("|".join(lone), re.M) if lone else _NEVER
