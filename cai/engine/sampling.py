"""The draw of one token: counter-based Gumbel noise, so that a row's text depends on its own seed and positions only.

Owns the hash (seed, position, token id) -> noise and `pick`. Doesn't own logits, batches or stop rules. The integer
part is 32-bit arithmetic that wraps the same way on every device, so the noise of a row is the same bits on CPU and GPU
up to the last bit of `log`. Gumbel-max: argmax(logits / T + g) is a draw from softmax(logits / T) (Gumbel 1954;
Maddison et al. 2014); argmax(logits + T * g) is the same draw and turns into plain argmax at T = 0.

Axes: B rows, V vocabulary. `positions_B` counts the new tokens of the row, the first draw being position 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cai.engine import Rules

GOLDEN_64 = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
MIX_64 = (-4658895280553007687, -7723592293110705685)  # splitmix64 (Steele et al. 2014)
GOLDEN_32 = -1640531535  # 0x9E3779B1
MIX_32 = (2146121005, -2073254261)  # lowbias32 (Wellons 2018): 0x7feb352d, 0x846ca68b
LARGEST_V = 1.0 - 2.0**-24  # the largest float32 below 1
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU = 1 << 17, 1 << 26  # a chunk's temporaries stay in the cache / small


def signed64(seed: int) -> int:
    """Any Python int as the two's-complement 64-bit number that torch stores."""
    return (seed & (1 << 64) - 1) - ((seed & 1 << 63) << 1)


def seed_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Seeds of any size (the low 64 bits count) as an int64 tensor."""
    return torch.tensor([signed64(seed) for seed in seeds], dtype=torch.int64, device=device)


def row_keys(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 keys a row, from splitmix64 of seed + (position + 1) * golden ratio."""
    z = seeds_B.to(torch.int64) + (positions_B.to(torch.int64) + 1) * GOLDEN_64
    z = (z ^ ((z >> 30) & (1 << 34) - 1)) * MIX_64[0]
    z = (z ^ ((z >> 27) & (1 << 37) - 1)) * MIX_64[1]
    z = z ^ ((z >> 31) & (1 << 33) - 1)
    return z.to(torch.int32), (z >> 32).to(torch.int32)


def hash_BV(key0_B: torch.Tensor, key1_B: torch.Tensor, tokens_V: torch.Tensor) -> torch.Tensor:
    """31 uniform bits (int32, not negative) for each row and token."""
    x = (tokens_V.to(torch.int32) * GOLDEN_32)[None, :] ^ key0_B[:, None]
    x ^= (x >> 16) & 0xFFFF
    x *= MIX_32[0]
    x ^= (x >> 15) & 0x1FFFF
    x += key1_B[:, None]
    x *= MIX_32[1]
    x ^= (x >> 16) & 0xFFFF
    return x & 0x7FFFFFFF


def gumbel_of_bits(bits_BV: torch.Tensor) -> torch.Tensor:
    """-log(-log(u)) in float32 with u = 1 - v, v in (0, 1): `log1p` keeps all 31 bits where the noise is large."""
    v = bits_BV.to(torch.float32).mul_(2.0**-31).add_(2.0**-32).clamp_(max=LARGEST_V)
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    seeds_B: torch.Tensor, positions_B: torch.Tensor, vocab_size: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Standard Gumbel noise, float32 (B, V), a pure function of each row's (seed, position) and the token id."""
    device = seeds_B.device if device is None else torch.device(device)
    key0_B, key1_B = row_keys(seeds_B.to(device), positions_B.to(device))
    return gumbel_of_bits(hash_BV(key0_B, key1_B, torch.arange(vocab_size, dtype=torch.int32, device=device)))


def mask_min_p(logits_BV: torch.Tensor, temperatures_B: torch.Tensor, min_p: float) -> torch.Tensor:
    """Logits with -inf where a token is less than `min_p` times as likely as the row's best, at its temperature."""
    floor_B = temperatures_B.to(torch.float32) * math.log(min_p)
    lowest_B = logits_BV.amax(-1).to(torch.float32) + floor_B
    return logits_BV.masked_fill(logits_BV < lowest_B[:, None], float("-inf"))


