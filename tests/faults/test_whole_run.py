"""Whole runs on the fake model, in child processes, under faults that are injected for real.

F04, F10, F15, F16, F18, F20, F21, F27, F29 and the guarantees they stand for. The embedded model's turn is in
test_embedded_run.py, training's own faults in tests/test_train*.py.
"""

from __future__ import annotations

import os
import pty
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from whole import ROOT, Project, digest, events, wait_for

from cai import errors
from cai.commands import verify
from cai.store.records import read

pytestmark = pytest.mark.faults
M1 = ("--milestone", "m1")
SLOW = ("model.name=fake:slow",)


@pytest.fixture
def made(project: Path) -> Project:
    return Project(project)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digest of an M1 run that was left alone."""
    return digest(_whole(tmp_path_factory, "fake"))


@pytest.fixture(scope="session")
def alone_slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digest(_whole(tmp_path_factory, "fake:slow"))


def _whole(factory: pytest.TempPathFactory, model: str) -> Path:
    import shutil

    from whole import ROOT

    folder = factory.mktemp("alone")
    for name in ("cai.toml", "constitution.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    project = Project(folder)
    done = project.go(*M1, sets=(f"model.name={model}",))
    assert done.code == 0, done.said
    return project.run


def test_f04_sigkill_at_random_times_30_rounds(made: Project, alone_slow: dict[str, str]) -> None:
    """G1-G4: killed thirty times over several whole runs, each ends with the bytes of the run left alone."""
    began = time.monotonic()
    assert made.go(*M1, sets=SLOW).code == 0
    whole = time.monotonic() - began
    draw, rounds, finished = random.Random(4), 0, 0
    argv: tuple[str, ...] = M1
    committed = 0
    while rounds < 30 or argv != M1:
        process = made.fork(*argv, sets=SLOW * (argv == M1))
        try:
            code = process.wait(whole * draw.uniform(0.2, 1.2) if rounds < 30 else 120)
            assert code == 0, (made.folder / "errors").read_text()[-2000:]
            assert digest(made.run) == alone_slow
            assert verify.sound(verify.verify(made.run))
            finished, argv, committed = finished + 1, M1, 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            rounds += 1
            if argv == M1 and not _has_run(made):
                continue
            rows = read(made.run / "records.jsonl")
            assert len(rows) >= committed, "a committed row is gone"
            committed, argv = len(rows), ("--resume", "runs/latest")
    assert finished >= 2


def _has_run(made: Project) -> bool:
    """Whether the killed runner had come as far as a run folder that is not finished."""
    latest = made.folder / "runs" / "latest"
    return latest.is_symlink() and not (latest / "report.md").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_f10_disk_full_at_every_size(made: Project, disk: Path, alone: dict[str, str]) -> None:
    """G9: wherever the disk fills up (inputs, logs, data set, adapter, report), exit 74 and one line.

    After each, 20 KB more and a resume: no committed row is lost, and the end is that of the run left alone.
    """
    argv, failed, committed = M1, set(), 0
    for size in range(24, 4000, 20):
        subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        done = made.go(*argv, sets=(f"runs={disk}/runs",))
        if done.code == 0:
            break
        assert done.code == errors.IO, done.said
        lines = done.err.strip().splitlines()
        assert "free space" in lines[-1] and "Traceback" not in done.err, done.err
        failed.add(Path(lines[-1].split(": ")[0]).name)
        latest = disk / "runs" / "latest"
        if latest.is_symlink():
            rows = read(latest.resolve() / "records.jsonl")
            assert len(rows) >= committed
            committed, argv = len(rows), ("--resume", f"{disk}/runs/latest")
    run = (disk / "runs" / "latest").resolve()
    assert digest(run) == alone
    assert verify.sound(verify.verify(run))
    assert len(failed) >= 4 and any(name.startswith("report") for name in failed), failed


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", "1"), ("engine.batch_size", "3"), ("sampling.answers.temperature", "0.5"), ("rounds", "2")],
)
def test_f15_a_changed_recipe_is_drift(made: Project, key: str, value: str) -> None:
    """G8: exit 3 names the key with both values, offers a fork, changes nothing."""
    assert made.go("--milestone", "m0", "--until", "answers").code == 0
    before = digest(made.run, ("records.jsonl", "manifest.json", "recipe.resolved.toml"))
    done = made.resume(sets=(f"{key}={value}",))
    assert done.code == errors.DRIFT and f"{key}: " in done.err and "-> " in done.err and "--fork" in done.err
    assert digest(made.run, ("records.jsonl", "manifest.json", "recipe.resolved.toml")) == before


def test_f15_both_remedies_do_what_they_say(made: Project) -> None:
    """As printed, from the folder where the refused command was given, also where only a run's name was given."""
    assert made.go("--milestone", "m1", "--limit", "2", "--until", "answers").code == 0
    first = made.run
    done = made.go("--resume", first.name, sets=("sampling.answers.temperature=0.5",))
    assert done.code == errors.DRIFT
    as_it_was, forked = (shlex.split(line.partition("runner.py ")[2]) for line in done.err.splitlines()[-2:])
    assert as_it_was[1] == "--resume" and "--fork" in forked, done.err
    for words in (as_it_was, forked):
        command = [sys.executable, str(ROOT / "runner.py"), *words]
        ran = subprocess.run(command, cwd=made.folder, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
    assert made.run != first and "temperature = 0.5" in (made.run / "recipe.resolved.toml").read_text()
    stages = {row["stage"] for row in read(made.run / "records.jsonl")}
    assert stages == {"instructions", "label_bar"}, "what no answer's temperature made"
    assert 'milestone = "m1"' in (made.run / "recipe.resolved.toml").read_text()


@pytest.mark.parametrize("name", ["prompts/revisions.yaml", "constitution.yaml"])
def test_f15_a_changed_file_is_drift(made: Project, name: str) -> None:
    assert made.go("--milestone", "m0", "--until", "answers").code == 0
    path = made.folder / name
    path.write_text(path.read_text() + "\n# a remark\n")
    done = made.resume()
    assert done.code == errors.DRIFT and name in done.err
    own = Project(made.run, (), recipe="recipe.toml")
    assert own.go("--resume", str(made.run)).code == 0, "the run's own copies continue it"


def test_f16_price_items_and_training_keys_may_change_before_training(made: Project) -> None:
    assert made.go(*M1, "--until", "revisions").code == 0
    before = read(made.run / "records.jsonl")
    done = made.resume(sets=("budget.usd_per_hour=9.0", "items=12", "dpo.beta=0.2"))
    assert done.code == 0, done.said
    rows = read(made.run / "records.jsonl")
    assert rows[: len(before)] == before and {row["item"] for row in rows} >= set(range(12))
    assert events(made.run, "attempt")[-1]["usd_per_hour"] == 9.0
    done = made.resume(sets=("dpo.beta=0.3",))
    assert done.code == errors.DRIFT and "dpo.beta" in done.err


def test_f18_a_resume_with_nothing_left_loads_no_model(made: Project) -> None:
    """G12: under three seconds, exit 0, no model, no derived byte rewritten, once more the same verdict."""
    first = made.go(*M1, alone=True)  # with its pictures, which a forked one has not
    assert first.code == 0, first.said
    ours = ("records.jsonl", "records.sum", "dataset", "adapter", "train", "manifest.json", "prompts")
    ours += ("eval/scores.jsonl", "eval/measured.json", "eval/gates.json")  # reports tell the cost, so they change
    before, loaded = digest(made.run, ours), len(events(made.run, "model_loaded"))
    stamps = {made.run / name: (made.run / name).stat().st_mtime_ns for name in before}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = made.resume(alone=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime  # of the processor: the machine is shared
    assert done.code == 0 and seconds < 3, (seconds, done.said)
    assert digest(made.run, ours) == before and len(events(made.run, "model_loaded")) == loaded
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert done.out.splitlines()[-1].split(". Report")[0] == first.out.splitlines()[-1].split(". Report")[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["instructions", "critiques", "revisions"])
def test_f20_signals_in_generation(made: Project, alone_slow: dict[str, str], number: int, stage: str) -> None:
    """G10: exit 75 within five seconds, one line that says how to go on, and the end is the same."""
    process = made.fork(*M1, sets=SLOW)
    status = made.folder / "runs" / "latest" / "status.json"
    wait_for(process, lambda: status.exists() and orjson.loads(status.read_bytes()).get("stage") == stage)
    began = time.monotonic()
    process.send_signal(number)
    code, err = process.wait(10), (made.folder / "errors").read_text()
    assert code == errors.RESUMABLE, err
    assert time.monotonic() - began < 5 and "resume" in err.splitlines()[-1] and "Traceback" not in err
    assert events(made.run, "end")[-1]["code"] == errors.RESUMABLE
    done = made.resume()
    assert done.code == 0, done.said
    assert digest(made.run) == alone_slow


def test_f20_two_signals_end_at_once_and_the_run_goes_on(made: Project, alone_slow: dict[str, str]) -> None:
    process = made.start(*M1, sets=SLOW)
    log = made.folder / "runs" / "latest" / "records.jsonl"
    wait_for(process, lambda: log.exists() and log.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode in (errors.SIGINT, errors.RESUMABLE)
    assert made.resume().code == 0
    assert digest(made.run) == alone_slow


def test_f21_the_terminal_closes(made: Project, alone_slow: dict[str, str]) -> None:
    leader, follower = pty.openpty()
    process = made.start(
        *M1, sets=SLOW, stdin=follower, stdout=follower, stderr=follower, start_new_session=False, preexec_fn=_terminal
    )
    os.close(follower)
    assert os.read(leader, 100)
    log = made.folder / "runs" / "latest" / "records.jsonl"
    wait_for(process, lambda: log.exists() and log.stat().st_size > 0)
    os.close(leader)
    assert process.wait(timeout=60) == 0
    assert digest(made.run) == alone_slow


def _terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_f21_piped_into_head(made: Project, alone: dict[str, str]) -> None:
    process = made.start(*M1)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert digest(made.run) == alone


@pytest.mark.parametrize("behaviour", ["empty", "looping", "limit", "refusing", "copying"])
@pytest.mark.parametrize("given", [False, True], ids=["from the first stage on", "answers only"])
def test_f27_outputs_that_are_no_answers(made: Project, behaviour: str, given: bool) -> None:
    """Every reject is a row with a reason; with no pair at all the run ends 6, says why, and says it again."""
    sets = [f"model.name=fake:{behaviour}"]
    if given:
        lines = [f"Describe harbour number {i} and its {i * 7} lanterns, please." for i in range(40)]
        (made.folder / "given.txt").write_text("\n".join(lines))
        sets.append("instructions.file=given.txt")
    done = made.go(*M1, sets=tuple(sets))
    assert done.code == errors.QUALITY and "no pair came through, rejected: " in done.err, done.said
    rows = read(made.run / "records.jsonl")
    assert rows and all(row["status"] == "ok" or row["reason"] for row in rows)
    assert "Traceback" not in done.err
    assert verify.sound(verify.verify(made.run))
    before = digest(made.run)
    again = made.resume()
    assert again.code == errors.QUALITY and digest(made.run) == before


@pytest.mark.parametrize("items", [0, 1, 7, 16, 17, 33])
def test_f29_any_number_of_items(made: Project, items: int) -> None:
    """None, one, a batch less and more one: each item has its pair; a resume finds nothing left."""
    done = made.go("--milestone", "m1", sets=(f"items={items}", "evaluation.enabled=false"))
    if items == 0:
        assert done.code == errors.USAGE and "items" in done.err and len(done.err.strip().splitlines()) == 1
        return
    assert done.code == 0, done.said
    assert len(read_lines(made.run / "dataset" / "examples.jsonl")) == items
    before = digest(made.run)
    assert made.resume().code == 0 and digest(made.run) == before


def read_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def test_f29_a_clock_that_jumps_back(made: Project, alone: dict[str, str]) -> None:
    """The resume runs in 1999 (libfaketime where it is installed, else a patched clock in the child)."""
    assert made.go(*M1, "--until", "answers").code == 0
    hook = made.folder / "sitecustomize.py"
    hook.write_text("import time\nreal = time.time\ntime.time = lambda: real() - 27 * 365 * 86400\n")
    made.env["PYTHONPATH"] = f"{made.folder}:{os.environ.get('PYTHONPATH', '')}"
    done = made.resume()
    assert done.code == 0, done.said
    assert digest(made.run) == alone
    assert all(0 <= float(str(event["s"])) < 60 for event in events(made.run, "stage"))
