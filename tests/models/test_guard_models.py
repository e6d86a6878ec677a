"""Guards with weights: tiny random models with the published templates' structure, from a folder and from a hub id.

What the guard says is compared with transformers used as the model cards do: template applied to the texts, tokenised
whole, softmax over the verdict's first telling tokens. The hub id is resolved offline, from a cache as the hub's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.guards import LLAMA_1B, LLAMA_8B, QWEN_GEN, train_bpe
from support.runs import ROOT

from cai.errors import CaiError
from cai.models import auxiliary, weights
from cai.recipe.settings import EngineSection

pytestmark = pytest.mark.slow
TEMPLATES = {"Llama-Guard-3-8B": LLAMA_8B, "Llama-Guard-3-1B": LLAMA_1B, "Qwen3Guard-Gen-4B": QWEN_GEN}
PROMPT, REPLY = "How do I bake bread?", "Mix flour and water.\n\n- Bake it."
CHILD = """
import json, sys
from types import SimpleNamespace
from cai.models import auxiliary
from cai.models.guard import make_guard
from cai.models.guard_formats import Exchange
from cai.recipe.settings import EngineSection
from cai.recipe.settings_benchmarks import GuardSection
name = sys.argv[1]
context = SimpleNamespace(
    recipe=SimpleNamespace(engine=EngineSection()), model=SimpleNamespace(model=None), stopped=lambda: False,
    run=SimpleNamespace(event=lambda *a, **k: None, events=lambda kind: []),
)
auxiliary.require(name, "guard.model", "get it")
with auxiliary.loaded(context, name, "guard.model") as loaded:
    said = make_guard(loaded, GuardSection(model=name, threshold=0.01)).judge([Exchange(*sys.argv[2:])], context)[0]
