"""Repair, verify, fork and supervise: what a person does with a run that is damaged, doubted, changed or preempted."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai import errors
from cai.commands import fork, repair, supervise, verify
from cai.commands.supervise import Supervisor, work_done
from cai.errors import CaiError
from cai.run.folder import Run
from cai.store.records import RecordLog, read
from cai.store.rows import Lines
from cai.store.scan import RECORD_KEY, encode_points, points_of
from cai.store.walk import walking
from cai.training.train import load_result

ROOT = Path(__file__).resolve().parents[2]
RunFake = Callable[..., tuple[int, Path]]


@pytest.fixture
def run_fake(run_paper):
    return run_paper


def row(stage: str, item: int, round: int = 0, text: str = "text") -> dict[str, Any]:
    base = {"v": 1, "stage": stage, "item": item, "round": round, "principle": None, "text": f"{text} {item} {round}"}
    base |= {"status": "ok", "reason": None, "finish": "eos", "tokens": 5, "seed": item}
    return base | {"prompt_sha": "0" * 16}


ROWS = [row(stage, item) for stage in ("instructions", "answers", "critiques", "revisions") for item in range(4)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four items whose records were appended four at a time."""
    manifest = {"identity": {"seed": "0"}, "stages": {}}
    with Run.create(tmp_path / "runs", "20260101-000000-m0-abcdef", {}, manifest) as run, run.records() as log:
        for start in range(0, len(ROWS), 4):
            log.append(ROWS[start : start + 4])
    return run.path


def damage(run: Path, old: bytes, new: bytes) -> None:
    path = run / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def check(run: Path, promise: str) -> list[verify.VerifyResult]:
    return [found for found in verify.verify(run) if promise in found.promise]


def test_a_whole_run_needs_no_repair(run: Path) -> None:
    said: list[str] = []
    before = (run / "records.jsonl").read_bytes()
    assert repair.repair(run, write=True, say=said.append) == 0
    assert said[-1] == "nothing to repair" and (run / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"text 2 0"', b'"TEXT 2 0"', "changed after it was committed"),
        (b'"text 2 0"', b'"a longer text"', "changed after it was committed"),
        (b'{"v":1,"stage":"answers"', b'x{"v":1,"stage":"answers"', "not JSON"),
        (b'{"v":1,"stage":"critiques"', b"", "not JSON"),
        (b'"round":0', b'"rowdy":0', "without round"),
    ],
)
def test_g6_repair_drops_one_line_and_shows_it_first(run: Path, old: bytes, new: bytes, reason: str) -> None:
    """Dry by default; --write drops the line, keeps its bytes, and a resume may append it again."""
    damage(run, old, new)
    damaged = (run / "records.jsonl").read_bytes()
    said: list[str] = []
    assert repair.repair(run, say=said.append) == 1
    assert reason in said[1] and "--write" in said[-1] and (run / "records.jsonl").read_bytes() == damaged
    assert not (run / "quarantine").exists()
    assert repair.repair(run, write=True, say=said.append) == 1
    kept = b"".join(path.read_bytes() for path in (run / "quarantine").iterdir())
    assert kept in damaged and len(damaged) - len(kept) == (run / "records.jsonl").stat().st_size
    with Run.open(run) as again, again.records() as log:
        assert len(log.rows) == len(ROWS) - 1
        log.append(ROWS)
    assert sorted(map(orjson.dumps, read(run / "records.jsonl"))) == sorted(map(orjson.dumps, ROWS))
    assert verify.sound(verify.verify(run))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_an_editors_line_ends_are_put_back_and_no_row_is_lost(run: Path, bom: bytes) -> None:
    """Saved with CR LF (and a byte-order mark): every line differs from what was committed, no row does."""
    path = run / "records.jsonl"
    before = path.read_bytes()
    path.write_bytes(bom + before.replace(b"\n", b"\r\n"))
    with Run.open(run) as again, pytest.raises(CaiError, match="line 1"):
        again.records()
    said: list[str] = []
    assert repair.repair(run, say=said.append) == len(ROWS) + bool(bom)
    assert f"{len(ROWS)} lines stay, 0 go" in said[0] and b"\r" in path.read_bytes()
    repair.repair(run, write=True, say=said.append)
    assert path.read_bytes() == before
    assert repair.repair(run, say=said.append) == 0


