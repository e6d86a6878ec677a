"""What own answers (`sft.answers`) cost: an estimate that learns from a run that had some counts those asked now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.runs import ROOT, read_jsonl

from cai.commands import fork
from cai.recipe.load import Recipe, read, resolve
from cai.run import budget
from cai.run.folder import Run
from cai.run.rates import HIGH, LOW, Speed, from_events, measured_before
from cai.run.standing import Standing, of_run

Runner = Callable[..., tuple[int, Path]]
KEYS = (
    "items=3", "heldout.items=1", "dpo.max_steps=2", 'dpo.start="sft"', "evaluation.critic_items=0",
    "evaluation.prompted=[]", "evaluation.fresh_items=1", "evaluation.neutral_passages=2", "instructions.max_tries=1",
)  # fmt: skip
SETS = tuple(word for key in KEYS for word in ("--set", key))


def recipe(answers: int) -> Recipe:
    keys = [*KEYS, "model.backend=fake", "model.name=fake", f"sft.answers={answers}"]
    return resolve(read(ROOT / "cai.toml"), milestone="m2", sets=keys)


@pytest.mark.runs
def test_an_estimate_that_learns_from_a_run_with_own_answers_counts_those_asked_now(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m2", *SETS, "--set", "sft.answers=6")
    drawn = [row for row in read_jsonl(run / "records.jsonl") if row["stage"].startswith("sft_")]
    tokens = sum(row["tokens"] for row in drawn)

    def found(answers: int, stands: Standing | None = None) -> Any:
        return budget.estimate(recipe(answers), "fake", run.parent, 1000, stands=stands)

    none, same, twice = found(0), found(6), found(12)
    assert tokens and len(drawn) == 12 and run.name in same.source
    for one, share in ((same, 1), (twice, 2)):
        assert one.tokens.low - none.tokens.low == pytest.approx(LOW * tokens * share)
        assert one.tokens.high - none.tokens.high == pytest.approx(HIGH * tokens * share)
        assert one.generation.low > none.generation.low and one.rest == none.rest
    assert none.tokens.high == pytest.approx(HIGH * measured_before(run.parent, recipe(0), "fake").tokens)  # type: ignore[union-attr]
    whole = found(0, Standing(1.0, 4))
    assert found(6, Standing(1.0, 4)).tokens.low - whole.tokens.low == pytest.approx(LOW * tokens)
    assert found(12, Standing(1.0, 4, own_answers=6)).tokens.low - whole.tokens.low == pytest.approx(LOW * tokens)
    assert found(6, Standing(1.0, 4, own_answers=9)) == found(6, Standing(1.0, 4, own_answers=6))


def test_what_own_answers_and_arms_took_is_no_part_of_the_rest() -> None:
    """Both are counted for themselves: `sft.answers` times what one took, the SFT stage as pairs seen."""
    times = {"answers": 10.0, "sft_instructions": 1.0, "sft_answers": 3.0, "evaluate preference.p3": 5.0}
    events: list[dict[str, Any]] = [
        {"kind": "stage", "attempt": 1, "s": 20.0, "stage": name, "seconds": took, "tokens": 10, "items": 4}
        for name, took in times.items()
    ]
    trained = {"kind": "trained", "attempt": 1, "s": 40.0, "steps": 2}
    events += [{**trained, "seconds": 7.0}, {**trained, "seconds": 4.0, "arm": "sft"}]
    known = {"stages": {"answers": {}, "sft_instructions": {}, "sft_answers": {}}, "items": 4, "backend": "fake"}
    speed = from_events("x", known, [{"kind": "attempt", "attempt": 1, "s": 0.0}, *events])
    assert speed is not None and (speed.own_answers, speed.own_tokens, speed.own_seconds) == (4, 20, 4.0)
    assert (speed.generation_seconds, speed.training_seconds, speed.rest_seconds) == (10.0, 7.0, 40.0 - 10 - 7 - 4 - 4)
    assert not [label for label in speed.labels if label.startswith("sft_")]
    assert Speed("x", "fake", 4, 1, 10, 10.0, 7.0, 2.0, 40.0).rest_seconds == 23.0


@pytest.mark.runs
def test_a_fork_knows_how_many_stand(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m2", *SETS, "--set", "sft.answers=6", "--until", "pairs")
    before = {path.name for path in run.parent.iterdir()}
    run_fake("--fork", str(run), "--milestone", "m2", *SETS, "--set", "sft.answers=6", "--set", "dpo.beta=0.3")
    made = next(path for path in run.parent.iterdir() if path.name not in before and path.is_dir())
    assert of_run(made) == Standing(1.0, 4, own_answers=6)


def test_they_are_no_part_of_the_slots_drawing_of_which_a_share_stands(tmp_path: Path) -> None:
    def rows(stage: str) -> list[Any]:
        return [{"stage": stage, "item": i, "round": 0, "tokens": 100, "status": "ok"} for i in range(4)]

    with Run.create(tmp_path, "20261122-200000-m1-abc123", {}, {"items": 4, "identity": {}}) as run:
        (run.path / "dataset" / "pairs").mkdir(parents=True)
    own = [*rows("sft_instructions"), *rows("sft_answers")]
    rates = dict.fromkeys(("instructions", "answers", "sft_instructions", "sft_answers"), fork.Rate(0.01, 0.0))
    for told in (rates, {}):
        plan = fork.ForkPlan(run.path, rows("instructions"), [*rows("answers"), *own], {}, told)
        assert fork.standing(plan) == Standing(0.5, 4)
        assert fork.standing(replace(plan, kept=[*plan.kept, *own], again=rows("answers"))) == Standing(
            0.5, 4, False, 4
        )
