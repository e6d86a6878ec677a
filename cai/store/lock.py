"""The lock of a run folder: one runner at a time, held until it is released or its process ends.

Owns `.lock` (flock, through filelock) and `.holder.json`, which says who holds it and is only ever shown to people.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import orjson
from filelock import FileLock, Timeout

from cai import errors
from cai.errors import CaiError
from cai.store import files


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def take_lock(path: Path) -> FileLock:
    """The run's lock, held until released or the process ends. Errors: CaiError(LOCKED) naming the holder.

    filelock closes the descriptor in forked children, so a child that outlives its parent does not keep the run.
    """
    lock = FileLock(path / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CaiError(f"{path}: locked by {holder(path)}", errors.LOCKED) from None
    except (OSError, NotImplementedError) as error:
        reason = error if isinstance(error, OSError) else OSError(0, str(error))
        raise files.io_error(path / ".lock", "locking", reason) from error
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": utc_now()}
    with suppress(CaiError):
        files.write_json_atomic(path / ".holder.json", me, durable=False)
    return lock


def _holder(path: Path) -> tuple[int, str, str] | None:
    """(pid, host, since) of the process that took the lock last."""
    try:
        holder = orjson.loads((path / ".holder.json").read_bytes())
        return int(holder["pid"]), str(holder["host"]), str(holder["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _gone(pid: int, host: str) -> bool:
    return host == socket.gethostname() and Path("/proc").is_dir() and not Path(f"/proc/{pid}").exists()


def holder_died(path: Path) -> bool:
    """Whether the process that took the lock last is certainly no more (only its own machine can tell)."""
    found = _holder(path)
    return found is not None and _gone(*found[:2])


def holder_lives(path: Path) -> bool:
    """Whether the process that took the lock last is there and was there then (a number may be another process's)."""
    found = _holder(path)
    if found is None or found[1] != socket.gethostname() or not Path("/proc").is_dir():
        return False
    try:
        started = Path(f"/proc/{found[0]}").stat().st_ctime
        return started <= datetime.fromisoformat(found[2].replace("Z", "+00:00")).timestamp() + 1.0
    except (OSError, ValueError):
        return False


def holder(path: Path) -> str:
    found = _holder(path)
    if found is None:
        return f"another runner (unknown process): find it with: fuser {path}/.lock"
    pid, host, since = found
    if _gone(pid, host):
        return (
            f"a child that outlived runner process {pid} on {host} (since {since}): "
            f"find it with: fuser {path}/.lock and stop it"
        )
    return f"process {pid} on {host} since {since}: wait for it, or stop it with: kill {pid}"
