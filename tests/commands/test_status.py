"""--status: one screen from files only, of a run that works, ended, was killed, or is half written."""

from __future__ import annotations

import io
import os
import re
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import orjson
import pytest
from support import rich_run as rich
from support.pages import REPO, item_rows, make_run, records
from support.runs import FAKE

from cai.commands.status import command, just_made, screen, sparkline, watch
from cai.run.folder import Run


def lines_of(path, now=None):
    return {line.split()[0]: line for line in screen(path, now).splitlines()}


def test_a_finished_run(tmp_path):
    path = make_run(tmp_path)
    text = screen(path)
    found = lines_of(path)
    assert found["run"].endswith("m1 on SmolLM2-135M-Instruct (embedded)")
    assert found["state"].split() == ["state", "done"]
    assert "3 to train on, 1 held out" in found["pairs"]
    assert "1 rejected (too_short 1)" in found["instructions"]
    assert "10 steps done, loss 0.6931 to 0.4231" in found["training"]
    assert "gate         FAIL         revisions.addresses 0.5 (n=10)" in text
    assert len(text.splitlines()) < 25
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.runs
def test_tries_that_made_no_pair_are_counted_where_the_run_said_them(tmp_path):
    """A user saw "7 items rejected" once and on no other screen."""
    lines = ["Why do cats purr when they are stroked?", "word " * 9000, "How do I fix a tap that drips all night?"]
    folder = rich.project(tmp_path)
    (folder / "mine.txt").write_text("\n".join(lines))
    keys = ("--set", "items=3", "--set", "instructions.file=mine.txt", "--set", "evaluation.enabled=false")
    code, said = rich.go(folder, *FAKE, "--milestone", "m1", "--until", "pairs", *keys)
    assert code == 0, said
    told = re.search(r"dataset: .*; (\d+ of \d+) tries made no pair \((.*)\)", said)
    assert told and "missing_stage 1" in told[2]
    assert lines_of(rich.latest(folder))["pairs"].endswith(f"; {told[1]} tries made none ({told[2]})")


def test_a_run_at_work_and_one_that_was_killed(tmp_path):
    with Run.create(tmp_path, "20261122-180000-m1-abc123", {}, {"milestone": "m1"}, usd_per_hour=1.74) as run:
        run.status(
            now=True, stage="critiques", round=1, done=12, total=20, tokens_per_second=82.4, eta_seconds=[60.0, 90.0]
        )
        state = lines_of(run.path)["state"]
        assert state.split(None, 1)[1].startswith("running, attempt 1: critiques, round 2: 12/20, 82 tok/s, ")
        assert state.endswith(", 1 min to 1 min 30 s to go in this stage")
        later = datetime.now(UTC) + timedelta(hours=2)
        found = lines_of(run.path, later)
        assert "(alive, 2 h 00 min in one step)" in found["state"] and "go" not in found, "its holder lives"
        holder = orjson.loads((run.path / ".holder.json").read_bytes())
        (run.path / ".holder.json").write_bytes(orjson.dumps(holder | {"host": "elsewhere"}))
        found = lines_of(run.path, later)
        assert "silent for 2 h 00 min (killed, or in a long step)" in found["state"] and "--resume" in found["go"]


def test_a_model_that_loads_for_long_is_shown_as_alive_without_a_count(tmp_path):
    with Run.create(tmp_path, "20261122-180000-m1-abc123", {}, {"milestone": "m1"}) as run:
        run.status(now=True, stage="load the model")
        state = lines_of(run.path, datetime.now(UTC) + timedelta(minutes=5))["state"]
        assert "running, attempt 1: loading the model (alive, 5 min in one step)" in state


def test_a_number_that_is_another_process_now_is_no_living_holder(tmp_path):
    """A process that began after the lock was taken did not take it."""
    with Run.create(tmp_path, "20261122-180000-m1-abc123", {}, {"milestone": "m1"}) as run:
        holder = orjson.loads((run.path / ".holder.json").read_bytes())
        (run.path / ".holder.json").write_bytes(orjson.dumps(holder | {"since": "2020-01-01T00:00:00.000Z"}))
        assert "silent for" in lines_of(run.path, datetime.now(UTC) + timedelta(hours=2))["state"]


