"""Rows of several prefixes in one step on a GPU: the oracle's draws, graphs on, and the time beside one at a time.

pytest -m gpu tests/gpu/test_pool_gpu.py -s                      (a minute, compilation included; says the steps)
"""

from __future__ import annotations

import dataclasses
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cai.engine import Request, Sampling, ScoreRequest  # noqa: E402
from cai.engine.native import prefixes, scoring  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402
from tests.gpu.test_engine_gpu import VOCAB, Numbers, complete, model, quantised  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
LENGTHS = (150, 64, 33, 300, 0)


def mixed(count=40, temperature=0.7):
    """Rows of four prefixes by turns, and of none."""
    draw = random.Random(3)
    of = [tuple(draw.randrange(VOCAB) for _ in range(length)) for length in LENGTHS]
    made = []
    for i in range(count):
        prefix = of[i % len(of)]
        ids = (*prefix, *(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 90))))
        made.append(Request(i, ids, Sampling(temperature, draw.randrange(2, 50)), seed=i, prefix_len=len(prefix)))
    return made


def one_at_a_time(engine):
    engine.scheduler.several = False
    return engine


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_in_fp32_every_row_is_the_oracle_s(temperature):
    expected = complete(ReferenceEngine(model(), Numbers()), mixed(temperature=temperature))
    engine = NativeEngine(model(), Numbers(), device="cuda", batch_size=16)
    for _ in range(2):  # the second time every prefix is there
        assert complete(engine, mixed(temperature=temperature)) == expected
    assert engine.stats.extra["prefix_tokens_computed"] == sum(LENGTHS)
    assert len(engine.cache.free) == engine.cache.blocks


def test_fewer_steps_than_one_prefix_after_another():
    together, apart = (NativeEngine(model(), Numbers(), device="cuda", batch_size=16) for _ in range(2))
    assert complete(together, mixed(80)) == complete(one_at_a_time(apart), mixed(80))
    print(f"{together.stats.decode_steps} steps, one prefix after another {apart.stats.decode_steps}", end=" ")
    assert together.stats.decode_steps < apart.stats.decode_steps


def test_a_store_too_small_for_all_of_them_and_redraws_on_the_way():
    expected = complete(ReferenceEngine(model(), Numbers()), mixed())
    engine = NativeEngine(model(), Numbers(), device="cuda", batch_size=8)
    engine.store = prefixes.PrefixStore(engine.shape, 320, engine.device)
    again, found = {5: 1, 20: 13}, {}
    for request in mixed():
        engine.submit(request)
    for done in engine.completions():
        found[done.id] = done
        if len(found) in again:
            item = again[len(found)]
            engine.submit(dataclasses.replace(mixed()[item], id=100 + item, first=True))
    for id_, done in found.items():
        assert done.token_ids == expected[id_ % 100].token_ids
    assert len(found) == 42


@pytest.mark.parametrize("linears", ["bnb", "bf16", "fused", "fp8"])
def test_every_way_of_the_linears_runs_over_several_prefixes(linears):
    """In bf16 a row may leave the other's path at a near tie; most agree to the end."""
    if linears == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a card without fp8")
    engine, alone = (
        NativeEngine(quantised(), Numbers(), device="cuda", batch_size=16, linears=linears) for _ in range(2)
    )
    found, expected = complete(engine, mixed(temperature=0.0)), complete(one_at_a_time(alone), mixed(temperature=0.0))
    same = [found[i].token_ids[:4] == expected[i].token_ids[:4] for i in found]
    print(f"{sum(same)} of {len(same)}", end=" ")
    assert sum(same) >= 0.8 * len(same)
    engine.close()
    alone.close()


def test_scores_of_many_cases_in_one_pass_are_those_of_each_alone():
    draw = random.Random(4)
    head, wanted = tuple(draw.randrange(VOCAB) for _ in range(400)), []
    for case in range(7):
        text = (*head, *(draw.randrange(VOCAB) for _ in range(50 + case)))
        for _ in range(5):
            own = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(2, 30)))
            wanted.append(ScoreRequest(len(wanted), (*text, *own), (7, 9), len(text), len(head)))
    together, alone = (NativeEngine(model(), Numbers(), device="cuda", batch_size=32) for _ in range(2))
    found = {score.id: score.total for score in together.score(wanted)}
    one_at_a_time(alone)
    for request in wanted:
        (score,) = alone.score([request])
        assert found[request.id] == pytest.approx(score.total, abs=1e-3)


def eight(model_, **options):
    return NativeEngine(model_, Numbers(), device="cuda", batch_size=16, kv="int8", **options)


def test_keys_and_values_in_8_bits_draw_nearly_the_same_and_score_exactly():
    """Prefixes and scores do not know of it; a row draws the same alone, beside others and after it gave way."""
    plain, engine = NativeEngine(model(), Numbers(), device="cuda", batch_size=16), eight(model())
    assert engine.cache.keys.dtype == torch.int8 and engine.exact.keys.dtype == torch.float32
    wanted = [ScoreRequest(i, r.token_ids, (3, 1, 4), r.prefix_len) for i, r in enumerate(mixed())]
    scores = [sorted((s.id, s.total) for s in each.score(wanted)) for each in (plain, engine)]
    assert [total for _, total in scores[1]] == pytest.approx([total for _, total in scores[0]], abs=1e-4)
    found, expected = complete(engine, mixed(temperature=0.0)), complete(plain, mixed(temperature=0.0))
    same = sum(found[i].token_ids[:4] == expected[i].token_ids[:4] for i in found)
    print(f"{same} of {len(found)} begin alike", end=" ")
    assert same >= 0.8 * len(found)
    together = complete(eight(model()), mixed())
    assert complete(engine, mixed()[::-1]) == together
    for request in mixed()[:6]:
        assert complete(eight(model()), [request]) == {request.id: together[request.id]}
    nats, agree = scoring.divergence(engine, mixed()[3].token_ids)
    print(f"KL {nats:.5f} nats a token, {agree:.1%} the same first choice", end=" ")
    assert 0 < nats < 0.05 and scoring.divergence(plain, mixed()[3].token_ids) == (0.0, 1.0)
    assert len(engine.cache.free) == engine.cache.blocks and len(engine.exact.free) == engine.exact.blocks


@pytest.mark.parametrize("linears", ["bnb", "bf16", "fused", "fp8", "int8"])
def test_twice_as_many_tokens_fit_and_every_way_of_the_linears_draws(linears):
    if linears == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a card without fp8")
    engine = eight(quantised(), linears=linears)
    assert engine.drawn.bytes_per_token < 0.54 * engine.shape.bytes_per_token
    assert "8 bits" in engine.stats.extra["kv"]
    found = complete(engine, mixed())
    assert {i: len(done.token_ids) for i, done in found.items()} == {r.id: r.sampling.max_new_tokens for r in mixed()}
    engine.close()
