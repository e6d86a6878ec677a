"""Any model on a CPU, and what every load refuses: small random checkpoints of the common families."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from support.models import FAMILIES, NO_SYSTEM, save_tiny
from support.runs import ROOT

import runner
from cai import errors
from cai.errors import CaiError
from cai.recipe.settings import EngineSection, LoraSection, ModelSection

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
LORA = LoraSection(rank=2, alpha=4)


def section(folder: Path, **changes) -> ModelSection:
    return ModelSection(**{"name": str(folder), "backend": "cpu", "max_seq_length": 2048, "format": "base"} | changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "Tiny-Llama", "llama")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["base", "chat"])
def test_a_family_answers_scores_and_takes_an_adapter(tmp_path, family, format):
    import torch

    from cai.engine import Request, Sampling, ScoreRequest
    from cai.models.policy import load
    from cai.recipe.prompts import load_prompt

    folder = save_tiny(tmp_path / family, family, template=NO_SYSTEM if "gemma" in family else "")
    if format == "chat" and "gemma" not in family:
        shutil.rmtree(folder)
        save_tiny(folder, family)
    model = load(section(folder, format=format), "cpu")
    assert model.facts["revision"].startswith("content:") and model.facts["quantization"] == "float32"
    answers = load_prompt(ROOT / "prompts" / "answers.yaml")  # it has a preamble: a system turn in chat format
    prompt = answers.render({"instruction": "Why is the sky blue?"}, format=format, tokenizer=model.tokenizer)
    engine = model.engine(EngineSection())
    ids = prompt.token_ids[-1500:]
    engine.submit(Request(0, ids, Sampling(0.0, 12, prompt.stop, model.tokenizer.eos_ids)))
    (before,) = engine.completions()
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1]
    assert before.token_ids[0] == int(logits.argmax())
    (score,) = engine.score([ScoreRequest(0, ids, before.token_ids[:3])])
    assert score.logps[0] == pytest.approx(float(logits.log_softmax(-1)[before.token_ids[0]]), abs=1e-3)
    model.to_lora(LORA, seed=1)
    trained = [name for name, p in model.hf.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # seven projections of two layers, A and B
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    ask = Request(1, ids, Sampling(0.0, 12, prompt.stop, model.tokenizer.eos_ids))
    texts = {}
    for on in (True, False):
        with model.adapter(on):
            engine = model.engine(EngineSection())
            engine.submit(ask)
            texts[on] = next(engine.completions()).token_ids
    assert texts[False] == before.token_ids != texts[True]


def test_weights_that_are_missing_are_an_error_and_never_random(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    from cai.models.policy import load

    folder = tmp_path / "holes"
    shutil.copytree(llama, folder)
    weights = load_file(str(folder / "model.safetensors"))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaiError, match=r"the weights lack model\.\S+ and 1 more, which would be random") as caught:
        load(section(folder), "cpu")
    assert caught.value.code == errors.USAGE


@pytest.mark.parametrize(("of", "place"), [("", 0), ("layers.1.self_attn.q_proj", 7), ("embed_tokens", -1)])
def test_weights_that_are_not_numbers_are_told_at_once(tmp_path, llama, of, place):
    """All of them; one of a matrix, which makes every logit one; one of a row that is seldom read."""
    from safetensors.torch import load_file, save_file

    from cai.models.policy import load

    folder = tmp_path / "nan"
    shutil.copytree(llama, folder)
    weights = load_file(str(folder / "model.safetensors"))
    for name, value in weights.items():
        if of in name:
            value.view(-1)[place] = float("inf" if place < 0 else "nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaiError, match=rf"model\..*{of}.*\.weight is not finite"):
        load(section(folder), "cpu")


def test_a_guard_or_judge_with_missing_weights_is_refused_too(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    from cai.models import auxiliary

    folder = tmp_path / "guard"
    shutil.copytree(llama, folder)
    weights = load_file(str(folder / "model.safetensors"))
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaiError, match=r"guard\.model: the weights lack lm_head\.weight, which would be random"):
        auxiliary._load(str(folder), "guard.model", "main", EngineSection())


def test_what_breaks_inside_a_library_is_one_line(tmp_path, llama):
    from cai.models.policy import load

    folder = tmp_path / "odd"
    shutil.copytree(llama, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CaiError, match=r"model\.name: cannot load") as caught:
        load(section(folder), "cpu")
    assert "\n" not in str(caught.value)


def test_a_model_too_large_for_the_memory_is_told_before_it_is_loaded(llama, monkeypatch):
    from cai.models import loading
    from cai.models.policy import load

    monkeypatch.setattr(loading, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr(loading, "plain", lambda *given: pytest.fail("it was loaded"))
    with pytest.raises(CaiError, match=r"needs about 1\.1 GB of memory on a CPU .* 0\.0 GB are free\. Take a smaller"):
        load(section(llama), "cpu")


def test_the_copies_of_a_small_model_s_weights_count_and_a_large_one_has_none(tmp_path, monkeypatch):
    from cai.models import loading

    monkeypatch.setattr(loading, "free_memory", lambda: 1)
    for millions, gigabytes in ((400, "4.7"), (600, "4.1")):  # 1.25 of the weights and 1.1 GB, and once more 1.6 GB
        monkeypatch.setattr(loading, "_parameters", lambda *_, count=millions * 1e6: count)
        with pytest.raises(CaiError, match=f"needs about {gigabytes} GB"):
            loading.check_room(section(tmp_path), tmp_path, None)


def test_the_size_of_a_hub_model_comes_from_its_config_before_the_download(tmp_path, monkeypatch):
    from cai.models import loading

    config = {"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648, "vocab_size": 152064}
    (tmp_path / "config.json").write_bytes(orjson.dumps(config))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(tmp_path / "config.json"))
    monkeypatch.setattr(loading, "free_memory", lambda: 20 * 10**9)
    with pytest.raises(CaiError, match=r"Qwen/Qwen2.5-32B needs about 1\d\d\.\d GB .* 20\.0 GB are free"):
        loading.check_room(section(tmp_path).model_copy(update={"name": "Qwen/Qwen2.5-32B"}), None, None)


def test_without_the_hub_the_remedy_is_the_network():
    from cai.models.policy import load

    with pytest.raises(CaiError, match=r"cannot be had .* the network"):
        load(section(Path("nobody/nothing-at-all")), "cpu")


def test_a_module_that_is_not_there_is_told_before_the_first_token(llama):
    from cai.models.loading import check_modules
    from cai.models.policy import load

    model = load(section(llama), "cpu")
    check_modules(model.hf, LORA.target_modules)
    for names in (("c_attn",), ("q_proj", "vproj"), ("lm_head", "q_proj"), ("q_proj", "embed_tokens")):
        with pytest.raises(CaiError, match=r"lora\.target_modules: '\w+' is no linear module .* q_proj"):
            check_modules(model.hf, names)
    model.to_lora(LORA, seed=1)
    check_modules(model.hf, LORA.target_modules)  # wrapped, it has the same modules


def test_a_head_that_training_cannot_compute_is_told_before_the_first_token(tmp_path, project):
    done = m0(project, save_tiny(tmp_path / "gemma2", "gemma2"))
    assert done.returncode == errors.USAGE, done.stderr
    assert "final_logit_softcapping, which training here does not support" in done.stderr


def test_the_dry_run_knows_modules_template_and_date(llama, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    argv = ["cai.toml", "--dry-run", "--set", "model.backend=cpu", "--set", f"model.name={llama}"]
    argv[3:3] = ["model.max_seq_length=32768", "--set"]  # its tokens are bytes
    assert runner.main(argv) == errors.DONE
    assert "float32 on the CPU" in capsys.readouterr().out
    assert runner.main([*argv, "--set", 'lora.target_modules=["q_proj","vproj"]']) == errors.USAGE
    assert "lora.target_modules: 'vproj' is no linear module" in capsys.readouterr().err
    (bare := project / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, bare / name)
    argv[-1] = f"model.name={bare}"
    assert runner.main([*argv, "--set", "model.format=chat"]) == errors.USAGE
    assert 'has no chat template; set format = "base"' in capsys.readouterr().err


STAGES = ("instructions", "answers", "critiques", "revisions")
TINY = [
    "pairs.label=always",
    "evaluation.enabled=false",
    "dpo.max_steps=2",
    "dpo.max_length=512",
]
TINY += ["lora.rank=2", "lora.alpha=4", *(f"few_shot.{stage}=0" for stage in STAGES)]
TINY += [f"sampling.{stage}.max_new_tokens=24" for stage in STAGES]


def m0(project: Path, folder: Path, *more: str, program: str = "bench/noise.py") -> subprocess.CompletedProcess:
    """Through bench/noise.py, whose parser makes a text of whatever random weights write."""
    sets = [word for text in (f"model.name={folder}", "model.backend=cpu", *TINY) for word in ("--set", text)]
    command = [sys.executable, str(ROOT / program), "cai.toml", *(sets if "--resume" not in more else []), *more]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=600)


def test_a_whole_m0_on_a_random_checkpoint_and_no_other_one_under_its_name(project, llama):
    """Made, killed at a stage, the folder's weights exchanged: the resume tells; put back, it ends and trains."""
    folder = project / "Tiny"
    shutil.copytree(llama, folder)
    done = m0(project, folder, "--until", "answers")
    assert done.returncode == errors.DONE, done.stdout + done.stderr
    assert f"m0 runs on {folder} on the CPU, in float32." in done.stdout
    run = (project / "runs" / "latest").resolve()
    facts = orjson.loads((run / "manifest.json").read_bytes())["model"]
    assert facts["revision"].startswith("content:") and facts["backend"] == "cpu"
    save_tiny(folder, "llama", seed=4)
    drift = m0(project, folder, "--resume", "runs/latest")
    assert drift.returncode == errors.DRIFT and "revision: 'content:" in drift.stderr, drift.stderr
    shutil.rmtree(folder)
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    drift = m0(project, folder, "--resume", "runs/latest")
    assert drift.returncode == errors.DRIFT and "tokenizer: 'content:" in drift.stderr, drift.stderr
    save_tiny(folder, "llama", seed=4)
    forked = m0(project, folder, "--fork", "runs/latest")
    assert forked.returncode == errors.DONE, forked.stderr
    new = (project / "runs" / "latest").resolve()
    assert new != run
    assert orjson.loads((new / "manifest.json").read_bytes())["model"] == facts  # a fork knows what wrote its texts
    drift = m0(project, folder, "--resume", "runs/latest")
    assert drift.returncode == errors.DRIFT
    shutil.rmtree(folder)
    shutil.copytree(llama, folder)
    done = m0(project, folder, "--resume", "runs/latest")
    assert done.returncode in (errors.DONE, errors.GATE), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (new / "adapter" / "adapter_model.safetensors").is_file()


