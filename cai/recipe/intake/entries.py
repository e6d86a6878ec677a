"""An entry (an object, a table's row, a text, a conversation) -> the request in it and its pool.

Owns which keys hold a request and what is joined to it, as the data sets that people bring mean them: Alpaca's `input`,
Dolly's `context`, `messages`, ShareGPT's `conversations`, the transcripts of HH-RLHF. Keys that are not read are
counted, so that they can be named once.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

from cai.recipe.intake import frames
from cai.recipe.intake.jsontext import Broken, Entry
from cai.store.jsonl import JsonObject, clean

POOLS = ("benign", "redteam")
REQUEST = ("instruction", "prompt", "question")
CONTEXT = ("input", "context")
CONVERSATION = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
PAIR = ("chosen",)
SYSTEM = ("system", "system_prompt")
NO_CONTEXT = ("", "<noinput>", "nan", "none", "null", "n/a")
ROLES, CONTENTS = ("role", "from"), ("content", "value", "text")
HUMAN = ("user", "human", "prompter")
NAMED_KEYS = 8  # ignored keys that are named
LONGEST = 1_000_000  # characters of a request: more than model.max_seq_length may ever hold
TURN = re.compile(r"(?:\n\s*|\s*(?=#{2,4} ))(?:#{2,4} )?(Human|User|Assistant|AI|GPT|Bot)\s*:[ \t]*")
OPENING = re.compile(r"\s*(?:#{2,4} )?(Human|User)\s*:")


class Given(NamedTuple):
    """A request of the user's file, its pool, and the line on which it begins."""

    text: str
    pool: str
    line: int


@dataclass
class Tally:
    """What is said about a file once: counts by key, and of rows."""

    ignored: Counter[str] = field(default_factory=Counter)
    joined: Counter[str] = field(default_factory=Counter)
    systems: int = 0
    more_turns: int = 0
    pooled: int = 0


def counted(counts: Mapping[str, int]) -> str:
    """Keys with how often each came: the first NAMED_KEYS by name."""
    shown = [f"{str(name)[:40]} ({count})" for name, count in list(counts.items())[:NAMED_KEYS]]
    return ", ".join(shown) + (f" and {len(counts) - NAMED_KEYS} more" if len(counts) > NAMED_KEYS else "")


