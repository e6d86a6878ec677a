"""--dry-run: every stage's prompt, counts, an estimate, nothing written, no torch, under two seconds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from support.pages import REPO, make_run, recipe

from cai import errors
from cai.commands import cli
from cai.commands.dry_run import dry_run
from cai.data import chain
from cai.inputs import read_inputs
from cai.models.tokenizer_file import ByteCounter, TokenizerFile, tokenizer_at_hand
from cai.run import budget

FAKE = ["--set", "model.backend=fake", "--set", "model.name=fake"]


def estimate(recipe, backend, root):
    return budget.estimate(recipe, backend, root, chain.limit_tokens(recipe))


def inputs(*more: str):
    return read_inputs(cli.parse([str(REPO / "cai.toml"), "--dry-run", *more]))


def test_shows_every_stage_and_an_estimate(capsys):
    assert dry_run(inputs("--milestone", "m1", *FAKE)) == 0
    out = capsys.readouterr().out
    for stage in ("instructions", "answers", "relevance", "critiques", "revisions", "judge_pair", "policy"):
        assert f"--- {stage} (" in out
    assert "How can I keep my bicycle" in out
    assert "estimate" in out
    assert "estimated at 4 bytes a token" in out
    assert "Nothing was loaded and nothing was written" in out


def test_base_format_shows_cues_and_stops_and_no_chat_token(capsys):
    dry_run(inputs("--set", "model.backend=cuda", "--set", "model.name=nobody/nothing"))
    out = capsys.readouterr().out
    assert "[stops at end of text or" in out
    assert "<|im_start|>" not in out


def test_instructions_from_a_file_need_no_prompt(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("Explain tides.\n")
    dry_run(inputs(*FAKE, "--set", f"instructions.file={tmp_path / 'x.txt'}"))
    out = capsys.readouterr().out
    assert "--- instructions (" not in out
    assert "--- answers (" in out


def test_a_prompt_that_fills_the_context_is_refused():
    from cai.errors import CaiError

    with pytest.raises(CaiError, match=r"exceed model\.max_seq_length = 300"):
        dry_run(inputs("--set", "model.backend=cuda", "--set", "model.name=no/no", "--set", "model.max_seq_length=300"))


@pytest.mark.slow
def test_under_two_seconds_without_torch_and_writes_nothing(tmp_path):
    for name in ("cai.toml", "constitution.yaml"):
        (tmp_path / name).write_bytes((REPO / name).read_bytes())
    (tmp_path / "prompts").symlink_to(REPO / "prompts")
    began = time.monotonic()
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop()); import runner; code = runner.main();"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "cai.toml", "--dry-run", "--milestone", "m2", *FAKE, str(REPO)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 8.0  # 1 s on a quiet machine
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cai.toml", "constitution.yaml", "prompts"]


def tokenizer_folder(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    fast = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "<|im_end|>": 2}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["<|im_end|>"])
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return folder


def test_tokenizer_file_counts_and_renders_the_chat_template(tmp_path):
    found = TokenizerFile(tokenizer_folder(tmp_path / "model"))
    assert found.eos_token_id == 2
    text = found.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    assert text == "[user]hello<|im_end|>"
    assert found.encode("hello hello") == [1, 1]


def test_a_template_is_sandboxed(tmp_path):
    folder = tokenizer_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        TokenizerFile(folder).apply_chat_template([], tokenize=False, add_generation_prompt=False)


def test_tokenizer_is_found_in_a_local_folder_and_in_the_hubs_cache(tmp_path, monkeypatch):
    folder = tokenizer_folder(tmp_path / "model")
    section = recipe().model.model_copy(update={"name": str(folder)})
    assert tokenizer_at_hand(section, "cuda")[1].startswith("exact")
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--a--b" / "refs").mkdir()
    (tmp_path / "hub" / "models--a--b" / "refs" / "main").write_text("abc")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert tokenizer_at_hand(section.model_copy(update={"name": "a/b"}), "cuda")[1].startswith("exact")
    assert isinstance(tokenizer_at_hand(section.model_copy(update={"name": "a/c"}), "cuda")[0], ByteCounter)


def test_estimate_comes_from_the_latest_run_of_the_same_model(tmp_path):
    assert estimate(recipe(), "embedded", tmp_path).source.startswith("table")
    make_run(tmp_path)
    assert "20261122-180000-m1-abc123" in estimate(recipe(), "embedded", tmp_path).source
    other = recipe().model.model_copy(update={"name": "another/model"})
    make_run(tmp_path, run_id="20261122-190000-m1-abc123", manifest={"identity": {"model.name": repr("other")}})
    assert "180000" in estimate(recipe(model=recipe().model), "embedded", tmp_path).source
    assert estimate(recipe(model=other), "cuda", tmp_path).source.startswith("table")


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("model.name=fake:nonsense", "the fake model knows fake"), ("lora.rank=1000000000", "lora.rank: input should be")],
)
def test_what_the_run_would_refuse_the_dry_run_refuses(run_fake, capsys, key: str, wanted: str) -> None:
    assert run_fake("--dry-run", "--set", key)[0] == errors.USAGE
    assert wanted in capsys.readouterr().err


def test_every_arm_has_its_cost_and_a_base_model_is_advised_to_begin_with_sft(capsys):
    asked = ["--set", "model.backend=cuda", "--set", "model.name=nobody/nothing", "--milestone", "m2"]
    dry_run(inputs(*asked))
    out = " ".join(capsys.readouterr().out.split())
    assert "base with pairs shown: 100 fresh answers, at most 60,000 tokens, " in out
    assert "advised DPO alone does not teach a base model to stop" in out and "--set dpo.start=sft" in out
    dry_run(inputs(*asked, "--set", "dpo.start=sft", "--set", "dpo.also_from_base=true"))
    out = " ".join(capsys.readouterr().out.split())
    assert "SFT, then DPO, 100 steps" in out and "advised" not in out
    assert "DPO from the base: trained beside SFT+DPO, 1 min 32 s to 2 min 40 s, $0.04 to $0.08" in out
    dry_run(inputs(*asked, "--set", "model.format=chat"))
    assert "advised" not in capsys.readouterr().out
