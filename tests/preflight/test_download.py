"""What a run will download is said before it does, with its size; what is here already is not named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import runner
from cai import errors
from cai.preflight.download import at_hand, download_line
from cai.recipe import load as recipes
from cai.recipe.load import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def recipe(*sets: str, milestone: str = "m1") -> Recipe:
    return recipes.resolve(recipes.read(ROOT / "cai.toml"), milestone=milestone, sets=sets)


def kept(cache: Path, owner: str, name: str) -> None:
    snapshot = cache / f"models--{owner}--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x")


def test_the_recipes_own_model_is_named_with_both_sizes_and_the_folder(cache: Path) -> None:
    line = download_line(recipe(), "cuda")
    assert "Qwen/Qwen2.5-32B, about 19 GB where the hub has a copy in 4 bits, else 64 GB" in line
    assert str(cache) in line and "judge" not in line


def test_without_four_bits_there_is_one_size() -> None:
    assert "Qwen/Qwen2.5-32B, about 64 GB;" in download_line(recipe("model.quantization=bf16"), "cuda")


def test_guard_and_judges_of_m3_are_named_once_each() -> None:
    line = download_line(recipe(milestone="m3"), "cuda")
    for name in ("Qwen/Qwen3Guard-Gen-4B", "cais/HarmBench-Llama-2-13b-cls", "Qwen/Qwen2.5-32B-Instruct"):
        assert line.count(f"the judge {name}, up to ") == 1
    assert "regex" not in line


@pytest.mark.parametrize(("owner", "name"), [("Qwen", "Qwen2.5-32B"), ("unsloth", "Qwen2.5-32B-bnb-4bit")])
def test_what_lies_in_the_cache_is_not_downloaded(cache: Path, owner: str, name: str) -> None:
    kept(cache, owner, name)
    assert download_line(recipe(), "cuda") == ""


@pytest.mark.parametrize(
    ("owner", "name"), [("Qwen", "Qwen2.5-32B-Instruct"), ("somebody", "Qwen2.5-32B"), ("unsloth", "Qwen2.5-3B")]
)
def test_another_model_in_the_cache_is_not_this_one(cache: Path, owner: str, name: str) -> None:
    kept(cache, owner, name)
    assert not at_hand("Qwen/Qwen2.5-32B") and download_line(recipe(), "cuda")


def test_a_folder_and_models_that_come_with_the_requirements_need_no_download(tmp_path: Path) -> None:
    assert at_hand(str(tmp_path))
    assert download_line(recipe(), "embedded") == download_line(recipe(), "fake") == ""


def test_the_dry_run_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([str(ROOT / "cai.toml"), "--dry-run", "--set", "model.backend=cuda"]) == errors.DONE
    assert "to download   Qwen/Qwen2.5-32B, about 19 GB" in capsys.readouterr().out


def test_setup_says_what_it_installs_before_it_does() -> None:
    lines = (ROOT / "Makefile").read_text().split("$(STAMP): ")[1].splitlines()
    said = next(place for place, line in enumerate(lines) if "3 GB on disk" in line)
    assert said < next(place for place, line in enumerate(lines) if "install" in line and "$(PIP)" in line)


def test_a_run_says_it_before_the_model_is_loaded(
    run_fake: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cai.session.download_line", lambda recipe, backend: "to download: much")
    run_fake("--milestone", "m0", "--until", "instructions")
    said = capsys.readouterr().out
    assert said.index("to download: much") < said.index("model: fake loaded")
