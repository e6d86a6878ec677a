"""An answer is asked about the principles that are for its request's pool, and about no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import read_jsonl

from cai.recipe.constitution import load_constitution

REPO = Path(__file__).parents[2]
RELEVANT = ("--set", 'principles.choice="relevant"', "--set", "items=4", "--set", "heldout.items=4")


@pytest.mark.runs
@pytest.mark.parametrize("by", ["critic", "rule_check"])
def test_scores_are_of_the_principles_that_fit_and_one_of_them_is_drawn(
    run_fake: Callable[..., tuple[int, Path]], by: str
) -> None:
    _, run = run_fake("--milestone", "m1", "--until", "answers", *RELEVANT, "--set", f'principles.by="{by}"')
    _, run = run_fake("--resume", str(run), "--until", "relevance")
    fits = {
        pool: {p.id for p in load_constitution(REPO / "constitution.yaml").principles if pool in (p.pools or (pool,))}
        for pool in ("benign", "redteam")
    }
    rows = [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == "relevance"]
    assert {row["pool"] for row in rows} == {"benign", "redteam"} and fits["redteam"] < fits["benign"]
    for row in rows:
        assert row["scores"].keys() == fits[row["pool"]]
        assert row["principle"] is None or row["principle"] in fits[row["pool"]]
