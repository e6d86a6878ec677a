"""8-bit products: for the rows of data alone, exact everywhere else, and refused in one line where they cannot be.

The card and the kernels stand in plain torch here (rounded to quarters, so that the effect is large); the kernels'
own tests are test_engine_kernel_cases.py and tests/gpu.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")
pytestmark = pytest.mark.slow

from test_engine import PREFIX, Letters, Loaded, ScoreRequest, complete, requests, tiny  # noqa: E402
from triton.errors import TritonError  # noqa: E402

from cai.engine import Request, Sampling, build  # noqa: E402
from cai.engine.native import engine as native  # noqa: E402
from cai.engine.native import fp8, linears, scoring, tuning  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.errors import CaiError  # noqa: E402
from cai.models.policy import LoadedModel  # noqa: E402
from cai.recipe.settings import EngineSection  # noqa: E402


def quarters(x):
    return (x * 4).round() / 4


@pytest.fixture
def card(monkeypatch):
    """A card with 8-bit products and much memory; every way takes the time that `ms` says."""
    ms = {"fused": 3.0, "dequant": 2.0, "module": 4.0, "fp8": 1.0, "bf16": 2.0}

    def milliseconds(run):
        run()
        return ms[shared_of(run).choose(1)]

    monkeypatch.setattr(tuning, "is_nf4", lambda module: isinstance(module, torch.nn.Linear))
    monkeypatch.setattr(linears, "nf4_of", lambda module: module)
    monkeypatch.setattr(linears.Group, "dequantised", lambda group: torch.cat([m.weight for m in group.modules]))
    monkeypatch.setattr(linears.Group, "unpack", unpack)
    monkeypatch.setattr("cai.engine.native.nf4.fused_linears", lambda x, weights, bias: x @ joined(weights).T)
    monkeypatch.setattr(fp8, "require", lambda *a: None)
    monkeypatch.setattr(fp8, "round_rows", quarters)
    monkeypatch.setattr(fp8, "product", lambda x, w, bias: x @ w.T if bias is None else x @ w.T + bias)
    monkeypatch.setattr(tuning, "copy_layers", lambda *a: pytest.fail("bf16 copies beside 8-bit ones"))
    monkeypatch.setattr(tuning, "right_weights", lambda groups: True)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "free_gpu_bytes", lambda device: 80 << 30)
    monkeypatch.setattr(tuning, "reserve_bytes", lambda device: 4 << 30)
    monkeypatch.setitem(tuning.AGREES_WITHIN, "fp8", 0.9)
    monkeypatch.setattr(tuning.timings, "facts", lambda *a: {})
    monkeypatch.setattr(tuning.timings, "recall", lambda *a: None)
    monkeypatch.setattr(tuning.timings, "remember", lambda *a: None)
    return ms


def joined(modules):
    return torch.cat([module.weight for module in modules])


def unpack(group, shared, dtype):
    group.shared, group.nf4 = shared, group.modules
    if any(module.bias is not None for module in group.modules):
        group.bias = torch.cat(
            [m.bias if m.bias is not None else m.weight.new_zeros(len(m.weight)) for m in group.modules]
        )


def shared_of(run):
    """Of the groups that a timed closure calls."""
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, list))[0].shared


def decoder(kind="llama"):
    layers = [SimpleNamespace(linears=linears.LayerLinears.of(layer)) for layer in tiny(kind).model.layers]
    return SimpleNamespace(layers=layers, dtype=torch.float32, device="cpu")


def groups_of(made):
    return [group for layer in made.layers for group in layer.linears.groups]


def eight_bit(kind="llama", linears="fp8", **options):
    """An engine as `linears = "fp8"` sets it up on a GPU."""
    engine = NativeEngine(tiny(kind), Letters(), **options)
    engine.stats.extra["linears"] = tuning.choose(engine.decoder, linears)
    engine.shared = engine.groups[0].shared
    engine._allocate()
    return engine


# -- the choice


def test_8_bit_products_are_for_drawing_only(card):
    made = decoder()
    said = tuning.choose(made, "fp8")
    assert said.startswith("drawing: fp8 (8-bit products); the rest: linears by tokens: <=1: dequant")
    assert "fused 3.0" in said and "module 4.0" in said and "fp8 1.0" in said  # timed, all of them
    shared = groups_of(made)[0].shared
    assert {shared.choose(tokens) for tokens in (1, 512, 9999)} == {"dequant"}  # the fastest exact one
    with shared.draws():
        assert {shared.choose(tokens) for tokens in (1, 16, 9999)} == {"fp8"}
    with pytest.raises(ZeroDivisionError), shared.draws():
        raise ZeroDivisionError
    assert shared.choose(1) == "dequant"
    tuning.choose(made, "fused")
    with groups_of(made)[0].shared.draws():
        assert groups_of(made)[0].shared.choose(1) == "dequant"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_group_rounds_inputs_and_weights_and_adds_the_bias(card, kind):
    made = decoder(kind)
    tuning.choose(made, "fp8")
    group, x = groups_of(made)[0], torch.randn(3, 32)
    with group.shared.draws():
        outputs = torch.cat(group(x), -1)
    bias = 0 if kind == "llama" else torch.cat([module.bias for module in group.modules])
    assert torch.equal(outputs, quarters(x) @ quarters(joined(group.modules)).T + bias)


def fault(error):
    def raises(*a):
        raise error

    return raises


CANNOT = {
    "no such product": (
        fp8,
        "product",
        fault(RuntimeError("no such kernel\nand more")),
        r"cannot run here \(no such kernel\)",
        2,
    ),
    "no compiler": (fp8, "round_rows", fault(TritonError("arch")), r"cannot run here \(arch\)", 2),
    "memory, copies": (fp8, "round_rows", fault(torch.OutOfMemoryError("full")), "out of memory over its copies", 75),
    "memory, products": (fp8, "product", fault(torch.OutOfMemoryError("full")), "out of memory over its copies", 75),
    "wrong": (fp8, "product", lambda x, w, bias: x @ w.T * 2, "gives wrong products on this card", 2),
    "no number": (fp8, "product", lambda x, w, bias: x @ w.T * float("nan"), "gives wrong products on this card", 2),
    "no room": (tuning, "free_gpu_bytes", lambda device: 8 << 30, r"needs 0.0 GiB for 8-bit copies, 0.0 are free", 2),
    "another card": (fp8, "require", fault(CaiError("engine.linears: the card")), "engine.linears: the card", 2),
    "no NF4": (tuning, "is_nf4", lambda m: False, "made of NF4 weights .* no projection is that", 2),
    "weights read wrong": (tuning, "right_weights", lambda groups: False, "weights that come out wrong", 2),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_8_bit_copies_that_cannot_be_are_one_line(card, monkeypatch, kind):
    where, name, planted, words, code = CANNOT[kind]
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(CaiError, match=words) as caught:
        tuning.choose(decoder(), "fp8")
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert 'Use "' in str(caught.value) or kind == "another card"


def test_one_wrong_group_of_four_is_seen(card, monkeypatch):
    real = fp8.product
    monkeypatch.setattr(
        fp8, "product", lambda x, w, bias: real(x, w, bias) * (1 if len(w) != 32 or x.shape[1] != 48 else 3)
    )
    with pytest.raises(CaiError, match="wrong products"):
        tuning.choose(decoder(), "fp8")


def test_a_product_that_is_off_by_more_than_its_rounding_is_wrong(card, monkeypatch):
    monkeypatch.setitem(tuning.AGREES_WITHIN, "fp8", 1e-4)
    with pytest.raises(CaiError, match="wrong products"):
        tuning.choose(decoder(), "fp8")


def test_the_room_is_what_cache_and_reserve_leave(card, monkeypatch):
    made = decoder()
    need = sum(group.numel for group in groups_of(made))
    monkeypatch.setattr(tuning, "free_gpu_bytes", lambda device: (4 << 30) + tuning.KV_BYTES_NEEDED + need)
    tuning.choose(made, "fp8")
    monkeypatch.setattr(tuning, "free_gpu_bytes", lambda device: (4 << 30) + tuning.KV_BYTES_NEEDED + need - 1)
    with pytest.raises(CaiError, match="are free beside the KV cache"):
        tuning.choose(decoder(), "fp8")


@pytest.mark.parametrize(
    ("has", "dtype", "words"),
    [
        ((8, 0), "bfloat16", "no 8-bit"),
        ((8, 6), "bfloat16", "no 8-bit"),
        ((8, 9), "bfloat16", ""),
        ((9, 0), "float16", "float16"),
    ],
)
def test_a_card_without_8_bit_products_is_refused(monkeypatch, has, dtype, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some card")
    if not words:
        return fp8.require("cuda", getattr(torch, dtype))
    with pytest.raises(CaiError, match=f'engine.linears: .*{words}.* Use "auto"'):
        fp8.require("cuda", getattr(torch, dtype))


# -- the engine


def test_prompts_and_draws_are_rounded_scores_and_prefixes_are_not(card, monkeypatch):
    plain, engine = NativeEngine(tiny(), Letters(), batch_size=4), eight_bit(batch_size=4)
    seen = []
    real = linears.Group.base
    monkeypatch.setattr(linears.Group, "base", lambda group, x, way: seen.append(way) or real(group, x, way))
    drawn = [complete(each, requests(temperature=0.0)) for each in (plain, engine)]  # drawn first: prefixes are new
    assert drawn[0] != drawn[1]
    assert engine.store.parts and engine.store.parts == plain.store.parts
    for part in engine.store.parts.values():
        for one, other in zip(engine.store.read(1, part), plain.store.read(1, part), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    wanted = [ScoreRequest(i, (*PREFIX, i), (3, 1, 4), len(PREFIX)) for i in range(4)]
    scores = [[score.total for score in each.score(wanted)] for each in (plain, engine)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert {"fp8", "dequant"} == set(seen) - {"module"}  # the plain engine's, whose weights are packed


@pytest.mark.parametrize("part", ["prefill", "decode_on_device"])
def test_both_the_prompt_and_each_draw_are_rounded(card, part):
    engine, ways = eight_bit(), []
    real = getattr(engine, part)

    def watched(*args):
        ways.append(engine.shared.choose(1))
        return real(*args)

    setattr(engine, part, watched)
    engine.submit(Request(0, (5, 6, 7), Sampling(0.7, 4), seed=1))
    list(engine.completions())
    assert ways and set(ways) == {"fp8"}


def test_a_row_does_not_depend_on_the_others_of_its_prefix(card):
    """The last row after a kill is alone with its prefix: computed as the row's own tokens, it was rounded."""
    wanted = requests(8)
    together = complete(eight_bit(batch_size=3), wanted)
    for request in wanted:
        assert complete(eight_bit(), [request]) == {request.id: together[request.id]}


