"""The surface that prompts, stages and engines need of a tokenizer, with two implementations, and control tokens.

Content is tokenised as plain text: `encode` never returns a control id, whatever the text spells.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from cai.engine.foreign import HfTokenizer
from cai.errors import CaiError
from cai.store.jsonl import Row, clean, one_line


class Turn(NamedTuple):
    role: str  # "system", "user" or "assistant"
    content: str


class Piece(NamedTuple):
    text: str
    turn: int | None  # the turn whose content this is; None: the template's own text, where control strings count


class Tokenizer(Protocol):
    """What prompts, stages and engines need of a tokenizer. `encode` never returns a control id."""

    eos_ids: tuple[int, ...]
    control_strings: tuple[str, ...]
    control_ids: frozenset[int]
    date: datetime | None  # what a chat template takes for today; None: the clock's

    def encode(self, text: str) -> list[int]: ...
    def encode_template(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def chat(self, turns: Sequence[Turn]) -> list[Piece]: ...


def split_control(text: str, control_strings: Collection[str]) -> list[str]:
    """Cut the text after the first character of every control string (overlapping ones too): no piece holds one."""
    cuts = {
        match.start() + 1
        for token in control_strings
        if len(token) > 1 and token in text
        for match in re.finditer(f"(?={re.escape(token)})", text)
    }
    bounds = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds) if a < b]


class HFTokenizer:
    """A transformers tokenizer with the surface above; imports neither torch nor transformers itself.

    Every added token counts as control, special or not (Qwen's `<tool_call>` and `<think>` are not marked special).
    A normaliser in the tokenizer still applies (Qwen: NFC), so text comes back as the tokenizer normalises it.
    `date`: what a chat template takes for today (a run's first day: a resume tomorrow writes the same prompts).
    """

    date: datetime | None = None

    def __init__(self, hf: HfTokenizer, eos_ids: Sequence[int] | None = None) -> None:
        self.hf = hf
        added = {str(token): int(id) for id, token in hf.added_tokens_decoder.items()}
        self.control_strings = tuple(sorted(added))
        self.control_ids = frozenset(added.values())
        self.eos_ids = tuple(eos_ids) if eos_ids is not None else (hf.eos_token_id,)

    def encode(self, text: str) -> list[int]:
        return [id for piece in split_control(clean(text), self.control_strings) for id in self.encode_template(piece)]

    def encode_template(self, text: str) -> list[int]:
        return self.hf.encode(text, add_special_tokens=False) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def chat(self, turns: Sequence[Turn]) -> list[Piece]:
        if not getattr(self.hf, "chat_template", None):
            raise CaiError('model.format: this tokenizer has no chat template; set format = "base"')
        marks = [f"\ue0f0{i}\ue0f1" for i in range(len(turns))]  # private use: stands for the content in the template
        messages = [{"role": turn.role, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
        try:
            parts = self._rendered(messages)
        except CaiError:  # Gemma's and other templates have no system role, or pass over it: the first request opens so
            if [turn.role for turn in turns[:2]] != ["system", "user"]:
                raise
            first = {"role": "user", "content": "\n\n".join(marks[:2])}
            parts = self._rendered([first, *messages[2:]], len(turns))
        return [
            Piece(turns[int(part)].content, int(part)) if i % 2 else Piece(part, None)
            for i, part in enumerate(parts)
            if part
        ]

    def _rendered(self, messages: list[dict[str, str]], turns: int = 0) -> list[str]:
        """Template text and numbers of turns in turn. Error: a template that refuses, drops or reorders them."""
        more: Row = {"strftime_now": self.date.strftime} if self.date else {}
        try:
            text = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)
        except Exception as error:  # a template raises what it likes, e.g. "System role not supported"
            raise CaiError(f"model.format: the chat template refuses these turns: {one_line(error)}") from None
        parts = re.split("\ue0f0(\\d+)\ue0f1", text)
        if parts[1::2] != [str(i) for i in range(turns or len(messages))]:
            raise CaiError('model.format: the chat template drops or reorders turns; set format = "base"')
        return parts


class ByteTokenizer:
    """UTF-8 bytes as ids and three control tokens: for the fake model and for tests without transformers."""

    date: datetime | None = None
    controls = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

    def __init__(self, eos_ids: Sequence[int] = (256,)) -> None:
        self.control_strings: tuple[str, ...] = self.controls
        self.control_ids = frozenset(range(256, 256 + len(self.controls)))
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = 256 + len(self.controls)

    def encode(self, text: str) -> list[int]:
        return list(clean(text).encode())

    def encode_template(self, text: str) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, self.controls)) + ")", text)
        return [
            id
            for i, part in enumerate(parts)
            for id in ([256 + self.controls.index(part)] if i % 2 else self.encode(part))
        ]

    def decode(self, ids: Sequence[int]) -> str:
        try:
            data = bytes(ids)  # no control token among them: most texts
        except ValueError:
            data = b"".join(bytes([id]) if id < 256 else self.controls[id - 256].encode() for id in ids)
        return data.decode(errors="replace")

    def chat(self, turns: Sequence[Turn]) -> list[Piece]:
        pieces: list[Piece] = []
        for i, turn in enumerate(turns):
            pieces += [Piece(f"<|im_start|>{turn.role}\n", None), Piece(turn.content, i), Piece("<|im_end|>\n", None)]
        return [*pieces, Piece("<|im_start|>assistant\n", None)]
