"""Prompt files to token ids: a few-shot transcript (base) or the tokenizer's chat template (chat), from the same turns.

Owns the prompt file's format, the one-pass `{{name}}` substitution and the assembly of token ids. Doesn't own the
wording (prompts/*.yaml), what a stage fills in, nor how text becomes ids (`tokenizers`).

Invariants:
- text that is filled in is never scanned for placeholders; lone surrogates become U+FFFD at the door and
  white space around it goes, nothing else changes;
- content is tokenised as plain text: a base prompt holds no control id, a chat prompt only those of its template;
- the first `prefix_len` ids are the same in all renders of one file with the same format, tokenizer and `shift`.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cai.engine.tokenizers import Piece, Tokenizer, Turn
from cai.errors import CaiError
from cai.recipe.intake.entries import POOLS, normal
from cai.recipe.yaml_files import check_keys, check_text, load_yaml
from cai.store.jsonl import JsonObject, clean

Format = Literal["base", "chat"]
Shift = int | tuple[int, ...]  # the few-shot examples: all, so far rotated, or these places in this order
PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
BRACES = re.compile(r"\{\{.*?\}\}", re.DOTALL)  # whatever looks like a placeholder must be one


@dataclass(frozen=True, slots=True)
class FewShotExample:
    """One exchange; `then` is a second one that follows it, as (user, assistant).

    `topic`, `pool`: what the case is about and whose request it answers; `request`: what a review of it was asked for.
    """

    user: str
    assistant: str
    then: tuple[str, str] | None = None
    topic: str = ""
    pool: str = ""
    request: str = ""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        return ((self.user, self.assistant), *((self.then,) if self.then else ()))


@dataclass(frozen=True, slots=True)
class Rendered:
    """One prompt, ready for the engine. `sha`: 16 hex of the file's bytes, the format, the text and the token ids."""

    token_ids: tuple[int, ...]
    text: str
    prefix_len: int
    stop: tuple[str, ...]
    sha: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked prompt file. `sha`: 16 hex of its bytes; `fields`: the names that `final` needs."""

    name: str
    path: str
    sha: str
    preamble: str
    user_cue: str
    assistant_cue: str
    examples: tuple[FewShotExample, ...]
    final: str
    fields: frozenset[str]
    stop: tuple[str, ...] = ()
    prefill: str = ""
    reply: str = ""  # of a second turn: what the assistant answered to `final`, as a template ...
    follow_up: str = ""  # ... and what the user asks then
    few_shot: int = -1  # how many of the examples are shown; -1: all
    _prefixes: dict[Any, tuple[list[int], str]] = field(default_factory=dict, repr=False, compare=False)

    def render(
        self, fields: Mapping[str, str], *, format: Format, tokenizer: Tokenizer, shift: Shift = 0, prefill: str = ""
    ) -> Rendered:
        """The prompt for these fields. `shift`: which examples it shows; the completion follows `prefill`."""
        if prefill != self.prefill and prefill:
            given = replace(self, prefill=prefill)  # shares the prefixes that were encoded
            return given.render(fields, format=format, tokenizer=tokenizer, shift=shift)
        self._check_fields(fields)
        head, tail = split_at_placeholder(self.final)
        tail = substitute(tail, fields)
        more = (substitute(self.reply, fields), substitute(self.follow_up, fields)) if self.follow_up else ()
        order = self.order(shift)
        if format == "chat":
            fixed, rest = self._chat_pieces(head, tail, order, more, tokenizer)
        else:
            fixed, rest = self._base_pieces(head, tail, order, more)
        key = (format, order, tokenizer)
        if key not in self._prefixes:
            self._prefixes[key] = (encode_pieces(fixed, tokenizer), "".join(piece.text for piece in fixed))
        prefix_ids, prefix_text = self._prefixes[key]
        token_ids = (*prefix_ids, *encode_pieces(rest, tokenizer))
        text = clean(prefix_text + "".join(piece.text for piece in rest))
        sha = digest(self.sha.encode(), format.encode(), text.encode(), struct.pack(f"<{len(token_ids)}I", *token_ids))
        return Rendered(token_ids, text, len(prefix_ids), self._stops(format), sha)

    def order(self, shift: Shift) -> tuple[int, ...]:
        """The places of the examples that are shown; prompts of one order begin with the same tokens.

        A number rotates them and shows the first `few_shot`; of places that are given the last so many are shown.
        """
        count = len(self.examples)
        if isinstance(shift, int):
            rotated = tuple((place + shift) % count for place in range(count))
            return rotated if self.few_shot < 0 else rotated[: self.few_shot]
        return shift if self.few_shot < 0 else shift[max(0, len(shift) - self.few_shot) :]

    def _check_fields(self, fields: Mapping[str, str]) -> None:
        if set(fields) != self.fields:
            missing, extra = sorted(self.fields - set(fields)), sorted(set(fields) - self.fields)
            raise CaiError(f"{self.path}: final: fields missing {missing}, not used {extra}; edit the placeholders")

    def _stops(self, format: Format) -> tuple[str, ...]:
        # a base model writes the next turns itself
        cues = ("\n" + self.user_cue.rstrip(), "\n" + self.assistant_cue.rstrip())
        return tuple(dict.fromkeys((cues if format == "base" else ()) + self.stop))

    def _turns(self, order: tuple[int, ...]) -> list[tuple[str, str]]:
        return [turn for place in order for turn in self.examples[place].turns]

    def _base_pieces(
        self, head: str, tail: str, order: tuple[int, ...], more: tuple[str, ...]
    ) -> tuple[list[Piece], list[Piece]]:
        """The transcript as plain text, cut where the first filled-in text begins."""
        start = self.preamble + "\n\n" if self.preamble else ""
        for user, assistant in self._turns(order):
            start += f"{after(self.user_cue, user)}\n\n{after(self.assistant_cue, assistant)}\n\n"
        whole = start + after(self.user_cue, head)
        fixed = whole.rstrip(" ")  # a lone trailing space is a token of its own: the space belongs to the word after it
        end = after(self.assistant_cue, self.prefill) if self.prefill else self.assistant_cue
        for cue, text in zip((self.assistant_cue, self.user_cue), more, strict=False):
            tail += f"\n\n{after(cue, text)}"
        return [Piece(fixed, 0)], [Piece(f"{whole[len(fixed) :]}{tail}\n\n{end}", 0)]

    def _chat_pieces(
        self, head: str, tail: str, order: tuple[int, ...], more: tuple[str, ...], tokenizer: Tokenizer
    ) -> tuple[list[Piece], list[Piece]]:
        """The template's pieces with the last user turn cut where the first filled-in text begins."""
        turns = [Turn("system", self.preamble)] if self.preamble else []
        for user, assistant in self._turns(order):
            turns += [Turn("user", user), Turn("assistant", assistant)]
        turns.append(Turn("user", head + tail))
        turns += [Turn("assistant", more[0]), Turn("user", more[1])] if more else []
        pieces = tokenizer.chat(turns)
        at = next(i for i, piece in enumerate(pieces) if piece.turn == len(turns) - (3 if more else 1))
        fixed_head = head.rstrip(" ")
        rest = [Piece(head[len(fixed_head) :] + tail, 0), *pieces[at + 1 :]]
        return [*pieces[:at], Piece(fixed_head, 0)], rest + ([Piece(self.prefill, 0)] if self.prefill else [])


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    encoded = (tokenizer.encode_template(p.text) if p.turn is None else tokenizer.encode(p.text) for p in pieces)
    return [id for ids in encoded for id in ids]


