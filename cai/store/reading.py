"""A user's file, read once: bounded in size, and a pipe is never waited for more than a moment.

Owns opening and reading. Whoever hashes, parses or copies a user's file takes these bytes: a pipe (`<(...)`, a FIFO)
gives them once, and a second open of it would wait for ever or find nothing. Does not know what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

from cai.errors import CaiError

MOST_BYTES = 256 << 20  # of a file of instructions; 5 million requests of 50 characters
MOST_WRITTEN_BYTES = 16 << 20  # of a file that people write by hand
PART = 1 << 20
PIPE_SECONDS = 5.0  # without one byte more from a pipe
PIPE_SECONDS_IN_ALL = 60.0


def read_once(path: Path, *, where: str, most: int = MOST_BYTES, pipes: bool = True) -> bytes:
    """All bytes of a regular file or, with `pipes`, of a pipe. `where`: how a fault begins ("FILE: KEY").

    Errors, one line each: missing, a folder, a device, more than `most` bytes, a pipe that gives nothing.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Missing(f"{where}: cannot read it ({error.strerror}). Give an existing file.") from None
    except OSError as error:
        hint = "Give a regular file." if error.errno == errno.ENXIO else "Give an existing file."
        raise CaiError(f"{where}: cannot read it ({error.strerror}). {hint}") from None
    except ValueError as error:  # a NUL in the name
        raise CaiError(f"{where}: cannot read it ({error}). Give an existing file.") from None
    try:
        return _read(fd, where, most, pipes)
    except OSError as error:
        raise CaiError(f"{where}: cannot read it ({error.strerror}). Give a file that can be read.") from None
    finally:
        os.close(fd)


class Missing(CaiError):
    """There is no such file (a resume may have a copy)."""


def _read(fd: int, where: str, most: int, pipes: bool) -> bytes:
    about = os.fstat(fd)
    if stat.S_ISREG(about.st_mode):
        if about.st_size > most:
            raise _too_large(where, most)
        return _until_end(fd, where, most, None)
    if stat.S_ISDIR(about.st_mode):
        raise CaiError(f"{where}: cannot read it (Is a directory). Give an existing file.")
    if not stat.S_ISFIFO(about.st_mode):
        raise CaiError(f"{where}: is a device or a socket, which may have no end. Give a regular file.")
    if not pipes:
        raise CaiError(f"{where}: is a pipe, which has no folder of its own. Give a regular file.")
    return _until_end(fd, where, most, time.monotonic() + PIPE_SECONDS_IN_ALL)


def _until_end(fd: int, where: str, most: int, deadline: float | None) -> bytes:
    """`deadline`: of a pipe. One that nobody has opened for writing reads as empty, so emptiness is asked twice."""
    parts, size, heard = [], 0, time.monotonic()
    while True:
        try:
            part = os.read(fd, PART)
        except BlockingIOError:
            if deadline is None:  # a file of /proc that waits for news
                raise CaiError(f"{where}: gives nothing. Give a regular file.") from None
            part = None
        if part:
            parts.append(part)
            size, heard = size + len(part), time.monotonic()
            if size > most:
                raise _too_large(where, most)
            if deadline is None or heard < deadline:
                continue
        if part == b"" and (parts or deadline is None):
            return b"".join(parts)
        now = time.monotonic()
        if deadline is not None and (now > deadline or now - heard > PIPE_SECONDS):
            what = "did not come to its end" if parts else "gives nothing"
            raise CaiError(f"{where}: a pipe that {what} (waited {now - heard:.0f} s). Save it as a file first.")
        select.select([fd] if part is None else [], [], [], 0.05)


def _too_large(where: str, most: int) -> CaiError:
    return CaiError(f"{where}: more than {most >> 20} MB. Give a smaller file.")
