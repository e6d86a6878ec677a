"""The engine on tiny random decoders: backends agree, rows don't see their batch, nothing is lost or leaked."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")

from cai.engine import Request, Rules, Sampling, ScoreRequest  # noqa: E402
from cai.engine.build import make_engine  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402
from cai.engine.static import StaticEngine  # noqa: E402
from cai.errors import CaiError  # noqa: E402
from cai.preflight.model_checks import greedy  # noqa: E402

VOCAB = 300


class Letters:
    """Token i is the character chr(33 + i)."""

    def decode(self, ids):
        return "".join(chr(33 + i) for i in ids)


def tiny(kind="llama", seed=0):
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
    }
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](**shape)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name or "bias" in name else 0.3)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request):
    return tiny(request.param)


PREFIX = tuple(range(40, 80))


def requests(count=12, temperature=0.7, stop=(), eos=(), shared=True):
    draw = random.Random(5)
    made = []
    for i in range(count):
        own = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 30)))
        prefix = PREFIX if shared and i % 4 else ()
        sampling = Sampling(temperature, draw.randrange(1, 14), stop, eos)
        made.append(Request(i, prefix + own, sampling, seed=draw.getrandbits(70), prefix_len=len(prefix)))
    return made


def complete(engine, wanted):
    for request in wanted:
        engine.submit(request)
    done = list(engine.completions())
    assert sorted(d.id for d in done) == sorted(r.id for r in wanted)
    return {d.id: d for d in done}


def test_backends_draw_the_same_rows(model):
    letters = tuple(chr(33 + i) for i in range(0, VOCAB, 9))
    for temperature, stop, eos in ((0.0, (), ()), (0.7, letters, (3, 5)), (0.3, ("#$",), tuple(range(0, VOCAB, 11)))):
        wanted = requests(temperature=temperature, stop=stop, eos=eos)
        expected = complete(ReferenceEngine(model, Letters()), wanted)
        assert complete(StaticEngine(model, Letters(), batch_size=5), wanted) == expected
        assert complete(NativeEngine(model, Letters(), batch_size=5), wanted) == expected
    assert {done.finish for done in expected.values()} >= {"eos", "length"}


def test_no_ngram_twice_on_any_backend(model):
    """Random models repeat themselves; with the rule no pair of tokens stands twice, and the backends agree."""

    def again(done, n=2):
        grams = [done.token_ids[i : i + n] for i in range(len(done.token_ids) - n + 1)]
        return len(grams) - len(set(grams))

    draw = random.Random(1)
    for temperature in (0.0, 0.2):
        wanted = [
            Request(i, (*PREFIX, i), Sampling(temperature, 20 + draw.randrange(40)), seed=i, prefix_len=len(PREFIX))
            for i in range(9)
        ]
        free = complete(NativeEngine(model, Letters(), batch_size=4), wanted)
        assert any(map(again, free.values()))
        found = []
        for engine in (ReferenceEngine(model, Letters()), StaticEngine(model, Letters(), batch_size=4)):
            engine.rules = Rules(0.01, 2)
            found.append(complete(engine, wanted))
        engine = NativeEngine(model, Letters(), batch_size=4)
        engine.rules = Rules(0.01, 2)
        found.append(complete(engine, wanted))
        assert found[0] == found[1] == found[2]
        assert not any(map(again, found[0].values())), [again(done) for done in found[0].values()]


def test_a_row_does_not_depend_on_its_batch_or_order(model):
    wanted = requests(16)
    alone = complete(NativeEngine(model, Letters(), batch_size=1), wanted)
    assert complete(NativeEngine(model, Letters(), batch_size=16), wanted[::-1]) == alone
    engine = NativeEngine(model, Letters(), batch_size=3)
    assert complete(engine, wanted[7:]) | complete(engine, wanted[:7]) == alone


def test_the_prefix_is_computed_once(model):
    wanted = [request for request in requests(16) if request.prefix_len]
    engine = NativeEngine(model, Letters(), batch_size=4)
    complete(engine, wanted)
    complete(engine, wanted)
    own = sum(len(request.token_ids) - len(PREFIX) for request in wanted)
    assert engine.stats.extra["prefix_tokens_computed"] == len(PREFIX)
    assert engine.stats.prompt_tokens_computed == len(PREFIX) + 2 * own


def test_scores_agree_and_sum_to_the_model_s_own_log_probs(model):
    draw = random.Random(2)
    wanted = []
    for i in range(9):
        context = (PREFIX if i % 3 else ()) + tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20)))
        continuation = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 15)))
        wanted.append(ScoreRequest(i, context, continuation, len(PREFIX) if i % 3 else 0))
    found = [
        {score.id: score.logps for score in engine.score(wanted)}
        for engine in (
            ReferenceEngine(model, Letters()),
            StaticEngine(model, Letters(), batch_size=4),
            NativeEngine(model, Letters(), batch_size=4),
        )
    ]
    for request in wanted:
        ids = torch.tensor([request.context_ids + request.continuation_ids])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)
        start = len(request.context_ids)
        expected = [logps[start + k - 1, token].item() for k, token in enumerate(request.continuation_ids)]
        for scores in found:
            assert scores[request.id] == pytest.approx(expected, abs=1e-4)


def test_two_verdicts_on_one_question_are_one_row(model):
    """ "Yes" and "No" after the same context: its tokens are computed once, and the scores are those of two rows."""
    contexts = [(*PREFIX, 7, 8, 9), (*PREFIX, 3)]
    asks = [(context, (word,)) for context in contexts for word in (11, 12)] + [((*PREFIX, 3), (12, 13))]
    wanted = [ScoreRequest(i, context, words, len(PREFIX)) for i, (context, words) in enumerate(asks)]
    expected = {score.id: score.logps for score in ReferenceEngine(model, Letters()).score(wanted)}
    engine = NativeEngine(model, Letters(), batch_size=4)
    for score in engine.score(wanted):
        assert score.logps == pytest.approx(expected[score.id], abs=1e-4)
    assert engine.stats.prompt_tokens_computed == len(PREFIX) + 3 + 1 + 2


def test_a_context_that_another_row_begins_with_is_not_computed_again(model):
    """The longer row first: a verdict is read on the way to the line behind it."""
    contexts = [
        ((*PREFIX, 7, 8, 9, 4, 6), (11,)),
        ((*PREFIX, 7, 8), (12,)),
        ((*PREFIX, 7, 8), (9, 5)),
        ((*PREFIX, 2), (3,)),
    ]
    wanted = [ScoreRequest(i, context, words, len(PREFIX)) for i, (context, words) in enumerate(contexts)]
    expected = {score.id: score.logps for score in ReferenceEngine(model, Letters()).score(wanted)}
    engine = NativeEngine(model, Letters(), batch_size=4)
    for score in engine.score(wanted):
        assert score.logps == pytest.approx(expected[score.id], abs=1e-4)
    assert engine.stats.prompt_tokens_computed == len(PREFIX) + 5 + 1


def test_a_redraw_goes_before_what_waits_and_draws_the_same_text(model):
    wanted = [Request(i, (*PREFIX, i, 3), Sampling(0.7, 5), seed=i, prefix_len=len(PREFIX)) for i in range(5)]
    engine, order = NativeEngine(model, Letters(), batch_size=1), []
    for request in (*wanted[:4], dataclasses.replace(wanted[4], first=True)):
        engine.submit(request)
    for done in engine.completions():
        order.append(done.id)
        assert done == complete(ReferenceEngine(model, Letters()), [wanted[done.id]])[done.id]
    assert order == [4, 0, 1, 2, 3]


def test_submitting_while_rows_finish(model):
    wanted = requests(14)
    expected = complete(ReferenceEngine(model, Letters()), wanted)
    engine, rest, found = NativeEngine(model, Letters(), batch_size=3), wanted[3:], {}
    for request in wanted[:3]:
        engine.submit(request)
    for done in engine.completions():
        found[done.id] = done
        if rest:
            engine.submit(rest.pop())
    assert found == expected


@pytest.mark.parametrize("backend", [StaticEngine, NativeEngine])
def test_a_stop_in_mid_flight_leaves_a_usable_engine(model, backend):
    wanted = requests(12)
    engine, asked = backend(model, Letters(), batch_size=4), iter([False] * 5 + [True] * 99)
    for request in wanted:
        engine.submit(request)
    some = {done.id: done for done in engine.completions(lambda: next(asked))}
    assert len(some) < 12
    everything = complete(engine, wanted)
    assert {i: everything[i] for i in some} == some


def test_walking_away_from_the_iterator_frees_the_rows(model):
    engine = NativeEngine(model, Letters(), batch_size=4)
    for request in requests(8):
        engine.submit(request)
    next(engine.completions())  # the generator is dropped here
    gc.collect()
    assert engine.scheduler.idle
    assert len(engine.cache.free) == engine.cache.blocks


def test_static_halves_its_batch_when_memory_runs_out(model, monkeypatch):
    from cai.engine import generate as hf

    real, sizes = hf.generate_slice, []

    def tight(model, pieces, requests, *rest):
        sizes.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("injected")
        return real(model, pieces, requests, *rest)

    wanted = requests(9)
    expected = complete(ReferenceEngine(model, Letters()), wanted)
    monkeypatch.setattr(hf, "generate_slice", tight)
    engine = StaticEngine(model, Letters(), batch_size=8)
    assert complete(engine, wanted) == expected
    assert sizes[:3] == [8, 4, 2]
    assert engine.stats.out_of_memory >= 1
    assert engine.stats.batch_size == 2
    monkeypatch.setattr(hf, "generate_slice", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    engine.submit(wanted[0])
    with pytest.raises(CaiError, match="batch size 1"):
        list(engine.completions())


def test_native_prefills_less_when_memory_runs_out(model, monkeypatch):
    wanted = requests(9)
    expected = complete(ReferenceEngine(model, Letters()), wanted)
    engine = NativeEngine(model, Letters(), batch_size=8)
    real = engine._first_draws

    def tight(admitted, packed):
        if len(admitted) > 2:
            raise torch.OutOfMemoryError("injected")
        return real(admitted, packed)

    monkeypatch.setattr(engine, "_first_draws", tight)
    assert complete(engine, wanted) == expected
    assert engine.stats.out_of_memory > 0


def test_native_decodes_fewer_rows_when_memory_runs_out(model, monkeypatch):
    wanted = requests(9)
    expected = complete(ReferenceEngine(model, Letters()), wanted)
    engine = NativeEngine(model, Letters(), batch_size=8)
    real = engine.decode_on_device

    def tight(rows, *more):
        if rows > 2:
            raise torch.OutOfMemoryError("injected")
        return real(rows, *more)

    monkeypatch.setattr(engine, "decode_on_device", tight)
    assert complete(engine, wanted) == expected
    assert engine.stats.out_of_memory >= 1
    assert engine.stats.extra["decode_rows"] <= 2
    assert len(engine.cache.free) == engine.cache.blocks
    monkeypatch.setattr(engine, "decode_on_device", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    engine.submit(wanted[0])
    with pytest.raises(CaiError, match="a single row"):
        list(engine.completions())


def test_native_scores_less_at_a_time_when_memory_runs_out(model, monkeypatch):
    wanted = [ScoreRequest(i, (*PREFIX, i, 5), tuple(range(i, i + 9)), len(PREFIX)) for i in range(7)]
    engine = NativeEngine(model, Letters(), batch_size=8)
    expected = {score.id: score.logps for score in engine.score(wanted)}
    real = engine.prefill

    def tight(packed, *rest):
        if len(packed) > 2:
            raise torch.OutOfMemoryError("injected")
        return real(packed, *rest)

    monkeypatch.setattr(engine, "prefill", tight)
    found = {score.id: score.logps for score in engine.score(wanted)}
    assert found.keys() == expected.keys()
    assert all(found[i] == pytest.approx(expected[i], abs=1e-5) for i in expected)
    assert engine.stats.out_of_memory > 0
    assert len(engine.cache.free) == engine.cache.blocks
    monkeypatch.setattr(engine, "prefill", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(CaiError, match="a single row"):
        list(engine.score(wanted[:1]))
    with pytest.raises(CaiError, match="prefix of a stage"):
        list(engine.score([ScoreRequest(i, (*range(40), i), (1,), 40) for i in range(2)]))


def test_close_frees_the_cache_over_a_dozen_cycles(model):
    wanted = requests(4)
    caches = []
    for _ in range(12):
        engine = NativeEngine(model, Letters(), batch_size=4)
        complete(engine, wanted)
        caches += [weakref.ref(engine.cache.keys), weakref.ref(engine.store.keys)]
        engine.close()
        engine.close()
    gc.collect()
    assert not [ref for ref in caches if ref() is not None]


def test_adapter_on_and_off_equal_peft(model):
    peft = pytest.importorskip("peft")
    import copy

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    wanted = [ScoreRequest(i, (*PREFIX, i, 5), tuple(range(i, i + 9)), len(PREFIX)) for i in range(4)]
    native, oracle = NativeEngine(tuned, Letters(), batch_size=4), ReferenceEngine(tuned, Letters())

    def totals(engine):
        return [score.total for score in sorted(engine.score(wanted), key=lambda score: score.id)]

    on = totals(native)
    assert on == pytest.approx(totals(oracle), abs=1e-3)
    with tuned.disable_adapter():
        off = totals(native)
        assert off == pytest.approx(totals(oracle), abs=1e-3)
        assert complete(native, requests()) == complete(oracle, requests())
    assert on != pytest.approx(off, abs=1e-2)
    assert complete(native, requests()) == complete(oracle, requests())


def test_a_request_longer_than_the_model_is_refused(model):
    engine = NativeEngine(model, Letters(), batch_size=2)
    with pytest.raises(CaiError, match="needs 300 tokens"):
        engine.submit(Request(0, (1,) * 290, Sampling(0.0, 10)))


class Loaded:
    """What `make_engine` reads of a LoadedModel."""

    def __init__(self, hf):
        self.hf, self.tokenizer, self.device = hf, Letters(), "cpu"


def test_auto_takes_native_where_it_knows_the_decoder(model):
    assert make_engine("auto", Loaded(model)).name == "native"
    other = tiny()
    other.config.hidden_act = "gelu"
    assert make_engine("auto", Loaded(other)).name == "static"
    with pytest.raises(CaiError, match="gelu"):
        make_engine("native", Loaded(other))
    with pytest.raises(CaiError, match=r"engine\.backend"):
        make_engine("vllm", Loaded(model))


def test_start_up_check_sees_a_broken_batch(model):
    prompts = [(1, 2, 3), (4, 5, 6, 7, 8, 9), (10,)]
    together, alone = StaticEngine(model, Letters(), batch_size=3), ReferenceEngine(model, Letters())
    expected = greedy(alone, prompts, at_once=False)
    assert greedy(together, prompts, at_once=True) == expected
    broken = NativeEngine(tiny(seed=1), Letters(), batch_size=3)
    assert greedy(broken, prompts, at_once=True) != expected
