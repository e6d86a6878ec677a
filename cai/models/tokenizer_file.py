"""A tokenizer from a tokenizer.json that is already on this machine, for counting tokens without transformers.

Owns where such a file may lie (a local model folder, the embedded model's cache, the hub's cache; never the network)
and the small surface that cai.engine.tokenizers.HFTokenizer needs. A model whose chat template cannot be rendered here
counts as ChatML, which both models of the recipe use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from cai.engine.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer
from cai.errors import CaiError
from cai.models import embedded
from cai.recipe.settings import ModelSection


class ByteCounter(ByteTokenizer):
    """Bytes for tokens: whoever counts with it divides by four and says so."""


class TokenizerFile:
    """`tokenizers.Tokenizer` with the names that HFTokenizer asks a transformers tokenizer for."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.fast = Fast.from_file(str(folder / "tokenizer.json"))
        self.added_tokens_decoder = {id_: str(t.content) for id_, t in self.fast.get_added_tokens_decoder().items()}
        self.config = _json(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        self.chat_template = template.read_text() if template.is_file() else self.config.get("chat_template")
        self.eos_token_id = self.fast.token_to_id(self._content("eos_token")) or 0

    def _content(self, name: str) -> str:
        token = self.config.get(name) or ""
        return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return str(self.fast.decode(list(ids), skip_special_tokens=False))

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template is code of the model's publisher

        def refuse(message: str) -> None:
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        names = {name: self._content(name) for name in ("bos_token", "eos_token", "pad_token")}
        template = environment.from_string(str(self.chat_template))
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)


def tokenizer_at_hand(model: ModelSection, backend: str) -> tuple[Tokenizer, str]:
    """(tokenizer, what to say about its counts). Without a file: bytes, and counts estimated at 4 bytes a token."""
    if backend != "fake":
        for folder in _folders(model, backend):
            if (folder / "tokenizer.json").is_file():
                found = TokenizerFile(folder)
                if model.format == "base" or found.chat_template:
                    return HFTokenizer(found), "exact, by the model's tokenizer"
    counter: Any = ByteCounter()
    return counter, "estimated at 4 bytes a token (the model's tokenizer is not on this machine yet)"


def _folders(model: ModelSection, backend: str) -> list[Path]:
    if backend == "embedded":
        return _embedded()
    local = Path(model.name).expanduser()
    return [local] if local.is_dir() else _hub_cache(model)


def _embedded() -> list[Path]:
    """The converted folder, if it was made; it is never made here (that takes half a minute)."""
    if given := os.environ.get("CAI_EMBEDDED"):
        return [Path(given)]
    try:
        size = embedded.gguf_file().stat().st_size
    except (CaiError, OSError):
        return []
    return [embedded.cache_root() / f"{embedded.NAME}-{size:x}-v{embedded.VERSION}"]


def _hub_cache(model: ModelSection) -> list[Path]:
    """The snapshot of the revision in the hub's cache; the layout is the hub library's documented one."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.name.replace('/', '--')}"
    try:
        commit = (cache / "refs" / model.revision).read_text().strip()
    except OSError:
        commit = model.revision
    return [cache / "snapshots" / commit]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}
