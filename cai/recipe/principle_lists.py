"""Constitutions as people have them -> principles: our list, a mapping around it, other tools' keys, sentences.

Owns the shapes, and what is made where one has less than we need (an id of the words, the two requests of a sentence).
Does not own the choice of principles (constitution). All faults of an entry stand in one line.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cai.errors import CaiError
from cai.recipe.intake import delimited, jsontext, plain
from cai.recipe.intake.entries import POOLS, normal
from cai.recipe.intake.jsontext import Broken
from cai.recipe.yaml_files import parse_yaml
from cai.store.jsonl import JsonObject, Row

KEYS = ("id", "principle", "critique_request", "revision_request")
OPTIONAL = ("pools", "priority", "topic", "refusal_is_fault")
NAMES = {  # ours -> what other tools call it, in the form of `normal`
    "id": ("id", "name", "title"),
    "principle": ("principle", "text", "rule", "sentence", "description", "statement"),
    "critique_request": ("critique_request", "critique", "critic"),
    "revision_request": ("revision_request", "revision", "edit_request"),
}
BESIDE = ("prompt", "type", "_type", "source")  # of other tools' entries, not needed
ABOUT = ("author", "version", "license", "date", "url", "comment", "notes", "system", "user", "language", "preamble")
CONTAINERS = ("principles", "constitution", "constitutions")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST_SLUG = 48
CELLS: Mapping[str, type] = {"refusal_is_fault": bool, "priority": int, "pools": list}  # of a table, which has but text
LONGEST_TEXT = 10_000  # characters of a principle or a request: beside the examples it has to fit into a prompt
SMALL_WORDS = frozenset(
    "a an and any are as be by for from in is it its of on or please s that the this to was with".split()
)
SLOTS = "answer|response|reply|completion|output|question|prompt|instruction|request|query|input|conversation|user|" \
        "assistant|human|critique|revision|principle|topic|name|text"  # fmt: skip
PLACEHOLDER = re.compile(
    r"\{\{.*?\}\}|\{%.*?%\}|<%.*?%>|\{[A-Za-z_][\w. ]*(?:![rsa])?(?::[-<>=^+,.\d]\S{0,8})?\}"
    r"|｛\w+｝|<[a-z]+(?:_[a-z]+)+>|__[A-Z]+__|\{\d*\}|\$\{\w+\}|\$[A-Za-z_]\w*|%\(\w+\)s|%[sd]\b|<<\w+>>|\[\[\w+\]\]"
    rf"|<\|(?:{SLOTS})s?\|>|<(?:the )?(?:{SLOTS})s?>|\[(?:the )?(?:{SLOTS})s?\]"
    rf"|\[[A-Z][A-Z0-9]*(?:[ _][A-Z0-9]+)+\]|\[(?:{SLOTS.upper()})\]"
)
FRAME = re.compile(r"^\s*(?:critique|revision)\s*(?:request)?\s*:\s*|\s*\b(?:critique|revision)\s*:\s*$", re.IGNORECASE)
TOML = re.compile(
    r"^\s*\[{1,2}[A-Za-z][\w.-]*\]{1,2}\s*$|^\s*[\w.-]+\s*=\s*(?:[\[{(\"']|\w+\()|^[A-Z][A-Z_]+=\S", re.MULTILINE
)
# a list within a list, of which YAML makes one sentence
NESTED = re.compile(r"^(\s*)[-*+] +[^\s\"'\[{&*][^\n]*[^\n:\s|>]\n\1\s+[-*+] ", re.MULTILINE)
NUMBERED = re.compile(r"\A\s*\(?1[.)]\s+\S")  # "1. **Honest**: ..." is a mapping to YAML
ADDRESS = re.compile(r"\w+://\S+")
LIKE_YAML = re.compile(
    r"^\s*(?:-\s+)?(?:id|name|title|principles?|constitutions?|critic|critique\w*|revision\w*|edit_request|version)\s*:"
    r"|^\s*[?:]\s|^\s*(?:-\s+)?[&!]|^\s*-\s*[{\[&*-]|^\s*[{\[]|^---|^\s*[\w-]+\s*:\s*[\[{&*|>]",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Principle:
    """`pools`: the pools of requests that it is for, empty for all; `priority`: 0 where the file says nothing.

    `topic`: which of the prompt files' examples a review under it is shown, "" for those most alike in their words.
    `refusal_is_fault`: help in place of a refusal is what it asks for, of a harmful request too.
    """

    id: str
    principle: str
    critique_request: str
    revision_request: str
    pools: tuple[str, ...] = ()
    priority: int = 0
    topic: str = ""
    refusal_is_fault: bool = False


def read(text: str, path: str | Path) -> tuple[list[Principle], list[str]]:
    """(principles in file order, notes). Errors: CaiError of one line."""
    content = _content(text, path)
    rows, notes = _rows(content)
    if not rows:
        keys = ", ".join(repr(str(name)[:40]) for name in content) if isinstance(content, Mapping) else ""
        here = f" (keys here: {keys[:120]}; those read are {', '.join(map(repr, CONTAINERS))})" if keys else ""
        raise CaiError(f"{path}: no principles found{here}; write a list, each entry with the keys {', '.join(KEYS)}")
    found = [_fields(row, f"{path}: principles[{i}]") for i, row in enumerate(rows)]
    if made := sum(by_default for _, by_default in found):
        notes.append(
            f"constitution: {made} of {len(found)} principles are sentences; their requests are the default ones"
        )
    return [principle for principle, _ in found], notes


def _content(text: str, path: str | Path) -> Any:
    """YAML (JSON is YAML), JSON lines, or sentences; the YAML's own fault where the text looks like YAML."""
    if TOML.search(text):
        raise CaiError(
            f"{path}: TOML or a program found; write YAML: a list, each entry with the keys {', '.join(KEYS)}"
        )
    if nested := NESTED.search(text):
        line = text.count("\n", 0, nested.end()) + 1
        raise CaiError(f"{path}: line {line}: a list within a list; write one principle an entry of one list")
    if not LIKE_YAML.search(text):
        if (rows := _table(text, path)) is not None:
            return rows
        if NUMBERED.match(text):
            return _sentences(text, path)
    try:
        content = parse_yaml(text, path)
    except CaiError as error:
        if (rows := _json(text)) is not None:
            return rows
        if re.search(r"^ *\t", text, re.MULTILINE):
            raise CaiError(f"{error} (a tab is no indentation in YAML: write spaces)") from None
        if LIKE_YAML.search(text) or not any(sign.isalpha() for sign in text):
            raise
        return _sentences(text, path)
    if isinstance(content, str):
        return _sentences(text, path)
    return content


