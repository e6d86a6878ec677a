"""Objects of transformers and PEFT by kind: what a parameter takes where no class of ours can name its attributes.

Owns the names alone. A model's modules, a configuration's fields and a tokenizer's methods differ by family and by
release, and most are made at run time, so what they answer is unchecked; what is passed is checked: a text, a number, a
`Model` of ours or None is none of these. Imports nothing.
"""

from __future__ import annotations

from typing import Any, Protocol


class Foreign(Protocol):
    """An object of another library: any attribute may be asked for and set."""

    def __getattr__(self, name: str, /) -> Any: ...

    def __setattr__(self, name: str, value: Any, /) -> None: ...


class HfModule(Foreign, Protocol):
    """A `torch.nn.Module` of a loaded model: a layer, a projection (bare, quantised or wrapped by PEFT), a norm."""

    def __call__(self, *inputs: Any, **named: Any) -> Any: ...


class HfModel(HfModule, Protocol):
    """A transformers `PreTrainedModel`, or the `PeftModel` around one."""


class HfConfig(Foreign, Protocol):
    """A transformers `PretrainedConfig`, or the configuration of the text part in one."""


class HfTokenizer(Foreign, Protocol):
    """A transformers `PreTrainedTokenizerBase`, or what stands in for one."""

    def __call__(self, *texts: Any, **named: Any) -> Any: ...
