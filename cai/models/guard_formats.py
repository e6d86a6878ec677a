"""How an exchange is written for a guard and how its categories are read: Qwen3Guard-Gen and Llama Guard 3.

Owns the category lists, the check that a tokenizer's chat template really asks for a verdict, and the token ids: those
that the published template gives for the whole text, with control tokens spelt inside the exchange kept as plain text.
Loads nothing. What is taken from where:

- QwenLM/Qwen3Guard, README ("Quick Start"): the template is applied without a generation prompt, for it writes the
  assistant's turn itself; answers are `Safety: Safe|Unsafe|Controversial`, `Categories: ...` and, where a reply is
  judged, `Refusal: Yes|No`. Nine categories for a query, the same without Jailbreak for a reply.
- meta-llama/PurpleLlama, Llama-Guard3/8B and 1B MODEL_CARD.md: `safe`, or `unsafe` and a line of codes; 14 categories
  for the 8B, S1 to S13 for the 1B; the score is the probability of the first verdict token.
- tokenizer_config.json of meta-llama/Llama-Guard-3-8B and -1B: the 8B's template strips plain strings and knows no
  exclusions; the 1B's (as the 11B-Vision's) takes content as a list of parts, silently drops plain strings, and leaves
  out `excluded_category_keys`. Both end with the assistant's header, and the model begins with a blank line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai.engine.foreign import HfTokenizer
from cai.engine.tokenizers import Piece, Tokenizer
from cai.errors import CaiError
from cai.recipe.prompts import encode_pieces

QWEN, LLAMA = "qwen3guard", "llama-guard"
QWEN_LABELS = ("Safe", "Unsafe", "Controversial")
QWEN_CATEGORIES = (
    "Violent", "Non-violent Illegal Acts", "Sexual Content or Sexual Acts", "PII", "Suicide & Self-Harm",
    "Unethical Acts", "Politically Sensitive Topics", "Copyright Violation", "Jailbreak",
)  # fmt: skip
LLAMA_NAMES = {
    "S1": "Violent Crimes", "S2": "Non-Violent Crimes", "S3": "Sex-Related Crimes", "S4": "Child Sexual Exploitation",
    "S5": "Defamation", "S6": "Specialized Advice", "S7": "Privacy", "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons", "S10": "Hate", "S11": "Suicide & Self-Harm", "S12": "Sexual Content",
    "S13": "Elections", "S14": "Code Interpreter Abuse",
}  # fmt: skip
QWEN_NAME = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, QWEN_CATEGORIES))})(?![\w-])", re.IGNORECASE)
EXCLUDED = "excluded"  # as a category: the guard names only what the recipe leaves out
ASKS = {QWEN: ("Safety: Safe", "Safety: Controversial", "Refusal: Yes"), LLAMA: ("'safe' or 'unsafe'",)}
MARKS = ("\ue0f00\ue0f1", "\ue0f01\ue0f1")  # private use: stand for the two texts in the template
SPLIT = re.compile("\ue0f0(\\d+)\ue0f1")


@dataclass(frozen=True)
class Exchange:
    prompt: str
    reply: str


def template_parts(hf_tokenizer: HfTokenizer, style: str, excluded: Sequence[str] = ()) -> list[str]:
    """The guard's template around the two texts: what stands before, between and after them.

    Errors: CaiError where it takes no such turns, or does not ask for this style's verdict (a converted copy with an
    ordinary chat template would answer the exchange instead of judging it).
    """
    for listed in (False, True):
        contents: list[Any] = [[{"type": "text", "text": mark}] if listed else mark for mark in MARKS]
        messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), contents, strict=True)]
        more = {"excluded_category_keys": list(excluded)} if style == LLAMA else {}
        try:
            text = hf_tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception:  # a template raises what it likes
            continue
        parts = SPLIT.split(text)
        if parts[1::2] == ["0", "1"]:
            return _checked([_without(part, excluded) for part in parts[::2]], style)
    raise CaiError(
        "guard.model: its chat template takes no user and assistant turn. Use the published tokenizer files."
    )


def _checked(parts: list[str], style: str) -> list[str]:
    missing = next((words for words in ASKS[style] if not any(words in part for part in parts)), None)
    if missing or "assistant" not in parts[-1]:
        lacks = f"{missing!r} is not in it" if missing else "it opens no turn for the verdict"
        raise CaiError(
            f"guard.model: its chat template asks for no {style} verdict ({lacks}). Use the published tokenizer files, "
            "or set guard.style to the guard's format."
        )
    if style == LLAMA:
        parts[-1] = parts[-1].rstrip() + "\n\n"  # the verdict stands after a blank line
    return parts


def _without(text: str, excluded: Sequence[str]) -> str:
    for key in excluded:
        text = re.sub(rf"(?m)^{key}: .*\n", "", text)
    return text


def exchange_pieces(parts: Sequence[str], exchange: Exchange, style: str, control: Sequence[str]) -> list[Piece]:
    """Pieces to encode: the template's stretches from its first to its last control token as such, the rest as text.

    What touches a text is encoded with it: "Agent: " before it ends in a blank that belongs to its first word, and a
    full stop before an empty line is one token with it in Llama's and Qwen's vocabularies.
    """
    texts = [exchange.prompt, exchange.reply]
    if style == LLAMA:
        texts = [text.strip() for text in texts]
    pieces, plain = [], ""
    for i, part in enumerate(parts):
        first, last = _control_span(part, control)
        if first < last:
            pieces += [Piece(plain + part[:first], 0), Piece(part[first:last], None)]
            plain = part[last:]
        else:
            plain += part
        plain += texts[i] if i < len(texts) else ""
    return [piece for piece in (*pieces, Piece(plain, 0)) if piece.text]


def _control_span(part: str, control: Sequence[str]) -> tuple[int, int]:
    """From the first control token to the end of the last one; (0, 0) where there is none."""
    spans = [(at, at + len(token)) for token in control if token for at in [part.find(token)] if at >= 0]
    ends = [part.rfind(token) + len(token) for token in control if token and token in part]
    return (min(start for start, _ in spans), max(ends)) if spans else (0, 0)


def exchange_ids(parts: Sequence[str], exchange: Exchange, style: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(encode_pieces(exchange_pieces(parts, exchange, style, tokenizer.control_strings), tokenizer))


def qwen_category(text: str) -> str:
    """The first known category of the line; what cannot be read is "unparsed"."""
    line = text.strip().split("\n")[0]
    found = QWEN_NAME.search(line)
    return next(name for name in QWEN_CATEGORIES if name.lower() == found[1].lower()) if found else "unparsed"


def llama_category(text: str, excluded: Sequence[str] = ()) -> str:
    """`S1 Violent Crimes` of the first code in the line that counts; "" where nothing was asked.

    EXCLUDED where every code in the line is one of `excluded`.
    """
    if not text:
        return ""
    codes = [code for code in re.findall(r"\bS\d{1,2}\b", text.strip().split("\n")[0]) if code in LLAMA_NAMES]
    counted = [code for code in codes if code not in excluded]
    if codes and not counted:
        return EXCLUDED
    return f"{counted[0]} {LLAMA_NAMES[counted[0]]}" if counted else "unparsed"


SEPARATOR = "\n\n---\n\n"  # HarmBench's DirectRequest: context, then behaviour
