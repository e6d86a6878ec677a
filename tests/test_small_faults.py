"""What a disk, a browser, a name or a mistyped word may do: one line, nothing left behind, nobody held up."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.pages import make_run
from support.runs import ROOT

import runner
from cai import errors
from cai.commands import cli, review
from cai.errors import CaiError
from cai.report.pages import write_pages
from cai.report.snapshot import read_story
from cai.report.templating import code, environment
from cai.run.folder import Run
from cai.run.run_ids import resolve_run
from cai.run.stop import StopSwitch
from cai.store import files

Runner = Callable[..., tuple[int, Path]]
SMALL = ("--milestone", "m1", "--set", "items=1", "--set", "heldout.items=0", "--until", "instructions")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_has_no_sync_of_folders_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.fsync

    def refuse_folders(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(files, "_fsync", refuse_folders)
    files.write_atomic(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    monkeypatch.setattr(files, "_fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    with pytest.raises(CaiError, match="disk failed"):
        files.write_atomic(tmp_path / "x", b"other")


def test_an_idle_connection_and_half_a_form_hold_up_no_other_reader(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    seen: list[str] = []

    def ready(server: object, url: str) -> None:
        def visit() -> None:
            host, port = server.server_address  # type: ignore[attr-defined]
            idle, half = socket.create_connection((host, port)), socket.create_connection((host, port))
            token = url.rsplit("/", 2)[1]
            half.sendall(f"POST /{token}/ HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 500\r\n\r\nmark".encode())
            for length in ("²", "-1", "9" * 30, "x", "0" * 9 + "10000000"):
                bad = socket.create_connection((host, port))
                bad.sendall(
                    f"POST /{token}/ HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {length}\r\n\r\n".encode()
                )
                bad.settimeout(5)
                try:
                    seen.append(bad.recv(40).split(b" ")[1].decode())
                except TimeoutError:
                    seen.append("waits")
                bad.close()
            import urllib.request

            began = time.monotonic()
            seen.append(str(urllib.request.urlopen(url, timeout=15).status))
            seen.append("soon" if time.monotonic() - began < 5 else "late")
            idle.close()
            half.close()
            server.shutdown()  # type: ignore[attr-defined]

        threading.Thread(target=visit, daemon=True).start()

    with review.reviewing(read_story(path), "ann") as session:
        review.serve(session, lambda line: None, ready)
    assert seen == ["404", "404", "404", "404", "404", "200", "soon"]


def test_a_run_folder_that_a_killed_runner_was_making_is_removed_by_the_next(tmp_path: Path) -> None:
    dead = tmp_path / f".20261128-100000-m0-abcdef.{2**22 + 1}.new"
    mine = tmp_path / f".20261128-100000-m0-abcdee.{os.getpid()}.new"
    for folder in (dead, mine):
        folder.mkdir()
        (folder / "recipe.toml").write_text("x = 1")
    with Run.create(tmp_path, "20261128-100001-m0-abcdef", {}, {"milestone": "m0"}):
        pass
    assert not dead.exists() and mine.exists()


def test_latest_as_a_real_folder_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(CaiError, match="no link to a run"):
        resolve_run("latest", tmp_path)


HOSTILE = "evil\x1b[2J\u202e`name"


@pytest.mark.runs
def test_a_model_or_judge_with_a_hostile_name_is_inert_on_screen_and_in_every_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai.terminal import say

    say(f"model: {HOSTILE} loaded")
    assert "\x1b" not in capsys.readouterr().out
    rendered = environment().from_string("{{ x }} {{ x | code }}").render(x=HOSTILE)
    assert "\x1b" not in rendered and "\u202e" not in rendered and "``" in code(HOSTILE)
    path = make_run(tmp_path)
    import orjson

    manifest = orjson.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(orjson.dumps(manifest | {"model": {"model": HOSTILE, "backend": "fake"}}))
    write_pages(path)
    for page in ("report.html", "report.md"):
        text = (path / page).read_text()
        assert "evil" in text and "\x1b" not in text and "\u202e" not in text


@pytest.mark.runs
@pytest.mark.parametrize("place", ["runs", "runs/out", "runs/{id}/out"])
def test_nothing_is_exported_into_the_folder_of_runs(run_fake: Runner, project: Path, place: str, capsys) -> None:
    _, run = run_fake(*SMALL[:-1], "pairs")
    to = project / place.format(id=run.name)
    assert run_fake("--export", "runs/latest", "--to", str(to), fake=())[0] == errors.USAGE
    assert "among the runs" in capsys.readouterr().err
    kept = project / "out" / ".part"
    kept.mkdir(parents=True)
    (kept / "mine.txt").write_text("a person's")
    assert run_fake("--export", "runs/latest", "--to", str(project / "out"), fake=())[0] == errors.USAGE
    assert (kept / "mine.txt").read_text() == "a person's"


def test_a_run_whose_folder_is_taken_away_and_memory_that_is_used_up_are_one_line(
    run_fake: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "/x/runs/20261128-100000-m1-abcdef/eval/a.json")

    def full(*_: object) -> None:
        raise MemoryError

    for fault, word in ((gone, "is gone"), (full, "memory")):
        monkeypatch.setattr(runner, "read_inputs", fault)
        assert run_fake(*SMALL)[0] == errors.IO
        said = capsys.readouterr().err
        assert word in said and "Traceback" not in said and len(said.strip().splitlines()) == 1


ANSWERS = {
    ("status",): "--status",
    ("dry-run",): "--dry-run",
    ("--compare", "a"): "two runs or more, 1 was given",
    ("runs",): "--runs",
    ("stauts",): "Did you mean --status?",
    ("Compare",): "--compare",
    ("--staus",): "did you mean --status for --staus? See",
    ("--milstone", "m1"): "did you mean --milestone",
    ("--resum=runs/latest",): "did you mean --resume",
    ("docs",): "is a folder",
}


@pytest.mark.parametrize("argv", ANSWERS, ids=" ".join)
def test_a_mistyped_command_line_is_answered_to_the_point(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(CaiError) as caught:
        cli.parse(list(argv))
    assert ANSWERS[argv] in str(caught.value) and "\n" not in str(caught.value)


def test_a_rater_s_name_with_a_blank_is_answered_with_one_that_works(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    with pytest.raises(CaiError, match=r"--rater ann-b$"), review.reviewing(read_story(path), "Ann B"):
        pass
    with review.reviewing(read_story(path), "ann-b"):
        pass


def test_one_ctrl_c_that_reaches_the_process_twice_is_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice within a moment (`timeout --foreground` passes it on) is one; a second one later ends at once."""
    import signal

    ended: list[int] = []
    monkeypatch.setattr("cai.run.stop.os._exit", ended.append)
    switch = StopSwitch(grace_seconds=60).install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        assert switch() and not ended
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 5
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ended == [errors.SIGINT]
    finally:
        switch.uninstall()


