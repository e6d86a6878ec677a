"""A project's own prompts/judge.yaml and judge_pair.yaml: a run measures with them wherever it is gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import read_jsonl

from cai import errors
from cai.commands.verify import verify

Runner = Callable[..., tuple[int, Path]]
JUDGE = ("judge.yaml", "judge_pair.yaml")
KEYS = (
    "items=2", "heldout.items=1", "rounds=1", "dpo.max_steps=1", "evaluation.critic_items=0",
    "evaluation.fresh_items=1", "evaluation.neutral_passages=2", 'evaluation.probes=""',
)  # fmt: skip
FEW = ("--milestone", "m1", *(word for key in KEYS for word in ("--set", key)))


def reword(project: Path) -> None:
    for name in JUDGE:
        path = project / "prompts" / name
        path.write_text(path.read_text() + "\n# another hand\n")


def scores(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "eval").glob("scores*.jsonl")}


@pytest.mark.runs
@pytest.mark.parametrize("label", ["judge", "always"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_resume_by_the_runs_own_recipe_judges_with_the_same_prompts(
    run_fake: Runner, project: Path, label: str, lost: bool
) -> None:
    """It measured all anew with the prompts that come with the project. `lost`: a run of before they were copied."""
    reword(project)
    _, run = run_fake(*FEW, "--set", f"pairs.label={label}")
    before = scores(run)
    for name in JUDGE:
        copy = run / "prompts" / name
        assert copy.read_bytes() == (project / "prompts" / name).read_bytes()
        if lost and (label == "always" or name == "judge.yaml"):  # else a stage's prompt, which always had its copy
            copy.unlink()
    import runner

    assert runner.main([str(run / "recipe.toml"), "--resume", str(run)]) == errors.DONE
    assert scores(run) == before and list(before) == ["scores.jsonl"]
    assert all((run / "prompts" / name).is_file() for name in JUDGE)
    assert not [check for check in verify(run) if check.verdict == "FAIL"]


@pytest.mark.runs
def test_another_judge_prompt_is_no_other_run_and_drops_no_record(run_fake: Runner, project: Path) -> None:
    """What it judged is measured again: the score log has its mark."""
    _, run = run_fake(*FEW, "--set", "pairs.label=always")
    before = scores(run)["scores.jsonl"]
    reword(project)
    code, same = run_fake("--resume", run.name, fake=())
    assert (code, same) == (errors.DONE, run) and len(scores(run)) == 2 and before in scores(run).values()
    assert (run / "prompts" / "judge.yaml").read_bytes() == (project / "prompts" / "judge.yaml").read_bytes()
    reword(project)
    known = {path.name for path in run.parent.iterdir()}
    assert run_fake(*FEW, "--set", "pairs.label=always", "--fork", str(run))[0] == errors.DONE
    fork = next(path for path in run.parent.iterdir() if path.name not in known and path.is_dir())
    assert read_jsonl(fork / "records.jsonl") == read_jsonl(run / "records.jsonl")


@pytest.mark.runs
def test_a_project_without_them_takes_those_that_come_with_it(run_fake: Runner, project: Path) -> None:
    (project / "prompts" / "judge.yaml").unlink()
    code, run = run_fake(*FEW, "--set", "pairs.label=always")
    assert code == errors.DONE and not any((run / "prompts" / name).exists() for name in JUDGE)
    assert "preference.p3" in {row["metric"] for row in read_jsonl(run / "eval" / "scores.jsonl")}