print(json.dumps({"unsafe": said.unsafe, "category": said.category, "revision": loaded.facts["revision"]}))
"""


def save(folder: Path, template: str) -> None:
    """A random two-layer Llama, its tokenizer and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(template), eos_token="<|im_end|>")
    tokenizer.chat_template = template
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=1024, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def published_use(folder: Path, name: str) -> float:
    """P(unsafe) as the cards have it, at the first tokens that tell the format's labels apart."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    contents = [[{"type": "text", "text": part}] if "1B" in name else part for part in (PROMPT, REPLY)]
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), contents, strict=True)]
    more = {"excluded_category_keys": []} if "Llama" in name else {}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    text, words = (text + "\n\n", ("safe", "unsafe")) if "Llama" in name else (text + "Safety:", None)
    words = words or (" Safe", " Unsafe", " Controversial")
    head = tokenizer.encode(text, add_special_tokens=False)
    totals, labels = [], [tokenizer.encode(word, add_special_tokens=False) for word in words]
    length = next(n for n in range(1, 9) if len({tuple(ids[:n]) for ids in labels}) == len(labels))
    for ids in (label[:length] for label in labels):
        with torch.no_grad():
            logps = model(torch.tensor([head + ids])).logits[0].log_softmax(-1)
        totals.append(sum(logps[len(head) - 1 + i, id_].item() for i, id_ in enumerate(ids)))
    shares = torch.tensor(totals).softmax(0)
    return float(shares[1] if "Llama" in name else shares[1] + shares[2])


def said(name: str, cwd: Path, **environment: str) -> dict[str, object]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, PROMPT, REPLY], capture_output=True, text=True, env=env, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_guard_from_a_folder_says_what_the_published_use_says(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, TEMPLATES[name])
    found = said(f"./{name}", tmp_path)
    assert found["unsafe"] == pytest.approx(published_use(tmp_path / name, name), abs=1e-5)
    assert found["category"] == "unparsed"  # random weights name no category
    assert found["revision"] == weights.identity(tmp_path / name)


def test_a_guard_by_hub_id_comes_from_the_hubs_cache(tmp_path: Path) -> None:
    name, revision = "Qwen3Guard-Gen-4B", "0123456789abcdef" * 2 + "01234567"
    repo = tmp_path / "hub" / f"models--someone--{name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    save(repo / "snapshots" / revision, TEMPLATES[name])
    found = said(f"someone/{name}", tmp_path, HF_HOME=str(tmp_path))
    assert found["unsafe"] == pytest.approx(published_use(repo / "snapshots" / revision, name), abs=1e-5)
    assert found["revision"] == revision


def judged(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[object], auxiliary.Auxiliary]:
    """What the guard in a folder says of nine exchanges, over this engine."""
    from types import SimpleNamespace

    from cai.engine import build
    from cai.models.guard import make_guard
    from cai.models.guard_formats import Exchange
    from cai.recipe.settings_benchmarks import GuardSection

    real = build.make_engine
    monkeypatch.setattr(build, "make_engine", lambda _, *a, **k: real(backend, *a, **k))
    loaded = auxiliary._load(name, "guard.model", "main", EngineSection())
    monkeypatch.setattr(build, "make_engine", real)
    guard = make_guard(loaded, GuardSection(model=name, threshold=0.6))
    exchanges = [Exchange(f"{PROMPT} {i}", REPLY * (1 + i)) for i in range(9)]
    return guard.judge(exchanges, SimpleNamespace(stopped=lambda: False)), loaded  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_guard_runs_natively_and_reads_its_template_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / name, TEMPLATES[name])
    natively, loaded = judged(str(tmp_path / name), "auto", monkeypatch)
    slowly, other = judged(str(tmp_path / name), "static", monkeypatch)
    assert (loaded.engine.name, loaded.facts["engine"], other.engine.name) == ("native", "native", "static")
    for fast, slow in zip(natively, slowly, strict=True):
        assert fast.unsafe == pytest.approx(slow.unsafe, abs=1e-5)  # type: ignore[attr-defined]
        assert (fast.label, fast.refuses) == (slow.label, slow.refuses)  # type: ignore[attr-defined]
    assert loaded.engine.stats.extra["prefix_tokens_computed"] > 0


def test_a_verdict_and_its_refusal_are_read_in_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens computed are those of the longer row alone, behind what all prompts begin with."""
    save(tmp_path / "Qwen3Guard-Gen-4B", QWEN_GEN)
    lengths: list[tuple[int, ...]] = []
    real = auxiliary.choices

    def watched(judge: object, asks: dict[int, tuple[tuple[int, ...], object]], *a: object, **k: object) -> object:
        lengths.append(tuple(len(ids) for ids, _ in asks.values()))
        return real(judge, asks, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr("cai.models.guard.choices", watched)
    monkeypatch.setattr("cai.models.guard.QwenGuard._verdict", lambda *a: "Safe")
    _, loaded = judged(str(tmp_path / "Qwen3Guard-Gen-4B"), "auto", monkeypatch)
    (first, *_) = lengths
    shared = loaded.engine.stats.extra["prefix_tokens_computed"]
    assert len(first) == 18 and shared >= 16
    assert loaded.engine.stats.prompt_tokens_computed == shared + sum(length - shared for length in first[::2])


def test_without_room_for_its_cache_a_judge_runs_in_static_batches_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai.engine.native.engine import NativeEngine

    def full(*a: object, **k: object) -> None:
        raise CaiError("engine: 0.1 GiB are left for the KV cache, too few.")

    monkeypatch.setattr(NativeEngine, "__init__", full)
    save(tmp_path / "guard", QWEN_GEN)
    loaded = auxiliary._load(str(tmp_path / "guard"), "guard.model", "main", EngineSection())
    assert loaded.engine.name == "static" and "0.1 GiB are left" in loaded.facts["engine"]
    assert "13.5 times slower" in loaded.facts["engine"] and "\n" not in loaded.facts["engine"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"[]"),
        ("tokenizer_config.json", b"[]"),
        ("config.json", b"[]"),
        ("model.safetensors", b"cut"),
    ],
)
def test_a_damaged_file_of_a_guard_is_one_clear_line(tmp_path: Path, file: str, content: bytes) -> None:
    save(tmp_path / "guard", QWEN_GEN)
    (tmp_path / "guard" / file).write_bytes(content)
    with pytest.raises(
        CaiError, match=r"^guard.model: [^\n]*guard[^\n]+ (or give a whole folder|Download it again|Give .*)\.$"
    ) as error:
        auxiliary._load(str(tmp_path / "guard"), "guard.model", "main", EngineSection())
    assert error.value.code == 2
