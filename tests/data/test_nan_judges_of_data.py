"""A judge without a number while the data are made: its row is unscored and rejected, never a label or a verdict.

The judges: relevance ("does this answer break the rule?"), the calibrated critic, the check of labels, the guard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import read_jsonl

from cai import errors
from cai.data import labels
from cai.engine.tokenizers import ByteTokenizer
from cai.models.fake import FakeEngine
from cai.models.guard import HashGuard, Judgement

Runner = Callable[..., tuple[int, Path]]
WORDS = {  # judge -> what it may answer with; the critic is asked for the first token of "No"
    "relevance": ("Yes",),
    "critic": ("N", " N", " "),
    "critic alone": ("N", " N", " "),
    "labels": ("A", "B"),
    "guard": (),
}
KEYS = {
    "relevance": ("principles.by=rule_check",),
    "critic": ("critiques.found=calibrated", "principles.by=rule_check"),
    "critic alone": (),
    "labels": ('principles.choice="uniform"', 'critiques.no_issue="revise"'),
    "guard": ('principles.choice="uniform"', 'critiques.no_issue="revise"', 'pairs.label="always"',
              "guard.enabled=true", 'guard.model="stand-in"', "checks.enabled=false"),
}  # fmt: skip
STAGE = {
    "relevance": "relevance",
    "critic": "relevance",
    "critic alone": "relevance",
    "labels": "labels",
    "guard": "guard",
}


def spoil(monkeypatch: pytest.MonkeyPatch, judge: str, values: tuple[float, ...]) -> list[int]:
    """Every log-prob of one of the judge's words becomes one of `values` in turn. Gives a list that counts them."""
    real, hits = FakeEngine.score, [0]

    def judged(self: HashGuard, exchanges: Any, context: Any) -> list[Judgement]:
        hits[0] += 1
        return [Judgement(values[(hits[0] + i) % len(values)], "Safe") for i, _ in enumerate(exchanges)]

    if judge == "guard":  # the fake model's guard reads no likelihood; of others `choices` gives none that is no number
        monkeypatch.setattr(HashGuard, "judge", judged)
        return hits

    def score(self: FakeEngine, requests: Any, *more: Any) -> Iterator[Any]:
        asked = list(requests)
        said = {one.id: ByteTokenizer().decode(one.continuation_ids) for one in asked}
        for found in real(self, asked, *more):
            if said[found.id] in WORDS[judge] or said[found.id].strip() in WORDS[judge]:
                hits[0] += 1
                yield type(found)(found.id, (values[hits[0] % len(values)],) * max(1, len(found.logps)))
            else:
                yield found

    monkeypatch.setattr(FakeEngine, "score", score)
    return hits


@pytest.mark.runs
@pytest.mark.parametrize("values", [(math.nan,), (-math.inf,), (math.nan, -math.inf, -1.0)], ids=str)
@pytest.mark.parametrize("judge", WORDS)
def test_what_a_judge_did_not_score_is_rejected_as_unscored(
    judge: str, values: tuple[float, ...], run_fake: Runner, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hits = spoil(monkeypatch, judge, values)
    sets = [word for key in (*KEYS[judge], "items=4", "pairs.retries=0", "pairs.replacements=0")
            for word in ("--set", key)]  # fmt: skip
    code, run = run_fake("--milestone", "m1", *sets, "--until", "pairs")
    said = capsys.readouterr()
    assert "Traceback" not in said.err and hits[0] > 0
    rows = [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == STAGE[judge]]
    assert rows, "the judge was asked"
    if -1.0 not in values:  # nothing was scored: nothing may pass, and nothing may be called sound
        assert code == errors.QUALITY
        assert all(row["status"] == "rejected" or judge == "labels" for row in rows)
        kept = run / "dataset" / "pairs" / "train.jsonl"
        assert not kept.exists() or not kept.read_bytes()
    for row in rows:
        if STAGE[judge] == "relevance":
            blind = any(value is None for value in {**row["scores"], **(row.get("evidence") or {})}.values())
            assert not (row["status"] == "ok" and row["principle"] is None and blind), "nothing broken, and not looked"
            assert row["status"] == "ok" or row["reason"].startswith("unscored: ")
        elif judge == "labels":
            unscored = row["first"] is None or row["second"] is None
            assert not unscored or labels.fault(row).startswith("unscored: ")
        else:
            unscored = row["chosen_unsafe"] is None or row["rejected_unsafe"] is None
            assert not unscored or (row["status"] == "rejected" and row["reason"].startswith("unscored: "))


def test_two_infinities_of_one_label_are_no_number_and_no_error() -> None:
    assert math.isnan(labels._mean([math.inf, -math.inf])) and math.isnan(labels._mean([0.0, math.nan]))
    assert labels._mean([1.0, 2.0]) == 1.5
