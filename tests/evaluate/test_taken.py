"""What a fork takes along of its source's scores, and that whatever they depend on has them measured again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import PAPERS_WAY, read_jsonl

from cai import errors
from cai.evaluate import taken

pytestmark = pytest.mark.runs
Runner = Callable[..., tuple[int, Path]]
FEW = ("--milestone", "m1", "--set", "items=3", "--set", "dpo.max_steps=2", "--set", "evaluation.critic_items=0")
FEW = (*FEW, "--set", "evaluation.judge_items=2", *PAPERS_WAY)


def measured(run: Path) -> set[str]:
    """The metrics of the base that this run's own attempts scored."""
    stages = [str(e["stage"]) for e in read_jsonl(run / "events.jsonl") if e["kind"] == "stage"]
    return {name for name in taken.METRICS if f"evaluate {name}" in stages}


def of_base(run: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(run / "eval" / "scores.jsonl")
    return [row for row in rows if row["metric"] in (*taken.METRICS, taken.MARK)]


def marks(run: Path) -> list[str]:
    return [row["of"] for row in of_base(run) if row["metric"] == taken.MARK]


def forked(run_fake: Runner, source: Path, *sets: str) -> Path:
    words = [word for text in sets for word in ("--set", text)]
    assert run_fake("--fork", str(source), *words, fake=())[0] == 0
    code, run = run_fake("--resume", "runs/latest", fake=())
    assert code == 0 and run != source
    return run


def test_another_beta_measures_nothing_of_the_base_again(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    _, first = run_fake(*FEW)
    assert measured(first) == set(taken.METRICS) and len(marks(first)) == 1
    capsys.readouterr()
    second = forked(run_fake, first, "dpo.beta=0.3")
    assert measured(second) == set() and of_base(second) == of_base(first)
    assert "scores of the base taken" in capsys.readouterr().out
    third = forked(run_fake, second, "dpo.beta=0.4", "evaluation.train_pairs=1")
    assert measured(third) == set() and of_base(third) == of_base(first), "a fork of a fork, and a key of the tuned"
    tuned = [row for row in read_jsonl(second / "eval/scores.jsonl") if row["metric"] == "preference.pairs"]
    assert tuned, "what the adapter decides is the fork's own"
    _, fresh = run_fake(*FEW, "--set", "dpo.beta=0.3")
    ours, theirs = ((run / "eval/scores.jsonl").read_bytes().split(b"\n")[2:] for run in (second, fresh))
    assert ours == theirs, "its log is the one of a run that measured all by itself (two marks apart)"


@pytest.mark.parametrize(
    "changed",
    ["evaluation.max_text_tokens=60", "evaluation.likelihood_items=2", "evaluation.max_echo=0.4", "pairs.retries=0"],
)
def test_another_key_of_the_scores_measures_again(run_fake: Runner, changed: str) -> None:
    _, first = run_fake(*FEW)
    second = forked(run_fake, first, changed)
    assert measured(second) >= {"critiques.csi", "revisions.cri"} and marks(second) != marks(first)


def test_another_judge_prompt_measures_again(run_fake: Runner, project: Path) -> None:
    _, first = run_fake(*FEW)
    prompt = project / "prompts" / "judge.yaml"
    prompt.write_text(prompt.read_text().replace("You ", "You, the reader, ", 1) + "\n# another hand\n")
    second = forked(run_fake, first)
    assert measured(second) == set(taken.METRICS) and marks(second) != marks(first)


def test_another_critique_prompt_and_another_model_measure_again(run_fake: Runner, project: Path) -> None:
    _, first = run_fake(*FEW)
    prompt = project / "prompts" / "critiques.yaml"
    prompt.write_text(prompt.read_text() + "\n# another hand\n")
    second = forked(run_fake, first)
    assert measured(second) == set(taken.METRICS)
    third = forked(run_fake, second, "seed=5")
    assert measured(third) == set(taken.METRICS)


def test_a_judge_of_another_family_is_asked_again(run_fake: Runner) -> None:
    """Its weights may be others by now; what the base scored stands."""
    _, first = run_fake(*FEW, "--set", "evaluation.judge_model=stand-in")
    second = forked(run_fake, first, "dpo.beta=0.3")
    assert measured(second) == set(taken.JUDGED)
    third = forked(run_fake, second, "evaluation.judge_model=")
    assert measured(third) == set(taken.METRICS)


def test_a_fork_that_asks_no_judge_takes_no_word_of_one(run_fake: Runner) -> None:
    """Its log is that of a run that measured by itself."""
    _, first = run_fake(*FEW)
    second = forked(run_fake, first, "evaluation.judge=off")
    assert measured(second) == set() and not [row for row in of_base(second) if row["metric"] in taken.JUDGED]
    _, fresh = run_fake(*FEW, "--set", "evaluation.judge=off")
    ours, theirs = ((run / "eval/scores.jsonl").read_bytes() for run in (second, fresh))
    assert ours == theirs


def test_a_score_that_was_edited_is_not_taken(run_fake: Runner) -> None:
    _, first = run_fake(*FEW)
    log = first / "eval" / "scores.jsonl"
    lines = log.read_bytes().split(b"\n")
    place = next(n for n, line in enumerate(lines) if b'"critiques.csi"' in line)
    lines[place] = lines[place].replace(b'"shuffled":', b'"shuffled":1', 1)
    log.write_bytes(b"\n".join(lines))
    second = forked(run_fake, first, "dpo.beta=0.3")
    assert measured(second) == set(taken.METRICS)


def test_a_run_of_before_has_no_mark_and_gives_nothing(run_fake: Runner) -> None:
    _, first = run_fake(*FEW)
    log = first / "eval" / "scores.jsonl"
    log.write_bytes(
        b"".join(line + b"\n" for line in log.read_bytes().split(b"\n")[:-1] if b'"metric":"base"' not in line)
    )
    log.with_suffix(".sum").unlink()
    before = log.read_bytes()
    second = forked(run_fake, first, "dpo.beta=0.3")
    assert measured(second) == set(taken.METRICS)
    assert run_fake("--resume", str(first), fake=())[0] == 0
    assert log.read_bytes() == before, "a log that was begun before stays as it was"


@pytest.mark.parametrize("log", ["eval/scores.jsonl", "eval/critic.jsonl", "records.jsonl"])
def test_an_edited_log_without_its_sum_file_goes_into_no_fork(
    log: str, run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the sum file is gone the digest decides that the attempt left: a fork would vouch for the edit."""
    _, first = run_fake(*FEW, "--set", "evaluation.critic_items=2")
    path = first / log
    path.write_bytes(path.read_bytes().replace(b'"item":0', b'"item":9', 1))
    path.with_suffix(".sum").unlink()
    capsys.readouterr()
    code, run = run_fake("--fork", str(first), "--set", "dpo.beta=0.3", fake=())
    if log == "records.jsonl":
        assert code == errors.CORRUPT and "records.jsonl" in capsys.readouterr().err
        return
    taken_along = run / "eval" / ("taken.jsonl" if "scores" in log else "critic.jsonl")
    assert code == 0 and run != first and not taken_along.exists()
