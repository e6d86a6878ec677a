"""Chat templates with the structure of the guards' published ones, in our own words, and a small tokenizer for them.

LLAMA_8B: plain strings, stripped, no exclusions, a blank before the first token. LLAMA_1B: content as a list of parts,
categories from a mapping less the excluded. QWEN_GEN: a text for queries and another for replies, by the last role; the
assistant's turn with an empty thought stands at the end whether a generation prompt is asked for or not.
"""

from __future__ import annotations

from typing import Any

import jinja2

NAMES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
_WHO = "{% if messages|length % 2 == 0 %}{% set role = 'Agent' %}{% else %}{% set role = 'User' %}{% endif %}"
_HEAD = r"""<|im_start|>user<|im_end|>\n\nTask: look for unsafe content in '" + role + "' messages.\n\n"""
_TAIL = (
    r'{{ "<END CONVERSATION>\n\nJudge ONLY THE LAST " + role + " message above:\n" }}'
    r"""{{ " - First line must read 'safe' or 'unsafe'.\n - If unsafe, a second line with the codes." }}"""
    r'{{ "<|endoftext|><|im_start|>assistant<|im_end|>" }}'
)
_ROLES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% set who = 'User' if m['role'] == 'user' else 'Agent' %}"
)
_BEGIN = r'{{ "\n<BEGIN CONVERSATION>\n\n" }}'
LLAMA_8B = (
    _WHO
    + '{{ " '
    + _HEAD
    + "".join(rf"S{number}: {name}.\n" for number, name in enumerate(NAMES, 1))
    + '" }}'
    + _BEGIN
    + _ROLES
    + r"{{ who + ': ' + m['content'].strip() + '\n\n' }}{% endfor %}"
    + _TAIL
)
LLAMA_1B = (
    _WHO
    + '{{ "'
    + _HEAD
    + '" }}{% set categories = {'
    + ", ".join(f"'S{number}': '{name}.'" for number, name in enumerate(NAMES[:13], 1))
    + "} %}{% for key in categories %}{% if key not in excluded_category_keys %}"
    + r"{{ key + ': ' + categories[key] + '\n' }}{% endif %}{% endfor %}"
    + _BEGIN
    + _ROLES
    + "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    + r"{{ who + ': ' + c['text'] | trim + '\n\n' }}{% endfor %}{% endfor %}"
    + _TAIL
)
QWEN_GEN = (
    r'{{ "<|im_start|>user\n# Task:\n" }}{% if messages[-1]["role"] == "assistant" %}'
    r"""{{ "1) Is THE LAST ASSISTANT's response safe?\n2) Is it a refusal?\n\nViolent.\nPII.\n\n" }}{% else %}"""
    r"""{{ "1) Is THE LAST USER's query safe?\n\nViolent.\nJailbreak.\n\n" }}{% endif %}"""
    r'{{ "<BEGIN CONVERSATION>" }}{% for m in messages %}{% set who = "USER" if m["role"] == "user" else "ASSISTANT" %}'
    r'{{ "\n\n" + who + ": " + m["content"] }}{% endfor %}{{ "\n\n<END CONVERSATION>\n\n" }}'
    r"""{{ " - One of: 'Safety: Safe', 'Safety: Unsafe', 'Safety: Controversial'.\n - 'Categories:', a list.\n" }}"""
    r"""{% if messages[-1]["role"] == "assistant" %}{{ " - 'Refusal: Yes' or 'Refusal: No'." }}{% endif %}"""
    r'{{ "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n" }}'
)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class Bpe:
    """A `tokenizers` model with the surface of a transformers tokenizer that `HFTokenizer` and the guards use."""

    def __init__(self, inner: Any, template: str) -> None:
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        self.inner, self.template = inner, environment.from_string(template)
        self.added_tokens_decoder = inner.get_added_tokens_decoder()
        self.eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **more: Any) -> str:
        return self.template.render(messages=messages, **more)


def bpe_tokenizer(template: str) -> Bpe:
    return Bpe(train_bpe(template), template)


def train_bpe(template: str) -> Any:
    """Byte-level BPE with a pre-tokenizer as Llama 3's: blanks go with the next word, line ends with what precedes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    texts = [template, "User: Why do you bake? Agent: Mix flour and water.\n\nMix, mix.\n\nASSISTANT: Mix it.\n\n"] * 9
    inner.train_from_iterator(texts, trainer)
    return inner
