"""The run folder: creation, lock, manifest, drift, attempts. F13, F14, F17, G7, G8, G11, G12."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from cai import errors
from cai.commands import cli
from cai.errors import CaiError
from cai.inputs import locate
from cai.run import folder as run_module
from cai.run.events import read_events
from cai.run.folder import Run, check_identity, write_atomic, write_json_atomic
from cai.run.manifest import read_manifest
from cai.run.run_ids import check_run_id, new_run_id, resolve_run
from cai.store import files

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = {"seed": "7", "model.revision": "'abc'"}


def made(root: Path, run_id: str = "20260101-000000-m0-abcdef") -> Run:
    return Run.create(root, run_id, {"recipe.toml": "seed = 7\n"}, {"identity": IDENTITY}, usd_per_hour=3.6)


def python(code: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """A child Python that sees this repository; its output is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload]


def test_a_new_run_has_everything_that_names_it(tmp_path: Path) -> None:
    with made(tmp_path / "runs") as run:
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
        assert (run.path / "recipe.toml").read_text() == "seed = 7\n"
        assert read_manifest(run.path / "manifest.json")["identity"] == IDENTITY
        assert os.readlink(tmp_path / "runs" / "latest") == run.id
        run.update_manifest(model={"name": "x"})
    assert read_manifest(run.path / "manifest.json")["model"] == {"name": "x"}
    with pytest.raises(CaiError, match="exists already"):
        made(tmp_path / "runs")


