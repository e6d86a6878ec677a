"""Which adapter the linears hold: what PEFT says of it, its factors in the compute type, and those that were on before.

Owns the signature by which an adapter is known (its names and the place and version of its weights, so that new weights
under an old name are new), and the kept factors. Captured graphs read them where they lie, so an adapter that comes
back finds its factors, and with them its graphs. Doesn't own the graphs or how a linear is computed (`linears`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cai.engine.foreign import HfModel, HfModule

if TYPE_CHECKING:
    from cai.engine.native.linears import Group

KEPT = 3  # states of the adapter: off, on, and another one's

Signature = tuple[object, ...]
Factors = list[tuple[torch.Tensor, torch.Tensor] | None] | None  # of a group's modules


class AttachedAdapter:
    """The adapter that `groups` hold; `tuned` is any module that PEFT has wrapped (None: there is no adapter)."""

    def __init__(self, tuned: HfModule | None, dtype: torch.dtype) -> None:
        self.tuned, self.dtype = tuned, dtype
        self.signature: Signature | None = None
        self.kept: dict[Signature, list[tuple[Factors, bool]]] = {}

    def follow(self, signature: Signature, groups: Sequence[Group]) -> list[Signature]:
        """Let the groups hold the adapter of this signature; gives the signatures whose factors were let go for it."""
        gone: list[Signature] = []
        states = self.kept.pop(signature, None)
        if states is None:
            while len(self.kept) >= KEPT:
                gone.append(next(iter(self.kept)))
                del self.kept[gone[-1]]
            for group in groups:
                group.follow_adapter(self.dtype)
            states = [(group.lora, group.by_module) for group in groups]
        for group, (lora, by_module) in zip(groups, states, strict=True):
            group.lora, group.by_module = lora, by_module
        self.kept[signature], self.signature = states, signature
        return gone

    def forget(self) -> None:
        """Keep nothing: the next `follow` makes all anew."""
        self.kept.clear()
        self.signature = None


def tuned_module(hf_model: HfModel) -> HfModule | None:
    """Any module that PEFT has wrapped, since it switches all of them together; None where there is none."""
    return next((m for m in hf_model.modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")), None)


def adapter_signature(tuned: HfModule | None) -> Signature:
    """What a `tuned_module` says about the adapter: changes when it is switched, replaced, merged or trained."""
    if tuned is None or tuned.disable_adapters:
        return ()
    own = [weight for name, weight in tuned.named_parameters() if not name.startswith("base_layer.")]
    content = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in own]
    return ("on", *tuned.active_adapters, "merged", *tuned.merged_adapters, *content)


def factor_bytes(hf_model: HfModel, dtype: torch.dtype) -> int:
    """What the LoRA factors of all adapters take in the compute type."""
    return sum(p.numel() for name, p in hf_model.named_parameters() if "lora_" in name) * dtype.itemsize


def adapted(module: HfModule) -> bool:
    """Whether PEFT has more to compute than the linear inside (or has to take it out of its weight first)."""
    return hasattr(module, "base_layer") and (module.merged or not module.disable_adapters)


def has_more_than_lora(module: HfModule) -> bool:
    """Whether the adapter is more than LoRA's two factors beside the weight: another method, DoRA, a bias, merged."""
    if not adapted(module):
        return False
    if module.merged or not hasattr(module, "lora_A"):
        return True
    names = [name for name in module.active_adapters if name in module.lora_A]
    return any(name in module.lora_variant or module.lora_B[name].bias is not None for name in names)


def lora_parts(module: HfModule, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(A (r, K), scaled B (O, r)) of the active adapters in the compute type; None without one."""
    if not adapted(module):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    down = torch.cat([module.lora_A[name].weight for name in names]).to(dtype)
    up = torch.cat([module.lora_B[name].weight * module.scaling[name] for name in names], 1).to(dtype)
    return down, up