def mask_repeats(logits_BV: torch.Tensor, history_BT: torch.Tensor, counts_B: torch.Tensor, n: int) -> torch.Tensor:
    """Logits with -inf where a token would complete an n-gram that the row has drawn before (its prompt may repeat).

    `history_BT`: the rows' drawn ids, of which the first `counts_B` count. On the device alone: no host reads on a GPU.
    """
    windows = history_BT.shape[1] - n + 1
    if windows < 1:
        return logits_BV
    places = counts_B.to(torch.int64)[:, None] - torch.arange(n - 1, 0, -1, device=history_BT.device)
    last = history_BT.gather(1, places.clamp_(min=0))
    same = torch.arange(windows, device=history_BT.device) + n - 1 < counts_B[:, None]
    for i in range(n - 1):
        same = same & (history_BT[:, i : i + windows] == last[:, i, None])
    banned = torch.zeros(same.shape, dtype=logits_BV.dtype, device=same.device).masked_fill_(same, float("-inf"))
    return logits_BV.scatter_add(1, history_BT[:, n - 1 :].to(torch.int64), banned)


def allowed(
    logits_BV: torch.Tensor,
    rules: Rules,
    temperatures_B: torch.Tensor,
    history_BT: torch.Tensor,
    counts_B: torch.Tensor,
) -> torch.Tensor:
    """Logits with -inf where the engine's rules forbid a token; `history_BT` and `counts_B` as for `mask_repeats`."""
    if rules.no_repeat_ngram:
        logits_BV = mask_repeats(logits_BV, history_BT, counts_B, rules.no_repeat_ngram)
    return mask_min_p(logits_BV, temperatures_B, rules.min_p) if rules.min_p else logits_BV


def pick(
    logits_BV: torch.Tensor,
    temperatures_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    forbidden: bool = False,
) -> torch.Tensor:
    """Draw one token id a row (int64, B); rows with temperature 0 take the argmax. `logits_BV` is not changed.

    `forbidden`: rules have set most logits to -inf.
    """
    rows, vocab = logits_BV.shape
    if logits_BV.device.type == "cpu" and not bool(temperatures_B.any()):  # on a GPU the question would stall
        return logits_BV.argmax(-1)
    key0_B, key1_B = row_keys(seeds_B, positions_B)
    if forbidden and logits_BV.device.type == "cpu":  # min_p leaves a handful: only these columns draw
        allowed_C = (logits_BV > float("-inf")).any(0).nonzero()[:, 0]
        noise_BC = gumbel_of_bits(hash_BV(key0_B, key1_B, allowed_C)).mul_(temperatures_B.to(torch.float32)[:, None])
        return allowed_C[noise_BC.add_(logits_BV[:, allowed_C]).argmax(-1)]
    tokens_V = torch.arange(vocab, dtype=torch.int32, device=logits_BV.device)
    elements = CHUNK_ELEMENTS_CPU if logits_BV.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    step = max(1, elements // vocab)
    picked = [
        _pick_chunk(
            logits_BV[a : a + step], temperatures_B[a : a + step], key0_B[a : a + step], key1_B[a : a + step], tokens_V
        )
        for a in range(0, rows, step)
    ]
    return torch.cat(picked)


def _pick_chunk(
    logits_BV: torch.Tensor,
    temperatures_B: torch.Tensor,
    key0_B: torch.Tensor,
    key1_B: torch.Tensor,
    tokens_V: torch.Tensor,
) -> torch.Tensor:
    noise_BV = gumbel_of_bits(hash_BV(key0_B, key1_B, tokens_V)).mul_(temperatures_B.to(torch.float32)[:, None])
    return noise_BV.add_(logits_BV).argmax(-1)
