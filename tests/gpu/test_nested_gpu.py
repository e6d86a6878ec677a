"""A case's prefix behind the stage's head on a GPU: the scores of one prefix in one piece, in less time.

pytest -m gpu tests/gpu/test_nested_gpu.py -s                    (half a minute, compilation included; says the ratio)
"""

from __future__ import annotations

import dataclasses
import random
import time

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cai.engine import ScoreRequest  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from tests.gpu.test_engine_gpu import VOCAB, Numbers, complete, model, quantised, requests  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
HEAD, CASE, OWN, CASES, ASKS = 1_400, 500, 40, 6, 18  # as M3's relevance: examples, an answer, a principle
WIDER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}


def asked(said=1, cases=CASES, seed=3):
    draw = random.Random(seed)

    def ids(size):
        return tuple(draw.randrange(VOCAB) for _ in range(size))

    head, made = ids(HEAD), []
    for _ in range(cases):
        case = (*head, *ids(CASE))
        made += [(*case, *ids(OWN)) for _ in range(ASKS)]
    return [ScoreRequest(i, context, ids(said), HEAD + CASE, HEAD) for i, context in enumerate(made)]


def flat(wanted):
    return [dataclasses.replace(request, head_len=0) for request in wanted]


def totals(engine, wanted):
    """(totals in order, prompt tokens computed, seconds), with nothing saved before."""
    engine.store.parts.clear()
    before, began = engine.stats.prompt_tokens_computed, time.perf_counter()
    found = [score.total for score in sorted(engine.score(wanted), key=lambda score: score.id)]
    return found, engine.stats.prompt_tokens_computed - before, time.perf_counter() - began


def compared(engine, wanted):
    """Asserts the tokens; (totals in one piece, nested, best ratio of seconds of three)."""
    one, two = totals(engine, flat(wanted)), totals(engine, wanted)  # kernels are compiled here
    own = len(wanted) * (OWN + len(wanted[0].continuation_ids) - 1)
    assert one[1] == CASES * (HEAD + CASE) + own and two[1] == HEAD + CASES * CASE + own
    ratios = [totals(engine, wanted)[2] / totals(engine, flat(wanted))[2] for _ in range(3)]
    print(f"nested: {min(ratios):.2f} of the seconds (all: {', '.join(f'{r:.2f}' for r in ratios)})", end=", ")
    print(f"{two[1] / one[1]:.2f} of the tokens, {CASES} cases of {ASKS} asks")
    return one[0], two[0], min(ratios)


def test_scores_in_fp32_are_those_of_one_piece():
    engine = NativeEngine(model(), Numbers(), device="cuda", batch_size=32)
    one, nested, _ = compared(engine, asked())
    assert nested == pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize("linears", ["bnb", "bf16", "fused"])
def test_scores_of_every_way_of_the_linears(linears):
    """Within 1% of the sum of log-probs: bf16 products in another order."""
    engine = NativeEngine(quantised(), Numbers(), device="cuda", batch_size=32, linears=linears)
    one, nested, _ = compared(engine, asked(said=20))
    engine.close()
    assert nested == pytest.approx(one, rel=1e-2)


def test_a_wider_model_scores_the_same():
    """`compared` counts the tokens and prints the seconds; on an H200 launches bound a model of this size."""
    engine = NativeEngine(wider(), Numbers(), device="cuda", batch_size=32)
    one, nested, _ = compared(engine, asked(said=20))
    engine.close()
    assert nested == pytest.approx(one, rel=1e-2)


def wider():
    """A Qwen2 of half a billion parameters in bf16, large enough that tokens and not launches take the time."""
    config = transformers.Qwen2Config(
        **WIDER, num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=2048, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.02)
    return made


def test_graphs_follow_a_prefix_that_was_put_in_two_parts():
    """Drawing behind the head, before and after it was put under cases: the place of the prefix grew meanwhile."""
    engine, wanted = NativeEngine(model(), Numbers(), device="cuda", batch_size=16), asked(cases=2)
    head = wanted[0].context_ids[:HEAD]
    drawn = [dataclasses.replace(r, token_ids=(*head, *r.token_ids[:5]), prefix_len=HEAD) for r in requests(8)]
    before = complete(engine, drawn)
    totals(engine, wanted)
    assert complete(engine, drawn) == before
    assert complete(engine, requests(8)) == complete(NativeEngine(model(), Numbers(), device="cuda"), requests(8))
