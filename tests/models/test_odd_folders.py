"""Files of a model that loads: the tokenizer of another one, odd end tokens, half of an adapter. Needs torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest
from support.models import save_tiny

from cai import errors
from cai.errors import CaiError
from cai.recipe.settings import EngineSection, LoraSection, ModelSection

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
LORA = LoraSection(rank=2, alpha=4)


def section(folder: Path) -> ModelSection:
    return ModelSection(name=str(folder), backend="cpu", max_seq_length=2048, format="base")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "Tiny-Llama", "llama")


@pytest.mark.parametrize("who", ["policy", "guard"])
def test_the_tokenizer_of_another_model_is_told_before_the_first_text(tmp_path, llama, who):
    """An id beyond the embeddings is an IndexError on a CPU and a dead process on a GPU, in the middle of a run."""
    from cai.models import auxiliary
    from cai.models.policy import load

    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    content = orjson.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: id_ + (5000 if id_ > 200 else 0) for token, id_ in vocabulary.items()}
    (folder / "tokenizer.json").write_bytes(orjson.dumps(content))
    key = "model.name" if who == "policy" else "guard.model"
    with pytest.raises(CaiError, match=rf"^{key}: .* has the token 5,255, and the model has 261 rows") as caught:
        if who == "policy":
            load(section(folder), "cpu")
        else:
            auxiliary._load(str(folder), key, "main", EngineSection())
    assert caught.value.code == errors.USAGE
    content["model"]["vocab"] = vocabulary
    content["added_tokens"].append({**content["added_tokens"][0], "id": 900, "content": "<never asked for>"})
    (folder / "tokenizer.json").write_bytes(orjson.dumps(content))
    assert load(section(folder), "cpu").tokenizer.encode("plain")


@pytest.mark.parametrize("what", ["cut", "renamed", "missing", "another shape", "a list"])
def test_an_adapter_that_is_not_whole_is_one_line_and_never_half_of_one(tmp_path, llama, what):
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from cai.models.policy import load

    model = load(section(llama), "cpu")
    model.to_lora(LORA)
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model.hf).items()}
    first = min(tensors)
    if what == "renamed":
        tensors[f"{first}.x"] = tensors.pop(first)
    elif what == "missing":
        del tensors[first]
    elif what == "another shape":
        tensors[first] = tensors[first][:1].contiguous()
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors, file)
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif what == "a list":
        file.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(CaiError) as caught:
        model.attach(tmp_path, LORA)
    said = str(caught.value)
    assert caught.value.code == errors.CORRUPT and said.startswith(str(tmp_path)) and "\n" not in said
    assert model.attached is None


@pytest.mark.parametrize("eos", [["x", None], "x", {}, -3.5, None])
def test_an_end_token_of_a_guard_that_is_no_number_is_the_tokenizer_s(tmp_path, llama, eos):
    from cai.models import auxiliary

    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    (folder / "generation_config.json").write_bytes(orjson.dumps({"eos_token_id": eos}))
    loaded = auxiliary._load(str(folder), "guard.model", "main", EngineSection())
    assert loaded.tokenizer.eos_ids == (258,)
