"""A training pass for Llama-shaped decoders: pairs packed without padding, the prompt computed once for both.

Takes the packed rows of `attention`; its products are `linears`. Saved for the backward pass: the two residual inputs,
attention's tensors, gate and up; norms, the SwiGLU product and dequantised weights are made again. Takes weights from
the modules and never calls their forward, so stock and Unsloth-patched models are the same to it.

Legend: T packed tokens, H hidden, N heads, D head width, F feed-forward width, R rank. Imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cai.engine.foreign import HfConfig, HfModel, HfModule
from cai.training.adapter import NAME
from cai.training.attention import attend
from cai.training.frozen import Frozen
from cai.training.kernels import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from cai.training.linears import Copies, Projection, backproject, gradient_rooms, projection, wide_empty
from cai.training.loss import Batch, base_of

PLAIN_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not hang on the length of the text
SHAPES = {"llama", "qwen2", "qwen3", "mistral"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [T, D/2]
Parts = dict[str, Projection]  # of a layer


def refusal(hf: HfModel) -> str | None:
    """Why this model can't go through here, or None. Everything that decides the arithmetic is looked at."""
    config = base_of(hf).config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in SHAPES:
        return f"model type {config.model_type}"
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in PLAIN_ROPE or part != 1.0 or getattr(config, "hidden_act", "") != "silu":
        return f"another rotary embedding or activation ({kind}, {part:g} of a head, {config.hidden_act})"
    if getattr(config, "use_sliding_window", False) or (
        config.model_type == "mistral" and getattr(config, "sliding_window", None)
    ):
        return "sliding-window attention"
    for layer in base_of(hf).model.layers:
        for name, module in _modules(layer).items():
            if NAME not in getattr(module, "lora_A", {}):
                return f"{name} is not adapted"
            weight = module.get_base_layer().weight
            if not (weight.is_floating_point() or getattr(weight, "quant_state", None) is not None):
                return f"{name} is quantised to {weight.dtype}"
            if module.lora_dropout[NAME].__class__.__name__ != "Identity" or module.lora_bias.get(NAME):
                return "LoRA dropout or bias"
    return None


def _modules(layer: HfModule) -> dict[str, HfModule]:
    attention, mlp = layer.self_attn, layer.mlp
    return {name: getattr(attention if hasattr(attention, name) else mlp, name) for name in PROJECTIONS}


