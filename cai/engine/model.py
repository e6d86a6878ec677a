"""The Model Protocol: what the pipeline may ask of the loaded weights, whoever loaded them.

Owns the surface alone; `cai.models.policy.LoadedModel` and `cai.models.fake.FakeModel` satisfy it. Imports no torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from cai.engine import Engine, Rules
from cai.engine.foreign import HfModel, HfTokenizer
from cai.engine.tokenizers import Tokenizer
from cai.store.jsonl import Row

if TYPE_CHECKING:
    import torch

    from cai.recipe.settings import EngineSection, LoraSection


class Runnable(Protocol):
    """What an engine runs over."""

    hf: HfModel  # the model itself; None where there are no weights
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device: ...


class Model(Runnable, Protocol):
    """One set of weights with at most one adapter on them. `facts` go into the manifest."""

    hf_tokenizer: HfTokenizer
    format: Literal["base", "chat"]
    name: str
    max_seq_length: int
    facts: Row
    lora: bool
    attached: Path | None
    rules: Rules

    @property
    def backend(self) -> Literal["cuda", "cpu", "embedded", "fake"]: ...

    @property
    def embedded(self) -> bool: ...

    def engine(self, section: EngineSection, rounded: bool = False) -> Engine:
        """The engine over these weights, made on first use; `rounded`: data are made, 8-bit products are allowed."""

    def release(self) -> None:
        """Free the engine's caches."""

    def to_lora(self, lora: LoraSection, seed: int = 0) -> None:
        """A fresh LoRA on the weights; an earlier adapter is removed."""

    def load_adapter(self, folder: Path, lora: LoraSection) -> None:
        """A trained adapter (safetensors) onto the weights. Errors: CaiError."""

    def attach(self, folder: Path, lora: LoraSection) -> None:
        """This adapter is on the weights afterwards: loaded, unless it is there already."""

    def adapter(self, on: bool) -> AbstractContextManager[None]:
        """Within the block the adapter is on, or off (then the model is the base)."""

    def mode(self, which: Literal["generate", "train"]) -> None:
        """Generation or training mode of the same weights."""
