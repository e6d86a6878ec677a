"""How a projection is computed: the loaded module, a bf16 copy, own dequantisation, the fused NF4 kernel, 8-bit copies.

Owns the groups of projections that read the same input (q/k/v and gate/up are one product where weights are copied or
dequantised) and the LoRA part beside them. Doesn't own the choice (`tuning`). Invariant: whatever the way, the result
is x @ dequantise(W).T + b (+ LoRA), to the rounding of the compute type; "fp8" and "int8" round to 8 bits and are used
for drawing only, where the recipe asks for it. A projection that is not NF4 stays the loaded module: a 16-bit one is
its own copy.
Axes: T tokens, K inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from cai.engine.foreign import HfModule
from cai.engine.native.adapters import adapted, has_more_than_lora, lora_parts
from cai.engine.native.packed import PackedLinear, packed

if TYPE_CHECKING:
    from cai.engine.native.fp8 import Rounded as Fp8
    from cai.engine.native.int8 import Rounded as Int8

Way = Literal["module", "bf16", "dequant", "fused", "fp8", "int8"]
ROUNDED: tuple[Way, ...] = ("fp8", "int8")


@dataclass(slots=True)
class Nf4:
    """A bitsandbytes NF4 weight (O, K): packed codes, two per byte, and their scales (blocks of 64)."""

    codes: torch.Tensor
    absmax: torch.Tensor  # fp32, double quantisation already undone
    table: torch.Tensor  # fp32 (16)
    shape: tuple[int, int]


@dataclass(slots=True)
class Shared:
    """What all groups of an engine use in common: the way by number of tokens, and the dequantisation buffer.

    `rounding`: how products are rounded to 8 bits while `drawing`, that is for prompts and draws, not scores and
    prefixes. `exact`: the way of a group that has no such copy.
    """

    choose: Callable[[int], Way] = lambda tokens: "module"
    exact: Callable[[int], Way] = lambda tokens: "module"
    buffer: torch.Tensor | None = None
    rounding: Way | None = None
    drawing: bool = False

    @contextlib.contextmanager
    def draws(self) -> Iterator[None]:
        self.drawing = True
        try:
            yield
        finally:
            self.drawing = False


@dataclass(slots=True)
class Group:
    """Projections with one input. `copy` holds their bf16 weights, concatenated by output, while copied."""

    modules: list[HfModule]
    shared: Shared = field(default_factory=Shared)
    copy: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # of all modules, where one has a bias
    nf4: list[Nf4] | None = None
    fp8: Fp8 | None = None  # (sum of O, K)
    int8: Int8 | None = None  # the same
    packed: PackedLinear | None = None  # on a CPU: the weights in its library's layout
    lora: list[tuple[torch.Tensor, torch.Tensor] | None] | None = None
    by_module: bool = False  # the active adapter is more than two factors: only the modules compute it

    def __call__(self, x_TK: torch.Tensor) -> list[torch.Tensor]:
        """The outputs, one a module, possibly views of one tensor (row stride != width)."""
        way = self.shared.choose(x_TK.shape[0])
        if way in ROUNDED and getattr(self, way) is None:
            way = self.shared.exact(x_TK.shape[0])
        if self.by_module or (self.packed is None and (way == "module" or (self.nf4 is None and self.copy is None))):
            return [linear_of_few_rows(module, x_TK) for module in self.modules]
        outputs = self.base(x_TK, way)
        for index, pair in enumerate(self.lora or ()):
            if pair is not None:
                outputs[index] = torch.addmm(outputs[index], x_TK @ pair[0].T, pair[1].T)
        return outputs

    def base(self, x_TK: torch.Tensor, way: Way) -> list[torch.Tensor]:
        """The outputs without LoRA; "bf16" and "dequant" both take the copy where there is one."""
        if self.packed is not None and way not in ROUNDED:
            y_TO = self.packed(x_TK)
        elif way == "fused" and self.nf4 is not None:
            from cai.engine.native.nf4 import fused_linears

            y_TO = fused_linears(x_TK, self.nf4, self.bias)
        elif way in ROUNDED:
            module = rounding(way)
            y_TO = module.product(module.round_rows(x_TK), getattr(self, way), self.bias)
        else:
            weight_OK = self.copy if self.copy is not None else self.dequantised()
            y_TO = F.linear(x_TK, weight_OK, self.bias)
        return list(y_TO.split([base_layer(module).out_features for module in self.modules], -1))

    def unpack(self, shared: Shared, dtype: torch.dtype) -> None:
        """Make the NF4 weights and biases readable to the ways other than "module"."""
        bases = [base_layer(module) for module in self.modules]
        self.shared, self.nf4 = shared, [nf4_of(module) for module in self.modules]
        if any(base.bias is not None for base in bases):
            none = [torch.zeros(w.shape[0], dtype=dtype, device=w.codes.device) for w in self.nf4]
            biases = [n if base.bias is None else base.bias for n, base in zip(none, bases, strict=True)]
            self.bias = torch.cat(biases).to(dtype)

    def drop(self) -> None:
        """Back to the loaded modules; copies are freed."""
        self.shared, self.copy, self.bias, self.nf4, self.lora = Shared(), None, None, None, None
        self.fp8 = self.int8 = self.packed = None

    def pack(self) -> None:
        """Hold a copy in the layout of the CPU's library, where there is one; merged weights are left as they are."""
        if not any(getattr(module, "merged", False) for module in self.modules):
            self.packed = packed([base_layer(module) for module in self.modules])

    def follow_adapter(self, dtype: torch.dtype) -> None:
        """Hold the active adapter's factors; what is more than factors is left to the modules."""
        self.by_module = any(map(has_more_than_lora, self.modules))
        parts = [] if self.by_module else [lora_parts(module, dtype) for module in self.modules]
        self.lora = parts if any(part is not None for part in parts) else None

    def dequantised(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weights in bf16 (sum of O, K), in `out` or in the shared buffer (valid until the next group's)."""
        from cai.engine.native.nf4 import dequantise

        assert self.nf4 is not None
        rows, k = sum(w.shape[0] for w in self.nf4), self.nf4[0].shape[1]
        if out is None:
            assert self.shared.buffer is not None
            out = self.shared.buffer[: rows * k].view(rows, k)
        at = 0
        for weight in self.nf4:
            dequantise(weight, out[at : at + weight.shape[0]])
            at += weight.shape[0]
        return out

    @property
    def numel(self) -> int:
        return sum(base_layer(m).out_features * base_layer(m).in_features for m in self.modules)


@dataclass(slots=True)
class Mixed:
    """Projections with one input, some NF4 and some not: a group of each kind. `order`: the modules' places in them."""

    groups: list[Group]
    order: list[int]

    def __call__(self, x_TK: torch.Tensor) -> list[torch.Tensor]:
        outputs = [output for group in self.groups for output in group(x_TK)]
        return [outputs[place] for place in self.order]

    @classmethod
    def of(cls, modules: list[HfModule], first: Callable[[HfModule], bool]) -> Mixed:
        """The group of the modules that are `first`, then that of the others."""
        places = sorted(range(len(modules)), key=lambda i: not first(modules[i]))
        split = sum(map(first, modules))
        made = [Group([modules[i] for i in part]) for part in (places[:split], places[split:])]
        return cls(made, [places.index(i) for i in range(len(modules))])


@dataclass(slots=True)
class LayerLinears:
    """The four groups of a decoder layer."""

    qkv: Group | Mixed
    o: Group | Mixed
    gate_up: Group | Mixed
    down: Group | Mixed

    @classmethod
    def of(cls, layer: HfModule) -> LayerLinears:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            Group([attention.q_proj, attention.k_proj, attention.v_proj]),
            Group([attention.o_proj]),
            Group([mlp.gate_proj, mlp.up_proj]),
            Group([mlp.down_proj]),
        )

    @property
    def groups(self) -> list[Group]:
        parts = (self.qkv, self.o, self.gate_up, self.down)
        return [group for part in parts for group in (part.groups if isinstance(part, Mixed) else [part])]

    def split(self, kind: Callable[[HfModule], bool]) -> None:
        """Where only some projections of a group are of this kind, make two groups of it."""
        for name in ("qkv", "gate_up"):
            group = getattr(self, name)
            if isinstance(group, Group) and len(set(map(kind, group.modules))) > 1:
                setattr(self, name, Mixed.of(group.modules, kind))


def rounding(way: Way) -> Any:
    """`fp8` or `int8`, of one interface: require, round_rows, product. They need Triton, which a CPU may lack."""
    return importlib.import_module(f"cai.engine.native.{way}")


THIN_ROWS = 24  # measured on two cores, (3072, 576) float32: 1.7 times faster at 16 rows, 1.5 at 8, equal at 32


def linear_of_few_rows(module: HfModule, x_TK: torch.Tensor) -> torch.Tensor:
    """The module's output. On a CPU a few rows are computed as (W x^T)^T, for which its library has the better loop."""
    base = base_layer(module)
    if x_TK.is_cuda or adapted(module) or x_TK.shape[0] > THIN_ROWS or type(base) is not torch.nn.Linear:
        return module(x_TK)
    out_TO = (base.weight @ x_TK.T).T.contiguous()
    return out_TO if base.bias is None else out_TO.add_(base.bias)


def base_layer(module: HfModule) -> HfModule:
    """The linear inside a PEFT LoRA layer, or the module itself."""
    return module.base_layer if hasattr(module, "base_layer") else module


def is_nf4(module: HfModule) -> bool:
    state = getattr(base_layer(module).weight, "quant_state", None)
    return state is not None and state.quant_type == "nf4" and state.blocksize == 64


def is_int8(module: HfModule) -> bool:
    return type(base_layer(module)).__name__ == "Linear8bitLt"


def nf4_of(module: HfModule) -> Nf4:
    """Views of a bitsandbytes weight; only the scales are copied (double quantisation undone: 1/16 byte a weight)."""
    from bitsandbytes.functional import dequantize_blockwise

    weight = base_layer(module).weight
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return Nf4(
        weight.data.view(-1).view(torch.uint8),
        absmax.float().contiguous(),
        state.code.float().contiguous(),
        tuple(state.shape),
    )
