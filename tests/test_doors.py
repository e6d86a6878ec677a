"""The door between milestones: a verdict that failed, cannot be read or only advises opens nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from cai import errors

Runner = Callable[..., tuple[int, Path]]
ENFORCED = ("--set", "gates.enforce=true", "--set", "items=2", "--set", "heldout.items=0")


@pytest.fixture
def failed(run_fake: Runner) -> Path:
    code, run = run_fake("--milestone", "m1", *ENFORCED)
    assert code == errors.GATE
    return run


CONTENTS = [b"", b"{", b"[]", b"null", b'{"passed": true}', b'{"passed": true, "enforced": true, "recipe": 3}']


@pytest.mark.runs
@pytest.mark.parametrize("content", CONTENTS)
def test_a_verdict_that_cannot_be_read_is_not_passed(
    run_fake: Runner, failed: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (failed / "eval" / "gates.json").write_bytes(content)
    assert run_fake("--milestone", "m2", *ENFORCED)[0] == errors.GATE
    assert "gates.json" in capsys.readouterr().err
    assert not [*failed.parent.glob("*-m2-*")]


@pytest.mark.runs
def test_a_later_verdict_that_only_advises_does_not_open_what_an_enforced_one_closed(
    run_fake: Runner, failed: Path
) -> None:
    _, advisory = run_fake("--milestone", "m1", *ENFORCED, "--set", "gates.enforce=false")
    advised = orjson.loads((advisory / "eval" / "gates.json").read_bytes())
    assert advised["recipe"] == orjson.loads((failed / "eval" / "gates.json").read_bytes())["recipe"]
    for passed in (False, True):
        (advisory / "eval" / "gates.json").write_bytes(orjson.dumps({**advised, "passed": passed}))
        assert run_fake("--milestone", "m2", *ENFORCED)[0] == errors.GATE


@pytest.mark.runs
def test_a_damaged_verdict_of_another_recipe_closes_nothing(run_fake: Runner, failed: Path) -> None:
    (failed / "eval" / "gates.json").write_bytes(b"")
    code, run = run_fake("--milestone", "m2", *ENFORCED, "--set", "seed=7", "--until", "instructions")
    assert code == errors.DONE and "-m2-" in run.name


@pytest.mark.runs
def test_an_override_opens_it_and_stays(run_fake: Runner, failed: Path) -> None:
    (failed / "eval" / "gates.json").write_bytes(b"")
    why = ("--override-gate", "seen by eye", "--until", "instructions")
    assert run_fake("--milestone", "m2", *ENFORCED, *why)[0] == errors.DONE


@pytest.mark.runs
@pytest.mark.parametrize("how", ["turned", "gone"])
def test_a_verdict_that_is_not_what_its_run_left_opens_nothing(
    run_fake: Runner, failed: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = failed / "eval" / "gates.json"
    if how == "turned":
        gates.write_bytes(orjson.dumps({**orjson.loads(gates.read_bytes()), "passed": True}))
    else:
        gates.unlink()
    assert run_fake("--milestone", "m2", *ENFORCED)[0] == errors.GATE
    assert "after the run ended, so m2 does not start" in capsys.readouterr().err
    assert run_fake("--resume", failed.name)[0] == errors.GATE  # decided again
    assert run_fake("--milestone", "m2", *ENFORCED)[0] == errors.GATE
    assert "m1 did not pass its gate" in capsys.readouterr().err


def test_a_run_that_was_cut_off_before_its_gates_closes_nothing(run_fake: Runner) -> None:
    assert run_fake("--milestone", "m1", *ENFORCED, "--until", "answers")[0] == errors.DONE
    code, run = run_fake("--milestone", "m2", *ENFORCED, "--until", "instructions")
    assert code == errors.DONE and "-m2-" in run.name
