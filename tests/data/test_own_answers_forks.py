"""Forks of a run with own answers (`sft.answers`): with another prompt file, and with less than the source had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import read_jsonl

from cai import errors
from cai.commands.status import screen
from cai.commands.verify import verify
from cai.data.slots import HELDOUT, slot_of

Runner = Callable[..., tuple[int, Path]]
KEYS = (
    "items=3", "rounds=1", "heldout.items=2", 'dpo.start="sft"', "dpo.max_steps=2", "evaluation.enabled=false",
    'evaluation.probes=""', "sft.answers=5",
)  # fmt: skip


def sets(*keys: str) -> tuple[str, ...]:
    return ("--milestone", "m1", *(word for key in (*KEYS, *keys) for word in ("--set", key)))


EDITS = {
    "answers.yaml": ("Every response answers its instruction", "Each response answers its instruction"),
    "grid.yaml": ("    - bread baking\n", "    - bread baking\n    - pottery\n"),
}


def forked(run_fake: Runner, source: Path, *keys: str) -> Path:
    before = {path.name for path in source.parent.iterdir()}
    assert run_fake(*sets(*keys), "--fork", str(source))[0] == errors.DONE
    return next(path for path in source.parent.iterdir() if path.name not in before and path.is_dir())


def faults(run: Path) -> list[str]:
    return [f"{check.promise}: {check.found}" for check in verify(run) if check.verdict == "FAIL"]


@pytest.mark.runs
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("until", ["", "sft_instructions"])
def test_with_another_prompt_file_it_is_a_run_from_nothing(
    run_paper: Runner, project: Path, name: str, until: str
) -> None:
    """`until`: the source was stopped among its own answers."""
    _, source = run_paper(*sets(), *(("--until", until) if until else ()))
    stage, path = "sft_answers" if name == "answers.yaml" else "sft_instructions", project / "prompts" / name
    old, new = EDITS[name]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    fork = forked(run_paper, source)
    (event,) = (row for row in read_jsonl(fork / "events.jsonl") if row["kind"] == "forked")
    assert event["changed"][stage] == [f"sha256(prompts/{name})"]
    kept = {row["stage"] for row in read_jsonl(fork / "records.jsonl")}
    assert kept == ({"instructions"} if name == "answers.yaml" else set()) and not faults(fork)
    assert "sft_answers" not in screen(fork)
    for _ in range(2):  # the second finds all done
        assert run_paper("--resume", fork.name, fake=())[0] == errors.DONE
    assert not faults(fork) and not faults(source)
    told = screen(fork)
    assert "state        done" in told and "sft_instructions 5 accepted" in told and "sft_answers  5 accepted" in told
    assert run_paper("--report", fork.name, fake=())[0] == errors.DONE
    _, anew = run_paper(*sets())
    assert anew != fork
    for log in ("records.jsonl", "train/sft/inputs.json", "dataset/pairs/train.jsonl"):
        assert (fork / log).read_bytes() == (anew / log).read_bytes()
    mine, theirs = (
        [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == stage] for run in (fork, source)
    )
    assert len(mine) == 5 and not [row for row in mine if row in theirs]
    assert json.loads((fork / "train" / "sft" / "result.json").read_bytes())["pairs"] == 3 + 5


@pytest.mark.runs
def test_rows_that_the_fork_does_not_ask_for_are_not_made_again(
    run_paper: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Own answers, items, rounds and a guard that are fewer or off now: it told of their time and tokens."""
    guard = ("guard.enabled=true", 'guard.model="stand-in"')
    _, source = run_paper(*sets("rounds=2", *guard))
    warm = "sampling.answers.temperature=0.3"

    def told(*keys: str) -> str:
        capsys.readouterr()
        assert run_paper(*sets(warm, "rounds=2", *guard, *keys), "--fork", str(source), "--dry-run")[0] == errors.DONE
        return capsys.readouterr().out

    same = told()
    assert "others go" not in same and "sft_answers: 5 again" in same and "changed for sft_answers" in same
    fewer = told("sft.answers=2")
    assert "  6 others go, which this recipe does not ask for" in fewer and "sft_answers: 2 again" in fewer
    for off in ("sft.answers=0", 'dpo.start="base"'):
        assert "  10 others go" in told(off) and "sft_" not in told(off), off
    rows = read_jsonl(source / "records.jsonl")

    def count(stage: str, *, slots: tuple[int, ...] = (0, 1, 2, HELDOUT, HELDOUT + 1), rounds: int = 2) -> int:
        mine = [row for row in rows if row["stage"] == stage and row["round"] < rounds]
        return sum(slot_of(row["item"]) in slots for row in mine)

    two, one = told("items=2"), told("rounds=1")
    for stage in ("answers", "critiques", "revisions"):
        assert f"  {stage}: {count(stage, slots=(0, 1, HELDOUT, HELDOUT + 1))} again" in two
        assert f"  {stage}: {count(stage, rounds=1)} again" in one
    assert f"  {count('guard')} others go" in told("guard.enabled=false")


@pytest.mark.runs
def test_a_dry_run_of_a_fork_tells_nothing_of_answers_that_stand(
    run_paper: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = run_paper(*sets())
    for asked, said in ((5, ""), (8, "SFT: further requests, 3 answers")):
        fork = forked(run_paper, source, "dpo.beta=0.3", f"sft.answers={asked}")
        capsys.readouterr()
        assert run_paper("--resume", fork.name, "--dry-run", fake=())[0] == errors.DONE
        out = capsys.readouterr().out
        assert said in out and ("further requests" in out) == bool(said)