def test_a_walk_away_leaves_scores_exact(card):
    engine = eight_bit()
    for request in requests():
        engine.submit(request)
    next(iter(engine.completions()))
    assert not engine.shared.drawing


def test_close_frees_the_copies(card):
    engine = eight_bit()
    groups = engine.groups
    assert all(group.fp8 is not None for group in groups)
    engine.close()
    assert all(group.fp8 is None for group in groups) and not hasattr(engine, "shared")


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_divergence_is_the_kl_of_the_exact_distribution_from_the_drawn_one(card, monkeypatch, at_once):
    engine, ids = eight_bit(), tuple(range(7, 47))
    monkeypatch.setattr(scoring, "HEAD_CHUNK_BYTES", at_once * 8 * engine.decoder.config.vocab_size)
    engine.place(PREFIX)  # of an earlier stage
    nats, same = scoring.divergence(engine, ids)
    exact = torch.stack([logps_after(engine, ids[: n + 1]) for n in range(len(ids))])
    engine.shared.choose = lambda tokens: "fp8"
    drawn = torch.stack([logps_after(engine, ids[: n + 1]) for n in range(len(ids))])
    assert nats == pytest.approx((exact.exp() * (exact - drawn)).sum(-1).mean().item(), rel=1e-3)
    assert same == pytest.approx((exact.argmax(-1) == drawn.argmax(-1)).float().mean().item())
    assert nats > 0
    assert scoring.divergence(engine, ids) == (0.0, 1.0)  # nothing is rounded beside what always is
    monkeypatch.setattr(engine, "prefill", fault(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        scoring.divergence(engine, ids)
    assert len(engine.cache.free) == engine.cache.blocks


def logps_after(engine, ids):
    vocab = engine.decoder.config.vocab_size
    scores = engine.score([ScoreRequest(token, ids, (token,)) for token in range(vocab)])
    return torch.tensor([score.total for score in sorted(scores, key=lambda score: score.id)])


# -- who asks for it


def test_only_who_makes_data_gets_8_bit_products(monkeypatch):
    asked, closed = [], []

    def make(name, model, *, batch_size, linears, kv):
        asked.append(linears)
        return SimpleNamespace(stats=SimpleNamespace(extra={}), close=lambda: closed.append(linears))

    monkeypatch.setattr(build, "make_engine", make)
    model = LoadedModel(tiny(), None, Letters(), "base", "embedded", "tiny", "cpu", 256)
    section = EngineSection(linears="fp8")
    first = model.engine(section, rounded=True)
    assert model.engine(section, rounded=True) is first and asked == ["fp8"]
    measuring = model.engine(section)
    assert measuring is not first and asked == ["fp8", "auto"] and closed == ["fp8"]  # one at a time
    assert model.engine(section) is measuring
    model.release()
    other = EngineSection(linears="fused")
    assert model.engine(other) is model.engine(other, rounded=True) and asked[2:] == ["fused"]


def test_the_stages_make_data():
    from cai.run.context import Context

    asked = []
    engine = SimpleNamespace(stats="its counts")
    model = SimpleNamespace(engine=lambda section, rounded=False: asked.append((section, rounded)) or engine)
    progress = SimpleNamespace(follow=asked.append)
    context = Context(SimpleNamespace(engine="the section"), *[None] * 4, lambda: model, None, None, progress)
    assert context.engine is engine and asked == [("the section", True), "its counts"]


def test_the_wish_reaches_the_engine(monkeypatch):
    """On a CPU nothing comes of it, and that is said; what was chosen on a GPU is not overwritten."""
    given = []

    class Engine(NativeEngine):
        def __init__(self, *args, **options):
            given.append(options.pop("linears"))
            super().__init__(*args, **options)
            if given[-1] == "bf16":
                self.stats.extra["linears"] = "as chosen"

    monkeypatch.setattr(native, "NativeEngine", Engine)
    unused = 'linears: the loaded modules; "{}" is for the native engine on a GPU'
    made = {wish: build.make_engine("native", Loaded(tiny()), linears=wish) for wish in ("fp8", "bf16", "auto")}
    assert given == ["fp8", "bf16", "auto"]
    assert made["fp8"].stats.extra["linears"] == unused.format("fp8")
    assert made["bf16"].stats.extra["linears"] == "as chosen"
    assert "linears" not in made["auto"].stats.extra
    odd = tiny()
    odd.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for name, weights in (("static", tiny()), ("reference", tiny()), ("auto", odd)):
        engine = build.make_engine(name, Loaded(weights), linears="fused")
        assert engine.stats.extra["linears"] == unused.format("fused")
