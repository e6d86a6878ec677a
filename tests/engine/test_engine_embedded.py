"""The native engine against the oracle on the embedded model: 200 mixed prompts, greedy, fp32, on the CPU."""

from __future__ import annotations

import itertools
import random

import pytest

pytestmark = pytest.mark.long  # 200 prompts; the small-model tests of test_engine.py run with the slow tier

NEW_TOKENS = 12
OPENINGS = (
    "Write a short {a} about a {b}.",
    "Q: Why does a {b} need {c}?\nA:",
    "def {a}_{b}(x, y):\n    ",
    "Translate into French: the {b} is {c}.\nFrench:",
    "1. {a}\n2. {b}\n3.",
    "{a}, {b}, {c}, {a}, {b},",
    "Der {b} ist {c} und",
    "Human: I feel {c} about my {b}. What should I do?\n\nAssistant:",
    "<{a}><{b}>{c}</{b}>",
    "Once upon a time a {c} {b}",
)
A = ("story", "list", "poem", "function", "summary")
B = ("river", "neighbour", "engine", "cat", "password", "lamp")
C = ("blue", "angry", "water", "3.14", "très bien", "氷")


def prompts() -> list[str]:
    """200 texts of 3 to 120 tokens."""
    draw = random.Random(7)
    made = []
    for number, opening in zip(range(200), itertools.cycle(OPENINGS), strict=False):
        text = opening.format(a=draw.choice(A), b=draw.choice(B), c=draw.choice(C))
        made.append(" ".join([text] * (1 + number % 4)) if number % 3 == 0 else text)
    return made


@pytest.fixture(scope="module")
def loaded():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cai.engine.tokenizers import HFTokenizer
    from cai.models import embedded

    folder = str(embedded.folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, HFTokenizer(AutoTokenizer.from_pretrained(folder))


def top_gap(model, ids) -> float:
    """Distance between the two largest logits after `ids`."""
    import torch

    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item()


def test_200_greedy_texts_equal_the_reference(loaded):
    """A difference is allowed only where the two best logits lie closer than 1e-3 (fp32 sums in another order)."""
    from cai.engine import Request, Sampling
    from cai.engine.native.engine import NativeEngine
    from cai.engine.oracle import ReferenceEngine

    model, tokenizer = loaded
    shared = tokenizer.encode("A conversation between a curious person and a careful, honest assistant.\n\n" * 2)
    texts = {}
    for engine in (NativeEngine(model, tokenizer, batch_size=16), ReferenceEngine(model, tokenizer)):
        for i, text in enumerate(prompts()):
            ids = (*(shared if i % 2 else ()), *tokenizer.encode(text))
            sampling = Sampling(0.0, NEW_TOKENS, ("\n\n",), (2,))
            engine.submit(Request(i, ids, sampling, prefix_len=len(shared) if i % 2 else 0))
        texts[engine.name] = {done.id: done for done in engine.completions()}
        engine.close()
    assert len(texts["native"]) == len(texts["reference"]) == 200
    differing = [i for i in range(200) if texts["native"][i] != texts["reference"][i]]
    for i in differing:
        mine, theirs = texts["native"][i].token_ids, texts["reference"][i].token_ids
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))
        ids = (*(shared if i % 2 else ()), *tokenizer.encode(prompts()[i]), *mine[:common])
        assert top_gap(model, ids) < 1e-3, (i, texts["native"][i].text, texts["reference"][i].text)
    assert len(differing) <= 4
    print(f"{200 - len(differing)} of 200 equal")
