"""A judge that answers with no number: every verdict of it is unscored, nowhere a class, a rating or a pass."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from support import rich_run as rich
from support.runs import PAPERS_WAY

from cai import pipeline
from cai.data import comparisons
from cai.engine import Score
from cai.evaluate import likelihood
from cai.metrics.figure import Unscored
from cai.models.fake import FakeEngine

BAD = [math.nan, -math.inf]


@pytest.fixture(params=BAD, ids=["NaN", "minus infinity"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every log-probability of a word that a judge may answer with is no finite number."""
    real, measuring = FakeEngine.score, []
    evaluate = pipeline.evaluate

    def measured(*args: Any) -> Any:
        measuring.append(True)  # the data are made before: here the judges of what was made are looked at
        return evaluate(*args)

    monkeypatch.setattr(pipeline, "evaluate", measured)
    words = {"1", "2", "3", "Yes", "No", "A", "B", "Safe", "yes", "no"}

    def score(self: FakeEngine, requests: Any, *more: Any) -> Iterator[Any]:
        asked = list(requests)
        said = {one.id: self_decode(self, one.continuation_ids).strip() for one in asked}
        for found in real(self, asked, *more):
            bad = bool(measuring) and said[found.id] in words
            yield type(found)(found.id, (request.param,) * max(len(found.logps), 1)) if bad else found

    monkeypatch.setattr(FakeEngine, "score", score)


def self_decode(engine: FakeEngine, ids: Any) -> str:
    from cai.engine.tokenizers import ByteTokenizer

    return ByteTokenizer().decode(ids)


@pytest.mark.runs
def test_a_judge_without_a_number_is_unscored_in_every_figure(broken: None, tmp_path: Path) -> None:
    folder = rich.project(tmp_path)
    code, said = rich.go(folder, *rich.RICH, "--set", 'evaluation.judge="require"')
    assert code == 0 and "Traceback" not in said, said
    run = rich.latest(folder)
    figures = orjson.loads((run / "eval" / "benchmarks.json").read_bytes())["figures"]
    for name in ("xstest.over_refusal.base", "xstest.over_refusal.tuned", "xstest.over_refusal_rise"):
        assert (figures[name]["value"], figures[name]["n"]) == (None, 0) and figures[name]["unscored"] == 3
    measured = orjson.loads((run / "eval" / "measured.json").read_bytes())["figures"]
    for name in ("critiques.meaningful", "revisions.addresses", "revisions.improves", "preference.p3"):
        assert measured[name]["value"] in (None, 0.0), name
        assert measured[name]["n"] == 0 or measured[name]["value"] == 0.0
    check = orjson.loads((run / "eval" / "checks.json").read_bytes())["checks"]["xstest"]
    assert check["undecided"] == check["n"] and not check["proven"]
    assert rich.go(folder, "--resume", "runs/latest")[0] == 0


@pytest.mark.runs
@pytest.mark.parametrize("values", [(math.nan,), (math.inf, -1.0), (math.nan, math.inf, -math.inf, -2.0)], ids=str)
def test_likelihoods_that_are_no_number_are_unscored_in_pairs_arms_and_groups(
    values: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score while a run is measured, the pairs' own log-probabilities too, and a comparison of such runs."""
    real, evaluate, measuring = FakeEngine.score, pipeline.evaluate, []

    def measured(*args: Any) -> Any:
        measuring.append(True)
        return evaluate(*args)

    def score(self: FakeEngine, requests: Any, *more: Any) -> Iterator[Any]:
        for n, found in enumerate(real(self, list(requests), *more)):
            bad = tuple(values[(n + place) % len(values)] for place, _ in enumerate(found.logps))
            yield type(found)(found.id, bad) if measuring else found

    monkeypatch.setattr(pipeline, "evaluate", measured)
    monkeypatch.setattr(FakeEngine, "score", score)
    folder = rich.project(tmp_path)
    code, said = rich.go(folder, *rich.RICH, *PAPERS_WAY, "--set", 'evaluation.judge="require"')
    assert code == 0 and "Traceback" not in said, said
    run = rich.latest(folder)
    for path in run.rglob("*.json"):
        assert not re.search(rb"[:\[,]\s*-?(NaN|Infinity)\b", path.read_bytes()), path
    figures = orjson.loads((run / "eval" / "measured.json").read_bytes())["figures"]
    figures |= orjson.loads((run / "eval" / "sft.json").read_bytes())["figures"]
    if -1.0 not in values and -2.0 not in values:
        for name in ("preference.p1", "dpo_over_sft.preference.p1", "dpo_over_sft.forgetting.nll_delta"):
            assert (figures[name]["value"], figures[name]["n"]) == (None, 0) and figures[name]["unscored"] > 0, name
    tried = figures["dpo_over_sft.preference.p1"]
    assert tried["n"] + tried["unscored"] == 2, "each held-out pair is counted"
    for argv in (("--report", "runs/latest"), ("--compare", "runs/latest", run.name)):
        assert rich.go(folder, *argv)[0] == 0


def test_an_order_that_is_infinite_is_no_win() -> None:
    scores = {
        (0, "j4", order, letter): Score(0, (value,))
        for order, pair in enumerate(((0.0, -math.inf), (-math.inf, 0.0)))
        for letter, value in zip("AB", pair, strict=True)
    }
    assert math.isnan(comparisons.pair_win(scores, (0,)))
    assert likelihood._contrast(-1.0, [math.inf, -math.inf], "none") == Unscored("none")
