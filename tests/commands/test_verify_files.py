"""Damage is never success: `--verify`, a resume and `--export` over every file of a whole run, each damaged in turn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from support import rich_run as rich

from cai import errors
from cai.commands import verify
from cai.run import digests

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "emptied": lambda data: b"",
    "its last line gone": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    "a line more": lambda data: data + b"x\n",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = rich.project(tmp_path_factory.mktemp("rich"))
    code, said = rich.go(folder, *rich.RICH)
    assert code == 0, said
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The project again, with a run of its own to damage."""
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def found(run: Path, verdict: str) -> list[str]:
    checks = [check for check in verify.verify(run) if check.found != "no checkpoint"]  # the fake model has none
    return [check.found for check in checks if check.verdict == verdict]


def told(run: Path) -> list[str]:
    """What a damage is told by; a log that was shortened at a line is a note, for a resume makes the rows again.

    So is a line of a sum file that is no hash: a crash leaves such ones, and every byte of the log is compared.
    """
    noted = ("committed bytes are missing", "are no hashes", "torn bytes at the end")
    shortened = [line for line in found(run, "note") if any(words in line for words in noted)]
    return [*found(run, "FAIL"), *found(run, "skip"), *shortened]


@pytest.mark.runs
def test_a_whole_run_passes_every_check_and_names_what_is_not_compared(made: Path) -> None:
    run = rich.latest(made)
    assert not found(run, "FAIL") and not found(run, "skip")
    assert any("status.json (shown to people" in line for line in found(run, "note"))


@pytest.mark.slow
def test_every_file_of_a_run_is_compared_or_named_as_not_compared(made: Path, tmp_path: Path) -> None:
    """Each file flipped, emptied and shortened: `--verify` fails or skips it, or the file is one of the few named."""
    run, unseen, tried = rich.latest(made), [], 0
    for name in digests.names_of(run):
        if name.split("/")[0] in digests.NOT_COVERED:
            continue
        data = (run / name).read_bytes()
        for what, damage in DAMAGES.items():
            if damage(data) == data:
                continue
            tried += 1
            (run / name).write_bytes(damage(data))
            seen = told(run)
            (run / name).write_bytes(data)
            if not seen:
                unseen.append(f"{name}: {what}")
        (run / name).rename(tmp_path / "away")
        if not told(run):
            unseen.append(f"{name}: deleted")
        (tmp_path / "away").rename(run / name)
    assert tried > 100 and not unseen


@pytest.mark.runs
@pytest.mark.parametrize("damage", ["gone", "emptied", "one line of it gone"])
def test_a_sum_file_that_is_gone_or_short_is_never_ok_and_an_edit_behind_it_is_found(copy: Path, damage: str) -> None:
    run = rich.latest(copy)
    sums = (run / "records.sum").read_bytes().splitlines(keepends=True)
    if damage == "gone":
        (run / "records.sum").unlink()
    else:
        (run / "records.sum").write_bytes(b"" if damage == "emptied" else b"".join(sums[:3] + sums[4:]))
    assert any("cannot be checked" in line for line in found(run, "skip"))
    assert not any(line.startswith("records.jsonl") for line in found(run, "ok"))
    data = (run / "records.jsonl").read_bytes()
    at = int(sums[3].split()[0]) + 40 if damage.startswith("one") else 300
    letter = next(i for i in range(at, len(data)) if data[i : i + 1].isalpha())
    (run / "records.jsonl").write_bytes(data[:letter] + bytes([data[letter] ^ 0x20]) + data[letter + 1 :])
    assert any(line.startswith("records.jsonl") for line in found(run, "FAIL"))
    code, said = rich.go(copy, "--resume", "runs/latest")
    assert code == errors.CORRUPT and "records.jsonl" in said and "Traceback" not in said


def test_an_equal_row_twice_is_no_failure_for_a_resume_takes_it(copy: Path) -> None:
    run = rich.latest(copy)
    data = (run / "records.jsonl").read_bytes()
    (run / "records.jsonl").write_bytes(data + data.splitlines(keepends=True)[-1])
    assert not any("stand more than once" in line for line in found(run, "FAIL"))
    assert any("stand twice, equal" in line for line in found(run, "note"))


@pytest.mark.runs
def test_a_damaged_adapter_is_not_measured_but_exported_again_by_a_resume(copy: Path, made: Path) -> None:
    run = rich.latest(copy)
    path = run / "adapter" / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    scores = (run / "eval" / "scores.jsonl").read_bytes()
    code, said = rich.go(copy, "--export", "runs/latest", "--to", str(copy / "out"))
    assert code == errors.CORRUPT and "adapter" in said and not (copy / "out").exists()
    code, said = rich.go(copy, "--benchmark", "xstest", "--resume", "runs/latest")
    assert code == errors.USAGE and "no whole adapter" in said
    assert rich.go(copy, "--resume", "runs/latest")[0] == 0
    assert path.read_bytes() == data
    assert (run / "eval" / "scores.jsonl").read_bytes() == scores and not [*run.glob("eval/scores-*")]


@pytest.mark.runs
@pytest.mark.parametrize("arm", ["adapter-sft", "adapter-seed-1"])
def test_so_is_a_damaged_adapter_of_the_other_arms(copy: Path, arm: str) -> None:
    path = rich.latest(copy) / arm / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert rich.go(copy, "--resume", "runs/latest")[0] == 0
    assert path.read_bytes() == data


@pytest.mark.runs
def test_a_number_edited_in_the_result_of_training_is_made_again(copy: Path) -> None:
    path = rich.latest(copy) / "train" / "result.json"
    whole = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps(whole | {"last_loss": 0.001}))
    assert rich.go(copy, "--resume", "runs/latest")[0] == 0
    assert orjson.loads(path.read_bytes())["last_loss"] == whole["last_loss"]


@pytest.mark.runs
def test_an_emptied_data_set_is_not_exported(copy: Path) -> None:
    path = rich.latest(copy) / "dataset" / "pairs" / "train.jsonl"
    data = path.read_bytes()
    path.write_bytes(b"")
    code, said = rich.go(copy, "--export", "runs/latest", "--to", str(copy / "out"))
    assert code == errors.CORRUPT and "train.jsonl" in said
    assert rich.go(copy, "--resume", "runs/latest")[0] == 0 and path.read_bytes() == data


@pytest.mark.runs
@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"7", b'{"checks": [], "figures": 3}', b'{"checks": {"guard": 1}}']
)
def test_checks_that_were_lost_or_are_odd_are_made_again_from_their_records(copy: Path, content: bytes | None) -> None:
    run = rich.latest(copy)
    before = {name: (run / "eval" / name).read_bytes() for name in ("checks.json", "guard.json", "gates.json")}
    (run / "eval" / "checks.json").unlink()
    if content is not None:
        (run / "eval" / "checks.json").write_bytes(content)
    code, said = rich.go(copy, "--resume", "runs/latest")
    assert code == 0 and "Traceback" not in said
    assert before == {name: (run / "eval" / name).read_bytes() for name in before}


@pytest.mark.runs
def test_every_derived_file_of_eval_that_is_lost_is_made_again(copy: Path) -> None:
    run = rich.latest(copy)
    whole = {path.name: path.read_bytes() for path in (run / "eval").glob("*.json")}
    for content in (None, b"[]", b"{"):
        for name in whole:
            (run / "eval" / name).unlink()
            if content is not None:
                (run / "eval" / name).write_bytes(content)
        code, said = rich.go(copy, "--resume", "runs/latest")
        assert code == 0 and "Traceback" not in said, said
        assert whole == {path.name: path.read_bytes() for path in (run / "eval").glob("*.json")}