def test_a_run_whose_process_is_gone_was_killed(tmp_path):
    """At once, not after a minute of silence; and a watch of it ends."""
    with Run.create(tmp_path, "20261122-180000-m1-abc123", {}, {"milestone": "m1"}) as run:
        assert lines_of(run.path)["state"].split()[1] == "running,"
        assert "go" not in lines_of(run.path)
        holder = orjson.loads((run.path / ".holder.json").read_bytes())
        (run.path / ".holder.json").write_bytes(orjson.dumps(holder | {"pid": 2**22 + 1}))  # above Linux's largest
        assert "killed, can go on; its last sign of life was" in lines_of(run.path)["state"]
        assert "--resume" in lines_of(run.path)["go"]
        assert len(list(watch(run.path, 0.0))) == 1
        (run.path / ".holder.json").write_bytes(orjson.dumps(holder | {"pid": 2**22 + 1, "host": "elsewhere"}))
        assert "running" in lines_of(run.path)["state"]


def test_a_watch_outlasts_a_long_silent_step(tmp_path, monkeypatch):
    monkeypatch.setattr("cai.commands.status.SILENT_SECONDS", -1.0)
    with Run.create(tmp_path, "20261122-180000-m1-abc123", {}, {"milestone": "m1"}) as run:
        seen = watch(run.path, 0.0)
        assert "(alive, " in next(seen)
        assert "(alive, " in next(seen)
    assert "stopped where it was asked to" in next(seen)
    assert next(seen, None) is None


