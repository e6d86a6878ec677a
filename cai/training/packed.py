"""A training pass for Llama-shaped decoders: pairs packed without padding, the prompt computed once for both.

Takes the packed rows of `attention`. Frozen 4-bit weights are dequantised into one scratch buffer, used and
overwritten; LoRA runs beside them. Saved for the backward pass: the two residual inputs, attention's tensors, gate and
up; norms, the SwiGLU product and dequantised weights are made again. Takes weights from the modules and never calls
their forward, so stock and Unsloth-patched models are the same to it.

Legend: T packed tokens, H hidden, N heads, D head width, F feed-forward width, R rank. Imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cai.engine.foreign import HfConfig, HfModel, HfModule
from cai.training.adapter import NAME
from cai.training.attention import attend
from cai.training.frozen import Frozen
from cai.training.kernels import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from cai.training.loss import Batch, base_of

PLAIN_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not hang on the length of the text
SHAPES = {"llama", "qwen2", "qwen3", "mistral"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [T, D/2]
Adapted = dict[str, tuple["Projection", list[torch.nn.Parameter]]]  # a layer's projections by name, and what is trained


@dataclass(frozen=True)
class Projection:
    """One adapted linear: frozen weight (maybe 4-bit) and bias, scale, and A_RI, B_OR in the compute dtype."""

    base: HfModule
    scale: float
    a: torch.Tensor
    b: torch.Tensor
    frozen: Frozen

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """weight_OI. A dequantised one lives in a scratch buffer until the next call."""
        return self.frozen.weight(self.base, dtype)


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
        self._copies: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._frozen = Frozen()

    def __call__(self, hf: HfModel, batch: Batch) -> torch.Tensor:
        base = base_of(hf)
        model, config = base.model, base.config
        adapted = not _adapter_off(base)
        x_TH = F.embedding(batch["ids_T"], model.embed_tokens.weight)
        layers = [{name: self._projection(m, x_TH.dtype) for name, m in _modules(la).items()} for la in model.layers]
        self._refresh()
        rope = rotary(config, batch["positions_T"])
        for i, (layer, (parts, trained)) in enumerate(zip(model.layers, map(_split, layers), strict=True)):
            arguments = (layer, config, x_TH, rope, batch, adapted, parts, trained)
            if i < self.checkpoint_layers and torch.is_grad_enabled():
                x_TH = checkpoint(_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TH = _layer(*arguments)
        hidden_NH = x_TH.index_select(0, batch["hidden_index_N"])
        return _Norm.apply(hidden_NH, model.norm.weight, _eps(model.norm))

    def _projection(self, module: HfModule, dtype: torch.dtype) -> tuple[Projection, list[torch.nn.Parameter]]:
        trained = [module.lora_A[NAME].weight, module.lora_B[NAME].weight]
        for parameter in trained:
            if parameter.dtype != dtype and getattr(self._copies.get(parameter), "dtype", None) != dtype:
                self._copies[parameter] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        a, b = (self._copies.get(p, p) if p.dtype != dtype else p.detach() for p in trained)
        return Projection(module.get_base_layer(), module.scaling[NAME], a, b, self._frozen), trained

    def _refresh(self) -> None:
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(list(self._copies.values()), list(self._copies))


def _split(layer: Adapted) -> tuple[dict[str, Projection], dict[str, list[torch.nn.Parameter]]]:
    return {name: p for name, (p, _) in layer.items()}, {name: trained for name, (_, trained) in layer.items()}


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
    layer: HfModule, config: HfConfig, x_TH: torch.Tensor, rope: Rope, batch: Batch, adapted: bool,
    parts: dict[str, Projection], trained: dict[str, list[torch.nn.Parameter]],
) -> torch.Tensor:  # fmt: skip
    """One decoder block over the packed row. Parameters go along for autograd; `parts` hold what is computed with."""

    def group(*names: str) -> tuple[list[Projection], list[torch.nn.Parameter]]:
        return [parts[n] for n in names], [tensor for n in names for tensor in trained[n]]

    norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
    qkv, qkv_trained = group("q_proj", "k_proj", "v_proj")
    q, k, v = _NormLinears.apply(x_TH, norm1.weight, _eps(norm1), qkv, adapted, *qkv_trained)
    width = head_width(config)
    q_TND, k_TND, v_TND = (t.view(t.shape[0], -1, width) for t in (q, k, v))
    q_TND, k_TND = (_head_norm(layer.self_attn, name, t) for name, t in (("q_norm", q_TND), ("k_norm", k_TND)))
    a_TH = attend(_Rope.apply(q_TND, *rope), _Rope.apply(k_TND, *rope), v_TND, batch).flatten(1)
    out, out_trained = group("o_proj")
    x_TH = _OutLinear.apply(a_TH, x_TH, out, adapted, *out_trained)
    mlp, mlp_trained = group("gate_proj", "up_proj", "down_proj")
    return _Mlp.apply(x_TH, norm2.weight, _eps(norm2), mlp, adapted, *mlp_trained)


def _head_norm(attention: HfModule, name: str, x_TND: torch.Tensor) -> torch.Tensor:
    """Qwen3's RMSNorm of each head before the rotation; other families have none."""
    norm = getattr(attention, name, None)
    if norm is None:
        return x_TND
    return _Norm.apply(x_TND.reshape(-1, x_TND.shape[-1]), norm.weight, _eps(norm)).view(x_TND.shape)


# --- linears with LoRA: y = x W' + bias + s (x A') B'


