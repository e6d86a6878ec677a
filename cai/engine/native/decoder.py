"""A Llama- or Qwen2-type decoder over the loaded projection modules: their weights, our norms, rotary and attention.

Owns what is read from the config (rotary parameters, head counts) and the forward pass over packed tokens. Doesn't own
the cache, the batch, or how a linear is computed (`linears`). No weight is copied here.
Axes: T packed tokens (one a row in a decode step), H hidden, N query heads, M key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cai.engine.generate import causal_lm
from cai.engine.native.attention import Step
from cai.engine.native.cache import KVCache
from cai.engine.native.linears import LayerLinears, thin

MODEL_TYPES = ("llama", "qwen2", "mistral")
PLAIN_ROPE = ("default", "linear", "llama3", "yarn")


def unsupported(hf_model: Any) -> str | None:
    """Why `native` cannot run this model; None where it can."""
    lm = causal_lm(hf_model)
    config = getattr(lm, "config", None)
    if config is None or getattr(config, "model_type", None) not in MODEL_TYPES:
        return f"model type {getattr(config, 'model_type', None)!r} is none of {', '.join(MODEL_TYPES)}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not silu"
    windowed = getattr(config, "use_sliding_window", config.model_type == "mistral")
    if windowed and getattr(config, "sliding_window", None):
        return "sliding-window attention"
    rope = rope_parameters(config)
    if rope.get("rope_type", "default") not in PLAIN_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rotary embedding {rope['rope_type']!r}, partial_rotary_factor {rope.get('partial_rotary_factor', 1.0)}"
    if head_dim(config) & (head_dim(config) - 1):
        return f"head dimension {head_dim(config)} is no power of two"
    return misplaced(hf_model, lm)


def misplaced(hf_model: Any, lm: Any) -> str | None:
    """What of the loaded weights `native` would read from the wrong place; None where all is as it expects."""
    if getattr(getattr(hf_model, "active_peft_config", None), "is_prompt_learning", False):
        return "an adapter of virtual tokens"
    norms = [
        lm.model.norm,
        *(n for layer in lm.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    if any(hasattr(norm, "original_module") or hasattr(norm, "base_layer") for norm in norms):
        return "an adapter that trains norms"
    devices = sorted({str(parameter.device) for parameter in lm.parameters()})
    if len(devices) > 1:
        return f"its weights lie on several devices ({', '.join(devices)})"
    return None


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary parameters under their names of transformers 5 or of 4."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), "rope_type": "default", **found}


def rope_table(config: Any, length: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 (length, D/2), as transformers computes them for this config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, dim = rope_parameters(config), head_dim(config)
    kind = parameters["rope_type"]
    if kind == "default":
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    angles = torch.outer(torch.arange(length).float(), inv_freq.float())
    return (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)


@dataclass(slots=True)
class Layer:
    """One decoder layer: references into the loaded model."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    linears: LayerLinears


class Decoder:
    """The forward pass. `ops` is the module of elementwise and attention operations for the device."""

    def __init__(self, hf_model: Any, ops: Any, max_len: int) -> None:
        lm = causal_lm(hf_model)
        self.config, self.ops, self.lm = lm.config, ops, lm
        body = lm.model
        self.embed, self.norm, self.head = body.embed_tokens, body.norm.weight, lm.get_output_embeddings()
        self.eps = lm.config.rms_norm_eps
        self.heads, self.kv_heads, self.dim = (
            lm.config.num_attention_heads,
            lm.config.num_key_value_heads,
            head_dim(lm.config),
        )
        self.layers = [
            Layer(layer.input_layernorm.weight, layer.post_attention_layernorm.weight, LayerLinears.of(layer))
            for layer in body.layers
        ]
        self.dtype, self.device = self.embed.weight.dtype, self.embed.weight.device
        self.cos, self.sin = rope_table(lm.config, max_len, self.device)

    def forward(
        self, ids_T: torch.Tensor, step: Step, cache: KVCache, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (T, H) after the final norm, of the `wanted` tokens only (all by default).

        Keys and values of all tokens are stored in the cache; what the last layer would compute for others is skipped.
        """
        ops, residual_TH = self.ops, self.embed(ids_T)
        x_TH = ops.rms_norm(residual_TH, self.layers[0].input_norm, self.eps)
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer, index, x_TH, step, cache)
            if wanted is not None and index == len(self.layers) - 1:
                attended, residual_TH = attended[wanted], residual_TH[wanted]
            x_TH, residual_TH = ops.add_rms_norm(layer.linears.o(attended)[0], residual_TH, layer.post_norm, self.eps)
            gate, up = layer.linears.gate_up(x_TH)
            mlp_TH = layer.linears.down(ops.silu_mul(gate, up))[0]
            x_TH, residual_TH = ops.add_rms_norm(mlp_TH, residual_TH, following[index], self.eps)
        return x_TH

    def _attend(self, layer: Layer, index: int, x_TH: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        q, k, v = layer.linears.qkv(x_TH)
        shape = (self.heads, self.kv_heads, self.dim)
        k_cache, v_cache = cache.keys[index], cache.values[index]
        q_TND = self.ops.rope_and_store(q, k, v, shape, self.cos, self.sin, step, k_cache, v_cache)
        attend = self.ops.prefill_attention if step.prefill else self.ops.decode_attention
        return attend(q_TND, k_cache, v_cache, step, index)

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """(T, V) in the model's dtype."""
        return thin(self.head, hidden_TH)