@pytest.mark.slow
def test_a_watch_folds_in_a_narrow_terminal_and_paints(tmp_path, monkeypatch):
    """Each line that a terminal breaks by itself moves the screen that is drawn over it."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    path = make_run(tmp_path)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *a: os.terminal_size((60, 40)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("cai.inputs.locate", lambda args, name: path)
    monkeypatch.setattr("sys.stdout", stream)
    assert command(SimpleNamespace(status="latest", watch=True)) == 0
    text = stream.getvalue().removeprefix("\x1b[H\x1b[J")
    assert "\x1b[32mPASS" in text or "\x1b[31mFAIL" in text
    lines = [line for line in re.sub(r"\x1b\[\d*m", "", text).split("\n") if "runner.py" not in line]
    assert max(map(len, lines)) <= 60


def test_a_watch_ends_when_nobody_reads_it(tmp_path, monkeypatch):
    (tmp_path / "cai.toml").write_text("[milestones.m0]\n")
    with Run.create(tmp_path / "runs", "20261122-180000-m1-abc123", {}, {"milestone": "m1"}):
        code = "import sys; sys.path.insert(0, sys.argv.pop()); import runner; sys.exit(runner.main())"
        command = [sys.executable, "-c", code, str(tmp_path / "cai.toml"), "--status", "runs/latest", "--watch", REPO]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as watching:
            assert watching.stdout is not None
            watching.stdout.readline()
            watching.stdout.close()
            assert watching.wait(timeout=20) == 0


def test_a_damaged_verdict_is_passed_over(tmp_path):
    path = make_run(tmp_path)
    for verdicts in ("3", '[{"metric": 1}, 5, {"metric": "a", "status": "PASS", "reason": "met"}]'):
        (path / "eval" / "gates.json").write_text('{"verdicts": ' + verdicts + "}")
        assert "gate" not in lines_of(path)


def test_a_stop_and_a_failure(tmp_path):
    path = make_run(tmp_path)
    with Run.open(path) as run:
        run.close(code=75, error="stopped in answers: by SIGTERM\nsecond line")
    text = screen(path)
    assert "stopped, can go on (exit 75): stopped in answers: by SIGTERM" in text
    assert f"--resume {path}" in text
    with Run.open(path) as run:
        run.close(code=6, error="no pair came through")
    assert "ended (exit 6): no pair came through" in screen(path)


def test_half_written_and_missing_parts(tmp_path):
    path = make_run(tmp_path)
    with (path / "records.jsonl").open("ab") as file:
        file.write(b'{"stage":"answers","status":"o')
    (path / "status.json").write_bytes(b"{")
    (path / "eval" / "gates.json").unlink()
    (path / "recipe.resolved.toml").write_bytes(b"= broken")
    for name in ("train", "heldout"):
        (path / "dataset" / "pairs" / f"{name}.jsonl").unlink()
    text = screen(path)
    assert "answers      5 accepted" in text
    assert "not written yet" in text
    for name in ("manifest.json", "events.jsonl", "records.jsonl"):
        (path / name).unlink()
    assert "nothing has happened yet" in screen(path)


def test_hostile_reasons_are_inert(tmp_path):
    rows = [*records(1), *item_rows(1)]
    rows[-1] = rows[-1] | {"status": "rejected", "reason": "\x1b[31mred\u202e"}
    text = screen(make_run(tmp_path, rows))
    assert "\x1b" not in text
    assert "\\x1b[31mred\\u202e" in text


def test_nothing_is_written_and_the_lock_is_not_needed(tmp_path):
    path = make_run(tmp_path)
    with Run.open(path):
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}
        screen(path)
        assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


def test_watch_ends_with_the_run(tmp_path):
    path = make_run(tmp_path)
    assert len(list(watch(path, 0.0))) == 1


@pytest.mark.runs
@pytest.mark.parametrize("run", ["runs/latest"])
def test_the_command_is_quick_and_needs_no_torch(tmp_path, run):
    path = make_run(tmp_path / "runs")
    (tmp_path / "cai.toml").write_text("[milestones.m0]\n")
    code = "import sys; sys.path.insert(0, sys.argv.pop()); import runner; code = runner.main()\n"
    code += "assert not {'torch', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, "cai.toml", "--status", *([run] if run else []), str(REPO)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime - before.ru_utime < 3.0  # of the processor, 0.9; with scipy.stats at the top it was 2.5
    assert done.stdout.startswith(f"run          {path.name}: m1")


@pytest.mark.runs
def test_many_rows_are_counted_in_time(tmp_path):
    path = make_run(tmp_path)
    row = orjson.dumps({"stage": "answers", "status": "ok", "text": "x" * 900}) + b"\n"
    (path / "records.jsonl").write_bytes(row * 35_000)
    began = time.monotonic()
    assert "35,000 accepted" in screen(path)
    assert time.monotonic() - began < 2.0


def test_a_run_that_stopped_where_it_was_asked_to_is_not_done(tmp_path):
    """`--until pairs` ends with 0, and nothing was trained."""
    path = make_run(tmp_path)
    (path / "eval" / "gates.json").unlink()
    found = lines_of(path)
    assert found["state"].endswith("stopped where it was asked to, can go on")
    assert "--resume" in found["go"]


def test_a_watch_shows_the_text_just_made_and_the_loss_as_a_line(tmp_path):
    path = make_run(tmp_path, [*item_rows(0), *item_rows(2)])
    text = next(watch(path, 0.0))
    made = next(line for line in text.splitlines() if line.startswith("just made"))
    assert "revisions, round 2, item 2: A mild sprain takes one to three weeks" in made
    assert "just made" not in screen(path), "a status is not a reader"
    loss = lines_of(path)["loss"]
    assert loss == "loss         0.693 █▇▆▆▅▄▃▃▂▁ 0.423"


def test_red_team_text_is_not_shown_unasked_while_one_watches(tmp_path):
    path = make_run(tmp_path, item_rows(1))
    text = next(watch(path, 0.0))
    assert "revisions, round 2, item 1: red-team text, folded" in text and "sprain" not in text


def test_hostile_text_just_made_does_not_steer_the_terminal():
    row = {"stage": "answers", "item": 0, "round": 0, "text": "a\x1b[2Jb\nc", "tokens": 3}
    from cai.terminal import printable

    assert "\x1b" not in printable(just_made([row])) and "\n" not in just_made([row])


def test_a_sparkline_needs_two_values_and_has_at_most_forty_marks():
    assert sparkline([0.5]) == ""
    assert sparkline([0.5, 0.5]) == "0.500 ▁▁ 0.500"
    line = sparkline([float(i) for i in range(1000)])
    assert len(line.split()[1]) == 40 and line.split()[1][0] == "▁" and line.split()[1][-1] == "█"