def after(cue: str, text: str) -> str:
    """The text behind its cue: on the next line if the cue ends its line, else after a space."""
    return cue + text if cue.endswith("\n") else f"{cue} {text}"


def split_at_placeholder(template: str) -> tuple[str, str]:
    match = PLACEHOLDER.search(template)
    at = match.start() if match else len(template)
    return template[:at], template[at:]


def substitute(template: str, fields: Mapping[str, str]) -> str:
    """Fill every `{{name}}` in one pass over the template; what is filled in is never looked at again."""
    return PLACEHOLDER.sub(lambda match: clean(fields[match[1]]).strip(), template)


def digest(*parts: bytes) -> str:
    """16 hex of the parts' sha256, each part behind its length."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(struct.pack("<Q", len(part)) + part)
    return sha.hexdigest()[:16]


# --- loading


REQUIRED, OPTIONAL = ("preamble", "cues", "examples", "final"), ("stop", "prefill")


def load_prompt(path: str | Path, fields: Collection[str] | None = None, content: bytes | None = None) -> Prompt:
    """Read and check a prompt file. `fields`: the names that `final` must use, None for any.

    `content`: the file's bytes, where they were read already.
    """
    data, sha = load_yaml(path, content)
    check_keys(data, REQUIRED, OPTIONAL, str(path))
    return _prompt(data, sha, path, fields)


def _prompt(data: JsonObject, sha: str, path: str | Path, fields: Collection[str] | None) -> Prompt:
    check_keys(data["cues"], ("user", "assistant"), (), f"{path}: cues")
    texts = {"preamble": data["preamble"], "final": data["final"], "prefill": data.get("prefill", "")}
    texts |= {f"cues.{key}": value for key, value in data["cues"].items()}
    for key, value in texts.items():
        check_text(value, f"{path}: {key}", empty=key in ("preamble", "prefill"))
    final = clean(data["final"]).strip()
    expected = None if fields is None else frozenset(fields)
    names = _placeholders(final, expected, f"{path}: final")
    return Prompt(
        name=Path(path).stem,
        path=str(path),
        sha=sha,
        preamble=clean(data["preamble"]).strip(),
        user_cue=clean(data["cues"]["user"]).lstrip(),
        assistant_cue=clean(data["cues"]["assistant"]).lstrip(),
        examples=_examples(data["examples"], final, str(path)),
        final=final,
        fields=names,
        stop=_stop(data.get("stop", []), str(path)),
        prefill=clean(data.get("prefill", "")).strip(),
    )


ABOUT = ("topic", "pool")  # of an example: any word, and "benign" or "redteam"
REVIEW_EXAMPLE = ("user", "critique"), ("revision_request", "revision", *ABOUT)


def load_reviews(
    path: str | Path, critique: Collection[str], revision: Collection[str], content: bytes | None = None
) -> tuple[Prompt, Prompt]:
    """Critique and revision in one transcript: the prompts of both stages, whose shown examples are the same.

    An example holds `user` (the fields of `final`) and `critique`, and, where the critique found something,
    `revision_request` and `revision`. `follow_up` is the second request; what stands before it is the first turn.
    """
    data, sha = load_yaml(path, content)
    check_keys(data, (*REQUIRED, "follow_up"), OPTIONAL, str(path))
    check_text(data["follow_up"], f"{path}: follow_up")
    follow_up, rows = clean(data["follow_up"]).strip(), data["examples"]
    if not isinstance(rows, list):
        raise CaiError(f"{path}: examples: {type(rows).__name__} found; write a list ([] for none)")
    first, then = [], []
    for i, row in enumerate(rows):
        check_keys(row, *REVIEW_EXAMPLE, f"{path}: examples[{i}]")
        if ("revision" in row) != ("revision_request" in row):
            raise CaiError(f"{path}: examples[{i}]: revision and revision_request stand together or not at all")
        about = {key: row[key] for key in (*ABOUT, "revision_request") if key in row}
        first.append({"user": row["user"], "assistant": row["critique"], **about})
        then.append(_second_turn(row, follow_up, f"{path}: examples[{i}]"))
    rest = {key: value for key, value in data.items() if key != "follow_up"} | {"examples": first}
    one = _prompt(rest, sha, path, critique)
    examples = tuple(replace(e, then=t) for e, t in zip(one.examples, then, strict=True))
    _placeholders(follow_up, {"revision_request"}, f"{path}: follow_up")
    one = replace(one, examples=examples, _prefixes={})
    two = replace(one, reply="{{critique}}", follow_up=follow_up, _prefixes={})
    names = frozenset(PLACEHOLDER.findall(one.final)) - {"critique_request"}
    needed = frozenset(revision) | {"critique_request"}
    if missing := sorted(needed - names - {"critique", "revision_request", "critique_request"}):
        raise CaiError(f"{path}: final: placeholder {{{{{missing[0]}}}}} is not used; add it to the text")
    return one, replace(two, fields=needed, _prefixes={})


def _second_turn(row: JsonObject, follow_up: str, where: str) -> tuple[str, str] | None:
    if "revision" not in row:
        return None
    for name in ("revision_request", "revision"):
        check_text(row[name], f"{where}.{name}")
    return substitute(follow_up, {"revision_request": row["revision_request"]}), clean(row["revision"]).strip()


def _placeholders(template: str, expected: Collection[str] | None, where: str) -> frozenset[str]:
    if odd := next((m[0] for m in BRACES.finditer(template) if not PLACEHOLDER.fullmatch(m[0])), None):
        raise CaiError(f"{where}: {odd[:40]!r} is no placeholder; write {{{{name}}}}")
    names = frozenset(PLACEHOLDER.findall(template))
    for name in sorted(names - set(names if expected is None else expected)):
        raise CaiError(f"{where}: unknown placeholder {{{{{name}}}}}; known are {', '.join(sorted(expected or ()))}")
    for name in sorted(set(expected or ()) - names):
        raise CaiError(f"{where}: placeholder {{{{{name}}}}} is not used; add it to the text")
    return names


def _examples(rows: object, final: str, path: str) -> tuple[FewShotExample, ...]:
    """`user` is text, or a mapping of the placeholders' values: then it is written the way `final` is."""
    if not isinstance(rows, list):
        raise CaiError(f"{path}: examples: {type(rows).__name__} found; write a list ([] for none)")
    names, examples = tuple(dict.fromkeys(PLACEHOLDER.findall(final))), []
    for i, row in enumerate(rows):
        where = f"{path}: examples[{i}]"
        check_keys(row, ("user", "assistant"), (*ABOUT, "revision_request"), where)
        check_text(row["assistant"], f"{where}.assistant")
        user, request = row["user"], row.get("revision_request", "")
        check_text(request, f"{where}.revision_request", empty="revision_request" not in row)
        if isinstance(user, dict):
            check_keys(user, names, (), f"{where}.user")
            for name, value in user.items():
                check_text(value, f"{where}.user.{name}")
            request = " ".join([*(text for name, text in user.items() if name.endswith("_request")), request])
            user = substitute(final, user)
        check_text(user, f"{where}.user")
        topic, pool = (_about(row[key], key, f"{where}.{key}") if key in row else "" for key in ABOUT)
        texts = clean(user).strip(), clean(row["assistant"]).strip()
        examples.append(FewShotExample(*texts, topic=topic, pool=pool, request=clean(request).strip()))
    return tuple(examples)


def _about(value: object, key: str, where: str) -> str:
    check_text(value, where)
    if key == "pool" and value not in POOLS:
        raise CaiError(f"{where}: {str(value)[:40]!r} is no pool; write {' or '.join(POOLS)}")
    return normal(value) if key == "topic" else str(value)


def _stop(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(stop, str) and stop for stop in value):
        raise CaiError(f"{path}: stop: write a list of non-empty strings")
    return tuple(value)
