"""evaluation.judge_model: J1-J4 and P3 by a second family, and how far the base agrees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from support.experiments import kill_in
from support.runs import read_jsonl

from cai import errors
from cai.engine import Score
from cai.evaluate import agreement, external
from cai.metrics.stats import kappa
from cai.models import auxiliary
from cai.models.auxiliary import Auxiliary
from cai.models.fake import FakeEngine, FakeModel
from cai.recipe.load import Recipe

SMALL = (
    *("--milestone", "m1", "--set", "items=6", "--set", "heldout.items=6", "--set", "evaluation.fresh_items=6"),
    *("--set", "evaluation.probes=", "--set", "evaluation.likelihood_items=4", "--set", "evaluation.judge_items=4"),
)


def other_way(loads: list[str]) -> Any:
    """A second family that says the opposite of the base, and counts how often it is loaded."""

    class Opposite(FakeEngine):
        def score(self, requests: Any, stopped: Any = lambda: False) -> Iterator[Score]:
            for score in super().score(requests, stopped):
                yield Score(score.id, tuple(-lp for lp in score.logps))

    @contextmanager
    def loaded(context: Any, name: str, key: str, **more: Any) -> Iterator[Auxiliary]:
        loads.append(name)
        model = FakeModel(context.recipe.model)
        yield Auxiliary(name, Opposite(model, 16), model.tokenizer, None, 4096, {"model": name})

    return loaded


@pytest.fixture
def judged(run_paper: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    loads: list[str] = []
    monkeypatch.setattr(auxiliary, "loaded", other_way(loads))
    monkeypatch.setattr(auxiliary, "require", lambda *args: None)
    real = FakeEngine._complete

    def complete(self: FakeEngine, request: Any) -> Any:  # some tuned answers are better, some are not
        done = real(self, request)
        better = self.model.tuned and len(done.text) % 2
        return type(done)(done.id, done.token_ids, done.text + " mended" * better, done.finish)

    monkeypatch.setattr(FakeEngine, "_complete", complete)
    code, run = run_paper(*SMALL, "--set", "evaluation.judge_model=other/family")
    assert code == errors.DONE
    return run, loads


@pytest.mark.runs
def test_the_judge_decides_p3_and_the_base_disagrees_on_every_prompt_that_differs(judged: Any) -> None:
    run, _ = judged
    rows = {name: {} for name in ("preference.p3", "preference.p3.base")}
    for row in read_jsonl(run / "eval" / "scores.jsonl"):
        if row["metric"] in rows:
            rows[row["metric"]][row["item"]] = row["log_odds"]
    ours, base = rows.values()
    assert ours.keys() == base.keys() and len(ours) == 6
    assert all(ours[item] == -base[item] for item in ours) and any(ours.values())
    figures = orjson.loads((run / "eval" / "measured.json").read_bytes())["figures"]
    assert figures["preference.p3"]["judge"] == "other/family"
    said = figures["preference.p3.agreement"]
    expected = kappa([ours[item] > 0 for item in ours], [base[item] > 0 for item in ours])
    assert expected is not None and expected < 0
    assert said["value"] == expected and said["n"] == 6
    for name in ("critiques.j1", "critiques.j2", "revisions.j3", "revisions.improves"):
        assert f"{name}.agreement" in figures


@pytest.mark.runs
def test_it_is_loaded_once_a_stretch_of_questions_and_not_once_a_slice(judged: Any) -> None:
    """Critiques and revisions are one stretch, P3 another: the policy answers in between."""
    assert judged[1] == ["other/family"] * 2


@pytest.mark.runs
@pytest.mark.parametrize(
    ("killed_in", "stretches"),
    [("critiques.judge", 2), ("preference.p3", 1), ("preference.p3.base", 0)],
)
def test_a_run_that_was_killed_while_it_was_judged_goes_on_to_the_same_bytes(
    judged: Any, run_paper: Any, killed_in: str, stretches: int
) -> None:
    """The judge is loaded again for what is missing alone: not at all where only the base's own verdicts are."""
    run, loads = judged
    names = [f"eval/{name}" for name in ("scores.jsonl", "measured.json", "gates.json")]
    whole = {name: (run / name).read_bytes() for name in names}
    begun = whole["eval/scores.jsonl"].index(f'"metric":"{killed_in}",'.encode())
    kill_in(run / "eval" / "scores.jsonl", run, whole["eval/scores.jsonl"][: begun + 40])
    for name in names[1:]:
        (run / name).unlink()
    loads.clear()
    assert run_paper("--resume", run.name, fake=())[0] == errors.DONE
    assert {name: (run / name).read_bytes() for name in names} == whole
    assert loads == ["other/family"] * stretches


