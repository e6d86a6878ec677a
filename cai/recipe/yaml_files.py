"""Strict YAML for the files that users edit: constitution, prompts, grid.

Owns reading (safe loader, UTF-8, a key given twice is an error) and the two checks that every schema is made of. Each
fault is a CaiError of one line: file, place, remedy. Doesn't own any schema.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from cai.errors import CaiError
from cai.store.jsonl import clean, one_line
from cai.store.reading import MOST_WRITTEN_BYTES, Missing, read_once


class _UniqueKeys:
    """Refuses a key given twice: plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[attr-defined]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"key {twice!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _Loader(_UniqueKeys, yaml.SafeLoader):
    """In Python: slow, and safe with any nesting."""


class _FastLoader(_UniqueKeys, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml, ten times as fast; its recursion is not counted, so deep nesting would end the process.

    What it refuses (an escaped lone surrogate, for one) is asked of the loader in Python, which has the last word.
    """


NESTED = re.compile(r"(?:[\[{]\s*(?:[\w\"'-]+\s*:\s*)?|[-?][ \t]+){60}")  # no file of ours needs a tenth of it


def _may_nest_deeply(text: str) -> bool:
    """More brackets, dashes or indentation than any file of ours: a cheap bound of the nesting."""
    if text.count("[") + text.count("{") > 400:
        return True
    return any(line.count("- ") + line.count("? ") > 50 or line[:200].isspace() for line in text.splitlines() if line)


def _parse(text: str) -> Any:
    if not _may_nest_deeply(text):
        with suppress(yaml.YAMLError):
            return yaml.load(text, Loader=_FastLoader)
    return yaml.load(text, Loader=_Loader)


@lru_cache(maxsize=64)  # one command reads a prompt file several times, and its own copy of it
def _read(text: str) -> Any:
    if NESTED.search(text):  # the loader in Python takes seconds to see it
        raise RecursionError
    _refuse_aliases(text)
    return _without_surrogates(_parse(text))


def load_yaml(path: str | Path, data: bytes | None = None) -> tuple[Any, str]:
    """(content, 16-hex sha of the bytes) of a YAML file; every fault is one line with the file and the place.

    `data`: the file's bytes, where the caller has read them already.
    """
    data = read_yaml_bytes(path) if data is None else data
    try:
        return parse_yaml(data.decode("utf-8-sig"), path), hashlib.sha256(data).hexdigest()[:16]
    except UnicodeDecodeError as error:
        raise CaiError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_yaml_bytes(path: str | Path) -> bytes:
    try:
        return read_once(Path(path), where=str(path), most=MOST_WRITTEN_BYTES)
    except Missing:
        raise CaiError(f"{path}: cannot be read (No such file or directory); give the path of a YAML file") from None


def parse_yaml(text: str, path: str | Path) -> Any:
    """The content of YAML text. An alias is refused: nested ones make gigabytes of a few hundred bytes."""
    try:
        return copy.deepcopy(_read(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = one_line(getattr(error, "problem", None) or error)
        problem += " (a colon within a text? put the text in quotes)" * problem.startswith("mapping values")
        raise CaiError(f"{path}: {place}bad YAML: {problem}; correct this line") from None
    except (RecursionError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CaiError(f"{path}: bad YAML: {type(error).__name__}; write plain keys, text and lists") from None


def _refuse_aliases(text: str) -> None:
    """No file of ours needs one (`*name`, `<<: *name`)."""
    if "*" not in text:
        return
    loader = yaml.SafeLoader if _may_nest_deeply(text) else _FastLoader
    alias = None
    with suppress(yaml.YAMLError):  # what is no YAML is told by the parser
        alias = next((token for token in yaml.scan(text, Loader=loader) if isinstance(token, yaml.AliasToken)), None)
    if alias is not None:
        problem = f"an alias (*{alias.value[:40]}) is not read, write its text out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=alias.start_mark)


def _without_surrogates(value: object) -> Any:
    """YAML's \\ud800 makes a lone surrogate, which no encoder accepts: each becomes U+FFFD, here at the door."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(inner) for key, inner in value.items()}
    return [_without_surrogates(inner) for inner in value] if isinstance(value, list) else value


def check_keys(data: Any, required: Collection[str], optional: Collection[str], where: str) -> None:
    """A mapping with all of `required` and nothing outside `required` and `optional`, or a CaiError."""
    if not isinstance(data, dict):
        raise CaiError(f"{where}: {type(data).__name__} found; write a mapping with the keys {', '.join(required)}")
    if missing := [key for key in required if key not in data]:
        raise CaiError(f"{where}: key {missing[0]!r} is missing; add it")
    if unknown := [key for key in data if key not in required and key not in optional]:
        known = ", ".join([*required, *optional])
        raise CaiError(f"{where}: unknown key {unknown[0]!r}; the known keys are {known}")


def check_text(value: object, where: str, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise CaiError(f"{where}: {type(value).__name__} found; write text (in quotes if it looks like something else)")
    if not empty and not value.strip():
        raise CaiError(f"{where}: is empty; write the text")