def _json(text: str) -> list[Any] | None:
    """JSON that is no YAML: indented with tabs, or an object a line."""
    if not text.lstrip().startswith(("{", "[", '"')):
        return None
    try:
        found = [entry.value for entry in jsontext.values(text)]
    except (Broken, RecursionError):
        return None
    return found[0] if len(found) == 1 else found


def _table(text: str, path: str | Path) -> list[Any] | None:
    """The rows of a CSV or its like with a column of ours or of another tool's; None for what is no table."""
    try:
        for name in (name for key in KEYS[1:] for name in NAMES[key]):
            if delimited.headed(text, name):
                table = delimited.parse(text, name)
                return None if table is None else [delimited.typed(entry.value, CELLS) for entry in table.rows]
        delimited.parse(text)
    except Broken as broken:
        why = broken.why.split(": ")[0].split(" in which ")[0]
        raise CaiError(f"{path}: line {broken.line}: {why}; name the columns {', '.join(KEYS)} in a header") from None
    return None


def _sentences(text: str, path: str | Path) -> list[str]:
    try:
        entries = plain.parse(plain.lines_of(text)).entries
        for before, entry in pairwise(entries):
            if entries[0].value[:1].isupper() and plain.continues(before.value, entry.value):
                raise Broken(entry.line, f"reads as the rest of the line before: {plain.ONE_A_LINE}")
        for entry in entries:
            if ADDRESS.fullmatch(entry.value) or not any(sign.isalpha() for sign in entry.value):
                raise Broken(entry.line, f"no sentence ({entry.value[:40]!r}): {plain.ONE_A_LINE}")
    except Broken as broken:
        raise CaiError(f"{path}: line {broken.line}: {broken.why.replace('request', 'principle')}") from None
    return [entry.value for entry in entries]


