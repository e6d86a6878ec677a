"""A tokenizer from a tokenizer.json that is already on this machine, for counting tokens without transformers.

Owns where such a file may lie (a local model folder, the embedded model's cache, the hub's cache; never the network)
and the small surface that cai.engine.tokenizers.HFTokenizer needs. Chat templates are rendered as transformers renders
them (`chat_environment`), within bounds, so that what a run would refuse is refused before anything is loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from cai.engine.foreign import HfTokenizer
from cai.engine.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer
from cai.errors import CaiError
from cai.models import chat_environment, embedded, weights
from cai.recipe.settings import ModelSection
from cai.store.jsonl import JsonObject, one_line, read_object


class ByteCounter(ByteTokenizer):
    """Bytes for tokens: whoever counts with it divides by four and says so."""


class TokenizerFile:
    """`tokenizers.Tokenizer` with the names that HFTokenizer asks a transformers tokenizer for."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.fast = Fast.from_file(str(folder / "tokenizer.json"))
        self.added_tokens_decoder = {id_: str(t.content) for id_, t in self.fast.get_added_tokens_decoder().items()}
        self.config = read_object(folder / "tokenizer_config.json")
        self.chat_template = template_of(folder)
        self.eos_token_id = self.fast.token_to_id(self._content("eos_token")) or 0

    @property
    def eos_token(self) -> str | None:
        return self._content("eos_token") or None

    def get_vocab(self) -> dict[str, int]:
        return dict(self.fast.get_vocab(with_added_tokens=True))

    def _content(self, name: str) -> str:
        token = self.config.get(name) or ""
        return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return str(self.fast.decode(list(ids), skip_special_tokens=False))

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool, **more: object
    ) -> str:
        names = {name: self._content(name) for name in ("bos_token", "eos_token", "pad_token")}
        return chat_environment.render(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, **(names | more)
        )


def template_of(folder: Path) -> str:
    """The chat template of a tokenizer's folder, of several the default one; "" where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with contextlib.suppress(OSError, UnicodeDecodeError), file.open(encoding="utf-8") as source:
            return source.read(chat_environment.MOST_TEMPLATE + 1)
    return chat_environment.choose(read_object(folder / "tokenizer_config.json").get("chat_template"))


def check_template(model: ModelSection, place: Path | str) -> None:
    """Before any weights: a chat model has a template, and it renders a request. `place`: folder or file; "": unknown.

    Errors: CaiError (exit 2): no template, one that refuses plain turns, one beyond the bounds.
    """
    if model.format != "chat" or not str(place):
        return
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    template = template_of(folder)
    if not template:
        raise CaiError(f'model.format: the tokenizer of {model.name} has no chat template; set format = "base".')
    turns = [{"role": "user", "content": "Hello."}]
    try:
        chat_environment.render(template, turns, add_generation_prompt=True, bos_token="", eos_token="")
    except Exception as error:  # a template raises what it likes
        line = one_line(error)
        raise CaiError(
            f'model.format: the chat template of {model.name}: {line}. Mend it, or set format = "base".'
        ) from None


def tokenizer_at_hand(model: ModelSection, backend: str) -> tuple[Tokenizer, str]:
    """(tokenizer, what to say about its counts). Without a file: bytes, and counts estimated at 4 bytes a token."""
    if backend != "fake":
        for folder in _folders(model, backend):
            if (folder / "tokenizer.json").is_file():
                check_template(model, folder)
                return HFTokenizer(cast(HfTokenizer, TokenizerFile(folder))), "exact, by the model's tokenizer"
    counter: Tokenizer = ByteCounter()
    return counter, "estimated at 4 bytes a token (the model's tokenizer is not on this machine yet)"


def folder_at_hand(model: ModelSection, backend: str, facts: JsonObject) -> Path | None:
    """The folder of the tokenizer that a run used (`facts`: its manifest's), if it is on this machine."""
    if backend not in ("embedded", "fake") and not Path(model.name).expanduser().is_dir():
        used = {"name": str(facts.get("loaded_from") or model.name), "revision": str(facts.get("revision") or "main")}
        model = model.model_copy(update=used)
    folders = [] if backend == "fake" else _folders(model, backend)
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _folders(model: ModelSection, backend: str) -> list[Path]:
    if backend == "embedded":  # never made here (that takes half a minute)
        return [found] if (found := embedded.place()) else []
    local = Path(model.name).expanduser()
    return [local] if local.is_dir() else _hub_cache(model)


def _hub_cache(model: ModelSection) -> list[Path]:
    """The snapshot of the revision in the hub's cache; the layout is the hub library's documented one."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.name.replace('/', '--')}"
    try:
        commit = (cache / "refs" / model.revision).read_text().strip()
    except OSError:
        commit = model.revision
    return [cache / "snapshots" / commit]


def modules_at_hand(model: ModelSection, backend: str) -> set[str]:
    """Linear modules of the decoder's layers, by the headers of weights that are on this machine; empty: not known."""
    if backend == "fake":
        return set()
    for folder in _folders(model, backend):
        if files := sorted(folder.glob("*.safetensors")):
            return weights.projections(files, "model.name")
    return set()
