"""What a CPU computes otherwise: packed weights, attention in two parts, draws over the allowed tokens alone."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

from test_engine import PREFIX, Loaded, ScoreRequest, complete, requests, tiny  # noqa: E402

from cai.engine.build import make_engine  # noqa: E402
from cai.engine.native import attention, packed  # noqa: E402
from cai.engine.native.cache import KVCache, KVShape, PrefixStore  # noqa: E402
from cai.engine.native.nesting import Part  # noqa: E402
from cai.engine.sampling import mask_min_p, pick  # noqa: E402


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_texts_and_scores_are_those_of_the_modules(kind, monkeypatch):
    """qwen2 has biases on q, k and v alone."""
    wanted = [ScoreRequest(i, (*PREFIX, i, 5), tuple(range(i, i + 9)), len(PREFIX)) for i in range(4)]
    found = []
    for limit in (packed.MOST_COPIED, 0):
        monkeypatch.setattr(packed, "MOST_COPIED", limit)
        engine = make_engine("native", Loaded(tiny(kind)), batch_size=4)
        assert all((group.packed is not None) is bool(limit) for group in engine.groups)
        assert (engine.decoder.packed_head is not None) is bool(limit)
        found.append((complete(engine, requests()), [score.logps for score in engine.score(wanted)]))
        engine.close()
    assert found[0][0] == found[1][0]
    for with_copies, without in zip(found[0][1], found[1][1], strict=True):
        assert with_copies == pytest.approx(without, abs=1e-4)


def test_a_product_that_differs_is_not_used(monkeypatch):
    linear = torch.nn.Linear(32, 48)
    assert packed.packed([linear]) is not None
    monkeypatch.setattr(packed.PackedLinear, "__call__", lambda self, x: torch.zeros(2, 48))
    assert packed.packed([linear]) is None


@pytest.mark.parametrize("other", [torch.nn.Linear(32, 48, dtype=torch.bfloat16), torch.nn.Identity()])
def test_only_plain_fp32_linears_are_packed(other):
    assert packed.packed([other]) is None


@pytest.mark.parametrize(("prefix_length", "window"), [(0, attention.WIDE), (40, attention.WIDE), (0, 9)])
def test_attention_in_two_parts_equals_one_softmax(prefix_length, window):
    torch.manual_seed(3)
    shape, device, lens = KVShape(2, 2, 16, torch.float32), torch.device("cpu"), [30, 1, 12]
    cache, store = KVCache(shape, 4, 64, device, by_slot=True), PrefixStore(shape, 64, device)
    cache.keys.normal_(), cache.values.normal_()
    if prefix_length:
        keys, values = torch.randn(2, 2, 2, prefix_length, 16)
        store.put(Part(5, prefix_length), keys, values)
    lens_B = torch.tensor(lens, dtype=torch.int32)
    places = (lens_B.long() + prefix_length, torch.arange(1, 4), lens_B.long() - 1)
    step = attention.Step(*places, torch.zeros(3, 1), lens_B, store, prefill=False, longest=max(lens))
    q_BMGD, own = torch.randn(3, 2, 3, 16), (cache.keys[1, 1:4, :, :30], cache.values[1, 1:4, :, :30])
    shared = store.read(1, Part(5, prefix_length))
    made = [parts(q_BMGD, own, shared, step, 0.25, window) for parts in (attention.fused_parts, attention.plain_parts)]
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-5)


def test_a_draw_over_the_allowed_tokens_alone_is_the_draw_over_all():
    torch.manual_seed(5)
    logits, temperatures = 3 * torch.randn(64, 900), torch.rand(64)
    kept, seeds, draws = mask_min_p(logits, temperatures, 0.1), torch.arange(64), torch.arange(64) % 7
    assert torch.equal(pick(kept, temperatures, seeds, draws, forbidden=True), pick(kept, temperatures, seeds, draws))
