"""Norms, rotary embedding and attention in plain torch: the CPU's operations and the reference of the GPU kernels.

Owns `Step` (what attention has to know about a batch) and the eager operations; `kernels` has the same names in Triton.
A shared prefix is read once for all rows that have it: its scores are one dense product, joined with each row's own by
one softmax.
Axes: T tokens, B rows, N query heads, M key/value heads, G = N / M query heads of a group, D head dimension, P prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from cai.engine.native.cache import LayerCache, PrefixStore
from cai.engine.native.nesting import NOWHERE, Parts, length_of

WIDE = 1 << 30  # the window of a layer that sees everything
KeysValues = tuple[torch.Tensor, torch.Tensor]
HeadNorms = tuple[torch.Tensor, torch.Tensor, float]  # factors of queries and keys (D, or all heads'), and epsilon

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # gives (output, log-sum-exp of its keys)


@dataclass(slots=True)
class Step:
    """One forward pass. A decode step has one token a row; a prefill has whole rows, packed one after another."""

    positions_T: torch.Tensor  # absolute: prefix length + place in the row
    blocks_T: torch.Tensor  # where the token's keys and values go
    offsets_T: torch.Tensor
    table_BW: torch.Tensor  # blocks of each row, int32
    lens_B: torch.Tensor  # own tokens of each row, this step's included, int32
    store: PrefixStore
    prefill: bool
    lens: tuple[int, ...] = ()  # prefill: host copy of the lengths
    parts: tuple[Parts, ...] = ()  # of each row, but for a decode step on a GPU
    shared: torch.Tensor | None = None  # decode on a GPU: (B, 2) place and length of each row's prefix, int32
    longest: int = 0  # decode on a CPU: the largest length
    tiles: torch.Tensor | None = None  # prefill on a GPU: of each query tile, see `query_tiles`
    kept: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)  # on a CPU: what all layers read


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """A factor in fp32 is multiplied before the result is rounded, another one after it, as its family does."""
    if x_TH.dtype == weight_H.dtype == torch.float32:
        return F.rms_norm(x_TH, weight_H.shape, weight_H, eps)
    x32_TH = x_TH.float()
    x32_TH = x32_TH * torch.rsqrt(x32_TH.square().mean(-1, keepdim=True) + eps)
    return (weight_H * x32_TH.to(torch.promote_types(weight_H.dtype, x_TH.dtype))).to(x_TH.dtype)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(residual + x), residual + x)."""
    residual_TH = residual_TH + x_TH
    return rms_norm(residual_TH, weight_H, eps), residual_TH


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def gelu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """GELU in its approximation by tanh."""
    return F.gelu(gate, approximate="tanh") * up