def _rows(content: object) -> tuple[list[Any], list[str]]:
    """The entries, whatever is around them."""
    notes: list[str] = []
    while isinstance(content, Mapping):
        around = [name for name in content if normal(name) in CONTAINERS and isinstance(content[name], list | Mapping)]
        if len(around) != 1:
            break
        others = ", ".join(str(name)[:40] for name in content if name != around[0])
        notes += [f"constitution: read under {str(around[0])[:40]!r}; not read: {others}"] if others else []
        content = content[around[0]]
    if isinstance(content, Mapping):
        known = {normal(name) for name in content}
        if known & {name for key in KEYS[1:] for name in NAMES[key]}:
            return [content], notes
        if all(isinstance(inner, Mapping) for inner in content.values()):
            return [{"name": str(name), **inner} for name, inner in content.items()], notes
        if _ids_and_sentences(content):
            return [{"id": name, "principle": text} for name, text in content.items()], notes
        sentences = [_as_sentence({name: inner}) for name, inner in content.items()]
        return (sentences if all(sentences) else []), notes
    return (list(content) if isinstance(content, list) else []), notes


def _ids_and_sentences(content: Mapping[Any, Any]) -> bool:
    """Whether each key is an id and each value a sentence, and no key one that says something about the file."""
    if {normal(name) for name in content} & {*BESIDE, *ABOUT, *(name for names in NAMES.values() for name in names)}:
        return False
    ids = all(isinstance(name, str) and ID.fullmatch(name) for name in content)
    return ids and all(isinstance(text, str) and len(text.split()) > 2 for text in content.values())


def _as_sentence(row: JsonObject) -> str:
    """A sentence with a colon, which YAML reads as a mapping of one key; "" for any other mapping."""
    if len(row) != 1:
        return ""
    name, text = next(iter(row.items()))
    return f"{name}: {text}" if isinstance(name, str) and " " in name.strip() and isinstance(text, str) else ""


def _fields(row: object, where: str) -> tuple[Principle, bool]:
    """The principle, and whether its requests are the default ones."""
    if isinstance(row, Mapping) and (sentence := _as_sentence(row)):
        row = sentence
    if isinstance(row, str) and row.strip():
        return _whole({"principle": row}, where, [])
    if not isinstance(row, Mapping):
        what = "an empty text" if isinstance(row, str) else type(row).__name__
        raise CaiError(f"{where}: {what} found; write a mapping with the keys {', '.join(KEYS)}")
    own = "id" in row
    if own and isinstance(row["id"], str):
        where = f"{where} ({row['id'][:64]!r})"
    faults: list[str] = []
    values = _own(row, faults) if own else _foreign(row, faults)
    return _whole(values, where, faults, own)


def _own(row: JsonObject, faults: list[str]) -> Row:
    """Our keys: all four, or a sentence with its id."""
    sentence = "principle" in row and not {"critique_request", "revision_request"} & row.keys()
    enough = sentence and len(row) == len({*row} & {"id", "principle", *OPTIONAL})
    missing = [] if enough else [k for k in KEYS if k not in row]
    unknown = [name for name in row if name not in (*KEYS, *OPTIONAL)]
    _keys(missing, unknown, faults)
    return {name: row[name] for name in (*KEYS, *OPTIONAL) if name in row}


def _foreign(row: JsonObject, faults: list[str]) -> Row:
    """LangChain's (name, critique_request, revision_request), critique and revision pairs, a sentence under a key."""
    values: Row = {}
    unknown = []
    framed = any(normal(name) in ("edit_request", "critique") for name in row)
    for name, value in row.items():
        ours = next((key for key, names in NAMES.items() if normal(name) in names), None)
        if ours is None and normal(name) in OPTIONAL:
            ours = normal(name)
        if ours is None:
            unknown += [] if normal(name) in BESIDE else [name]
        elif ours in values:
            faults.append(f"two keys for {ours}; keep one")
        else:
            frame = framed and ours in ("critique_request", "revision_request") and isinstance(value, str)
            values[ours] = FRAME.sub("", value) if frame else value
    both = ("critique_request", "revision_request")
    missing = [name for name in both if name not in values] if any(name in values for name in both) else []
    missing += ["principle"] if not values.keys() & {"principle", *both} else []
    _keys(missing, unknown, faults)
    if "critique_request" in values:
        values.setdefault("principle", values["critique_request"])
    return values


