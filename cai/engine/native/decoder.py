"""The forward pass of a decoder over the loaded projection modules: their weights, our norms, rotary and attention.

Owns the pass over packed tokens. Doesn't own what differs between families (`families`), the cache, the batch, or how a
linear is computed (`linears`).
Axes: T packed tokens (one a row in a decode step), H hidden, N query heads, M key/value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch

from cai.engine.foreign import HfModel
from cai.engine.generate import causal_lm
from cai.engine.native import families
from cai.engine.native.attention import Step
from cai.engine.native.cache import KVCache
from cai.engine.native.families import Layer, unsupported
from cai.engine.native.linears import base_layer, linear_of_few_rows
from cai.engine.native.packed import PackedLinear, fits, packed

__all__ = ("Decoder", "unsupported")


class Decoder:
    """The forward pass. `ops` is the module of elementwise and attention operations for the device."""

    def __init__(self, hf_model: HfModel, ops: Any, max_len: int) -> None:
        self.lm, self.ops = causal_lm(hf_model), ops
        self.config, body = families.text_parts(hf_model)
        config = self.config
        self.embed, self.norm = body.embed_tokens, families.norm_weight(config, body.norm)
        self.head, self.eps = self.lm.get_output_embeddings(), config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.scale = families.head_dim(config), families.attention_scale(config)
        self.gated = getattr(ops, families.ACTIVATIONS[families.activation(config)])
        self.layers = families.layers_of(config, body, max_len)
        self.dtype, self.device = self.embed.weight.dtype, self.embed.weight.device
        self.packed_head: PackedLinear | None = None

    def pack(self) -> None:
        """On a CPU: copies of the weights in its library's layout, where they fit."""
        groups = [group for layer in self.layers for group in layer.linears.groups]
        if fits([*(base_layer(module) for group in groups for module in group.modules), base_layer(self.head)]):
            for group in groups:
                group.pack()
            self.packed_head = packed([self.head])

    def forward(
        self, ids_T: torch.Tensor, step: Step, cache: KVCache, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (T, H) after the final norm, of the `wanted` tokens only (all by default).

        Keys and values of all tokens are stored in the cache; what the last layer would compute for others is skipped.
        """
        residual_TH = self.embed(ids_T)
        first = self.layers[0].before_attention
        x_TH = residual_TH if first is None else self.ops.rms_norm(residual_TH, first, self.eps)
        following = [layer.before_attention for layer in self.layers[1:]] + [self.norm]
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer, index, x_TH, step, cache)
            if wanted is not None and index == len(self.layers) - 1:
                attended, residual_TH = attended[wanted], residual_TH[wanted]
            made_TH = layer.linears.o(attended)[0]
            x_TH, residual_TH = self._add(made_TH, residual_TH, layer.after_attention, layer.before_mlp)
            gate, up = layer.linears.gate_up(x_TH)
            mlp_TH = layer.linears.down(self.gated(gate, up))[0]
            x_TH, residual_TH = self._add(mlp_TH, residual_TH, layer.after_mlp, following[index])
        return x_TH

    def _add(
        self, made_TH: torch.Tensor, residual_TH: torch.Tensor, after: torch.Tensor | None, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the next part reads, the residual) with a part's output added, itself normed where the family does."""
        if after is not None:
            made_TH = self.ops.rms_norm(made_TH, after, self.eps)
        if before is not None:
            return self.ops.add_rms_norm(made_TH, residual_TH, before, self.eps)
        residual_TH = residual_TH + made_TH
        return residual_TH, residual_TH

    def _attend(self, layer: Layer, index: int, x_TH: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        q, k, v = layer.linears.qkv(x_TH)
        shape = (self.heads, self.kv_heads, self.dim)
        held = cache.layer(index)
        norms = None if layer.head_norms is None else (*layer.head_norms, self.eps)
        q_TND = self.ops.rope_and_store(q, k, v, shape, *layer.rope, step, held, norms)
        attend = self.ops.prefill_attention if step.prefill else self.ops.decode_attention
        return attend(q_TND, held, step, index, self.scale, layer.window)

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """(T, V) in the model's dtype."""
        return linear_of_few_rows(self.head, hidden_TH) if self.packed_head is None else self.packed_head(hidden_TH)
