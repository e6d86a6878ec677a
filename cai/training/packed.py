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
from cai.training.factor_kernel import serves, swiglu_factors
from cai.training.frozen import Frozen
from cai.training.kernels import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from cai.training.linears import (
    Copies,
    Group,
    backproject,
    gradient_rooms,
    groups_of,
    input_room,
    interleaved,
    project,
    wide_empty,
)  # fmt: skip
from cai.training.loss import Batch, base_of

PLAIN_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not hang on the length of the text
SHAPES = {"llama", "qwen2", "qwen3", "mistral"}
QKV, OUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [T, D/2]
Groups = list[list[Group]]  # of a layer: of QKV, OUT, GATE_UP, DOWN


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
    return {
        name: getattr(attention if hasattr(attention, name) else mlp, name) for name in (*QKV, *OUT, *GATE_UP, *DOWN)
    }


class PackedForward:
    """`forward(hf, batch) -> hidden_NH` for a model that `refusal` accepts.

    Keeps one copy of the adapter in the compute dtype between calls, refreshed at the start of each: casting at every
    use would be 2,700 small launches a micro-batch at 64 layers.
    """

    def __init__(self) -> None:
        self.checkpoint_layers = 0  # how many layers, from the first, are recomputed in the backward pass
        self._frozen = Frozen()
        self._groups: list[Groups] = []
        self._made_of: list[object] = []

    def __call__(self, hf: HfModel, batch: Batch) -> torch.Tensor:
        base = base_of(hf)
        model, config = base.model, base.config
        adapted = not _adapter_off(base)
        x_TH = F.embedding(batch["ids_T"], model.embed_tokens.weight)
        layers = self._fresh(model.layers, x_TH)
        rope = rotary(config, batch["positions_T"])
        for i, (layer, groups) in enumerate(zip(model.layers, layers, strict=True)):
            arguments = (layer, config, x_TH, rope, batch, adapted, groups)
            if i < self.checkpoint_layers and torch.is_grad_enabled():
                x_TH = checkpoint(_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TH = _layer(*arguments)
        hidden_NH = x_TH.index_select(0, batch["hidden_index_N"])
        return _Norm.apply(hidden_NH, model.norm.weight, _eps(model.norm))

    def _fresh(self, layers: Sequence[HfModule], like: torch.Tensor) -> list[Groups]:
        """The groups of each layer, made anew where the model holds another adapter; copies of it are brought up."""
        made_of = [like.dtype, layers]
        for module in [*_modules(layers[0]).values(), *_modules(layers[-1]).values()]:
            made_of += [module.get_base_layer(), module.lora_A[NAME].weight, module.lora_B[NAME].weight]
        if len(made_of) != len(self._made_of) or any(a is not b for a, b in zip(made_of, self._made_of, strict=True)):
            self._groups = [
                [groups_of(parts, names, like, self._frozen) for names in (QKV, OUT, GATE_UP, DOWN)]
                for parts in map(_modules, layers)
            ]
            self._every = [group for layer in self._groups for groups in layer for group in groups]
            self._copies, self._made_of = Copies(self._every), made_of
        self._copies.refresh()
        self._frozen.begin(self._every)
        return self._groups


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
    layer: HfModule, config: HfConfig, x_TH: torch.Tensor, rope: Rope, batch: Batch, adapted: bool, groups: Groups
) -> torch.Tensor:  # fmt: skip
    """One decoder block over the packed row. Parameters go along for autograd; groups hold what is computed with."""
    qkv, out, gate_up, down = groups
    attention, width = layer.self_attn, head_width(config)
    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
    normed = getattr(attention, "q_norm", None) is not None
    turn = None if normed else rope
    q, k, v, residual = _Heads.apply(x_TH, norm1.weight, _eps(norm1), qkv, adapted, turn, width, *_trained(qkv))
    if normed:
        q, k = (_Rope.apply(_head_norm(getattr(attention, n), t), *rope) for n, t in (("q_norm", q), ("k_norm", k)))
    a_TH = attend(q, k, v, batch).flatten(1)
    x_TH = _OutLinear.apply(a_TH, residual, out, adapted, *_trained(out))
    trained = _trained(gate_up) + _trained(down)
    return _Mlp.apply(x_TH, norm2.weight, _eps(norm2), gate_up, down, adapted, *trained)


