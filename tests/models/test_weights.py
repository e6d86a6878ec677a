"""A model's files before a load: what is refused in one line, and which model a folder holds. No torch."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cai import errors
from cai.errors import USAGE, CaiError
from cai.models import weights

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16, "intermediate_size": 16}


def model(folder: Path, value: float = 1.0, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    tensors = {
        "model.embed_tokens.weight": np.full((16, 8), value, np.float32),
        "model.layers.0.self_attn.q_proj.weight": np.full((8, 8), value, np.float32),
        "model.layers.0.mlp.up_proj.weight": np.full((16, 8), value, np.float32),
        "model.layers.0.input_layernorm.weight": np.full((8,), value, np.float32),
        "lm_head.weight": np.full((16, 8), value, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CaiError) as caught:
        weights.check_folder(folder, "model.name")
    assert caught.value.code == USAGE
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.name: ")
    return str(caught.value)


def test_a_whole_model_passes_and_its_headers_tell_size_and_modules(tmp_path):
    files = weights.check_folder(model(tmp_path / "m"), "model.name")
    assert [file.name for file in files] == ["model.safetensors"]
    assert weights.stored_parameters(files, "k") == 16 * 8 * 3 + 64 + 8
    assert weights.projections(files, "k") == {"q_proj", "up_proj"}  # neither the head nor the embeddings


def test_pickles_and_redirections_are_refused_whatever_lies_beside_them(tmp_path):
    folder = model(tmp_path / "redirect")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    assert "another base" in refused(folder)
    folder = model(tmp_path / "junk")
    (folder / "model.safetensors").rename(folder / "junk.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin is a pickle" in refused(folder)
    folder = model(tmp_path / "index")
    for name in ("weights.bin", "../elsewhere.safetensors", 7):
        index = {"weight_map": {"a": name, "b": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        message = refused(folder)
        assert "must be safetensors" in message or "cannot be read" in message
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert "model-2.safetensors is missing" in refused(folder)


@pytest.mark.parametrize("length", [0, 7, 8, 40, -1])
def test_a_download_that_broke_off_is_one_line(tmp_path, length):
    file = model(tmp_path / "m") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:length])
    assert "Download it again" in refused(file.parent)
    file.write_bytes(data + b"x")
    assert "broke off" in refused(file.parent)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no table"),
        ("{", "cannot be read"),
        (json.dumps(CONFIG | {"num_hidden_layers": 10**6}), "num_hidden_layers is 1000000"),
        (json.dumps(CONFIG | {"hidden_size": "huge"}), "hidden_size is 'huge'"),
        (json.dumps(CONFIG | {"hidden_size": "32"}), "hidden_size is '32'"),
        (json.dumps({"text_config": CONFIG | {"vocab_size": -1}}), "vocab_size is -1"),
        (json.dumps(CONFIG | {"head_dim": 10**12}), "head_dim is 1000000000000"),
        (json.dumps(CONFIG | {"max_position_embeddings": 0}), "max_position_embeddings is 0"),
        (json.dumps(CONFIG | {"num_experts": 10**9}), "num_experts is"),
        (json.dumps(CONFIG | {"vision_config": {"depth": 10**9}}), "depth is"),
        (json.dumps(CONFIG | {"audio": {"tower": {"n_layer": -5}}}), "n_layer is -5"),
        (json.dumps(CONFIG | {"num_hidden_layers": 2000, "hidden_size": 262144, "intermediate_size": 2**21}), "e+15"),
    ],
)
def test_an_absurd_config_is_refused_before_memory_is_taken(tmp_path, content, said):
    folder = model(tmp_path / "m")
    (folder / "config.json").write_text(content)
    assert said in refused(folder)


def test_a_dense_model_says_that_it_has_no_experts(tmp_path):
    """0 and null are how published configs say "none" of what they have not."""
    folder = model(tmp_path / "m")
    none = {"num_experts": 0, "head_dim": None, "vision_config": {"num_hidden_layers": 0, "vocab_size": 0}}
    (folder / "config.json").write_text(json.dumps(CONFIG | none))
    assert weights.check_folder(folder, "model.name")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_or_a_device_among_a_models_files_is_named_and_never_waited_for(tmp_path, name):
    """config.json as a pipe hung for ever: the reader waits for a writer. Neighbours of the same kind."""
    for kind in ("pipe", "device"):
        folder = model(tmp_path / kind)
        (folder / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to("/dev/zero")
        with pytest.raises(CaiError) as caught, in_time(5):
            weights.check_folder(folder, "model.name")
        assert f"{name}: is a pipe or a device" in str(caught.value)


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """A read that waits for ever ends the test, not the suite."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"nothing came within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_folder_is_known_by_its_content_not_by_its_name(tmp_path, monkeypatch):
    one, other = weights.identity(model(tmp_path / "a")), weights.identity(model(tmp_path / "b"))
    assert one == other and one.startswith("content:")
    assert weights.identity(model(tmp_path / "a", value=1.001)) != one  # equal headers, other bytes
    assert weights.identity(model(tmp_path / "a", rope_theta=5.0)) != one
    assert weights.identity(model(tmp_path / "a", transformers_version="9")) == one
    monkeypatch.setattr(weights, "HASHED_WHOLE", 100)  # a large file is sampled
    large = weights.identity(model(tmp_path / "a"))
    assert large == weights.identity(model(tmp_path / "b")) != weights.identity(model(tmp_path / "a", value=1.001))


def test_its_tokenizer_and_template_are_known_apart_from_its_weights(tmp_path):
    """Another template makes other prompts of the same texts, and the weights tell nothing of it."""
    folder = model(tmp_path / "a")
    (folder / "tokenizer.json").write_text("{}")
    then = weights.known_by(folder)
    assert then["revision"] == weights.identity(folder) and then["tokenizer"].startswith("content:")
    (folder / "notes.txt").write_text("mine")
    assert weights.known_by(folder) == then
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    now = weights.known_by(folder)
    assert now["revision"] == then["revision"] and now["tokenizer"] != then["tokenizer"]
    (folder / "chat_template.jinja").rename(folder / "chat_template.json")
    assert weights.known_by(folder)["tokenizer"] not in (now["tokenizer"], then["tokenizer"])


def test_a_guard_whose_folder_was_exchanged_is_refused_and_one_of_before_is_not():
    facts = {"model": "guards/mine", "revision": "content:aa", "tokenizer": "content:bb"}
    before = [{"model": "guards/mine", "revision": "local"}, {"model": "other", "revision": "content:cc"}]
    weights.refuse_other(before, facts, "guard.model")  # "local": in runs from before the content was kept
    weights.refuse_other([*before, dict(facts)], facts, "guard.model")
    for name in ("revision", "tokenizer"):
        with pytest.raises(
            CaiError, match=rf"guard\.model: guards/mine: its {name} is not .*put the folder's"
        ) as found:
            weights.refuse_other([facts | {name: "content:zz"}], facts, "guard.model")
        assert found.value.code == errors.DRIFT and "\n" not in str(found.value)


def test_the_shipped_limits_let_the_largest_published_models_pass():
    for layers, hidden, inner, vocab in (
        (126, 16384, 53248, 128256),
        (61, 7168, 18432, 129280),
        (94, 4096, 12288, 151936),
    ):
        shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab}
        weights.check_config(shape, "x")
    qwen32 = {"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648, "vocab_size": 152064}
    assert weights.parameters(qwen32) == pytest.approx(32.8e9, rel=0.12)
