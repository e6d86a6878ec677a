"""8-bit integer products: exact sums, a scale for each token and output, down_proj in 16 bits, refused in one line.

The arithmetic runs as it is (torch._int_mm knows a CPU); the card stands in as in test_engine_fp8.py.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")
pytestmark = pytest.mark.slow

from test_engine import ScoreRequest, complete, requests  # noqa: E402
from test_engine_fp8 import card, decoder, eight_bit, fault, groups_of  # noqa: E402, F401  (a fixture)

from cai.engine.native import int8, linears, tuning  # noqa: E402
from cai.errors import CaiError  # noqa: E402


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (25, 576), (64, 1000)])
def test_rows_are_rounded_to_the_nearest_of_255_steps_each_with_its_own_scale(rows, width):
    x = torch.randn(rows, width)
    x[0] *= 1e-6
    x[-1] *= 3e4
    rounded = int8.round_rows(x)
    assert rounded.values.dtype == torch.int8 and rounded.scales.shape == (rows, 1)
    assert (rounded.values[:rows].int().abs().amax(1) == 127).all()  # the whole range is used
    error = (rounded.values[:rows].double() * rounded.scales.double() - x.double()).abs()
    assert (error <= 0.5001 * rounded.scales.double()).all() and error.max() > 0


@pytest.mark.parametrize("tokens", [1, 16, 17, 130])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_that_of_the_rounded_rows_to_the_rounding_of_bf16(tokens, biased):
    x, w, bias = torch.randn(tokens, 320), torch.randn(48, 320), torch.randn(48) if biased else None
    x8, w8 = int8.round_rows(x), int8.round_rows(w)
    exact = (x8.values[:tokens].double() * x8.scales.double()) @ (w8.values.double() * w8.scales.double()).T
    exact = exact if bias is None else exact + bias.double()
    out = int8.product(x8, w8, bias)
    assert out.shape == (tokens, 48) and out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), exact, rtol=2**-8, atol=1e-4)
    plain = x.double() @ w.double().T + (0 if bias is None else bias.double())
    assert (out.double() - plain).norm() < 0.02 * plain.norm()


def test_a_row_s_product_is_the_same_to_the_bit_whatever_the_others_are():
    x, w8 = torch.randn(40, 256), int8.round_rows(torch.randn(64, 256))
    together = int8.product(int8.round_rows(x), w8, None)
    assert torch.equal(int8.product(int8.round_rows(x[3:4]), w8, None)[0], together[3])


def test_rows_of_zeros_stay_zeros_and_padding_is_cut():
    rounded = int8.round_rows(torch.zeros(3, 64))
    assert len(rounded.values) == int8.FEWEST and (rounded.values == 0).all()
    assert torch.equal(int8.product(rounded, int8.round_rows(torch.randn(24, 64)), None), torch.zeros(3, 24).bfloat16())


@pytest.mark.parametrize(
    ("has", "dtype", "words"),
    [((7, 5), "bfloat16", "older than Ampere"), ((8, 0), "bfloat16", ""), ((8, 0), "float16", "float16")],
)
def test_a_card_or_type_for_which_it_is_not_made_is_refused(monkeypatch, has, dtype, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some card")
    if not words:
        return int8.require("cuda", getattr(torch, dtype))
    with pytest.raises(CaiError, match=f'engine.linears: .*{words}.* Use "auto"'):
        int8.require("cuda", getattr(torch, dtype))


@pytest.fixture
def ampere(card, monkeypatch):  # noqa: F811
    """The card with int8 products that come out in the tiny decoder's fp32."""
    real = int8.product
    monkeypatch.setattr(int8, "product", lambda *a: real(*a).float())
    monkeypatch.setattr(int8, "require", lambda *a: None)
    monkeypatch.setattr(tuning, "copy_layers", lambda decoder, must, beside, wanted: 0)
    card["int8"] = 1.5
    return card


def test_all_but_down_proj_is_rounded(ampere):
    made = decoder()
    said = tuning.choose(made, "int8")
    assert said.startswith("drawing: int8 (8-bit products); the rest: linears by tokens: <=1: dequant")
    assert [group.int8 is None for group in groups_of(made)] == [False, False, False, True] * 2
    down, x = groups_of(made)[3], torch.randn(5, 48)
    with down.shared.draws(), torch.no_grad():
        assert torch.equal(down(x)[0], down.modules[0](x))
        gate = groups_of(made)[2]
        exact = gate.modules[0](x[:, :32])
        assert 1e-4 < (gate(x[:, :32].contiguous())[0] - exact).norm() / exact.norm() < 0.03


def test_copies_to_16_bits_are_of_what_is_not_rounded_as_far_as_the_cache_leaves_room(monkeypatch):
    made = decoder()
    for layer in made.layers:
        for group in layer.linears.groups:
            group.nf4, group.int8 = group.modules, None if group is layer.linears.down else "rounded"
    monkeypatch.setattr(linears.Group, "dequantised", lambda group, out: out)
    monkeypatch.setattr(tuning, "reserve_bytes", lambda device: 4 << 30)
    monkeypatch.setattr(tuning, "KV_SHARE", 1.0)
    size, beside = 4 * 32 * 48, 1000
    for room, copied in ((size - 1, 0), (2 * size - 1, 1), (2 * size, 2)):
        free = (4 << 30) + tuning.KV_BYTES_WANTED + beside + room
        monkeypatch.setattr(tuning, "free_gpu_bytes", lambda device, free=free: free)
        assert tuning.copy_layers(made, False, beside) == copied
    assert tuning.copy_layers(made, False, beside, tuning.KV_BYTES_WANTED + 1) == 1  # a larger cache, fewer copies
    assert tuning.copy_layers(made, False, beside) == 2
    assert [group.copy is None for group in groups_of(made)] == [True, True, True, False] * 2


def test_prompts_and_draws_are_rounded_and_scores_are_not(ampere):
    from cai.engine.native.engine import NativeEngine

    engine = eight_bit(linears="int8", batch_size=4)
    plain = NativeEngine(engine.decoder.lm, engine.pieces.tokenizer, batch_size=4)
    ways = []
    for group in engine.groups:
        group.shared.choose = watched(group.shared.choose, ways)
        break
    assert len(complete(engine, requests(temperature=0.0))) == 12
    assert "int8" in ways
    wanted = [ScoreRequest(i, (9, 8, 7, i), (3, 1, 4)) for i in range(4)]
    scores = [[score.total for score in each.score(wanted)] for each in (plain, engine)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def watched(choose, ways):
    def seen(tokens):
        ways.append(choose(tokens))
        return ways[-1]

    return seen


CANNOT = {
    "no such product": ("product", fault(RuntimeError("no such kernel\nmore")), r"cannot run here \(no such kernel\)"),
    "memory": ("round_rows", fault(torch.OutOfMemoryError("full")), "out of memory over its copies"),
    "wrong": ("product", lambda x, w, bias: torch.zeros(x.scales.shape[0], w.scales.shape[0]), "wrong products"),
    "another card": ("require", fault(CaiError('engine.linears: some card. Use "auto"')), "some card"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_is_one_line(ampere, monkeypatch, kind):
    name, planted, words = CANNOT[kind]
    monkeypatch.setattr(int8, name, planted)
    with pytest.raises(CaiError, match=words) as caught:
        tuning.choose(decoder(), "int8")
    assert "\n" not in str(caught.value) and 'Use "auto"' in str(caught.value)