def _trained(groups: list[Group]) -> list[torch.nn.Parameter]:
    return [parameter for group in groups for parameter in group.trained]


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
    def forward(ctx, x_TH, weight_H, eps, groups, adapted, rope, width, *trained):
        wide = input_room(groups, x_TH)
        rms_norm(x_TH, weight_H, eps, wide[:, : x_TH.shape[1]])
        parts, xas = project(groups, wide, adapted)
        q, k, v = (part.unflatten(1, (-1, width)) for part in parts)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if adapted:
            ctx.save_for_backward(x_TH, weight_H, *xas)
            ctx.groups, ctx.eps, ctx.rope = groups, eps, rope
        return q, k, v, x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx, dq, dk, dv, residual):
        # y = linear(h), h = norm(x)  =>  dh = dlinear(dy), dx = dnorm(dh) + the residual's. h is made again from x:
        # [T, H] a layer that is not kept. q = R y, R orthogonal  =>  dy = R' dq: the rotation by the negative angle.
        # Where x needs no gradient (the first layer: embeddings are frozen) neither dh nor dx is made.
        x, weight, *xas = ctx.saved_tensors
        wides, places = gradient_rooms(ctx.groups, x)
        for place, grad, turns in zip(places, (dq, dk, dv), (True, True, False), strict=True):
            place = place.unflatten(1, grad.shape[1:])
            if turns and ctx.rope is not None:
                rotate(grad.contiguous(), ctx.rope[0], ctx.rope[1], place, inverse=True)
            else:
                place.copy_(grad)
        h = rms_norm(x, weight, ctx.eps)
        dh, d_trained = backproject(ctx.groups, wides, h, xas, ctx.needs_input_grad[0])
        dx = None if dh is None else rms_norm_backward(dh, x, weight, ctx.eps, residual.contiguous())
        return dx, None, None, None, None, None, None, *d_trained


class _OutLinear(torch.autograd.Function):
    """Residual plus one adapted linear (attention's output)."""

    @staticmethod
    def forward(ctx, a_TH, residual_TH, groups, adapted, *trained):
        (y,), (xa,) = project(groups, _wide(a_TH, groups[0].more), adapted)
        if adapted:
            ctx.save_for_backward(a_TH, xa)
            ctx.groups = groups
        return y.add_(residual_TH)

    @staticmethod
    def backward(ctx, grad):
        # y = residual + linear(a)  =>  dresidual = dy, da = dlinear(dy)
        a_TH, xa = ctx.saved_tensors
        grad = grad.contiguous()
        dx, d_trained = backproject(ctx.groups, [_wide(grad, ctx.groups[0].more)], a_TH, [xa], True)
        return dx, grad, None, None, *d_trained


def _wide(x: torch.Tensor, more: int) -> torch.Tensor:
    """x with room behind its rows, where that is needed."""
    if not more:
        return x
    wide = wide_empty(x, x.shape[1], more)
    wide[:, : x.shape[1]].copy_(x)
    return wide


class _Mlp(torch.autograd.Function):
    """Residual plus norm, gate, up, SwiGLU, down. The product is made again in the backward pass."""

    @staticmethod
    def forward(ctx, x_TH, weight_H, eps, gate_up, down, adapted, *trained):
        wide = input_room(gate_up, x_TH)
        rms_norm(x_TH, weight_H, eps, wide[:, : x_TH.shape[1]])
        (g, u), xas = project(gate_up, wide, adapted)
        wide = input_room(down, x_TH)
        swiglu(g, u, wide[:, : g.shape[1]])
        (y,), (xa,) = project(down, wide, adapted)
        if adapted:
            ctx.save_for_backward(x_TH, weight_H, g, u, xa, *xas)
            ctx.gate_up, ctx.down, ctx.eps = gate_up, down[0], eps
        return y.add_(x_TH)

    @staticmethod
    def backward(ctx, grad):
        # y = x + down(m), m = silu(g) u, g = gate(h), u = up(h), h = norm(x)
        # dm = ddown(dy);  dg = dm u silu'(g), silu'(g) = sig(g) (1 + g (1 - sig(g)));  du = dm silu(g)
        # dh = dgate(dg) + dup(du);  dx = dnorm(dh) + dy (the residual, added by rms_norm_backward)
        # m is made again for dA of `down`: not kept, and gone with dm before h is made again
        x, weight, g, u, xa, *xas = ctx.saved_tensors
        down, grad = ctx.down, grad.contiguous()
        dm, dyb = down.backward(_wide(grad, down.more), None)
        wides, (dg, du) = gradient_rooms(ctx.gate_up, x)
        d_a, d_bs = _factors(ctx.gate_up, down, dm, g, u, dg, du, dyb, xas)
        d_down = interleaved(d_a, down.d_b(grad, xa))
        del dm
        h = rms_norm(x, weight, ctx.eps)
        dh, d_trained = backproject(ctx.gate_up, wides, h, xas, True, d_bs)
        assert dh is not None
        dx = rms_norm_backward(dh, x, weight, ctx.eps, grad)
        return dx, None, None, None, None, None, *d_trained, *d_down


def _factors(
    gate_up: list[Group], down: Group, dm: torch.Tensor, g: torch.Tensor, u: torch.Tensor, dg: torch.Tensor,
    du: torch.Tensor, dyb: torch.Tensor, xas: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:  # fmt: skip
    """dg and du into their places; (dA of down, dB of gate and up where they come in the same pass)."""
    ranks = [down.ranks[0], *gate_up[0].ranks]
    rank = down.ranks[0].stop
    if len(ranks) != 3 or any(part.stop - part.start != rank for part in ranks) or not serves(rank):
        return down.d_a(dyb, swiglu_backward(dm, g, u, dg, du)), None
    xa_gate, xa_up = (xas[0][:, part] for part in ranks[1:])
    d_a, *d_bs = swiglu_factors(dm, g, u, dg, du, dyb[:, :rank], xa_gate, xa_up)
    return [d_a], [d_b * gate_up[0].scale for d_b in d_bs]