@pytest.mark.runs
def test_another_judge_begins_a_log_of_its_own_and_the_old_one_is_set_aside(judged: Any, run_paper: Any) -> None:
    run, loads = judged
    before = (run / "eval" / "scores.jsonl").read_bytes()
    loads.clear()
    assert run_paper("--resume", run.name, "--set", "evaluation.judge_model=third/one", fake=())[0] == errors.DONE
    assert loads == ["third/one"] * 2
    (aside,) = [path for path in (run / "eval").glob("scores-*.jsonl")]
    assert aside.read_bytes() == before != (run / "eval" / "scores.jsonl").read_bytes()
    figures = orjson.loads((run / "eval" / "measured.json").read_bytes())["figures"]
    assert figures["preference.p3"]["judge"] == "third/one"


@pytest.mark.runs
def test_a_run_without_such_a_judge_keeps_the_mark_of_its_scores(run_paper: Any) -> None:
    _, run = run_paper(*SMALL)
    before = (run / "eval" / "scores.jsonl").read_bytes()
    assert b".base" not in before and b"agreement" not in (run / "eval" / "measured.json").read_bytes()
    _, again = run_paper("--resume", str(run), fake=())
    assert (again / "eval" / "scores.jsonl").read_bytes() == before


def test_a_judge_that_cannot_be_had_is_told_before_anything_is_made(run_fake: Any, project: Any, capsys: Any) -> None:
    folder = project / "no-model"
    code, _ = run_fake(*SMALL, "--set", f"evaluation.judge_model={folder}")
    assert code == errors.USAGE and not (project / "runs").exists()
    assert f"evaluation.judge_model: {folder}: no such folder" in capsys.readouterr().err


@pytest.mark.runs
def test_the_stand_in_is_named_as_the_base_itself(run_paper: Any) -> None:
    code, run = run_paper(*SMALL, "--set", "evaluation.judge_model=stand-in")
    figures = orjson.loads((run / "eval" / "measured.json").read_bytes())["figures"]
    assert code == errors.DONE and figures["preference.p3"]["judge"] == "stand-in (the base itself)"


def test_no_external_judge_where_nobody_judges() -> None:
    class Context:
        recipe = Recipe.model_validate({"evaluation": {"judge": "off", "judge_model": "x/y"}})

    assert external.external_of(Context) is None  # type: ignore[arg-type]
    external.require(Context.recipe.evaluation)  # and nothing is looked for


# --- by hand


def rows(values: list[float | None]) -> list[dict[str, Any]]:
    return [{"item": i, "round": 0, "d": value} for i, value in enumerate(values)]


def test_kappa_by_hand_and_what_one_side_did_not_score_is_unscored() -> None:
    """++-- against +--- on four: agreed 3/4, by chance 1/2 x 1/4 + 1/2 x 3/4 = 1/2: kappa 1/2."""
    found = agreement.agreement("m", rows([1, 1, -1, -1, None]), rows([1, -1, -1, -1, 1]), "d", "other")
    assert (found.value, found.n, found.unscored, found.facts["raw"]) == (0.5, 4, 1, 0.75)
    assert found.low is not None and found.high is not None and found.low <= 0.5 <= found.high


def test_two_judges_with_one_answer_for_everything_are_not_called_agreed() -> None:
    found = agreement.agreement("m", rows([1, 1]), rows([1, 1]), "d", "other")
    assert found.value is None and found.facts["raw"] == 1.0 and "one answer" in found.note
