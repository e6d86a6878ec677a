"""Rows of several prefixes in one step, as on a GPU: the same texts, each prefix computed once, parts stay in place."""

from __future__ import annotations

import dataclasses
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

from test_engine import VOCAB, Letters, complete, tiny  # noqa: E402
from test_engine_families import checkpoint  # noqa: E402
from test_engine_nested import FLAT, NESTED, totals  # noqa: E402
from test_nesting import ASKS, CASE, CASES, HEAD, OWN  # noqa: E402

from cai.engine import Request, Sampling  # noqa: E402
from cai.engine.native import prefixes  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402

LENGTHS = (40, 20, 33)  # of the prefixes


def mixed(count=18, new=(1, 14)):
    """Rows of three prefixes by turns, some of none."""
    draw, made = random.Random(11), []
    for i in range(count):
        length = (*LENGTHS, 0)[i % 4]
        prefix = tuple((7 * place + length) % VOCAB for place in range(length))
        own = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 30)))
        sampling = Sampling(0.7, draw.randrange(*new))
        made.append(Request(i, prefix + own, sampling, seed=draw.getrandbits(70), prefix_len=length))
    return made


def pooled(model=None, batch_size=5, **options):
    engine = NativeEngine(model or tiny(), Letters(), batch_size=batch_size, **options)
    engine.scheduler.several = True
    return engine


@pytest.fixture
def beside(monkeypatch):
    """How many different prefixes were read in each decode step."""
    seen, real = [], NativeEngine.decode_on_device

    def watched(engine, rows, longest=0, parts=()):
        seen.append(len(set(parts)))
        return real(engine, rows, longest, parts)

    monkeypatch.setattr(NativeEngine, "decode_on_device", watched)
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral with a window", "gemma3"])
def test_rows_of_several_prefixes_draw_what_each_draws_alone(kind, beside):
    model = tiny(kind) if kind in ("llama", "qwen2") else checkpoint(kind)
    engine = pooled(model)
    assert complete(engine, mixed()) == complete(ReferenceEngine(model, Letters()), mixed())
    assert max(beside) > 1
    assert engine.stats.extra["prefix_tokens_computed"] == sum(LENGTHS)  # each once
    assert len(engine.cache.free) == engine.cache.blocks


def test_redraws_of_an_earlier_prefix_join_the_rows_that_run(beside):
    """They are before all that wait, and their prefix is there: computed once, no step of their own."""
    engine, wanted = pooled(batch_size=4), mixed(24, new=(6, 14))
    expected = complete(ReferenceEngine(tiny(), Letters()), wanted)
    again = {
        3: dataclasses.replace(wanted[0], id=100, first=True),
        9: dataclasses.replace(wanted[5], id=105, first=True),
    }
    for request in wanted:
        engine.submit(request)
    order = []
    for done in engine.completions():
        order.append(done.id)
        if done.id < 100:
            assert done == expected[done.id]
        if len(order) in again:
            engine.submit(again[len(order)])
    assert order.index(100) < 16 and order.index(105) < 22 and len(order) == 26
    assert engine.stats.extra["prefix_tokens_computed"] == sum(LENGTHS)


@pytest.mark.parametrize("room", [max(LENGTHS), 60, 75])
def test_a_store_too_small_for_all_prefixes_lets_rows_wait(room, beside):
    engine = pooled(batch_size=8)
    engine.store = prefixes.PrefixStore(engine.shape, room, engine.device)
    real, places = engine.store.take, []

    def take(name, length, held):
        part = real(name, length, held)
        places.append(part)
        for other in held:  # what rows read stays where it is
            assert part is None or part.start >= other.start + other.length or other.start >= part.start + part.length
        return part

    engine.store.take = take
    assert complete(engine, mixed()) == complete(ReferenceEngine(tiny(), Letters()), mixed())
    assert None in places and engine.store.capacity == room


def test_preempted_rows_of_several_prefixes_draw_the_same(monkeypatch):
    """A cache for few tokens, in blocks as on a GPU, needs rows to give way: the scheduler's part, without a device."""
    engine, wanted = pooled(), mixed(20, new=(8, 14))
    expected = complete(ReferenceEngine(tiny(), Letters()), wanted)
    grown, turns = engine.scheduler.grow, []

    def grow():
        turns.append(0)
        if len(turns) % 5 == 0 and len(engine.scheduler.active) > 1:
            return True, [engine.scheduler._victim()]
        return grown()

    monkeypatch.setattr(engine.scheduler, "grow", grow)
    assert complete(engine, wanted) == expected and engine.scheduler.preemptions > 2


def test_memory_that_runs_out_over_a_prefix_beside_running_rows(monkeypatch):
    engine, real, calls = pooled(), prefixes._compute, []

    def tight(engine, new, parts):
        calls.append(len(engine.scheduler.active))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        return real(engine, new, parts)

    monkeypatch.setattr(prefixes, "_compute", tight)
    assert complete(engine, mixed()) == complete(ReferenceEngine(tiny(), Letters()), mixed())
    assert calls[1] > 0 and engine.stats.out_of_memory == 1


def test_an_adapter_s_prefix_is_not_the_base_s():
    from test_engine_adapters import ADAPTERS, tuned

    model = tuned(ADAPTERS["v and down"])
    engine = pooled(model)
    for _ in range(2):
        assert complete(engine, mixed()) == complete(ReferenceEngine(model, Letters()), mixed())
        with model.disable_adapter():
            assert complete(engine, mixed()) == complete(ReferenceEngine(model, Letters()), mixed())
    assert engine.stats.extra["prefix_tokens_computed"] == 2 * sum(LENGTHS)


@pytest.mark.parametrize("room", [HEAD + 2 * CASE + 1, HEAD + CASES * CASE])
def test_cases_are_scored_together_where_a_device_allows_it(room, monkeypatch):
    """A head once, the cases behind it in one pass, then the rows of all of them in one."""
    engine, sizes = NativeEngine(tiny(), Letters(), batch_size=16), []
    expected = totals(NativeEngine(tiny(), Letters(), batch_size=4), FLAT)
    engine.store = prefixes.PrefixStore(engine.shape, room, engine.device)
    engine.cache.by_slot = False  # blocks from one list, each as long as a row
    engine.scheduler.several = True
    real = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda packed, *rest: sizes.append(len(packed)) or real(packed, *rest))
    before = engine.stats.prompt_tokens_computed
    assert totals(engine, NESTED) == pytest.approx(expected, abs=1e-5)
    assert engine.stats.prompt_tokens_computed - before >= HEAD + CASES * CASE + CASES * ASKS * OWN
    assert sizes[0] == 1 and sizes[1] >= 2 and max(sizes) > ASKS
    assert len(engine.cache.free) == engine.cache.blocks
