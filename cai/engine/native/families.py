"""What tells one family of decoders from another: where its norms stand, its windows, rotary tables and scales.

Owns the list of families that `native` runs and the reasons against a model. Each was compared with transformers on
random checkpoints of its true shape in small (tests/test_engine_families.py). Doesn't own the forward pass (`decoder`).
No weight is copied but norms that are multiplied before rounding (OLMo, Gemma; Gemma's are stored less one): in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cai.engine.foreign import HfConfig, HfModel, HfModule
from cai.engine.generate import causal_lm
from cai.engine.native.attention import WIDE
from cai.engine.native.linears import LayerLinears
from cai.store.jsonl import Row

PLAIN = ("input_layernorm", None, "post_attention_layernorm", None)  # before attention, after it, before the MLP, after
POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
NORMS: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), PLAIN),
    **dict.fromkeys(("olmo2", "olmo3"), POST),
    "gemma3_text": SANDWICH,
}
ONCE = ("olmo2", "olmo3", "gemma3_text")  # norms whose product is rounded once
ACTIVATIONS = {"silu": "silu_mul", "gelu_pytorch_tanh": "gelu_mul"}
PLAIN_ROPE = ("default", "linear", "llama3", "yarn")
ATTENTION = ("full_attention", "sliding_attention")


@dataclass(slots=True)
class Layer:
    """One decoder layer: references into the loaded model. A norm that the family has not is None."""

    linears: LayerLinears
    before_attention: torch.Tensor | None
    after_attention: torch.Tensor | None
    before_mlp: torch.Tensor | None
    after_mlp: torch.Tensor | None
    head_norms: tuple[torch.Tensor, torch.Tensor] | None  # of queries and keys: over a head, or over all heads
    rope: tuple[torch.Tensor, torch.Tensor]
    window: int


def text_parts(hf_model: HfModel) -> tuple[HfConfig, HfModel]:
    """The config and the body (`embed_tokens`, `layers`, `norm`) of the decoder, also inside a model that sees."""
    lm = causal_lm(hf_model)
    body: Any = getattr(lm, "model", None)
    return lm.config.get_text_config(decoder=True), getattr(body, "language_model", body)


def unsupported(hf_model: HfModel) -> str | None:
    """Why `native` cannot run this model; None where it can."""
    if getattr(causal_lm(hf_model), "config", None) is None:
        return "no config"
    config, body = text_parts(hf_model)
    if config.model_type not in NORMS:
        return f"model type {config.model_type!r} is none of {', '.join(NORMS)}"
    if activation(config) not in ACTIVATIONS:
        return f"activation {activation(config)!r} is none of {', '.join(ACTIVATIONS)}"
    capped = any(getattr(config, f"{what}_logit_softcapping", None) for what in ("attn", "final"))
    if capped or getattr(config, "use_bidirectional_attention", False):
        return "capped logits or attention in both directions"
    if other := set(layer_types(config)) - set(ATTENTION):
        return f"attention of type {min(other)!r}"
    for kind in sorted(set(layer_types(config))):
        rope = rope_parameters(config, kind)
        if rope["rope_type"] not in PLAIN_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
            partial = rope.get("partial_rotary_factor", 1.0)
            return f"rotary embedding {rope['rope_type']!r}, partial_rotary_factor {partial}"
    if head_dim(config) & (head_dim(config) - 1):
        return f"head dimension {head_dim(config)} is no power of two"
    return misplaced(hf_model, config, body)


def misplaced(hf_model: HfModel, config: HfConfig, body: HfModule) -> str | None:
    """What of the loaded weights `native` would read from the wrong place; None where all is as it expects."""
    if getattr(getattr(hf_model, "active_peft_config", None), "is_prompt_learning", False):
        return "an adapter of virtual tokens"
    norms = [body.norm]
    for layer in body.layers:
        norms += [getattr(layer, name) for name in NORMS[config.model_type] if name]
        norms += [n for n in (getattr(layer.self_attn, f"{x}_norm", None) for x in "qk") if n is not None]
    if any(hasattr(norm, "original_module") or hasattr(norm, "base_layer") for norm in norms):
        return "an adapter that trains norms"
    devices = sorted({str(parameter.device) for parameter in body.parameters()})
    if len(devices) > 1:
        return f"its weights lie on several devices ({', '.join(devices)})"
    return None


def activation(config: HfConfig) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def head_dim(config: HfConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_scale(config: HfConfig) -> float:
    return (getattr(config, "query_pre_attn_scalar", None) or head_dim(config)) ** -0.5


def layer_types(config: HfConfig) -> list[str]:
    """The kind of attention of each layer; Mistral's window is every layer's and named by no list."""
    if listed := getattr(config, "layer_types", None):
        return list(listed)
    windowed = config.model_type == "mistral" and getattr(config, "sliding_window", None)
    return [ATTENTION[1 if windowed else 0]] * config.num_hidden_layers


def window(config: HfConfig, kind: str) -> int:
    """How many positions a token sees, itself included."""
    return (getattr(config, "sliding_window", None) or WIDE) if kind == "sliding_attention" else WIDE


def rope_parameters(config: HfConfig, kind: str) -> Row:
    """The rotary parameters of a kind of layer, under their names of transformers 5 or of 4."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = found.get(kind, found)  # OLMo 3 and Gemma 3 have one table for each kind
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), "rope_type": "default", **found}


def rope_table(
    config: HfConfig, length: int, device: torch.device | str, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 (length, D/2), as transformers computes them for this config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, dim = rope_parameters(config, kind), head_dim(config)
    if parameters["rope_type"] == "default":
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    else:
        nested = kind in (getattr(config, "rope_parameters", None) or {})
        options = {"layer_type": kind} if nested else {}
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", **options)
    angles = torch.outer(torch.arange(length).float(), inv_freq.float())
    return (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)


def norm_weight(config: HfConfig, norm: HfModule) -> torch.Tensor:
    """The factor of a norm. fp32 says that it is multiplied before the product is rounded (`attention.rms_norm`)."""
    if config.model_type not in ONCE:
        return norm.weight
    return norm.weight.data.float() + (1.0 if config.model_type == "gemma3_text" else 0.0)


def layers_of(config: HfConfig, body: HfModule, max_len: int) -> list[Layer]:
    """The layers of a supported decoder."""
    kinds = layer_types(config)
    tables = {kind: rope_table(config, max_len, body.embed_tokens.weight.device, kind) for kind in set(kinds)}
    made = []
    for kind, layer in zip(kinds, body.layers, strict=True):
        names = NORMS[config.model_type]
        norms = [None if name is None else norm_weight(config, getattr(layer, name)) for name in names]
        own = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        heads = [norm_weight(config, norm) for norm in own if norm is not None]
        made.append(
            Layer(
                linears=LayerLinears.of(layer),
                before_attention=norms[0],
                after_attention=norms[1],
                before_mlp=norms[2],
                after_mlp=norms[3],
                head_norms=(heads[0], heads[1]) if heads else None,
                rope=tables[kind],
                window=window(config, kind),
            )
        )
    return made
