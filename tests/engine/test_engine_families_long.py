"""Greedy texts of 200 mixed prompts for every family that runs natively, one prefix at a time and several together."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.long

from test_engine import VOCAB, Letters, complete  # noqa: E402
from test_engine_families import KINDS, checkpoint  # noqa: E402

from cai.engine import Request, Sampling  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402


def prompts(count=200):
    """Prompts of 1 to 140 tokens behind none or one of five prefixes, drawn for 1 to 24 tokens; some end by eos."""
    draw, made = random.Random(23), []
    prefixes = [tuple(draw.randrange(VOCAB) for _ in range(length)) for length in (0, 17, 40, 63, 90, 120)]
    for i in range(count):
        prefix = prefixes[i % len(prefixes)]
        own = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20)))
        sampling = Sampling(0.0, draw.randrange(1, 25), (), tuple(range(0, VOCAB, 31)) if i % 3 else ())
        made.append(Request(i, prefix + own, sampling, seed=i, prefix_len=len(prefix)))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_200_greedy_texts_of_a_family_equal_the_reference(kind):
    model = checkpoint(kind)
    expected = complete(ReferenceEngine(model, Letters()), prompts())
    for several in (False, True):
        engine = NativeEngine(model, Letters(), batch_size=16)
        engine.scheduler.several = several
        assert complete(engine, prompts()) == expected, several
    assert {done.finish for done in expected.values()} == {"eos", "length"}
