"""A file is read once: a pipe gives its bytes or is refused after a moment, devices and huge files at once."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cai.errors import CaiError
from cai.store import reading
from cai.store.reading import Missing, read_once


def fault(path: Path | str, **options: object) -> str:
    with pytest.raises(CaiError) as caught:
        read_once(Path(path), where=f"{path}: key", **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{path}: key: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_regular_file_is_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\0b")
    assert read_once(tmp_path / "f", where="f") == b"a\0b"


def test_a_pipe_gives_all_that_was_written(tmp_path: Path) -> None:
    """As `<(...)` does: more than a pipe holds at once, so reader and writer take turns."""
    data = b"0123456789" * 30_000
    out, into = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(into, data[:1]), time.sleep(0.2), _write_all(into, data[1:])))
    writer.start()
    try:
        assert read_once(Path(f"/dev/fd/{out}"), where="f") == data
    finally:
        writer.join()
        os.close(out)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
    os.close(fd)


def test_a_pipe_that_nobody_writes_into_is_refused_after_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIPE_SECONDS", 0.3)
    os.mkfifo(tmp_path / "f")
    began = time.monotonic()
    assert "a pipe that gives nothing" in fault(tmp_path / "f")
    assert time.monotonic() - began < 5


def test_a_pipe_whose_writer_stops_half_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIPE_SECONDS", 0.3)
    out, into = os.pipe()
    os.write(into, b"half")
    assert "did not come to its end" in fault(f"/dev/fd/{out}")
    os.close(into)
    os.close(out)


def test_a_pipe_is_refused_where_a_folder_is_needed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    assert "is a pipe" in fault(tmp_path / "f", pipes=False)


def test_devices_folders_and_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    assert "a device or a socket" in fault("/dev/zero")
    assert "a device or a socket" in fault("/dev/null")
    assert "Is a directory" in fault(tmp_path)
    assert "cannot read it" in fault(tmp_path / ("x" * 5000))
    with pytest.raises(Missing, match="No such file"):
        read_once(tmp_path / "none", where="none")
    with pytest.raises(CaiError, match="null byte"):
        read_once(Path("a\0b"), where="f")


def test_more_than_the_bound_is_refused_from_files_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert "more than 1 MB" in fault(tmp_path / "f", most=1 << 20)
    out, into = os.pipe()
    os.write(into, b"x" * 5000)
    os.close(into)
    assert "more than 0 MB" in fault(f"/dev/fd/{out}", most=1000)
    os.close(out)


def test_a_file_that_only_waits_for_news_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of /proc do (kmsg): regular, empty by its size, and nothing to read yet."""
    (tmp_path / "kmsg").write_bytes(b"")

    def nothing(fd: int, size: int) -> bytes:
        raise BlockingIOError

    monkeypatch.setattr("cai.store.reading.os.read", nothing)
    with pytest.raises(CaiError, match="gives nothing"):
        read_once(tmp_path / "kmsg", where="kmsg")