def test_run_ids(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    run_id = new_run_id("M1", {"a": "1"}, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert run_id.startswith("20260102-030405-m1-") and len(run_id) == 25
    for bad in ("", "A", "-x", ".x", "a/b", "a" * 81, "a\n", "ä", "a b"):
        with pytest.raises(CaiError) as caught:
            check_run_id(bad)
        assert caught.value.code == errors.USAGE


def test_a_run_is_only_found_inside_its_root(tmp_path: Path) -> None:
    """Path traversal, links and unknown ids: one line, exit 2."""
    root = tmp_path / "runs"
    made(root).close()
    run_id = "20260101-000000-m0-abcdef"
    (root / "linked").symlink_to(root / run_id)
    (tmp_path / "outside" / run_id).mkdir(parents=True)
    for good in (run_id, f"{root}/{run_id}", f"{root}/{run_id}/", f"{root}/latest", "latest"):
        assert resolve_run(good, root) == root / run_id
    for bad in (
        "..",
        "../outside",
        f"{tmp_path}/outside/{run_id}",
        f"{root}/../outside",
        "/etc",
        f"{root}/linked",
        f"{root}/nope",
        f"{root}/..",
        ".",
    ):
        with pytest.raises(CaiError) as caught:
            resolve_run(bad, root)
        assert caught.value.code == errors.USAGE and "\n" not in str(caught.value)
    (root / "latest").unlink()
    (root / "latest").symlink_to("../outside")
    with pytest.raises(CaiError, match="run id"):
        resolve_run("latest", root)
    with pytest.raises(CaiError, match="no run folder"):
        Run.open(root / "linked")


@pytest.mark.parametrize("name", ["records.jsonl", "prompts/critiques.yaml"])
def test_a_pipe_in_a_run_is_refused_before_anything_waits_for_it(tmp_path: Path, name: str) -> None:
    run = made(tmp_path / "runs")
    run.close()
    (run.path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(run.path / name)
    with pytest.raises(CaiError, match=rf"/{name}: is a pipe or a device") as caught:
        resolve_run(run.id, tmp_path / "runs")
    assert caught.value.code == errors.CORRUPT


def test_a_command_finds_the_runs_folder_that_a_set_names_as_the_run_does(tmp_path: Path) -> None:
    recipe = tmp_path / "cai.toml"
    recipe.write_text('runs = "other"\n')
    for given, name in (('my "runs"', 'my "runs"'), ('"my runs"', "my runs"), (" plain ", "plain")):
        run = made(tmp_path / name)
        run.close()
        args = cli.parse([str(recipe), "--set", "seed=1", "--set", f"runs ={given}"])
        assert locate(args, "latest") == tmp_path / name / run.id


def test_a_mistyped_run_id_is_answered_with_the_run_that_was_meant(tmp_path: Path) -> None:
    for name in ("20261125-042544-m0-6ba4ff", "20261125-042552-m1-9f6806"):
        (tmp_path / name).mkdir()
    for wrong in ("20261125-042544-m0-6ba4fx", "20261125-042544-m0", "042544-m0-6ba4ff", "20261125-42544-m0-6ba4ff"):
        with pytest.raises(CaiError, match=r"no such run \(did you mean 20261125-042544-m0-6ba4ff"):
            resolve_run(wrong, tmp_path)
    with pytest.raises(CaiError, match="the newest of 2 is 20261125-042552-m1-9f6806"):
        resolve_run("nope", tmp_path)


@pytest.mark.parametrize("call", ["write", "replace", "rename"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_kill_while_a_run_is_created_leaves_no_half_run(tmp_path: Path, call: str, nth: int) -> None:
    """SIGKILL at the n-th such call of a forked child: whole (the rename is done) or under a hidden name."""
    root = tmp_path / "runs"
    if (child := os.fork()) == 0:
        module, name = (os, "rename") if call == "rename" else (files, f"_{call}")
        real, calls = getattr(module, name), iter(range(1, 100))
        fatal = lambda *rest: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == nth else real(*rest)  # noqa: E731
        setattr(module, name, fatal)
        try:
            made(root)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    seen = [path for path in root.iterdir() if not path.name.startswith(".") and not path.is_symlink()]
    assert os.WIFEXITED(status) == (call == "rename" and nth == 2) == bool(seen)
    made(root, "20260101-000000-m0-abcdee").close()
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        made(root, "20260101-000000-m0-abcded")
    assert not list(root.glob(".20260101-000000-m0-abcded*")), "what can clean up does"


@pytest.mark.slow
def test_runs_that_begin_in_the_same_second_each_get_a_folder(tmp_path: Path) -> None:
    """Four runners of one recipe, released at once: four whole runs, none disturbs another."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from cai import inputs as i, session as s; from cai.run import folder as r\n"
        "class Same(s.argparse.Namespace): set, limit, override_gate = [], 0, None\n"
        "r.utc_now(); s.new_run_id = lambda *a: '20260101-000000-m0-abcdef'\n"
        "inputs = i.read_inputs(s.argparse.Namespace(recipe=Path('cai.toml'), milestone='m0', resume='', fork='',\n"
        "    limit=0, override_gate=None, set=['model.backend=fake', f'runs={sys.argv[1]}']))\n"
        "time.sleep(max(0.0, float(sys.argv[2]) - time.time()))\n"
        "run = s.create_run(inputs, Same()); print(run.id, len(list(run.path.iterdir()))); run.close()"
    )
    together = str(time.time() + 3)
    children = [python(code, str(tmp_path / "runs"), together) for _ in range(4)]
    said = sorted(child.communicate(timeout=60)[0].split() for child in children)
    first = "20260101-000000-m0-abcdef"
    assert [name for name, _ in said] == [first, *(f"{first}-{n}" for n in (1, 2, 3))]
    assert len({count for _, count in said}) == 1
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["runs", "runs/below"])
def test_a_runs_folder_that_links_to_nothing_is_told_and_not_tried_for_ever(tmp_path: Path, name: str) -> None:
    """A volume that is not mounted: its folder was taken for a run of the same id, and the next id for another."""
    (tmp_path / "runs").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(CaiError, match=rf"^{tmp_path}/runs: a link to nothing") as caught:
        made(tmp_path / name)
    assert caught.value.code == errors.IO and not isinstance(caught.value, run_module.Taken)


def test_another_runner_that_was_first_by_a_moment_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder appears between the look and the rename: the id is taken, nothing of the other's is touched."""
    root, real = tmp_path / "runs", os.rename

    def late(source: Path, target: Path) -> None:
        Path(target).mkdir(exist_ok=True)
        (Path(target) / "records.jsonl").write_bytes(b"theirs")
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(run_module.Taken, match="exists already"):
        made(root)
    assert [path.name for path in root.iterdir()] == ["20260101-000000-m0-abcdef"]
    assert (root / "20260101-000000-m0-abcdef" / "records.jsonl").read_bytes() == b"theirs"


def test_f13_a_second_runner_is_told_who_holds_the_run(tmp_path: Path) -> None:
    """G7."""
    run = made(tmp_path / "runs")
    child = python(
        "import sys; from pathlib import Path; from cai.run.folder import Run\n"
        "try: Run.open(Path(sys.argv[1]))\n"
        "except Exception as error: print(error.code, error)",
        str(run.path),
    )
    said = child.communicate(timeout=30)[0]
    assert said.startswith(f"{errors.LOCKED} ") and f"process {os.getpid()}" in said and said.count("\n") == 1
    with pytest.raises(CaiError, match="locked by process"):
        Run.open(run.path)
    run.close()
    Run.open(run.path).close()
    assert run.events("attempt")[-1]["attempt"] == 2, "the refused ones began no attempt"


FORKING_PARENT = """
import os, sys, time
from pathlib import Path
from cai.run.folder import Run
run = Run.open(Path(sys.argv[1]))
keep = os.dup(run._lock._context.lock_file_fd) if sys.argv[2] == "kept" else None
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.write(tell, b"!")  # what a fork runs in the child is done: the lock is let go
    os.close(1)
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("lock", ["let go", "kept"])
def test_f14_dead_parent_live_child(tmp_path: Path, lock: str) -> None:
    """A forked child lets the lock go; one that cannot (a duplicate in native code) is named in the message."""
    made(tmp_path / "runs").close()
    path = tmp_path / "runs" / "20260101-000000-m0-abcdef"
    parent = python(FORKING_PARENT, str(path), lock)
    assert parent.stdout
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(CaiError, match=f"process {parent.pid}"):
            Run.open(path)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        os.kill(child, 0)
        if lock == "let go":
            Run.open(path).close()
        else:
            with pytest.raises(CaiError, match=f"child that outlived runner process {parent.pid}") as caught:
                Run.open(path)
            assert caught.value.code == errors.LOCKED and "fuser" in str(caught.value)
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_lock_of_a_killed_runner_is_free(tmp_path: Path) -> None:
    made(tmp_path / "runs").close()
    path = tmp_path / "runs" / "20260101-000000-m0-abcdef"
    child = python(
        "import sys, time; from pathlib import Path; from cai.run.folder import Run\n"
        "run = Run.open(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)",
        str(path),
    )
    assert child.stdout and child.stdout.readline()
    child.kill()
    child.wait()
    Run.open(path).close()


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, errors.CORRUPT, "missing"),
        (b"", errors.CORRUPT, "not whole"),
        (b'{"schema": 1, "identi', errors.CORRUPT, "not whole"),
        (b"\0" * 40, errors.CORRUPT, "not whole"),
        (b"[]", errors.CORRUPT, "no schema number"),
        (b'{"schema": 1, "training_identity": "x"}', errors.CORRUPT, "training_identity: should be a dict"),
        (b'{"schema": 1, "sets": {}}', errors.CORRUPT, "sets: should be a list"),
        (b'{"schema": 2}', errors.USAGE, "newer than 1.*update the program"),
    ],
)
def test_f17_manifest_missing_truncated_newer(tmp_path: Path, content: bytes | None, code: int, says: str) -> None:
    run = made(tmp_path / "runs")
    run.close()
    run.manifest_path.unlink()
    if content is not None:
        run.manifest_path.write_bytes(content)
    with pytest.raises(CaiError, match=says) as caught:
        Run.open(run.path)
    assert caught.value.code == code and "\n" not in str(caught.value) and "manifest.json" in str(caught.value)
    if content is not None:
        run.manifest_path.write_bytes(b'{"schema": 1}')
        Run.open(run.path).close()  # the lock was freed by the failed open


def test_g8_drift_names_every_key_and_offers_a_fork() -> None:
    check_identity(IDENTITY, dict(IDENTITY))
    with pytest.raises(CaiError) as caught:
        check_identity({"seed": "7", "beta": "0.1"}, {"seed": "8", "new": "1" * 200}, "runs/x", "my.toml")
    said = str(caught.value)
    assert caught.value.code == errors.DRIFT
    assert "seed: '7' -> '8'" in said and "beta: '0.1' -> (absent)" in said and "new: (absent) ->" in said
    assert "--fork runs/x" in said and "runner.py my.toml" in said and "3 inputs" in said
    assert max(len(line) for line in said.splitlines()) < 120


@pytest.mark.runs
def test_time_and_cost_are_sums_over_attempts_also_killed_ones(tmp_path: Path) -> None:
    """G12: a killed attempt counts up to its last event; the wall clock is not used."""
    root = tmp_path / "runs"
    made(root).close()
    path = root / "20260101-000000-m0-abcdef"
    code = (
        "import os, sys, time, signal; from pathlib import Path; from cai.run import folder as r\n"
        "r.HEARTBEAT_SECONDS, r.STATUS_SECONDS = 0.05, 0.0\n"
        "run = r.Run.open(Path(sys.argv[1]), usd_per_hour=3600.0)\n"
        "for i in range(8): time.sleep(0.03); run.status(done=i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        assert python(code, str(path)).wait(timeout=30) == -signal.SIGKILL
    with Run.open(path, usd_per_hour=0.0) as run:
        total = run.spent()
        assert total["attempts"] == 4 and 0.3 < total["seconds"] < 3
        assert total["usd"] == pytest.approx(total["seconds"], abs=0.1)
        assert run.read_status()["done"] == 7
        assert [e["attempt"] for e in run.events("attempt")] == [1, 2, 3, 4]


def test_f29_a_clock_that_jumps_back_changes_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    days = iter(["2030-01-01T00:00:00.000Z"] + ["1999-01-01T00:00:00.000Z"] * 100)
    run = made(tmp_path / "runs")
    monkeypatch.setattr(run_module, "utc_now", lambda: next(days))
    clock = iter(range(2_000_000_000, 0, -10_000_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    run.event("before")
    time.sleep(0.05)
    run.event("after")
    total = run.spent()
    assert 0.05 <= total["seconds"] < 5 and run.events("after")[0]["t"].startswith("1999")
    assert all(0 <= event["s"] < 5 for event in run.events()), "by the monotonic clock"
    run.close()


def test_a_torn_event_heals_and_is_noted(tmp_path: Path) -> None:
    run = made(tmp_path / "runs")
    run.close()
    with run.events_path.open("ab") as file:
        file.write(b'{"t":"2026')
    with Run.open(run.path) as again:
        assert again.events("healed")[0]["cut_bytes"] == 10
    with run.events_path.open("ab") as file:
        file.write(b"\xff\n")
    assert len([e for e in read_events(run.path / "events.jsonl") if e["kind"] == "attempt"]) == 2


def test_an_event_may_tell_of_a_nan(tmp_path: Path) -> None:
    with made(tmp_path / "runs") as run:
        run.event("train", loss=float("nan"), step=3)
        assert run.events("train")[0]["loss"] == "nan"


def test_g11_atomic_files_are_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_json_atomic(path, {"a": 1})
    for call in ("_write", "_fsync", "_replace"):

        def fail(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files, call, fail)
            with pytest.raises(CaiError, match="free space") as caught:
                write_atomic(path, b"new")
        assert caught.value.code == errors.IO
        assert orjson.loads(path.read_bytes()) == {"a": 1} and os.listdir(tmp_path) == ["status.json"]


def test_g11_atomic_files_sync_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("_write", "_fsync", "_replace"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    write_atomic(tmp_path / "x", b"data")
    assert calls == ["_write", "_fsync", "_replace", "_fsync"]


def test_g11_a_resume_removes_half_files_of_killed_writers_only(tmp_path: Path) -> None:
    """Left in dataset/, one would be exported and shared with the data set."""
    run = made(tmp_path / "runs")
    run.close()
    (run.path / "dataset").mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    halves = {pid: run.path / "dataset" / f".examples.jsonl.{pid}.new" for pid in (ended.pid, os.getpid(), 1)}
    for path in halves.values():
        path.write_bytes(b"{")
    Run.open(run.path).close()
    assert [pid for pid, path in halves.items() if path.exists()] == [1]


def test_closing_on_a_broken_disk_keeps_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CaiError, match=r"records\.jsonl"), made(tmp_path / "runs") as run, run.records() as log:
        monkeypatch.setattr(files, "_write", full)
        log.append([{"stage": "answers", "item": 0, "round": 0}])
    monkeypatch.undo()
    with Run.open(run.path) as again:
        assert again.attempt == 2