@pytest.mark.parametrize("name", ["benchmarks/xstest.jsonl", "lm_eval.jsonl", "scores.jsonl"])
def test_logs_under_eval_are_repaired_by_their_own_key(run: Path, name: str) -> None:
    key = ("metric" if name == "scores.jsonl" else "arm", "item", "round")
    path = run / "eval" / name
    path.parent.mkdir(parents=True)
    with RecordLog.open(path, run / "quarantine", key=key) as log:
        log.append([{key[0]: "base", "item": item, "round": 0, "text": f"text {item} 0"} for item in range(3)])
    assert repair.repair(run, say=lambda line: None) == 0, "a whole log loses nothing"
    assert any(name.split("/")[-1] in found.found and found.verdict == "ok" for found in check(run, "G1"))
    path.write_bytes(path.read_bytes().replace(b"text 1", b"TEXT 1"))
    assert repair.repair(run, write=True, say=lambda line: None) == 1
    assert [row["item"] for row in read(path, key)] == [0, 2]


def test_damaged_marks_of_people_are_repaired_too(run: Path) -> None:
    with RecordLog.open(run / "reviews.jsonl", run / "quarantine", key=repair.REVIEW_KEY) as log:
        log.append([{"rater": "ann", "key": key, "mark": "not"} for key in ("a", "b")])
    damaged = (run / "reviews.jsonl").read_bytes().replace(b'"key":"a"', b'"key":"c"')
    (run / "reviews.jsonl").write_bytes(damaged)
    assert repair.repair(run, say=lambda line: None) == 1


def test_a_log_that_is_gone_is_named_by_repair_verify_and_fork(run: Path) -> None:
    (run / "records.jsonl").unlink()
    for look in (lambda: repair.repair(run, say=lambda line: None), lambda: fork.plan_fork(run, {}, {})):
        with pytest.raises(CaiError, match=r"records\.jsonl: missing, but records\.sum says") as caught:
            look()
        assert caught.value.code == errors.CORRUPT
    assert any(found.verdict == "FAIL" and "missing" in found.found for found in check(run, "G1"))


def test_repair_drops_a_row_that_someone_put_in(run: Path) -> None:
    path = run / "records.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], orjson.dumps(row("answers", 99)), *lines[3:]]))
    with pytest.raises(CaiError, match="line 4"):
        Run.open(run).records()
    found = repair.plan(path)
    assert [drop.line for drop in found.drops] == [4] and found.stay == len(ROWS)


def test_repair_drops_duplicates_but_the_first(run: Path) -> None:
    path = run / "records.jsonl"
    path.with_suffix(".sum").unlink()
    extra = orjson.dumps(ROWS[0]) + b"\n" + orjson.dumps({**ROWS[1], "text": "another"}) + b"\n"
    path.write_bytes(path.read_bytes() + extra)
    reasons = [drop.reason for drop in repair.plan(path).drops]
    assert reasons == ["repeats an earlier row", "a second, different row for its key"]


def test_repair_waits_for_the_lock_only_to_write(run: Path) -> None:
    with Run.open(run):
        assert repair.repair(run, say=lambda line: None) == 0
        with pytest.raises(CaiError) as caught:
            repair.repair(run, write=True, say=lambda line: None)
    assert caught.value.code == errors.LOCKED


