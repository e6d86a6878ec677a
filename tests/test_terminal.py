"""Terminal and signals: inert text, streams that outlive a terminal, the two-step stop. F20 (signals), F21, G10."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cai import errors
from cai.errors import Stopped
from cai.run.stop import ONE_STOP_SECONDS, StopSwitch
from cai.terminal import LastingStream, printable

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "plain \u00e4 \u4f60 \U0001f469\u200d\U0001f680\tx\ny",
            "plain \u00e4 \u4f60 \U0001f469\u200d\U0001f680\tx\ny",
        ),
        ("\x1b[31mred\x1b]52;c;aGk=\x07", r"\x1b[31mred\x1b]52;c;aGk=\x07"),
        ("a\0b\x08\rc\x7f\x85\x9b", r"a\x00b\x08\x0dc\x7f\x85\x9b"),
        ("\u202eevil\u2066\u2028\u061c\u200b", r"\u202eevil\u2066\u2028\u061c\u200b"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_controls_are_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_every_control_is_inert_and_one_line_is_one_line() -> None:
    every = "".join(map(chr, range(0x2100)))
    out = printable(every, one_line=True)
    assert not [c for c in out if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E]
    assert len(out.splitlines()) == 1


def test_a_dead_stream_is_survived() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    stream = LastingStream(os.fdopen(write_fd, "w"))
    for _ in range(3):
        assert stream.write("line\n") == 5
        stream.flush()
    assert stream.dead and not stream.isatty()
    assert os.write(stream.fileno(), b"a library's own line") == 20
    stream._inner.close()
    LastingStream(io.StringIO()).write("x")


CHILD = """
import sys, time
from cai.terminal import last_through_hangups
from cai.run.stop import StopSwitch
last_through_hangups()
switch = StopSwitch(grace_seconds=float(sys.argv[1])).install()
log = open(sys.argv[2], "a", buffering=1)
log.write("ready\\n")
deadline = time.monotonic() + float(sys.argv[3])
while time.monotonic() < deadline:
    print("working", flush=True)
    print("working", file=sys.stderr, flush=True)
    time.sleep(0.02)
    if switch() and sys.argv[4] == "polite":
        log.write("graceful\\n")
        sys.exit(75)
log.write("finished\\n")
"""


def child(tmp_path: Path, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
    grace, seconds, manner = arguments
    command = [sys.executable, "-c", CHILD, grace, str(tmp_path / "log"), seconds, manner]
    process = subprocess.Popen(command, cwd=ROOT, **options)  # type: ignore[call-overload]
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_g10_first_signal_stops_gracefully(tmp_path: Path, number: int) -> None:
    process = child(tmp_path, "5", "20", "polite")
    process.send_signal(number)
    assert process.wait(timeout=5) == errors.RESUMABLE
    assert (tmp_path / "log").read_text() == "ready\ngraceful\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_g10_second_signal_stops_at_once(tmp_path: Path, number: int, code: int) -> None:
    process = child(tmp_path, "20", "20", "deaf")
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)  # within a moment of the first: one Ctrl-C that was passed on, still one stop
    time.sleep(ONE_STOP_SECONDS)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=2) == code


def test_g10_a_stop_that_takes_too_long_ends_resumable(tmp_path: Path) -> None:
    process = child(tmp_path, "0.5", "20", "deaf")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=5) == errors.RESUMABLE
    assert 0.3 < time.monotonic() - began < 2


@pytest.mark.runs
def test_g10_the_switch_turns_inside_one_long_native_call(tmp_path: Path) -> None:
    """SIGTERM in the middle of a call that returns to Python only after 20 s: the process ends in the grace period."""
    code = (
        "import hashlib, os\nfrom cai.run.stop import StopSwitch\nStopSwitch(grace_seconds=0.3).install()\n"
        "print('ready', flush=True)\nhashlib.pbkdf2_hmac('sha512', b'x', b'y', 30_000_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == errors.RESUMABLE


@pytest.mark.slow
def test_hold_puts_the_deadline_off() -> None:
    code = (
        "import time\nfrom cai.run.stop import StopSwitch\nswitch = StopSwitch(grace_seconds=0.2).install()\n"
        "with switch.hold():\n print('ready', flush=True)\n time.sleep(1.2)\n print('saved', flush=True)\ntime.sleep(9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=6) == errors.RESUMABLE
    assert process.stdout.read() == b"saved\n"


def test_a_forked_child_does_not_pass_its_signals_to_the_parent() -> None:
    code = (
        "import os, signal, sys, time\nfrom cai.run.stop import StopSwitch\nswitch = StopSwitch().install()\n"
        "child = os.fork()\nif child == 0:\n time.sleep(9)\n os._exit(0)\n"
        "time.sleep(0.2)\nos.kill(child, signal.SIGTERM)\n_, status = os.waitpid(child, 0)\ntime.sleep(0.2)\n"
        "sys.exit(0 if not switch() and os.WTERMSIG(status) == signal.SIGTERM else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20).returncode == 0


def test_the_switch_names_the_signal_and_gives_signals_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    switch = StopSwitch(grace_seconds=60).install()
    try:
        switch.check("before anything")
        switch.signal_number = signal.SIGTERM
        with pytest.raises(Stopped, match="SIGTERM during answers") as caught:
            switch.check("during answers")
        assert caught.value.code == errors.RESUMABLE
    finally:
        switch.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before


def test_f21_sighup_does_nothing(tmp_path: Path) -> None:
    def default() -> None:  # under nohup, a child would ignore it of its own accord
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = child(tmp_path, "5", "0.8", "polite", preexec_fn=default)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=5) == 0
    assert (tmp_path / "log").read_text() == "ready\nfinished\n"


@pytest.mark.slow
def test_f21_a_terminal_that_closes(tmp_path: Path) -> None:
    """A real pseudo-terminal, the child its session leader: closing it sends SIGHUP and makes every write fail."""
    leader, follower = pty.openpty()
    process = child(
        tmp_path, "5", "1.5", "polite", stdin=follower, stdout=follower, stderr=follower, preexec_fn=_session
    )
    os.close(follower)
    assert os.read(leader, 100)
    os.close(leader)
    assert process.wait(timeout=8) == 0
    assert (tmp_path / "log").read_text() == "ready\nfinished\n"


def _session() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_f21_piped_into_head(tmp_path: Path) -> None:
    process = child(tmp_path, "5", "1", "polite", stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=8) == 0
    assert (tmp_path / "log").read_text() == "ready\nfinished\n"


def test_f21_streams_that_were_closed_at_the_start(tmp_path: Path) -> None:
    """`>&- 2>&-`: a file that is opened next takes no standard descriptor's number, and printing goes nowhere."""
    code = "import sys; from cai.terminal import last_through_hangups; last_through_hangups(); "
    code += (
        "file = open('log', 'w'); print('x'); print('y', file=sys.stderr, flush=True); assert not sys.stderr.isatty(); "
    )
    code += "file.write(str(file.fileno()))"
    command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert int((tmp_path / "log").read_text()) > 2
