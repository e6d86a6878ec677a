"""Other models beside the policy: what counts as a whole model, how large it is, where it may lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cai import errors
from cai.errors import CaiError
from cai.models import auxiliary, weights

REVISION = "0123456789abcdef" * 2 + "01234567"
WHOLE = {"config.json": 2, "model.safetensors": 3 * 2**20}

EMPTY = (2).to_bytes(8, "little") + b"{}"  # a whole safetensors file without a tensor


def fill(folder: Path, sizes: dict[str, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (folder / name).write_bytes(b"0" * size)
    return folder


def sharded(folder: Path, *present: int) -> Path:
    names = {number: f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    fill(folder, {"config.json": 2, **{names[number]: 2**20 for number in present}})
    index = {"weight_map": {"a": names[1], "b": names[1], "c": names[2]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which itself is out of reach; gives the folder of "some/guard" at main."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--some--guard"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    return repo / "snapshots" / REVISION


def test_a_folder_without_a_whole_model_is_refused_before_it_is_needed(tmp_path: Path) -> None:
    for name, folder in {
        "empty": fill(tmp_path / "empty", {}),
        "no weights": fill(tmp_path / "bare", {"config.json": 2}),
        "no config": fill(tmp_path / "headless", {"model.safetensors": 9}),
        "a part is missing": sharded(tmp_path / "torn", 1),
    }.items():
        with pytest.raises(CaiError, match=r"guard\.model: .*no whole model in this folder.*get it") as error:
            auxiliary.require(str(folder), "guard.model", "get it")
        assert error.value.code == errors.USAGE and "\n" not in str(error.value), name
    for folder in (fill(tmp_path / "whole", WHOLE), sharded(tmp_path / "parts", 1, 2)):
        (folder / "config.json").write_text("{}")
        for part in folder.glob("*.safetensors"):
            part.write_bytes(EMPTY)
        auxiliary.require(str(folder), "guard.model", "get it")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("adapter_config.json", b'{"base_model_name_or_path": "/elsewhere"}', "would load another base"),
        ("model.safetensors", EMPTY[:5], "no whole safetensors file"),
        ("config.json", b'{"num_hidden_layers": 0}', "num_hidden_layers is 0"),
        ("config.json", b'{"max_position_embeddings": -4}', "max_position_embeddings is -4"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}', "must be safetensors beside it"),
    ],
)
def test_what_the_policy_s_loader_refuses_is_refused_of_a_guard_or_judge_before_a_run(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    """It was found when the model was loaded: of a judge after the data were made and trained on."""
    folder = fill(tmp_path / "whole", WHOLE)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(EMPTY)
    (folder / name).write_bytes(content)
    with pytest.raises(CaiError, match=told) as error:
        auxiliary.require(str(folder), "evaluation.judge_model", "get it")
    assert error.value.code == errors.USAGE and str(error.value).startswith("evaluation.judge_model: ")


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_a_list_of_parts_that_was_cut_is_no_whole_model(tmp_path: Path, index: str) -> None:
    folder = sharded(tmp_path / "cut", 1, 2)
    (folder / "model.safetensors.index.json").write_text(index)
    assert weights.weight_files(folder) == []
    with pytest.raises(CaiError, match="no whole model in this folder"):
        auxiliary.require(str(folder), "guard.model", "get it")


def test_a_local_copy_of_a_hub_model_is_whole_and_of_the_wanted_revision(hub: Path) -> None:
    fill(hub, {"config.json": 2})
    with pytest.raises(CaiError, match="cannot be had"):  # its config was fetched once, its weights never
        auxiliary.require("some/guard", "guard.model", "get it")
    fill(hub, WHOLE)
    auxiliary.require("some/guard", "guard.model", "get it")
    with pytest.raises(CaiError, match="cannot be had"):
        auxiliary.require("some/guard", "guard.model", "get it", "v2")


def test_the_size_is_that_of_the_weights_offline_too(tmp_path: Path, hub: Path) -> None:
    whole = fill(tmp_path / "whole", WHOLE | {"adapter.txt": 2**20})
    assert auxiliary.weights_gib(str(whole)) == pytest.approx(3 / 1024)
    assert auxiliary.weights_gib(str(sharded(tmp_path / "parts", 1, 2))) == pytest.approx(2 / 1024)
    assert auxiliary.weights_gib(str(fill(tmp_path / "none", {}))) is None
    assert auxiliary.weights_gib("some/guard") is None  # neither a copy nor the hub: too large, as far as one knows
    fill(hub, WHOLE)
    assert auxiliary.weights_gib("some/guard") == pytest.approx(3 / 1024)