def rotate(x_TKD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on halves (the Llama convention): cos twice, sin once less than zero and once as it is."""
    a, b = x_TKD.chunk(2, -1)
    return torch.cat((b, a), -1).mul_(sin_T1D).add_(x_TKD * cos_T1D)


def turns(cos: torch.Tensor, sin: torch.Tensor, step: Step, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The cos and sin of a step's positions as `rotate` reads them, once for all layers of one table."""
    kept, keys = step.kept, (("cos", id(cos)), ("sin", id(cos)))
    if keys[0] not in kept:
        cos_T1D, sin_T1D = (table[step.positions_T][:, None].to(dtype) for table in (cos, sin))
        kept[keys[0]], kept[keys[1]] = torch.cat((cos_T1D, cos_T1D), -1), torch.cat((-sin_T1D, sin_T1D), -1)
    return kept[keys[0]], kept[keys[1]]


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shape: tuple[int, int, int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    step: Step,
    cache: LayerCache,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Rotated queries (T, N, D); rotated keys and values go into one layer's cache."""
    heads, kv_heads, dim = shape
    if norms is not None:
        q, k = (normed_heads(x, weight, norms[2], dim) for x, weight in zip((q, k), norms[:2], strict=True))
    cos_T1D, sin_T1D = turns(cos, sin, step, q.dtype)
    store(rotate(k.unflatten(-1, (kv_heads, dim)), cos_T1D, sin_T1D), step, cache.keys)
    store(v.unflatten(-1, (kv_heads, dim)), step, cache.values)
    return rotate(q.unflatten(-1, (heads, dim)), cos_T1D, sin_T1D)


def store(x_TMD: torch.Tensor, step: Step, cache: torch.Tensor) -> None:
    """Keys or values into one layer's cache. The rows of a decode step sit in blocks 1..B (`decode_attention`)."""
    if step.prefill:
        cache[step.blocks_T, :, step.offsets_T] = x_TMD
        return
    rows, kv_heads, dim = x_TMD.shape
    place = step.kept.get(("place", dim))
    if place is None:
        place = step.kept["place", dim] = step.offsets_T[:, None, None, None].expand(rows, kv_heads, 1, dim)
    cache[1 : rows + 1].scatter_(2, place, x_TMD[:, :, None])


def normed_heads(x_TK: torch.Tensor, weight: torch.Tensor, eps: float, dim: int) -> torch.Tensor:
    """Each head's part normed for itself (weight (D)), or all of them together (weight (K))."""
    return rms_norm(x_TK.unflatten(-1, (-1, weight.shape[0])), weight, eps).flatten(-2)


def decode_attention(
    q_BND: torch.Tensor,
    cache: LayerCache,
    step: Step,
    layer: int,
    scale: float,
    window: int = WIDE,
) -> torch.Tensor:
    """One query a row. Blocks are whole rows here; rows sit in blocks 1..B (`engine` keeps them packed)."""
    rows, kv_heads, dim = q_BND.shape[0], cache.keys.shape[1], q_BND.shape[2]
    own = cache.keys[1 : rows + 1, :, : step.longest], cache.values[1 : rows + 1, :, : step.longest]
    q_BMGD = q_BND.view(rows, kv_heads, -1, dim)
    of_row = [parts[0] if parts else NOWHERE for parts in step.parts]
    found = {}
    for part in dict.fromkeys(of_row):
        attend = fused_parts if q_BND.dtype == torch.float32 and (window == WIDE or not part.length) else plain_parts
        found[part] = attend(q_BMGD, own, step.store.read(layer, part), step, scale, window)
    if len(found) == 1:
        return found[of_row[0]]
    return torch.stack([found[part][row] for row, part in enumerate(of_row)])


def fused_parts(
    q_BMGD: torch.Tensor, own: KeysValues, prefix: KeysValues, step: Step, scale: float, window: int
) -> torch.Tensor:
    """The row's own part and the prefix's in torch's kernel, joined by their log-sum-exps."""
    rows, kv_heads, _, dim = q_BMGD.shape
    mask = step.kept.get(("mask", window))
    if mask is None:
        mask = torch.zeros(rows, step.longest).masked_fill_(hidden(step, window), float("-inf"))[:, None, None]
        step.kept["mask", window] = mask
    own_BMGD, own_lse = flash(q_BMGD, *own, attn_mask=mask, scale=scale)
    if not prefix[0].shape[1]:
        return own_BMGD.reshape(rows, -1)
    q_1MRD = q_BMGD.transpose(0, 1).reshape(1, kv_heads, -1, dim)  # R = B * G: the prefix sees all rows as one product
    shared_1MRD, shared_lse = flash(q_1MRD, prefix[0][None], prefix[1][None], scale=scale)
    shared_BMGD = shared_1MRD.view(kv_heads, rows, -1, dim).transpose(0, 1)
    share_BMG = torch.sigmoid(own_lse - shared_lse.view(kv_heads, rows, -1).transpose(0, 1))
    return torch.lerp(shared_BMGD, own_BMGD, share_BMG[..., None]).reshape(rows, -1)


def hidden(step: Step, window: int) -> torch.Tensor:
    """(B, longest): places behind a row's end, or before its window; once for all layers."""
    found = step.kept.get(("hidden", window))
    if found is None:
        places_T, lens_B1 = torch.arange(step.longest), step.lens_B[:, None]
        found = step.kept["hidden", window] = (places_T >= lens_B1) | (places_T < lens_B1 - window)
    return found


def plain_parts(
    q_BMGD: torch.Tensor, own: KeysValues, prefix: KeysValues, step: Step, scale: float, window: int
) -> torch.Tensor:
    """The same with one softmax over both parts, for any type and for windows that reach into the prefix."""
    rows, kv_heads, _, dim = q_BMGD.shape
    dtype, length = q_BMGD.dtype, prefix[0].shape[1]
    q_BMGD = q_BMGD * scale
    own_BMGT = (q_BMGD @ own[0].transpose(-1, -2)).masked_fill_(hidden(step, window)[:, None, None], float("-inf"))
    if not length:
        return (own_BMGT.softmax(-1, dtype=torch.float32).to(dtype) @ own[1]).reshape(rows, -1)
    q_MRD = q_BMGD.transpose(0, 1).reshape(kv_heads, -1, dim)
    shared_BMGP = (q_MRD @ prefix[0].transpose(-1, -2)).view(kv_heads, rows, -1, length).transpose(0, 1)
    if window != WIDE:
        hidden_BP = torch.arange(length) < length + step.lens_B[:, None] - window
        shared_BMGP = shared_BMGP.masked_fill(hidden_BP[:, None, None], float("-inf"))
    both = torch.cat((shared_BMGP, own_BMGT), -1).softmax(-1, dtype=torch.float32).to(dtype)
    from_own = both[..., length:] @ own[1]
    from_prefix = both[..., :length].transpose(0, 1).reshape(kv_heads, -1, length) @ prefix[1]
    return (from_own + from_prefix.view(kv_heads, rows, -1, dim).transpose(0, 1)).reshape(rows, -1)


def prefill_attention(
    q_TND: torch.Tensor,
    cache: LayerCache,
    step: Step,
    layer: int,
    scale: float,
    window: int = WIDE,
) -> torch.Tensor:
    """Whole rows from their first own token: all of the prefix, causal over the own part. Row by row."""
    outputs, at = [], 0
    for row, (length, parts) in enumerate(zip(step.lens, step.parts, strict=True)):
        shared = length_of(parts)
        masked = bool(shared) or window != WIDE
        q_1NTD = q_TND[at : at + length].transpose(0, 1)[None]
        block = int(step.table_BW[row, 0])
        k_MTD, v_MTD = cache.keys[block, :, :length], cache.values[block, :, :length]
        if shared:
            before = [step.store.read(layer, part) for part in parts]
            k_MTD = torch.cat([keys for keys, _ in before] + [k_MTD], 1)
            v_MTD = torch.cat([values for _, values in before] + [v_MTD], 1)
        if masked:
            keys_K, queries_T1 = torch.arange(shared + length), torch.arange(shared, shared + length)[:, None]
            seen = (keys_K <= queries_T1) & (keys_K > queries_T1 - window)
        groups = q_1NTD.shape[1] // k_MTD.shape[0]
        out = F.scaled_dot_product_attention(
            q_1NTD,
            k_MTD.repeat_interleave(groups, 0)[None],
            v_MTD.repeat_interleave(groups, 0)[None],
            attn_mask=seen if masked else None,
            is_causal=not masked,
            scale=scale,
        )
        outputs.append(out[0].transpose(0, 1).flatten(1))
        at += length
    return torch.cat(outputs)
