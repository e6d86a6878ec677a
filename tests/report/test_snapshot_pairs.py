"""What the report, the comparison and the review read of a run's pairs is what the run itself kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import CALIBRATED, read_jsonl

from cai.report.snapshot import read_story


@pytest.mark.runs
def test_a_story_has_the_pairs_that_the_run_wrote(run_fake: Callable[..., tuple[int, Path]]) -> None:
    """Rounds that find nothing, labels: an item without a second critique is a pair and no gap."""
    _, run = run_fake("--milestone", "m1", "--until", "pairs", *CALIBRATED)
    written = {row["item"] for row in read_jsonl(run / "dataset" / "pairs" / "train.jsonl")}
    story = read_story(run)
    assert {pair["item"] for pair in story.pairs.kept} == written
    assert story.pairs.reasons.keys() <= {"no_issue"}, "a round without a critique is no gap"
    assert any(len(example["rounds"]) < story.recipe.rounds for example in story.pairs.examples)
