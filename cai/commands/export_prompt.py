"""The files that carry the prompt format: chat template, tokenizer, generation settings, Modelfile.

Owns what an exported folder says about how it is asked. For a base-format policy that is the policy prompt as a chat
template and the end token that was trained; for a chat-format one the model's own files, byte for byte. Needs neither
torch nor the weights; a tokenizer that is not on this machine is fetched alone, and missed with a line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import orjson

from cai import errors
from cai.engine.foreign import HfTokenizer
from cai.engine.greedy import NEUTRAL
from cai.errors import CaiError
from cai.models.policy import eos_token
from cai.models.tokenizer_file import TokenizerFile, folder_at_hand
from cai.recipe import chat_template
from cai.recipe.prompts import Format, Prompt, Rendered, load_prompt
from cai.report.snapshot import Snapshot
from cai.store.files import write_atomic, write_json_atomic
from cai.store.jsonl import Row

if TYPE_CHECKING:
    from cai.engine.tokenizers import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json",
)  # fmt: skip
TEMPLATE = "chat_template.jinja"
OWN_FILES = (TEMPLATE, "generation_config.json")  # of a chat model, unchanged
FETCHED = (*TOKENIZER_FILES, *OWN_FILES, "config.json")


@dataclass(frozen=True)
class Asking:
    """How the exported policy is prompted. `folder`: its tokenizer on this machine; None: not to be had."""

    prompt: Prompt
    format: Format
    eos: str
    eos_id: int | None
    stops: tuple[str, ...]
    folder: Path | None
    missed: str = ""  # why there is no tokenizer
    nothing_to_load: bool = False  # an adapter of the fake model

    @property
    def template(self) -> str:
        return chat_template.jinja_template(self.prompt, self.eos) if self.format == "base" else ""

    def render(self, instruction: str, tokenizer: Tokenizer, form: Format | None = None) -> Rendered:
        """A request as it was measured, or in the format asked for."""
        return self.prompt.render({"instruction": instruction}, format=form or self.format, tokenizer=tokenizer)

    def modelfile(self, weights: str) -> str:
        go = chat_template.go_template(self.prompt, self.eos) if self.format == "base" else ""
        return chat_template.modelfile(weights, go, [self.eos, *self.stops])


def policy_prompt(run: Path) -> Prompt:
    """The run's own copy of prompts/policy.yaml."""
    path = run / "prompts" / "policy.yaml"
    if not path.is_file():
        raise CaiError(f"{path}: missing, so nobody knows how the policy is prompted. Resume the run.", errors.CORRUPT)
    return load_prompt(path, frozenset({"instruction"}))


def asking(snapshot: Snapshot) -> Asking:
    """The run's prompt format, with the tokenizer where it is (or can be had)."""
    prompt, section = policy_prompt(snapshot.path), snapshot.recipe.model
    stops = chat_template.stop_strings(prompt, section.format)
    found = Asking(prompt, section.format, section.eos or "<|endoftext|>", None, stops, None)
    if snapshot.backend == "fake":
        return replace(found, missed="the fake model has neither weights nor a tokenizer", nothing_to_load=True)
    facts = snapshot.manifest.get("model") or {}
    folder = folder_at_hand(section, snapshot.backend, facts) or _fetched(section.name, facts)
    if folder is None:
        return replace(found, missed=f"the tokenizer of {section.name} is not on this machine and cannot be fetched")
    tokenizer = TokenizerFile(folder)
    eos = eos_token(section, cast(HfTokenizer, tokenizer))
    return replace(found, eos=eos, eos_id=tokenizer.fast.token_to_id(eos), folder=folder)


def _fetched(name: str, facts: Row) -> Path | None:
    """The tokenizer's files alone, off the hub; None where it is out of reach."""
    from huggingface_hub import snapshot_download

    repository = str(facts.get("loaded_from") or name)
    revision = str(facts.get("revision") or "main")
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FETCHED)))
    except Exception:  # the hub's own errors and those of four network libraries
        return None
    return folder if (folder / "tokenizer.json").is_file() else None


def write_prompt_files(found: Asking, target: Path) -> None:
    """Template, tokenizer and generation settings into a folder that holds an adapter or merged weights."""
    if found.format == "base":
        write_atomic(target / TEMPLATE, found.template.encode())
    if found.folder is None:
        return
    names = TOKENIZER_FILES if found.format == "base" else (*TOKENIZER_FILES, *OWN_FILES)
    for name in names:
        if (found.folder / name).is_file():
            write_atomic(target / name, _changed(found, name, (found.folder / name).read_bytes()))
    if found.format == "base" or not (target / "generation_config.json").is_file():
        write_json_atomic(target / "generation_config.json", generation_values(found))


def _changed(found: Asking, name: str, data: bytes) -> bytes:
    """A tokenizer's file, with the end token that was trained and without another template (base format)."""
    if name not in ("tokenizer_config.json", "special_tokens_map.json"):
        return data
    values = orjson.loads(data)
    if name == "tokenizer_config.json" and values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5's name, which 4 cannot load
    elif found.format == "chat":
        return data
    if found.format == "base":
        for key in ("chat_template", "is_local", "local_files_only"):
            values.pop(key, None)
        values["eos_token"] = found.eos
        if "eos_token_id" in values:
            values["eos_token_id"] = found.eos_id
    return orjson.dumps(values, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def generation_values(found: Asking) -> Row:
    """generation_config.json as the policy was measured: greedy, no penalty, to the end token or a stop string."""
    values: Row = {**NEUTRAL, "eos_token_id": found.eos_id, "pad_token_id": found.eos_id}
    return values | ({"stop_strings": list(found.stops)} if found.stops else {})
