"""A manifest that was edited by hand is refused before a row is taken by what it says; one from before resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from cai import errors
from cai.commands import verify
from cai.run import manifest as manifests
from cai.run.folder import Run

Runner = Callable[..., tuple[int, Path]]
HALF = ("--milestone", "m0", "--until", "instructions")


def rewritten(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = run / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    edit(manifest)
    path.write_bytes(orjson.dumps(manifest))


def says(run: Path) -> str:
    manifest = manifests.read_manifest(run / "manifest.json")
    try:
        manifests.refuse_edited(manifest, run / "manifest.json")
    except Exception as error:
        return str(error)
    return ""


def test_an_identity_that_was_made_to_fit_the_changed_recipe_is_refused(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the sums the run would go on with instructions of one seed and answers of another, exit 0."""
    _, run = run_fake(*HALF)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "manifest.json"}
    rewritten(run, lambda m: m["identity"].update({"seed": "7"}))
    capsys.readouterr()
    code, _ = run_fake("--resume", str(run), "--set", "seed=7", fake=())
    said = capsys.readouterr().err.strip()
    assert code == errors.CORRUPT and "\n" not in said
    assert "manifest.json: identity: edited since" in said and "from a copy, or start a new run" in said
    assert {path: path.read_bytes() for path in before} == before, "a run that is refused stays as it was"
    assert run_fake("--fork", str(run), fake=())[0] == errors.CORRUPT, "a fork reuses rows by the same words"
    found = [check for check in verify.verify(run) if check.promise == "manifest"]
    assert [check.verdict for check in found] == ["FAIL"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["stages"]["answers"].update({"sampling.answers.temperature": "0.1"}),
        lambda m: m["files"].update({"constitution.yaml": "0" * 16}),
        lambda m: m["model"].update({"revision": "0123abcd"}),
        lambda m: m.pop("model"),
        lambda m: m.update(milestone="m2"),
        lambda m: m.update(created="2020-01-01T00:00:00Z"),
        lambda m: m["sums"].pop("identity"),
        lambda m: m["sums"].update(other="0" * 16),
        lambda m: m["sums"].update(identity=[1]),
        lambda m: m["sums"].clear(),
    ],
)
def test_so_is_each_other_part_that_says_what_made_the_run(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    run = made(tmp_path)
    assert says(run) == ""
    rewritten(run, edit)
    assert "edited since the program wrote it" in says(run)


def made(root: Path) -> Path:
    facts: dict[str, Any] = {"milestone": "m1", "backend": "fake", "identity": {"seed": "0", "model.name": "é"}}
    facts |= {"files": {"constitution.yaml": "ab"}, "stages": {"answers": {"seed": "0"}}}
    with Run.create(root, "20260101-000000-m1-abcdef", {}, facts) as run:
        run.update_manifest(model={"model": "fake", "revision": "none", "load_seconds": 0.1})
    return run.path


def test_what_a_resume_may_change_and_another_order_of_the_keys_is_no_edit(tmp_path: Path) -> None:
    run = made(tmp_path)
    rewritten(run, lambda m: m.update(home="../elsewhere", sets=["items=9"], memory={"train": 1}))
    (run / "manifest.json").write_bytes(
        orjson.dumps(dict(reversed(manifests.read_manifest(run / "manifest.json").items())))
    )
    assert says(run) == ""


def test_a_later_update_does_not_make_an_edit_good(tmp_path: Path) -> None:
    run = made(tmp_path)
    rewritten(run, lambda m: m["identity"].update(seed="7"))
    with Run.open(run) as opened:
        opened.update_manifest(training_identity={"seed": "7"})
    assert "manifest.json: identity: edited" in says(run)


def test_a_run_from_before_there_were_sums_resumes_and_has_them_from_then_on(run_fake: Runner) -> None:
    _, run = run_fake(*HALF)
    rewritten(run, lambda m: m.pop("sums"))
    found = [check for check in verify.verify(run) if check.promise == "manifest"]
    assert [check.verdict for check in found] == ["skip"]
    assert run_fake("--resume", str(run), "--until", "pairs", "--override-gate", "why", fake=())[0] == errors.DONE
    manifest = manifests.read_manifest(run / "manifest.json")
    assert set(manifest["sums"]) == set(manifests.SEALED) & set(manifest) and says(run) == ""


def test_training_that_is_begun_anew_leaves_no_sum_of_what_is_gone(tmp_path: Path) -> None:
    from cai.run import resuming

    run = made(tmp_path)
    with Run.open(run) as opened:
        opened.update_manifest(training_identity={"items": "1"})
        assert "training_identity" in opened.manifest["sums"]
        resuming.train_anew(opened)
    assert says(run) == "" and "training_identity" not in manifests.read_manifest(run / "manifest.json")["sums"]
