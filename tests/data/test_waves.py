"""Tries of slots without a pair: one that has nothing to try is not announced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import read_jsonl

LINES = (
    "How do I mend a bicycle tyre?",
    "What makes bread rise?",
    "How far is the moon?",
    "Why is the sky blue?",
    "How do I fold a shirt?",
)


@pytest.mark.runs
def test_a_file_with_too_few_lines_is_told_once_and_no_empty_try_is_announced(
    run_fake: Callable[..., tuple[int, Path]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "five.txt").write_text("\n".join(LINES) + "\n")
    _, run = run_fake("--milestone", "m1", "--set", "instructions.file=five.txt", "--until", "pairs")
    said = "".join(capsys.readouterr())
    assert said.count("no line is left for") <= 1
    tried = {row["item"] // 1_000_000 for row in read_jsonl(run / "records.jsonl") if row["stage"] == "answers"}
    assert said.count("have no pair yet") == len(tried - {0})
    assert len(re.findall(r"have no pair yet \(\w+ \d+", said)) == len(tried - {0}), "and why"