@pytest.mark.parametrize("name", ["records.sum", "records.jsonl"])
def test_a_repair_that_is_killed_is_done_again(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Killed before the new sums, or between sums and log: the damage stays found, and the same line goes."""
    damage(run, b'"text 2 0"', b'"TEXT 2 0"')
    real = repair.files.write_atomic

    def killed(path: Path, data: bytes, **options: Any) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        real(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr("cai.commands.repair.files.write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            repair.repair(run, write=True, say=lambda line: None)
    with Run.open(run) as again, pytest.raises(CaiError, match="line 3"):
        again.records()
    assert repair.repair(run, write=True, say=lambda line: None) == 1
    with Run.open(run) as again, again.records() as log:
        assert len(log.rows) == len(ROWS) - 1


def test_a_dropped_line_is_shown_inert(run: Path) -> None:
    damage(run, b'{"v":1,"stage":"answers"', b"\x1b]52;c;aGk=\x07\xff{")
    said: list[str] = []
    repair.repair(run, say=said.append)
    assert "\\x1b]52" in said[1] and "\x1b" not in "".join(said) and len(said[1].splitlines()) == 1


@pytest.mark.runs
@given(
    st.lists(st.binary(max_size=6).map(lambda b: re.sub(b"[\r\n\xef]", b".", b) + b"\n"), max_size=8, unique=True),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_repair_keeps_every_line_that_is_as_committed(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], data: st.DataObject
) -> None:
    """Change some lines in place (not their order), take others out: exactly these are told from the others."""
    places = st.sets(st.integers(0, max(len(lines) - 1, 0)), max_size=3)
    touched = data.draw(places) if lines else set()
    gone = data.draw(places) - touched if lines else set()
    stay = [i for i in range(len(lines)) if i not in gone]
    now = [b"changed %d\n" % i if i in touched else lines[i] for i in stay]
    path = tmp_path_factory.mktemp("edited") / "records.jsonl"
    path.write_bytes(b"".join(now))
    path.with_suffix(".sum").write_bytes(b"".join(encode_points(points_of(lines))))
    with path.open("rb") as file:
        start = walking(Lines(path, file.fileno()), file.fileno(), path.with_suffix(".sum"), RECORD_KEY)
        with start as found:
            last = max((i for i in stay if i not in touched), default=-1)
            lost = sum(i < last for i in gone)
            assert repair.edited(path, found) == (bytes(i in touched for i in stay), lost)


@pytest.mark.parametrize("gone", [{0}, {1}, {0, 1}])
def test_whole_lines_that_are_lost_are_told_and_their_sums_go(run: Path, gone: set[int]) -> None:
    """Else verify and resume point to a repair that finds nothing."""
    log = run / "records.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in gone))
    with pytest.raises(CaiError, match="--repair"), Run.open(run) as opened:
        opened.records()
    said: list[str] = []
    assert repair.repair(run, say=said.append) == len(gone)
    assert f"{len(gone)} of those committed are gone" in said[0] and "--write" in said[-1]
    assert repair.repair(run, write=True, say=lambda line: None) == len(gone)
    with Run.open(run) as again, again.records() as found:
        assert [r["item"] for r in found.rows] == [r["item"] for i, r in enumerate(ROWS) if i not in gone]
    assert repair.repair(run, say=lambda line: None) == 0


# --- verify


def test_verify_finds_each_broken_promise(run: Path) -> None:
    assert verify.sound(verify.verify(run))
    damage(run, b'"text 2 0"', b'"TEXT 2 0"')
    (broken,) = [found for found in verify.verify(run) if found.verdict == "FAIL"]
    assert "line 3, byte" in broken.found
    (run / "records.sum").unlink()
    damage(run, b'"stage":"answers"', b'"stage":"elsewhere"')
    assert "1 rows without the row they were made from" in check(run, "chain")[0].found
    damage(run, b'"tokens":5', b'"tokens":"5"')
    assert "tokens (1 rows)" in check(run, "row format")[0].found
    os.chmod(run, 0o755)
    (run / "adapter").mkdir()
    (run / "adapter" / "link").symlink_to("/etc/passwd")
    found = {each.found for each in check(run, "folder")}
    assert any("chmod 700" in each for each in found) and any("adapter/link" in each for each in found)
    (run / "manifest.json").write_bytes(b"{")
    assert check(run, "manifest")[0].verdict == "FAIL"
    assert not verify.sound(verify.verify(run))


def test_verify_writes_nothing_and_sees_a_live_runner(run: Path) -> None:
    with (run / "records.jsonl").open("ab") as file:
        file.write(b'{"torn')
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert any("6 torn bytes" in found.found for found in check(run, "G1"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    with Run.open(run):
        assert f"process {os.getpid()}" in check(run, "G7")[0].found
    assert check(run, "G7")[0].verdict == "ok"


def test_verify_reads_adapters_without_torch(run: Path) -> None:
    import numpy as np

    def write(**tensors: Any) -> None:
        header, body = {}, b""
        for name, (kind, value) in tensors.items():
            header[name] = {"dtype": kind, "shape": [len(value)], "data_offsets": [len(body), len(body) + value.nbytes]}
            body += value.tobytes()
        head = orjson.dumps(header)
        (run / "adapter").mkdir(exist_ok=True)
        (run / "adapter" / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + body)

    ones, zeros = np.ones(3, dtype="<f4"), np.zeros(3, dtype="<f4")
    assert check(run, "adapter")[0].verdict == "skip"
    write(lora_A=("F32", ones), lora_B=("F32", ones))
    assert check(run, "adapter")[0].verdict == "ok"
    write(lora_A=("F32", ones), lora_B=("F32", zeros))
    assert "nothing was trained" in check(run, "adapter")[0].found
    write(lora_A=("F32", ones), lora_B=("BF16", np.array([0x7FC0, 0x3F80], dtype="<u2")))
    assert "NaN" in check(run, "adapter")[0].found


def test_verify_finds_a_secret_of_the_environment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123456789")
    assert check(run, "no secret")[0].verdict == "ok"
    (run / "status.json").write_text('{"argv": "hf_canary_0123456789"}')
    found = check(run, "no secret")[0]
    assert found.verdict == "FAIL" and "HF_TOKEN in status.json" in found.found and "canary" not in found.found


@pytest.fixture
def finished(run_fake: RunFake) -> Path:
    return run_fake("--milestone", "m0")[1]


HALF = object()
BROKEN = [
    ("dataset/examples.jsonl", None, "G11 dataset"),
    ("dataset/examples.jsonl", HALF, "G11 dataset"),
    ("dataset/examples.jsonl", b"[]\n", "G11 dataset"),
    ("dataset/pairs/train.jsonl", None, "G11 dataset"),
    ("dataset/pairs/train.jsonl", b"3\n", "G11 dataset"),
    ("dataset/pairs/heldout.jsonl", b"{}\n", "G11 dataset"),
    ("adapter/adapter_model.safetensors", None, "adapter"),
    ("adapter/adapter_model.safetensors", HALF, "adapter"),
    ("adapter/adapter_config.json", b"{}", "adapter"),
    ("adapter/adapter_model.safetensors", b"", "adapter"),
    ("train/result.json", b"[]", "adapter"),
    ("train/result.json", HALF, "adapter"),
    ("constitution.yaml", HALF, "inputs"),
    ("prompts/critiques.yaml", None, "inputs"),
    ("recipe.resolved.toml", None, ""),
    ("eval/measured.json", b"\0", ""),
    ("eval/measured.json", HALF, ""),
    ("eval/gates.json", b"[]", ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content", "promise"), BROKEN, ids=[f"{n} {str(c)[:8]}" for n, c, _ in BROKEN])
def test_g11_a_damaged_derived_file_is_named_and_a_resume_makes_it_again(
    finished: Path, run_fake: RunFake, name: str, content: Any, promise: str
) -> None:
    path = finished / name
    before = path.read_bytes()
    assert verify.sound(verify.verify(finished))
    path.unlink()
    if content is not None:
        path.write_bytes(before[: len(before) // 2] if content is HALF else content)
    if promise:
        failed = [found.found for found in check(finished, promise) if found.verdict == "FAIL"]
        assert failed and all(path.name in found and "Error:" not in found for found in failed)
    assert run_fake("--resume", str(finished))[0] == errors.DONE
    assert verify.sound(verify.verify(finished)), verify.table(verify.verify(finished))
    assert path.read_bytes() == before or name == "train/result.json"  # holds the seconds that training took


@pytest.mark.runs
def test_verify_compares_every_text_of_the_data_set_with_the_records(finished: Path) -> None:
    path = finished / "dataset" / "examples.jsonl"
    example = orjson.loads(path.read_bytes())
    example["critique"] += "!"
    path.write_bytes(orjson.dumps(example) + b"\n")
    assert "its critique is not in the records" in check(finished, "G11 dataset")[0].found


@pytest.mark.parametrize(("name", "value"), [("pairs", [[]]), ("log", [{"loss": "x"}]), ("seconds", None)])
def test_a_result_of_other_kinds_counts_as_none(finished: Path, name: str, value: Any) -> None:
    path = finished / "train" / "result.json"
    result = load_result(finished / "train")
    assert result is not None and result.adapter == finished / "adapter"
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | {name: value}))
    assert load_result(finished / "train") is None


@pytest.mark.runs
def test_verify_finds_a_flipped_byte_of_the_adapter(finished: Path) -> None:
    path = finished / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert "changed after it was saved" in check(finished, "adapter")[0].found


# --- fork


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, {"instructions", "answers", "critiques0", "revisions0", "critiques1", "revisions1", "guard"}),
        ({"guard"}, {"instructions", "answers", "critiques0", "revisions0", "critiques1", "revisions1"}),
        ({"revisions"}, {"instructions", "answers", "critiques0"}),
        ({"critiques"}, {"instructions", "answers"}),
        ({"answers"}, {"instructions"}),
        ({"instructions"}, set()),
        ({"answers", "guard"}, {"instructions"}),
    ],
)
def test_a_fork_keeps_what_nothing_before_it_changed(changed: set[str], kept: set[str]) -> None:
    rows = [("instructions", 0), ("answers", 0), ("critiques", 0), ("revisions", 0), ("critiques", 1), ("revisions", 1)]
    rows.append(("guard", 0))
    differs = {stage: ["key"] for stage in changed}
    stays = {
        stage + (str(round_) if stage in ("critiques", "revisions") else "")
        for stage, round_ in rows
        if fork.stays(stage, round_, differs)
    }
    assert stays == kept


def test_a_fork_keeps_later_tries_only_if_nothing_changed(tmp_path: Path) -> None:
    """A second try exists because of how the first pair came out, which the change may have turned around."""
    stages = {"instructions": {"a": "1"}, "answers": {"a": "1"}, "revisions": {"b": "1"}}
    manifest = {"identity": {"model.backend": "fake", "pairs.retries": "1"}, "stages": stages}
    with Run.create(tmp_path / "runs", "20260101-000000-m0-abcdef", {}, manifest) as run, run.records() as log:
        log.append([row("instructions", 0), row("answers", 0), row("instructions", 1_000_000)])
    same = fork.plan_fork(run.path, manifest["identity"], stages)
    assert len(same.kept) == 3 and not same.again and not same.changed
    for identity, now in (
        (manifest["identity"], {**stages, "revisions": {"b": "2"}}),
        ({**manifest["identity"], "pairs.retries": "2"}, stages),
    ):
        changed = fork.plan_fork(run.path, identity, now)
        assert [r["item"] for r in changed.kept] == [0, 0] and [r["item"] for r in changed.again] == [1_000_000]
    other = fork.plan_fork(run.path, {**manifest["identity"], "model.backend": "embedded"}, stages)
    assert not other.kept and "model.backend" in other.changed["instructions"]


def edit(project: Path, name: str) -> None:
    path = project / "prompts" / name
    path.write_text(path.read_text().replace("preamble: >-\n", "preamble: >-\n  Take care.\n", 1))


@pytest.mark.runs
@pytest.mark.parametrize(("name", "again"), [("revisions.yaml", {"critiques", "revisions"}), ("answers.yaml", None)])
def test_a_fork_ends_as_a_run_from_nothing_would(
    project: Path, run_fake: RunFake, capsys: pytest.CaptureFixture[str], name: str, again: set[str] | None
) -> None:
    """Only what follows from the change runs again, and the records are byte for byte those of a new run."""
    until = ("--milestone", "m1", "--until", "revisions")
    code, old = run_fake(*until)
    assert code == errors.DONE
    before = (old / "records.jsonl").read_bytes()
    edit(project, name)
    code, _ = run_fake("--milestone", "m1", "--fork", str(old), "--dry-run")
    said = capsys.readouterr().out
    assert code == errors.DONE and "are made again" in said and f"prompts/{name}" in said
    assert len([path for path in (project / "runs").iterdir() if not path.is_symlink()]) == 1, (
        "a dry run writes nothing"
    )
    code, forked = run_fake("--milestone", "m1", "--fork", str(old))
    assert code == errors.DONE and forked != old
    stages = {(r["stage"], r["round"]) for r in read(forked / "records.jsonl")}
    if again is not None:
        assert stages == {("instructions", 0), ("answers", 0), ("critiques", 0)}
    else:
        assert stages == {("instructions", 0)}
    code, resumed = run_fake("--resume", str(forked), "--until", "revisions")
    assert code == errors.DONE and resumed == forked
    code, fresh = run_fake(*until)
    assert fresh != forked
    assert (forked / "records.jsonl").read_bytes() == (fresh / "records.jsonl").read_bytes()
    assert (old / "records.jsonl").read_bytes() == before


def test_a_fork_of_a_damaged_run_is_refused(project: Path, run_fake: RunFake) -> None:
    _, old = run_fake("--milestone", "m0", "--until", "answers")
    (old / "records.jsonl").write_bytes((old / "records.jsonl").read_bytes().replace(b'"tokens":', b'"tokens": '))
    code, _ = run_fake("--milestone", "m0", "--fork", str(old))
    assert code == errors.CORRUPT


# --- supervise


def supervised(tmp_path: Path, codes: list[int], grows: bool) -> tuple[int, list[float], int]:
    """Exit code, pauses and starts of a supervisor whose runner exits with `codes` in turn (the last one for ever)."""
    state = tmp_path / "starts"
    state.write_text("0")
    (tmp_path / "records.jsonl").write_bytes(b"")
    child = (
        "import os, signal, sys\n"
        f"codes, grows, folder = {codes}, {grows}, {str(tmp_path)!r}\n"
        "count = int(open(folder + '/starts').read()); open(folder + '/starts', 'w').write(str(count + 1))\n"
        "if grows: open(folder + '/records.jsonl', 'ab').write(b'x')\n"
        "code = codes[min(count, len(codes) - 1)]\n"
        "os.kill(os.getpid(), signal.SIGKILL) if code == -9 else sys.exit(code)"
    )
    pauses: list[float] = []
    supervisor = Supervisor([sys.executable, "-c", child], tmp_path, fruitless=3, wait=pauses.append)
    return supervisor.supervise(), pauses, int(state.read_text())


@pytest.mark.parametrize(
    "name", ["records.jsonl", "eval/scores.jsonl", "eval/benchmarks/xstest.jsonl", "train/checkpoint-12/COMPLETE.json",
             "train/sft/checkpoint-4/COMPLETE.json", "train/reference.safetensors", "adapter/adapter_model.safetensors"]
)  # fmt: skip
def test_supervise_sees_progress_of_every_phase(tmp_path: Path, name: str) -> None:
    for old in ("train/checkpoint-8", "train/checkpoint-10"):
        (tmp_path / old).mkdir(parents=True)
        (tmp_path / old / "COMPLETE.json").write_text("{}")
    before = work_done(tmp_path)
    if "checkpoint-12" in name:  # the oldest goes when a new one is sealed: the sizes stay the same
        shutil.rmtree(tmp_path / "train/checkpoint-8")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    after = work_done(tmp_path)
    assert after[0] > before[0] or after[1] > before[1]


def test_supervise_finds_the_run_as_the_runner_does(
    project: Path, run_fake: RunFake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id, from another folder, with `=`; and a run that is not there is one line, not eight restarts."""
    _, run = run_fake("--milestone", "m0", "--until", "answers")
    seen: list[Path] = []
    monkeypatch.setattr(Supervisor, "supervise", lambda self: seen.append(self.run) or 0)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.chdir("/")
    for argv in (["--resume", run.name], ["--resume=latest"], ["--resume", str(run)]):
        assert supervise.main([str(project / "cai.toml"), *argv]) == 0
    assert seen == [run] * 3
    capsys.readouterr()
    for argv in (["--resume", "nope"], []):
        assert supervise.main([str(project / "cai.toml"), *argv]) == errors.USAGE
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_supervise_tells_a_runner_that_was_being_started(tmp_path: Path) -> None:
    supervisor = Supervisor([sys.executable, "-c", "import time; time.sleep(30)"], tmp_path)
    supervisor.pass_on(signal.SIGTERM, None)  # the signal came before there was a child
    assert supervisor.supervise() == 143


@pytest.mark.runs
def test_supervise_restarts_what_is_resumable_and_nothing_else(tmp_path: Path) -> None:
    assert supervised(tmp_path, [75, 75, 0], grows=True) == (0, [1.0, 1.0], 3)
    assert supervised(tmp_path, [75, 3], grows=True) == (3, [1.0], 2)
    assert supervised(tmp_path, [-9, 0], grows=True) == (0, [1.0], 2)
    assert supervised(tmp_path, [6], grows=True) == (6, [], 1)


def test_supervise_backs_off_and_gives_up_without_progress(tmp_path: Path) -> None:
    assert supervised(tmp_path, [75], grows=False) == (75, [2.0, 4.0, 8.0], 4)


@pytest.mark.runs
@pytest.mark.parametrize("when", ["while it runs", "while it waits"])
def test_supervise_passes_a_signal_on_and_starts_no_other(when: str) -> None:
    child = "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print(1, flush=True); time.sleep(9)"
    if when == "while it waits":
        child = "import sys; print(1, flush=True); sys.exit(75)"
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom cai.commands.supervise import Supervisor\n"
        f"supervisor = Supervisor([sys.executable, '-c', {child!r}], Path('.'), first_wait=30.0)\n"
        "signal.signal(signal.SIGTERM, supervisor.pass_on)\nsys.exit(supervisor.supervise())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "1\n" and process.stderr
    if when == "while it waits":
        assert "resuming in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == errors.RESUMABLE and "1" not in out and "resuming" not in err


@pytest.mark.runs
def test_random_edits_are_always_found_and_always_repaired(tmp_path: Path) -> None:
    """Any one byte of a closed log changed: opening stops, repair drops at most two lines, the rest is as committed."""
    draw = random.Random(6)
    path = tmp_path / "records.jsonl"
    with RecordLog.open(path, tmp_path / "quarantine") as log:
        log.append(ROWS)
    data, sums = path.read_bytes(), path.with_suffix(".sum").read_bytes()
    for _ in range(200):
        offset = draw.randrange(len(data) - 1)
        path.write_bytes(data[:offset] + bytes([draw.randrange(256)]) + data[offset + 1 :])
        path.with_suffix(".sum").write_bytes(sums)
        if path.read_bytes() == data:
            continue
        with pytest.raises(CaiError):
            RecordLog.open(path, tmp_path / "quarantine")
        found = repair.plan(path)
        assert 1 <= len(found.drops) <= 2
        kept = [*repair._kept(path, {drop.line for drop in found.drops})]
        assert found.stay == len(kept) and set(kept) <= set(data.splitlines(True))