@lru_cache(maxsize=4096)
def normal(key: object) -> str:
    """A key without what people vary: case, spaces, dashes, camelCase."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", unicodedata.normalize("NFC", str(key)).strip())
    return re.sub(r"[\s-]+", "_", text).lower()


def given(entry: Entry, *, key: str, pool: str, tally: Tally) -> Given:
    """The request of an entry. Errors: Broken with the line, what is wrong and the remedy."""
    value, line = entry.value, entry.line
    while isinstance(value, list) and len(value) == 1 and not _is_turn(value[0]):
        value = value[0]
    if key and not isinstance(value, Mapping):
        raise Broken(line, f"no object, so it has no key {key!r} (instructions.key). Leave the key out")
    if isinstance(value, str):
        text, own = _of_text(value, line, tally), ""
    elif isinstance(value, list) and value and all(map(_is_turn, value)):
        text, own = _conversation(value, line, tally), ""
    elif isinstance(value, Mapping):
        text, own = _of_row(value, line, key, tally), _pool(value, line)
    else:
        kind = "a list of several" if isinstance(value, list) else f"{type(value).__name__} {str(value)[:20]!r}"
        raise Broken(line, f'{kind} where a request should be. Write {{"instruction": "..."}}')
    text = clean(text).replace("\r\n", "\n").replace("\r", "\n").strip()
    if not frames.visible(text):
        raise Broken(line, 'no text under "instruction". Write {"instruction": "..."}')
    frames.refuse(text, line)
    if len(text) > LONGEST:
        raise Broken(line, f"{len(text):,} characters, more than any model reads. Shorten it, or take the line out")
    tally.pooled += bool(own)
    return Given(text, own or pool or "benign", line)


def is_row(value: JsonObject, key: str) -> bool:
    """Whether an object holds a request itself (rather than a list of them)."""
    names = {normal(name): inner for name, inner in value.items()}
    if key and (key in value or normal(key) in names):
        return True
    if any(isinstance(names.get(name), str) for name in (*REQUEST, *PAIR)) or isinstance(names.get("turns"), list):
        return True
    if any(_are_texts(names.get(name)) for name in CONVERSATION):  # LIMA: question, answer, question, ...
        return True
    lists = [names[name] for name in (*CONVERSATION, *PAIR, "prompt") if isinstance(names.get(name), list)]
    return any(all(map(_is_turn, turns)) for turns in lists)


def _of_row(row: JsonObject, line: int, key: str, tally: Tally) -> str:
    if _is_turn(row):
        raise Broken(line, "a turn of a conversation on a line of its own. Write all its turns as one list a line")
    names = _names(row, line)
    chosen = _key(row, names, line, key)
    value = _dig(row, chosen, key)
    text = _as_text(value, line, chosen, tally)
    read = {chosen, names.get("pool")}
    if normal(chosen) in REQUEST and isinstance(value, str):
        extra = _context(names, row, line)
        text = f"{text}\n\n{extra[1]}" if extra else text
        if extra:
            read |= {extra[0], names.get("instances")}
            tally.joined[extra[0]] += 1
    for name, inner in row.items():
        if name in read or inner is None or inner in ("", [], {}) or name.split(".")[0] == key.split(".")[0]:
            continue
        if normal(name) in SYSTEM:
            tally.systems += 1
        else:
            tally.ignored[name] += 1
    return text


def _names(row: JsonObject, line: int) -> dict[str, str]:
    """Normal key -> the key as it stands."""
    names: dict[str, str] = {}
    for name in row:
        if normal(name) in names and normal(name) in (*REQUEST, *CONTEXT, "pool"):
            raise Broken(line, f"the keys {names[normal(name)]!r} and {name!r} say the same: keep one")
        names.setdefault(normal(name), name)
    return names


def _key(row: JsonObject, names: Mapping[str, str], line: int, key: str) -> str:
    """The key that holds the request."""
    if key:
        if key in row or normal(key) in names or _dig(row, "", key) is not None:
            return key if key in row else names.get(normal(key), key)
        raise Broken(line, f"no key {key!r} (instructions.key); keys here: {_listed(row)}")
    texts = [names[name] for name in REQUEST if name in names and row[names[name]] not in (None, "")]
    if len(texts) > 1 and len({str(row[name]) for name in texts}) > 1:
        both = " and ".join(repr(name) for name in texts)
        raise Broken(line, f"{both} both hold text: say which is the request, --set instructions.key={texts[0]}")
    for name in (*texts, *(names[name] for name in (*CONVERSATION, *PAIR) if name in names)):
        return name
    if blank := [names[name] for name in REQUEST if name in names]:
        raise Broken(line, f'no text under "{blank[0]}". Fill it in, or take the line out')
    hint = _hint(row)
    raise Broken(
        line,
        f'no text under "instruction" (keys here: {_listed(row)}). Write {{"instruction": "..."}}, or say which key '
        f"holds the request: --set instructions.key={hint[:40]}",
    )


def _hint(row: Mapping[str, Any]) -> str:
    """The key or path that most likely holds the request: a conversation's, else the longest text's."""
    inner = {f"{name}.{k}": v for name, value in row.items() if isinstance(value, Mapping) for k, v in value.items()}
    for name, value in (*row.items(), *inner.items()):
        if isinstance(value, list) and value and all(map(_is_turn, value)):
            return str(name)
    texts = {
        str(name): value
        for name, value in (*row.items(), *inner.items())
        if isinstance(value, str) and str(name).split(".")[-1] not in (*ROLES, "id", "type")
    }
    return max(texts, key=lambda name: len(texts[name]), default="KEY")


def _listed(row: JsonObject) -> str:
    return ", ".join(str(name)[:40] for name in list(row)[:8]) + (", ..." if len(row) > 8 else "") or "none"


def _dig(row: JsonObject, chosen: str, key: str) -> Any:
    """The value under a key, or under the path a.b of `instructions.key`."""
    if chosen in row:
        return row[chosen]
    value: object = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _as_text(value: object, line: int, key: str, tally: Tally) -> str:
    if isinstance(value, str) and value.strip():
        return _of_text(value, line, tally, turns=normal(key) in CONVERSATION)
    if _is_turn(value):  # a conversation of one turn, without its list
        value = [value]
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        return _conversation(value, line, tally)
    if _are_texts(value):
        tally.more_turns += len(value) > 1
        return str(value[0])
    kind = "" if value is None or isinstance(value, str) else f" ({type(value).__name__} found)"
    if isinstance(value, Mapping) and (hint := _hint(value)) != "KEY":
        raise Broken(line, f'no text under "{key}"{kind}: say which, --set instructions.key={key}.{hint[:40]}')
    raise Broken(line, f'no text under "{key}"{kind}. Write {{"instruction": "..."}}')


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)


def _of_text(text: str, line: int, tally: Tally, turns: bool = False) -> str:
    """A text's request. A table's cell may hold a conversation as JSON; other JSON in a text was encoded twice."""
    inner = frames.within(text)
    if isinstance(inner, list) and inner and all(map(_is_turn, inner)):
        return _conversation(inner, line, tally)
    if turns and inner is not None and _are_texts(inner):
        tally.more_turns += len(inner) > 1
        return str(inner[0])
    if isinstance(inner, Mapping) and is_row(inner, ""):
        raise Broken(line, "JSON within a text (encoded twice?), not a request. Decode it once: jq -c fromjson")
    if turns and (inner is not None or text.lstrip().startswith("[")):
        raise Broken(line, "a conversation that is neither text nor JSON. Save the file as JSON lines")
    return _first_turn(text, line, tally)


def _context(names: Mapping[str, str], row: JsonObject, line: int) -> tuple[str, str] | None:
    """(key, text) of what belongs to the request: Alpaca's input, Dolly's context."""
    found = []
    for name in (names[name] for name in CONTEXT if name in names):
        value = row[name]
        if value is None or (isinstance(value, str) and value.strip().lower() in NO_CONTEXT):
            continue
        if not isinstance(value, str):
            raise Broken(line, f'"{name}" is no text ({type(value).__name__}). Put it into "instruction" as text')
        found.append((name, value.strip()))
    instances = row.get(names.get("instances", ""))
    if not found and isinstance(instances, list) and instances and isinstance(instances[0], Mapping):
        text = instances[0].get("input")  # Self-Instruct: the first of a task's instances
        found += (
            [("instances", text.strip())] if isinstance(text, str) and text.strip().lower() not in NO_CONTEXT else []
        )
    if len(found) > 1:
        raise Broken(line, '"input" and "context" both hold text. Put what belongs to the request into "instruction"')
    return found[0] if found else None


def _pool(row: JsonObject, line: int) -> str:
    name = next((name for name in row if normal(name) == "pool"), None)
    if name is None:
        return ""
    value = row[name]
    word = value.strip().lower() if isinstance(value, str) else value
    if word not in POOLS:
        shown = repr(value[:40] if isinstance(value, str) else value)[:60]
        raise Broken(line, f'pool: {shown} is unknown. Write "benign" or "redteam"')
    return str(word)


def _is_turn(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and any(name in value for name in ROLES)
        and any(name in value for name in CONTENTS)
        and all(isinstance(value[name], str) for name in ROLES if name in value)
    )


def _conversation(turns: Sequence[JsonObject], line: int, tally: Tally) -> str:
    """The first human turn."""
    said: list[tuple[str, Any]] = [(str(_field(turn, ROLES)).lower(), _field(turn, CONTENTS)) for turn in turns]
    human = [content for role, content in said if role in HUMAN]
    tally.systems += any(role == "system" and content for role, content in said)
    if not human:
        raise Broken(line, f"no turn of a user (roles here: {', '.join(role for role, _ in said)[:60]})")
    text = all_text(human[0])
    if text is None and human[0] is not None:
        raise Broken(line, "a turn that is not all text (a picture?). Give text alone")
    if not isinstance(text, str) or not text.strip():
        raise Broken(line, "the first turn of the user is empty. Take the line out")
    tally.more_turns += len(human) > 1
    return text


def all_text(content: Any) -> Any:
    """A turn's parts as one text, None where one is none; any other content as it is."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "\n".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None


def _field(turn: JsonObject, names: Sequence[str]) -> Any:
    return next(turn[name] for name in names if name in turn)


def _first_turn(text: str, line: int, tally: Tally) -> str:
    """The first human turn of a transcript ("Human: ...", "Assistant: ..."); any other text as it is."""
    opening = OPENING.match(text)
    if opening is None:
        return text
    rest = text[opening.end() :]
    speakers = [match[1] for match in TURN.finditer(rest)]
    if not speakers and not text.startswith("\n\n"):
        return text  # a text that begins with "User:"
    first = TURN.split(rest, maxsplit=1)[0].strip()
    if not first:
        raise Broken(line, "the first turn of the transcript is empty. Take the line out")
    tally.more_turns += any(speaker in ("Human", "User") for speaker in speakers)
    return first