class PackedForward:
    """`forward(hf, batch) -> hidden_NH` for a model that `refusal` accepts.

    Keeps one copy of the adapter in the compute dtype between calls, refreshed at the start of each: casting at every
    use would be 2,700 small launches a micro-batch at 64 layers.
    """

    def __init__(self) -> None:
        self.checkpoint_layers = 0  # how many layers, from the first, are recomputed in the backward pass
        self._frozen = Frozen()
        self._layers: list[Parts] = []
        self._made_of: list[object] = []

    def __call__(self, hf: HfModel, batch: Batch) -> torch.Tensor:
        base = base_of(hf)
        model, config = base.model, base.config
        adapted = not _adapter_off(base)
        x_TH = F.embedding(batch["ids_T"], model.embed_tokens.weight)
        layers = self._fresh(model.layers, x_TH)
        rope = rotary(config, batch["positions_T"])
        for i, (layer, parts) in enumerate(zip(model.layers, layers, strict=True)):
            arguments = (layer, config, x_TH, rope, batch, adapted, parts)
            if i < self.checkpoint_layers and torch.is_grad_enabled():
                x_TH = checkpoint(_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TH = _layer(*arguments)
        hidden_NH = x_TH.index_select(0, batch["hidden_index_N"])
        return _Norm.apply(hidden_NH, model.norm.weight, _eps(model.norm))

    def _fresh(self, layers: Sequence[HfModule], like: torch.Tensor) -> list[Parts]:
        """The projections of each layer, made anew where the model holds another adapter; their copies brought up."""
        made_of = [like.dtype, layers]
        for module in [*_modules(layers[0]).values(), *_modules(layers[-1]).values()]:
            made_of += [module.get_base_layer(), module.lora_A[NAME].weight, module.lora_B[NAME].weight]
        if len(made_of) != len(self._made_of) or any(a is not b for a, b in zip(made_of, self._made_of, strict=True)):
            self._layers = [
                {name: projection(module, name, like, self._frozen) for name, module in _modules(layer).items()}
                for layer in layers
            ]
            every = [part for parts in self._layers for part in parts.values()]
            self._frozen.prepare(every)
            self._copies, self._made_of = Copies(every), made_of
        self._copies.refresh()
        return self._layers


def rotary(config: HfConfig, positions_T: torch.Tensor) -> Rope:
    """cos and sin of each token's position, [T, D/2] in fp32; scaled kinds by transformers' own formulas."""
    parameters, scale = config.rope_parameters, 1.0
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        half = head_width(config) // 2
        exponent = torch.arange(half, device=positions_T.device, dtype=torch.float32) / half
        inverse = parameters["rope_theta"] ** -exponent
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, positions_T.device)
    angles = positions_T[:, None].float() * inverse
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def head_width(config: HfConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _adapter_off(base: HfModel) -> bool:
    module = base.model.layers[0].self_attn.q_proj
    return bool(module.disable_adapters) or bool(module.merged)


def _eps(norm: HfModule) -> float:
    return getattr(norm, "variance_epsilon", None) or norm.eps


def _layer(
    layer: HfModule, config: HfConfig, x_TH: torch.Tensor, rope: Rope, batch: Batch, adapted: bool, parts: Parts
) -> torch.Tensor:  # fmt: skip
    """One decoder block over the packed row. Parameters go along for autograd; `parts` hold what is computed with."""

    def group(*names: str) -> tuple[list[Projection], list[torch.nn.Parameter]]:
        return [parts[n] for n in names], [tensor for n in names for tensor in parts[n].trained]

    attention, norm1, norm2 = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    normed = getattr(attention, "q_norm", None) is not None
    qkv, trained = group("q_proj", "k_proj", "v_proj")
    turn, width = None if normed else rope, head_width(config)
    q, k, v, residual = _Heads.apply(x_TH, norm1.weight, _eps(norm1), qkv, adapted, turn, width, *trained)
    if normed:
        q, k = (_Rope.apply(_head_norm(getattr(attention, n), t), *rope) for n, t in (("q_norm", q), ("k_norm", k)))
    a_TH = attend(q, k, v, batch).flatten(1)
    out, trained = group("o_proj")
    x_TH = _OutLinear.apply(a_TH, residual, out, adapted, *trained)
    mlp, trained = group("gate_proj", "up_proj", "down_proj")
    return _Mlp.apply(x_TH, norm2.weight, _eps(norm2), mlp, adapted, *trained)


def _head_norm(norm: HfModule, x_TND: torch.Tensor) -> torch.Tensor:
    """Qwen3's RMSNorm of each head before the rotation."""
    return _Norm.apply(x_TND.reshape(-1, x_TND.shape[-1]), norm.weight, _eps(norm)).view(x_TND.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        # y = w x r, r = (mean(x^2) + eps)^-1/2  =>  dx = r (w dy - x r^2 mean(w dy x)).  w is frozen: no dw.
        x, weight = ctx.saved_tensors
        return rms_norm_backward(grad.contiguous(), x, weight, ctx.eps, None), None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TND, cos, sin):
        ctx.rope = (cos, sin)
        return rotate(x_TND, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        # y = R x with R orthogonal  =>  dx = R' dy: the rotation by the negative angle; x need not be kept
        return rotate(grad.contiguous(), *ctx.rope, inverse=True), None, None


class _Heads(torch.autograd.Function):
    """RMSNorm, then query, key and value by head, the first two rotated; and x itself, for the residual.

    The residual's gradient comes back through here: it is added where dx is written, not in a pass of its own.
    """

    @staticmethod
    def forward(ctx, x_TH, weight_H, eps, parts, adapted, rope, width, *trained):
        wide = wide_empty(x_TH, x_TH.shape[1], parts)
        rms_norm(x_TH, weight_H, eps, wide[:, : x_TH.shape[1]])
        results = [part.forward(wide, adapted) for part in parts]
        q, k, v = (y.unflatten(1, (-1, width)) for y, _ in results)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if adapted:
            ctx.save_for_backward(x_TH, weight_H, *(xa for _, xa in results))
            ctx.parts, ctx.eps, ctx.rope = parts, eps, rope
        return q, k, v, x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx, dq, dk, dv, residual):
        # y = linear(h), h = norm(x)  =>  dh = dlinear(dy), dx = dnorm(dh) + the residual's. h is made again from x:
        # [T, H] a layer that is not kept. q = R y, R orthogonal  =>  dy = R' dq: the rotation by the negative angle.
        # Where x needs no gradient (the first layer: embeddings are frozen) neither dh nor dx is made.
        x, weight, *xas = ctx.saved_tensors
        wides, places = gradient_rooms(ctx.parts, x)
        for place, grad, turns in zip(places, (dq, dk, dv), (True, True, False), strict=True):
            place = place.unflatten(1, grad.shape[1:])
            if turns and ctx.rope is not None:
                rotate(grad.contiguous(), ctx.rope[0], ctx.rope[1], place, inverse=True)
            else:
                place.copy_(grad)
        h = rms_norm(x, weight, ctx.eps)
        dh, d_trained = backproject(ctx.parts, wides, h, xas, ctx.needs_input_grad[0])
        dx = None if dh is None else rms_norm_backward(dh, x, weight, ctx.eps, residual.contiguous())
        return dx, None, None, None, None, None, None, *d_trained


class _OutLinear(torch.autograd.Function):
    """Residual plus one adapted linear (attention's output)."""

    @staticmethod
    def forward(ctx, a_TH, residual_TH, parts, adapted, *trained):
        y, xa = parts[0].forward(a_TH, adapted)
        if adapted:
            ctx.save_for_backward(a_TH, xa)
            ctx.parts = parts
        return y.add_(residual_TH)

    @staticmethod
    def backward(ctx, grad):
        # y = residual + linear(a)  =>  dresidual = dy, da = dlinear(dy)
        a_TH, xa = ctx.saved_tensors
        grad = grad.contiguous()
        dx, d_trained = backproject(ctx.parts, [grad], a_TH, [xa], True)
        return dx, grad, None, None, *d_trained


class _Mlp(torch.autograd.Function):
    """Residual plus norm, gate, up, SwiGLU, down. The product is made again in the backward pass."""

    @staticmethod
    def forward(ctx, x_TH, weight_H, eps, parts, adapted, *trained):
        gate, up, down = parts
        wide = wide_empty(x_TH, gate.inputs, [gate, up])
        rms_norm(x_TH, weight_H, eps, wide[:, : gate.inputs])
        g, xa_g = gate.forward(wide, adapted)
        u, xa_u = up.forward(wide, adapted)
        wide = wide_empty(x_TH, down.inputs, [down])
        swiglu(g, u, wide[:, : down.inputs])
        y, xa_d = down.forward(wide, adapted)
        if adapted:
            ctx.save_for_backward(x_TH, weight_H, g, u, xa_g, xa_u, xa_d)
            ctx.parts, ctx.eps = parts, eps
        return y.add_(x_TH)

    @staticmethod
    def backward(ctx, grad):
        # y = x + down(m), m = silu(g) u, g = gate(h), u = up(h), h = norm(x)
        # dm = ddown(dy);  dg = dm u silu'(g), silu'(g) = sig(g) (1 + g (1 - sig(g)));  du = dm silu(g)
        # dh = dgate(dg) + dup(du);  dx = dnorm(dh) + dy (the residual, added by rms_norm_backward)
        # m comes back from swiglu_backward for dA of `down`: not kept, and gone with dm before h is made again
        x, weight, g, u, *xas, xa_d = ctx.saved_tensors
        *gate_up, down = ctx.parts
        grad = grad.contiguous()
        dm, dyb = down.backward(_wide(grad, down), None)
        wides, (dg, du) = gradient_rooms(gate_up, x)
        d_a = down.d_a(dyb, swiglu_backward(dm, g, u, dg, du))
        d_b = down.d_b(grad, xa_d)
        del dm
        h = rms_norm(x, weight, ctx.eps)
        dh, d_trained = backproject(gate_up, wides, h, xas, True)
        assert dh is not None
        dx = rms_norm_backward(dh, x, weight, ctx.eps, grad)
        return dx, None, None, None, None, *d_trained, d_a, d_b


def _wide(dy: torch.Tensor, part: Projection) -> torch.Tensor:
    """dy with room behind its rows, where that is needed."""
    if not part.more:
        return dy
    wide = wide_empty(dy, part.outputs, [part])
    wide[:, : part.outputs].copy_(dy)
    return wide
