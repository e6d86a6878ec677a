"""The attention kernels, and what writes their cache, against float64; run as test_engine_kernel_cases.py is."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from test_engine_kernel_cases import DEVICE, DTYPE, TOLERANCE, close, random  # noqa: E402

from cai.engine.native import attention, kernels  # noqa: E402
from cai.engine.native.attention import Step  # noqa: E402
from cai.engine.native.cache import KVCache, KVShape, PrefixStore  # noqa: E402
from cai.engine.native.nesting import NOWHERE, Part, length_of  # noqa: E402

SHAPE = KVShape(layers=2, kv_heads=2, dim=16, dtype=DTYPE)
HEADS = 6


def filled(lens, parts, block_tokens=4, eight=False):
    """A cache and a store with random contents, each row's blocks scattered; `parts`: what stands before each row.

    (cache, table, store, dense keys and values of each row)
    """
    blocks = sum(-(-n // block_tokens) for n in lens)
    cache = KVCache(dataclasses.replace(SHAPE, dtype=torch.int8) if eight else SHAPE, blocks, block_tokens, DEVICE)
    plain = KVCache(SHAPE, blocks, block_tokens, DEVICE)
    for i, (numbers, exact) in enumerate(((cache.keys, plain.keys), (cache.values, plain.values))):
        if eight:
            numbers.copy_(torch.randint(-127, 128, numbers.shape))
            cache.scales[i].copy_(torch.rand(numbers.shape[:-1]) / 50 + 0.005)
            exact.copy_(numbers.float() * cache.scales[i][..., None])
        else:
            numbers.copy_(random(*numbers.shape))
            exact.copy_(numbers)
    order = (torch.randperm(blocks) + 1).tolist()
    width = max(-(-n // block_tokens) for n in lens)
    table, dense = [], []
    store = PrefixStore(SHAPE, 200, DEVICE)
    store.keys.copy_(random(*store.keys.shape))
    store.values.copy_(random(*store.values.shape))
    for n, before in zip(lens, parts, strict=True):
        mine = [order.pop() for _ in range(-(-n // block_tokens))]
        table.append(mine + [0] * (width - len(mine)))
        own = plain.gather(mine, n)
        pieces = [*(store.read(1, part) for part in before), [x[1] for x in own]]
        dense.append([torch.cat(pair, 1).double() for pair in zip(*pieces, strict=True)])
    return cache, torch.tensor(table, dtype=torch.int32, device=DEVICE), store, dense


def behind(rows, *parts):
    """The same parts before each of so many rows; a length of 0 is none."""
    return (tuple(part for part in parts if part.length),) * rows


SCALE = SHAPE.dim**-0.5 / 2  # of a model that has a scale of its own
WIDE = attention.WIDE


def expected_attention(q_ND, keys, values, window):
    """float64 softmax attention of one query over (M, tokens, D) keys."""
    keys, values = (x[:, -window:] for x in (keys, values))
    keys, values = (x.repeat_interleave(HEADS // SHAPE.kv_heads, 0) for x in (keys, values))
    scores = torch.einsum("nd,ntd->nt", q_ND.double(), keys) * SCALE
    return torch.einsum("nt,ntd->nd", scores.softmax(-1), values).flatten()


@pytest.mark.parametrize(
    ("prefix_length", "window"), [(0, WIDE), (1, WIDE), (70, WIDE), (0, 33), (1, 1), (70, 4), (70, 33), (70, 130)]
)
@pytest.mark.parametrize("lens", [(1,), (3, 9, 70), tuple(range(1, 12))])
def test_decode_attention_joins_prefix_and_own_keys(lens, prefix_length, window):
    decoded(lens, behind(len(lens), Part(9, prefix_length)), window)


OF_EACH = (Part(0, 70), Part(70, 3), NOWHERE, Part(80, 66), Part(150, 40))


@pytest.mark.parametrize("window", [WIDE, 1, 33, 90])
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("turn", [1, 3, 7])
def test_rows_of_several_prefixes_each_see_their_own(rows, turn, window):
    """In any order over the tiles: by turns, and runs of three and seven."""
    parts = [OF_EACH[row // turn % len(OF_EACH)] for row in range(rows)]
    decoded(tuple(row % 9 + 1 for row in range(rows)), [behind(1, part)[0] for part in parts], window)


def test_a_row_s_bits_do_not_hang_on_the_prefixes_of_the_others():
    lens = (5,) * 9
    out = []
    for others in (Part(9, 70), Part(100, 33)):
        torch.manual_seed(7)
        parts = [behind(1, Part(9, 70) if row == 4 else others)[0] for row in range(9)]
        out.append(decoded(lens, parts, WIDE)[4])
    assert torch.equal(*out)


@pytest.mark.parametrize("window", [WIDE, 20])
def test_keys_and_values_in_8_bits_are_read_with_their_scales(window):
    parts = [behind(1, part)[0] for part in OF_EACH]
    decoded((1, 70, 33, 9, 64), parts, window, eight=True)
    prefilled((1, 70, 33, 9, 65), parts, window, eight=True)


def decoded(lens, parts, window, eight=False):
    """What decode attention gives, each row compared with its own dense keys."""
    cache, table, store, dense = filled(lens, parts, eight=eight)
    lens_B = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    nothing = torch.zeros(0, device=DEVICE)
    wide = torch.zeros((len(lens), 5), dtype=torch.int32, device=DEVICE)  # columns of a wider table, as in `state`
    shared = wide[:, 1:3]
    shared.copy_(torch.tensor([list(before[0]) if before else [0, 0] for before in parts]))
    step = Step(nothing, nothing, nothing, table, lens_B, store, prefill=False, shared=shared)
    q = random(len(lens), HEADS, SHAPE.dim)
    out = kernels.decode_attention(q, cache.layer(1), step, 1, SCALE, window)
    for row in range(len(lens)):
        close(out[row], expected_attention(q[row], *dense[row], window))
    return out


@pytest.mark.parametrize(
    ("prefix_length", "window"), [(0, WIDE), (5, WIDE), (70, WIDE), (0, 33), (5, 1), (70, 4), (70, 66)]
)
@pytest.mark.parametrize("lens", [(1,), (3, 70), (65, 2, 7)])
def test_prefill_attention_is_causal_over_own_and_full_over_prefix(lens, prefix_length, window):
    prefilled(lens, behind(len(lens), Part(9, prefix_length)), window)


@pytest.mark.parametrize("window", [WIDE, 1, 20, 66, 90])
def test_prefill_attention_reads_a_head_and_what_stands_behind_it(window):
    parts = ((Part(60, 70), Part(3, 40)), (Part(60, 70), Part(140, 9)), (Part(60, 70),), ())
    prefilled((3, 70, 2, 7), parts, window)


def prefilled(lens, parts, window, eight=False):
    cache, table, store, dense = filled(lens, parts, eight=eight)
    nothing = torch.zeros(0, device=DEVICE)
    lens_B = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    step = Step(nothing, nothing, nothing, table, lens_B, store, prefill=True, lens=lens, parts=tuple(parts))
    step.tiles = kernels.query_tiles(lens, step.parts, DEVICE)
    q, at = random(sum(lens), HEADS, SHAPE.dim), 0
    out = kernels.prefill_attention(q, cache.layer(1), step, 1, SCALE, window)
    for row, length in enumerate(lens):
        for place in {0, length // 2, length - 1}:
            keys, values = (x[:, : length_of(parts[row]) + place + 1] for x in dense[row])
            close(out[at + place], expected_attention(q[at + place], keys, values, window))
        at += length


@pytest.mark.parametrize(
    ("norm", "once"), [("none", False), ("each head", False), ("each head", True), ("all heads", True)]
)
def test_rope_and_store_equals_eager(norm, once):
    lens = (3, 6)
    cache, table, store, _ = filled(lens, behind(2, Part(0, 5)))
    other = KVCache(SHAPE, cache.blocks, 4, DEVICE)
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    tokens = sum(lens)
    blocks = torch.tensor([table[0, 0]] * 3 + [table[1, 0]] * 4 + [table[1, 1]] * 2, device=DEVICE)
    offsets = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1], device=DEVICE)
    positions = torch.arange(tokens, device=DEVICE) + 5
    step = Step(positions, blocks.long(), offsets, table, torch.zeros(2), store, prefill=True)
    packed = random(tokens, (HEADS + 2 * SHAPE.kv_heads) * SHAPE.dim)
    q, k, v = packed.split([HEADS * SHAPE.dim, SHAPE.kv_heads * SHAPE.dim, SHAPE.kv_heads * SHAPE.dim], -1)
    angles = torch.rand(64, SHAPE.dim // 2, device=DEVICE)
    shape = (HEADS, SHAPE.kv_heads, SHAPE.dim)
    run = (angles.cos(), angles.sin(), step)
    norms = None
    if norm != "none":
        widths = (SHAPE.dim, SHAPE.dim) if norm == "each head" else (q.shape[1], k.shape[1])
        norms = (*(random(width, dtype=torch.float32 if once else DTYPE) for width in widths), 1e-3)
    out = kernels.rope_and_store(q, k, v, shape, *run, cache.layer(0), norms)
    close(out, attention.rope_and_store(q, k, v, shape, *run, other.layer(0), norms))
    close(cache.keys, other.keys)
    close(cache.values, other.values)


def test_what_is_stored_in_8_bits_is_within_half_a_step_of_each_head():
    """Heads of very different size, one of zeros; queries come out as they do beside exact keys."""
    lens = (3, 6)
    exact, table, store, _ = filled(lens, behind(2, Part(0, 5)))
    cache = filled(lens, behind(2, Part(0, 5)), eight=True)[0]
    tokens, width = sum(lens), SHAPE.kv_heads * SHAPE.dim
    blocks = torch.tensor([table[0, 0]] * 3 + [table[1, 0]] * 4 + [table[1, 1]] * 2, device=DEVICE)
    offsets = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1], device=DEVICE)
    places = (torch.arange(tokens, device=DEVICE) + 5, blocks.long(), offsets, table, torch.zeros(2))
    q, k, v = random(tokens, HEADS * SHAPE.dim), random(tokens, width), random(tokens, width)
    k[:, : SHAPE.dim] *= 300
    v[:, SHAPE.dim :] *= 1e-3
    v[4, : SHAPE.dim] = 0
    angles = torch.rand(64, SHAPE.dim // 2, device=DEVICE)
    shape = (HEADS, SHAPE.kv_heads, SHAPE.dim)
    run = (angles.cos(), angles.sin(), Step(*places, store, prefill=True))
    out = [kernels.rope_and_store(q, k, v, shape, *run, held.layer(0)) for held in (exact, cache)]
    assert torch.equal(*out)
    held, true_ones = cache.layer(0), exact.layer(0)
    for columns in zip(held[:2], held[2:], true_ones[:2], strict=True):
        stored, steps, true = (x[blocks, :, offsets].double() for x in columns)
        assert ((stored * steps[..., None] - true).abs() <= steps[..., None] * (0.5 + 127 * TOLERANCE)).all()
        assert (stored.abs().amax(-1) == 127).sum() >= tokens * SHAPE.kv_heads - 1  # the whole range is used
        assert torch.isfinite(steps).all()