def test_a_grace_period_does_not_end_a_process_that_took_its_signals_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended whatever the process did a minute later: the rest of a notebook, or of a test session."""
    import signal

    ended: list[int] = []
    monkeypatch.setattr("cai.run.stop.os._exit", ended.append)
    switch = StopSwitch(grace_seconds=0.3).install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 5
        while not switch() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        switch.uninstall()
    time.sleep(0.8)
    assert switch.signal_number == signal.SIGINT and not ended


def test_a_supervisor_does_not_resume_a_run_whose_budget_is_used_up(tmp_path: Path, capsys) -> None:
    from cai.commands.supervise import Supervisor

    with Run.create(tmp_path, "20261128-100000-m1-abcdef", {}, {"milestone": "m1"}) as run:
        path = run.path
        run.event("budget_stop", where="in answers")
    waits: list[float] = []
    command = [sys.executable, "-c", "raise SystemExit(75)"]
    assert Supervisor(command, path, wait=waits.append).supervise() == errors.RESUMABLE and not waits
    assert capsys.readouterr().err == f"not resumed: {path}: the budget is used up\n"
    with Run.open(path):  # a later attempt that was preempted is resumed
        pass
    assert Supervisor(command, path, wait=waits.append, fruitless=1).supervise() == errors.RESUMABLE and waits


def test_a_rate_is_never_shown_as_nothing_while_rows_are_made(tmp_path: Path) -> None:
    from cai.run.progress import Progress

    with Run.create(tmp_path, "20261128-100000-m1-abcdef", {}, {"milestone": "m1"}) as run:
        progress = Progress(run, 0.0)
        progress.begin("answers", 0, total=3)
        assert "tok/s" not in progress.rates() and progress.tokens_per_second() is None
        progress.began -= 50.0
        progress.step(20)
        assert "0.4 tok/s" in progress.rates()
        progress.began -= 600.0
        progress.last_step -= 600.0  # ten minutes more in which nothing finished
        assert "0.4 tok/s" in progress.rates()


@pytest.mark.runs
def test_the_package_installs_with_its_command_version_types_and_data(tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-c", "import setuptools, wheel"], capture_output=True).returncode:
        pytest.skip("setuptools is not installed: a wheel cannot be built here")
    source = tmp_path / "source"
    import shutil

    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "tests", "docs", "bench"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "-w", str(tmp_path), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"runner.py", "cai/py.typed", "cai/report/templates/report.html.j2", "cai/models/data/check_harm.jsonl"}
    assert wanted <= names
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "cai = runner:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--version"])
    assert caught.value.code == 0 and "constitutional-ai 0." in capsys.readouterr().out


def test_an_estimate_comes_from_whole_runs_only_and_counts_the_rest(tmp_path: Path) -> None:
    from support.pages import recipe

    from cai.run.rates import from_events, table_rates

    events = [
        {"attempt": 1, "kind": "attempt", "s": 0.0, "usd_per_hour": 0.0},
        {"attempt": 1, "kind": "stage", "stage": "answers", "round": 0, "tokens": 100, "seconds": 10.0, "s": 30.0},
        {"attempt": 1, "kind": "stage", "stage": "evaluate critiques.csi", "seconds": 20.0, "s": 60.0},
        {"attempt": 1, "kind": "end", "s": 70.0},
    ]
    manifest = {"stages": {"answers": {}}, "backend": "embedded", "items": 1, "heldout_items": 0}
    whole = from_events("one", manifest, events)
    assert whole is not None and (whole.rest_seconds, whole.growing_seconds) == (60.0, 20.0)
    later = {"attempt": 2, "kind": "stage", "stage": "answers", "round": 0, "tokens": 1, "seconds": 900.0, "s": 900.0}
    assert from_events("pieces", manifest, [*events, later]) is None
    assert table_rates("embedded").rest is not None
    assert recipe() and SimpleNamespace  # the table's rest is in an estimate without an earlier run
    from cai.run import budget

    found = budget.estimate(recipe(), "embedded", tmp_path, 100)
    assert found.rest is not None and "loading and evaluation" not in found.missing


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
        MemoryError(),
    ],
    ids=["threads", "library", "memory"],
)
def test_a_limit_of_the_host_is_one_line(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise fault

    monkeypatch.setattr(runner.cli, "parse", fail)
    assert runner.main(["cai.toml"]) == errors.IO
    said = capsys.readouterr().err
    assert "ulimit" in said and "Traceback" not in said and len(said.splitlines()) == 1