def _linear(x: torch.Tensor, part: Projection, adapted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, xa): the output, and x A' for the backward pass."""
    y = F.linear(x, part.weight(x.dtype), part.base.bias)
    if not adapted:
        return y, None
    xa = x @ part.a.t()
    return y.addmm_(xa, part.b.t(), alpha=part.scale), xa


def _linear_backward(
    dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor, part: Projection, dx: torch.Tensor | None, wants_dx: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(dx added to the given one, dA, dB); gradients of A and B in fp32."""
    # y = x W' + b + s (x A') B'  =>  dA = s (dy B)' x,  dB = s dy' (x A'),  dx = dy W + s (dy B) A;  W is frozen
    # s (dy B), [T, R], is made once for dA and dx, and its part of dx is added in place: no second [T, H].
    dyb = (dy @ part.b).mul_(part.scale)  # [T, R]
    d_a = (dyb.t() @ x).float()
    d_b = (dy.t() @ xa).mul_(part.scale).float()
    if wants_dx:
        weight = part.weight(dy.dtype)
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        dx.addmm_(dyb, part.a)
    return dx, d_a, d_b


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


class _NormLinears(torch.autograd.Function):
    """RMSNorm, then several adapted linears of the same input (query, key, value)."""

    @staticmethod
    def forward(ctx, x_TH, weight_H, eps, parts, adapted, *trained):
        h = rms_norm(x_TH, weight_H, eps)
        results = [_linear(h, part, adapted) for part in parts]
        if adapted:
            ctx.save_for_backward(x_TH, weight_H, *(xa for _, xa in results))
            ctx.parts, ctx.eps = parts, eps
        return tuple(y for y, _ in results)

    @staticmethod
    def backward(ctx, *grads):
        # y_i = linear_i(h), h = norm(x)  =>  dh = sum_i dlinear_i(dy_i), then dx = dnorm(dh). h is made again from x:
        # [T, H] a layer that is not kept. Where x needs no gradient (the
        # first layer: embeddings are frozen) neither dh nor dx is made.
        x, weight, *xas = ctx.saved_tensors
        h, dh, d_trained = rms_norm(x, weight, ctx.eps), None, []
        wants_dx = ctx.needs_input_grad[0]
        for part, dy, xa in zip(ctx.parts, grads, xas, strict=True):
            dh, d_a, d_b = _linear_backward(dy.contiguous(), h, xa, part, dh, wants_dx)
            d_trained += [d_a, d_b]
        dx = rms_norm_backward(dh, x, weight, ctx.eps, None) if dh is not None else None
        return dx, None, None, None, None, *d_trained


class _OutLinear(torch.autograd.Function):
    """Residual plus one adapted linear (attention's output)."""

    @staticmethod
    def forward(ctx, a_TH, residual_TH, parts, adapted, *trained):
        y, xa = _linear(a_TH, parts[0], adapted)
        if adapted:
            ctx.save_for_backward(a_TH, xa)
            ctx.part = parts[0]
        return y.add_(residual_TH)

    @staticmethod
    def backward(ctx, grad):
        # y = residual + linear(a)  =>  dresidual = dy, da = dlinear(dy)
        a_TH, xa = ctx.saved_tensors
        grad = grad.contiguous()
        dx, d_a, d_b = _linear_backward(grad, a_TH, xa, ctx.part, None, True)
        return dx, grad, None, None, d_a, d_b


class _Mlp(torch.autograd.Function):
    """Residual plus norm, gate, up, SwiGLU, down. The product is made again in the backward pass."""

    @staticmethod
    def forward(ctx, x_TH, weight_H, eps, parts, adapted, *trained):
        gate, up, down = parts
        h = rms_norm(x_TH, weight_H, eps)
        g, xa_g = _linear(h, gate, adapted)
        u, xa_u = _linear(h, up, adapted)
        y, xa_d = _linear(swiglu(g, u), down, adapted)
        if adapted:
            ctx.save_for_backward(x_TH, weight_H, g, u, xa_g, xa_u, xa_d)
            ctx.parts, ctx.eps = parts, eps
        return y.add_(x_TH)

    @staticmethod
    def backward(ctx, grad):
        # y = x + down(m), m = silu(g) u, g = gate(h), u = up(h), h = norm(x)
        # dm = dy W_d + s (dy B_d) A_d;  dg = dm u silu'(g), silu'(g) = sig(g) (1 + g (1 - sig(g)));  du = dm silu(g)
        # dh = dgate(dg) + dup(du);  dx = dnorm(dh) + dy (the residual, added by rms_norm_backward)
        # m comes back from swiglu_backward for dA, dB of `down`: not kept, and freed with dm before h is made again
        x, weight, g, u, xa_g, xa_u, xa_d = ctx.saved_tensors
        gate, up, down = ctx.parts
        grad = grad.contiguous()
        dm = (grad @ down.weight(grad.dtype)).addmm_((grad @ down.b).mul_(down.scale), down.a)
        m, dg, du = swiglu_backward(dm, g, u)
        _, d_a_d, d_b_d = _linear_backward(grad, m, xa_d, down, None, False)
        del m, dm
        h = rms_norm(x, weight, ctx.eps)
        dh, d_a_g, d_b_g = _linear_backward(dg, h, xa_g, gate, None, True)
        dh, d_a_u, d_b_u = _linear_backward(du, h, xa_u, up, dh, True)
        assert dh is not None
        dx = rms_norm_backward(dh, x, weight, ctx.eps, grad)
        return dx, None, None, None, None, d_a_g, d_b_g, d_a_u, d_b_u, d_a_d, d_b_d