def _keys(missing: Sequence[str], unknown: Sequence[object], faults: list[str]) -> None:
    if missing:
        named = ", ".join(map(repr, missing))
        faults.append(f"key {named} is missing; add it" if len(missing) == 1 else f"keys {named} are missing; add them")
    if unknown:
        named = ", ".join(repr(str(name)[:40]) for name in unknown)
        faults.append(
            f"unknown key{'s' * (len(unknown) > 1)} {named}; the known keys are {', '.join((*KEYS, *OPTIONAL))}"
        )


def _whole(values: JsonObject, where: str, faults: list[str], own: bool = False) -> tuple[Principle, bool]:
    """The checked fields; what a sentence lacks is made. Errors: all faults of the entry in one line."""
    texts = {name: values[name] for name in KEYS[1:] if name in values}
    for name, value in texts.items():
        faults += [f"{name}: {fault}" for fault in _text_faults(value)]
    id_ = values.get("id")
    id_ = str(id_) if isinstance(id_, int) and not isinstance(id_, bool) else id_
    if id_ is not None and not isinstance(id_, str):
        faults.append(f"id: {type(id_).__name__} found; write text (in quotes if it looks like something else)")
    elif id_ is not None and not ID.fullmatch(id_):
        if not own and id_.strip():  # another tool's name: its words
            id_ = slug(id_)
        else:
            faults.append("id: use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    pools, priority, topic = values.get("pools"), values.get("priority", 0), values.get("topic", "")
    if pools is not None and not (isinstance(pools, list) and pools and all(pool in POOLS for pool in pools)):
        faults.append('pools: write a list of "benign" and "redteam"')
    if not isinstance(priority, int) or isinstance(priority, bool):
        faults.append(f"priority: {type(priority).__name__} found; write a whole number")
    if not isinstance(topic, str):
        faults.append(f"topic: {type(topic).__name__} found; write the topic of examples in prompts/critiques.yaml")
    if not isinstance(at_fault := values.get("refusal_is_fault", False), bool):
        faults.append(f"refusal_is_fault: {str(at_fault)[:40]!r} found; write true or false")
    if faults:
        raise CaiError(f"{where}: {'; '.join(faults)}")
    if "principle" not in texts:
        raise CaiError(f"{where}: key 'principle' is missing; add it")
    clean = {name: " ".join(value.split()) for name, value in texts.items()}
    sentence = clean["principle"]
    requests = requests_for(sentence)
    made = Principle(
        str(id_ or slug(sentence)),
        sentence,
        clean.get("critique_request", requests[0]),
        clean.get("revision_request", requests[1]),
        tuple(dict.fromkeys(pools or ())),
        priority,
        normal(topic),
        at_fault,
    )
    return made, "critique_request" not in clean


def _text_faults(value: object) -> list[str]:
    if not isinstance(value, str):
        return [f"{type(value).__name__} found; write text (in quotes if it looks like something else)"]
    if not value.strip():
        return ["is empty; write the text"]
    faults = []
    if len(value) > LONGEST_TEXT:
        return [f"has {len(value):,} characters, more than a prompt holds; write at most {LONGEST_TEXT:,}"]
    if not any(sign.isalpha() for sign in value):
        faults.append(f"{value.strip()[:40]!r} is no sentence; write the text")
    if placeholder := PLACEHOLDER.search(value):
        faults.append(f"holds the placeholder {placeholder[0][:40]!r}, which nothing fills in; take it out")
    if frame := FRAME.search(value):
        faults.append(f"holds the words {frame[0].strip()!r} of another tool's prompt; take them off")
    return faults


def requests_for(sentence: str) -> tuple[str, str]:
    """(critique request, revision request) for a principle that is one sentence."""
    return (
        f"Say where the answer falls short of this principle, and quote the words that do: {sentence}",
        f"Rewrite the answer so that it keeps to this principle: {sentence}",
    )


def slug(sentence: str) -> str:
    """An id of the sentence's words, the same wherever it stands in the file; cut or not Latin, a hash too."""
    ascii_ = unicodedata.normalize("NFKD", sentence).encode("ascii", "ignore").decode().lower()
    words = [word for word in re.findall(r"[a-z0-9]+", ascii_) if word not in SMALL_WORDS]
    whole = "-".join(words)
    cut = whole[:LONGEST_SLUG].rstrip("-")
    if cut == whole and cut:
        return cut
    return "-".join(filter(None, (cut or "principle", hashlib.sha256(sentence.encode()).hexdigest()[:6])))