def test_another_model_in_the_embedded_ones_place_runs_under_its_own_name(llama, monkeypatch):
    from cai.models.policy import load

    monkeypatch.setenv("CAI_EMBEDDED", str(llama))
    model = load(ModelSection(format="chat", quantization="fp32", max_seq_length=512), "embedded")
    assert model.name == model.facts["model"] == "Tiny-Llama"
    assert model.facts["revision"].startswith("content:")
    monkeypatch.setenv("CAI_EMBEDDED", str(llama / "none"))
    with pytest.raises(CaiError, match=r"CAI_EMBEDDED: .*no such folder"):
        load(ModelSection(format="chat"), "embedded")


def test_a_pinned_model_is_loaded_by_the_name_that_was_given(monkeypatch):
    """A commit belongs to the repository that was named: the quantised twin has none of that name."""
    import unsloth

    from cai.models import loading, policy

    said, asked = [], []
    pinned = ModelSection(name="Qwen/Qwen2.5-32B", revision="1818d358", quantization="nf4")
    assert policy.resolve_name(pinned, said.append) == "Qwen/Qwen2.5-32B" and not said
    monkeypatch.setattr(unsloth.FastLanguageModel, "from_pretrained", lambda **given: asked.append(given) or (1, 2))
    loading.by_unsloth(pinned, "cuda", "Qwen/Qwen2.5-32B")
    assert asked[0]["revision"] == "1818d358" and asked[0]["use_exact_model_name"] is True
    assert asked[0]["use_safetensors"] is True and asked[0]["trust_remote_code"] is False
    free = pinned.model_copy(update={"revision": "main"})
    assert policy.resolve_name(free, said.append) == "unsloth/Qwen2.5-32B-bnb-4bit"
    assert "already quantised to 4 bits" in said[-1]
    bf16 = free.model_copy(update={"quantization": "bf16"})
    if policy.resolve_name(bf16, said.append) != "Qwen/Qwen2.5-32B":
        assert "quantised" not in said[-1]
