"""--dry-run of reviews by topic: the examples that the run shows, and room for the longest choice of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import FAKE, ROOT

import runner
from cai import errors
from cai.commands import cli, dry_run
from cai.data import rounds
from cai.inputs import read_inputs
from cai.models.tokenizer_file import ByteCounter

Runner = Callable[..., tuple[int, Path]]


def heads(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    """Stage -> the two lines above its prompt."""
    capsys.readouterr()
    assert runner.main([str(ROOT / "cai.toml"), "--milestone", "m1", *FAKE, *more, "--dry-run"]) == errors.DONE
    out = capsys.readouterr().out.split("\n--- ")[1:]
    return {part.partition(" ")[0]: "\n".join(part.splitlines()[:2]) for part in out}


@pytest.mark.parametrize("transcript", ["separate", "joint"])
def test_a_review_s_prompt_is_that_of_the_run(capsys: pytest.CaptureFixture[str], transcript: str) -> None:
    """It showed the file's first four examples, which no review of the run is shown, and counted those."""
    given = ("--set", f'critiques.transcript="{transcript}"')
    said = heads(capsys, *given)
    inputs = read_inputs(cli.parse([str(ROOT / "cai.toml"), "--milestone", "m1", *FAKE, *given, "--dry-run"]))
    for stage in ("critiques", "revisions"):
        principle = dry_run.first_principle(inputs)
        shift = rounds.shots_of(inputs.recipe, inputs.prompts, stage, 0, principle, "benign")
        counter = ByteCounter()
        tokens = dry_run.counted(counter, dry_run.render(inputs, stage, counter, shift))[0]
        shown = len(inputs.prompts[stage].order(shift))
        assert isinstance(shift, tuple) and f": ~{tokens} tokens" in said[stage] and f" {shown} examples" in said[stage]
        assert "these examples (of 4 choices); under " in said[stage] and ", the most; then" in said[stage]
    assert "in every prompt; then" in said["answers"]


@pytest.mark.parametrize(("shown", "examples"), [(0, 0), (1, 1), (-1, 3), (200, 3)])
def test_the_number_of_examples_is_what_is_shown(capsys: pytest.CaptureFixture[str], shown: int, examples: int) -> None:
    said = heads(capsys, "--set", f"few_shot.critiques={shown}")["critiques"]
    assert f" {examples} example{'s' * (examples != 1)}, " in said


def test_room_is_asked_for_the_longest_choice(capsys: pytest.CaptureFixture[str]) -> None:
    """The first four fit, so it was told to start; then every review of another topic was a rejected row."""
    given = ("--set", "model.max_seq_length=2400", "--dry-run")
    assert runner.main([str(ROOT / "cai.toml"), "--milestone", "m1", *FAKE, *given]) == errors.USAGE
    said = capsys.readouterr().err
    assert "revisions.yaml: " in said and " tokens under " in said and "exceed model.max_seq_length = 2400" in said
    assert said.count("\n") == 1


@pytest.mark.runs
def test_a_run_says_it_before_it_draws_and_again_where_no_pair_is_left(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended with "change prompts, or raise pairs.replacements"."""
    code, _ = run_fake("--milestone", "m0", "--set", "model.max_seq_length=1500", "--until", "pairs")
    said = capsys.readouterr()
    first = next(line for line in said.out.splitlines() if line.startswith("revisions: under "))
    assert "leave no room in model.max_seq_length = 1500: all are refused (prompt_too_long)" in first
    assert said.out.index(first) < said.out.index("model: fake loaded"), "before anything is drawn"
    assert code == errors.QUALITY and "then shorten the examples or raise model.max_seq_length: " in said.err
