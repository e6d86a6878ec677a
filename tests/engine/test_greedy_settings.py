"""A base whose own generation_config.json asks for a penalty: every greedy draw is the model's argmax all the same."""

from __future__ import annotations

from types import SimpleNamespace

import orjson
import pytest
from support.models import save_tiny
from support.runs import ROOT

from cai.engine import Request, Sampling
from cai.recipe.settings import EngineSection, ModelSection

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
TOKENS = 40
PENALTY = {"repetition_penalty": 1.6, "do_sample": True, "temperature": 0.7, "top_k": 20, "no_repeat_ngram_size": 3}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from cai.models.policy import load

    folder = save_tiny(tmp_path_factory.mktemp("models") / "Tiny", "qwen2", template="")
    path = folder / "generation_config.json"
    values = orjson.loads(path.read_bytes()) if path.is_file() else {}
    path.write_bytes(orjson.dumps(values | PENALTY))
    model = load(ModelSection(name=str(folder), backend="cpu", max_seq_length=512), "cpu")
    assert model.hf.generation_config.repetition_penalty == 1.6
    return model


@pytest.fixture(scope="module")
def argmax(loaded):
    """(prompt, its greedy continuation by hand); it repeats itself, so that a penalty shows."""
    ids = tuple(loaded.tokenizer.encode("Why is the sky blue? Why is the sky blue? Why"))
    row = list(ids)
    with torch.no_grad():
        for _ in range(TOKENS):
            row.append(int(loaded.hf(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    return ids, tuple(row[len(ids) :])


@pytest.mark.parametrize("name", ["reference", "static", "auto"])
def test_an_engine_draws_without_the_bases_penalty(loaded, argmax, name):
    loaded.release()
    engine = loaded.engine(EngineSection(backend=name))
    engine.submit(Request(0, argmax[0], Sampling(0.0, TOKENS)))
    (done,) = engine.completions()
    loaded.release()
    assert done.token_ids == argmax[1]


def test_the_chat_draws_without_the_bases_penalty(loaded, argmax):
    from cai.commands.streaming import draw

    said: list[str] = []
    asked = SimpleNamespace(token_ids=argmax[0], prefix_len=0)
    drawn = draw(loaded, EngineSection(), asked, Sampling(0.0, TOKENS), said.append)
    assert drawn.text == loaded.tokenizer.decode(argmax[1]).strip()


def test_the_exported_settings_draw_without_the_bases_penalty(loaded, argmax, tmp_path):
    from transformers import GenerationConfig

    from cai.commands.export_prompt import Asking, generation_values
    from cai.recipe.prompts import load_prompt

    prompt = load_prompt(ROOT / "prompts" / "policy.yaml", frozenset({"instruction"}))
    values = generation_values(Asking(prompt, "base", "<|endoftext|>", 256, (), None))
    (tmp_path / "generation_config.json").write_bytes(orjson.dumps(values))
    config = GenerationConfig.from_pretrained(str(tmp_path), max_new_tokens=TOKENS)
    row = torch.tensor([argmax[0]])
    made = loaded.hf.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=config)
    new = tuple(made[0, row.shape[1] :].tolist())
    assert new == argmax[1][: len(new)] and (len(new) == TOKENS or new[-1] == 256)
