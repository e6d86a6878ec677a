"""The real lm_eval package on small tasks of our own (tests/lm_tasks), offline, against its own backend."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import ROOT, read_jsonl

from cai import errors
from cai.evaluate.lm_eval import tasks
from cai.evaluate.scores import Evaluation
from cai.recipe.load import read, resolve
from cai.run.folder import Run

Runner = Callable[..., tuple[int, Path]]
TASKS = ("cai_colours", "cai_opposites")
SETS = ["evaluation.lm_eval=" + json.dumps(TASKS), "evaluation.lm_eval_include=tests/lm_tasks"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: make lm-eval"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(ROOT)  # the tasks name their documents from here


def quiet_progress() -> SimpleNamespace:
    return SimpleNamespace(**{name: lambda *_, **__: None for name in ("begin", "end", "step", "committed")})


def bench_of(model, folder: Path) -> Evaluation:  # type: ignore[no-untyped-def]
    recipe = resolve(read(ROOT / "cai.toml"), milestone="m1", sets=SETS, embedded=True)
    context = SimpleNamespace(
        recipe=recipe, run=Run(folder, {"model": {"model": "embedded"}}, None), model=lambda: model,
        progress=quiet_progress(), stopped=lambda: False, check_stop=lambda where: None,
    )  # fmt: skip
    return Evaluation(context, None, folder / "adapter", None)  # type: ignore[arg-type]


def move_adapter(model) -> None:  # type: ignore[no-untyped-def]
    """An adapter that has moved far enough to be seen in every log-prob."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.hf.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn_like(weight) * 0.02)


def by_its_own_backend(model, manager) -> dict:  # type: ignore[no-untyped-def]
    """Samples as lm_eval's HFLM gives them for the same weights and tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model.hf, tokenizer=model.hf_tokenizer, batch_size=4)
    return simple_evaluate(model=lm, tasks=list(TASKS), bootstrap_iters=0, task_manager=manager)["samples"]


def test_both_arms_on_the_embedded_model_are_those_of_lm_evals_own_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai.models.policy import load
    from cai.recipe.settings import LoraSection, ModelSection

    model = load(ModelSection(format="chat", quantization="fp32", max_seq_length=512), "embedded")
    model.to_lora(LoraSection(rank=4, alpha=8))
    move_adapter(model)
    evaluation = bench_of(model, tmp_path)
    model.attached = evaluation.adapter
    measured = tasks.measure(evaluation, ROOT)
    found = tasks.figures(measured)
    assert [found[f"forgetting.{name}_delta"].n for name in TASKS] == [6, 5]
    assert all(figure.facts["test"] == "exact McNemar" for figure in found.values())
    manager = tasks.tasks_at_hand(evaluation.section, ROOT)
    rows = read_jsonl(tmp_path / "eval/lm_eval.jsonl")
    model.release()
    for arm in tasks.ARMS:
        with model.adapter(arm == "tuned"):
            theirs = by_its_own_backend(model, manager)
        mine = {(row["kind"], row["item"]): row for row in rows if row["arm"] == arm and "kind" in row}
        for sample in theirs["cai_colours"]:
            for arguments, ((logp, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
                row = mine["loglikelihood", tasks.HarnessRequest("loglikelihood", tuple(arguments)).item]
                assert row["logp"] == pytest.approx(float(logp), abs=2e-3) and row["greedy"] == greedy
        for sample in theirs["cai_opposites"]:
            row = mine["generate_until", tasks.HarnessRequest("generate_until", tuple(sample["arguments"][0])).item]
            assert row["text"] == sample["resps"][0][0]
        for name, metric in zip(TASKS, ("acc", "exact_match"), strict=True):
            assert measured[name][arm] == {(name, row["doc_id"]): float(row[metric]) for row in theirs[name]}
    assert measured[TASKS[0]]["base"] and len({row["logp"] for row in rows if "logp" in row}) > 18  # the arms differ
    monkeypatch.setattr(tasks, "answer", lambda *_: pytest.fail("a request was asked twice"))
    assert tasks.measure(bench_of(None, tmp_path), ROOT) == measured


@pytest.fixture
def own_tasks(project: Path, run_fake: Runner) -> Runner:
    """Whole runs in a project folder that holds the tasks."""
    shutil.copytree(ROOT / "tests/lm_tasks", project / "tests/lm_tasks")
    return run_fake


def test_a_whole_run_with_the_real_package(own_tasks: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    sets = [argument for text in SETS for argument in ("--set", text)]
    code, run = own_tasks("--milestone", "m0", *sets)
    assert code == errors.DONE
    figures = json.loads((run / "eval/measured.json").read_text())["figures"]
    assert figures["forgetting.cai_colours_delta"]["n"] == 6 and figures["forgetting.cai_opposites_delta"]["n"] == 5
    told = capfd.readouterr()
    assert "Generating" not in told.err and "WARNING" not in told.err + told.out
    code, again = own_tasks("--milestone", "m0", *sets, "--set", 'evaluation.lm_eval=["cai_colors"]')
    error = capfd.readouterr().err.strip().splitlines()
    assert code == errors.USAGE and len(error) == 1 and "Did you mean cai_colours?" in error[0]
    assert read_jsonl(again / "records.jsonl") == []
