"""The system calls that durability rests on, and atomic replacement of whole files.

Owns every write, sync, truncate and rename that must not lie; fault tests inject here (`_write`, `_fdatasync`, ...) and
nowhere else. Does not know what the bytes mean. Invariant: a derived file is the old one or the new one, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError

PART = 1 << 16  # bytes compared at once
_write = os.write
_fsync = os.fsync
_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
_ftruncate = os.ftruncate
_replace = os.replace


NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
REMEDIES = {  # what a machine does to a program; any other OSError is a fault of the program
    errno.ENOSPC: "free space on that disk and resume",
    errno.EDQUOT: "free space in your quota and resume",
    errno.EFBIG: "raise the file-size limit (ulimit -f) and resume",
    errno.EROFS: "make the folder writable and resume",
    errno.EACCES: "make the folder writable and resume",
    errno.EIO: "the disk failed: copy the run folder to another disk and resume there",
    errno.ELOOP: "it is a symbolic link: put the real file there",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and resume",
    errno.ENFILE: "the machine has too many open files: close some and resume",
    errno.ESTALE: "the disk is gone: mount it again and resume",
    errno.ENOTCONN: "the disk is gone: mount it again and resume",
}


def io_error(path: Path | str, doing: str, error: OSError) -> CaiError:
    """One line for an operating-system error, with the remedy that fits its errno (exit 74)."""
    remedy = REMEDIES.get(error.errno or 0, "cure the cause and resume; what was committed before is intact")
    return CaiError(f"{path}: {doing} failed: {error.strerror or error}: {remedy}", errors.IO)


def write_all(fd: int, data: bytes) -> None:
    """Write `data` in one call; a short write (disk full, file-size limit) is an error, not a reason to go on."""
    written = _write(fd, data)
    if written != len(data):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        limited = limit != resource.RLIM_INFINITY and os.fstat(fd).st_size >= limit
        raise OSError(errno.EFBIG if limited else errno.ENOSPC, f"short write, {written} of {len(data)} bytes")


def make_folder(folder: Path) -> None:
    """The folder and those above it, unless they are there. Errors: OSError, CaiError(IO) for a link to nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        what = next((part for part in (folder, *folder.parents) if not part.is_dir() and os.path.lexists(part)), folder)
        why = "a link to nothing: mount what it points to, or remove it" if what.is_symlink() else error.strerror
        raise CaiError(f"{what}: {why}", errors.IO) from None


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is not, until its folder is synced).

    A file system that has no sync of a folder (CIFS, some FUSE) refuses it with EINVAL or ENOTSUP: passed over, as
    SQLite does, for there is nothing more that a program could do.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes | Iterable[bytes], *, durable: bool = True) -> None:
    """Replace `path` by `data`, whole or in parts: write beside it, fsync, rename, fsync the folder.

    The old file survives any failure.

    `durable=False` leaves out the syncs: after a power cut the file may be the older one. Errors: CaiError(IO).
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            for part in (data,) if isinstance(data, bytes | bytearray | memoryview) else data:
                view = memoryview(part)
                while view:  # Linux caps one write at 2 GiB, so a huge file needs several
                    written = _write(fd, view[: 1 << 30])
                    if written == 0:
                        raise OSError(errno.ENOSPC, "no byte could be written")
                    view = view[written:]
            if durable:
                _fsync(fd)
        finally:
            os.close(fd)
        _replace(beside, path)
        if durable:
            fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise io_error(path, "writing", error) from error


def remove_halves(folder: Path) -> None:
    """Remove what a `write_atomic` that was killed left below `folder`; of a process that lives, nothing."""
    for path in folder.rglob(".*.new"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not Path("/proc", pid).exists()):
            with suppress(OSError):
                path.unlink()


def remove_half_folders(root: Path) -> None:
    """Remove the folders that a process which is no more was still making in `root`, under hidden names."""
    for path in root.glob(".*.new"):
        pid = path.name.split(".")[-2]
        if path.is_dir() and not path.is_symlink() and pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def json_bytes(value: object) -> bytes:
    """Indented JSON with sorted keys and a last newline: the same value gives the same bytes."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def holds(path: Path, data: bytes) -> bool:
    """Whether the file stands already as it should be (then a resume leaves it alone)."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != len(data):
                return False
            parts = (memoryview(data)[start : start + PART] for start in range(0, len(data), PART))
            return all(file.read(PART) == part for part in parts)  # never the whole file beside the whole data
    except OSError:
        return False


def write_json_atomic(path: Path, value: object, *, durable: bool = True) -> None:
    """`write_atomic` of `json_bytes(value)`, unless the file holds them already."""
    data = json_bytes(value)
    if not holds(path, data):
        write_atomic(path, data, durable=durable)


def open_append(path: Path) -> int:
    """A descriptor that appends to a regular file of the owner; symbolic links and pipes are refused."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise io_error(path, "opening", error) from error
    return fd


def parts_of(fd: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to `end`, or to its end, in parts that are bounded."""
    while start < end and (part := os.pread(fd, min(1 << 20, end - start), start)):
        yield part
        start += len(part)


def joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines in parts of a MB or more, so that a log is not written in as many writes as it has lines."""
    part = bytearray()
    for line in lines:
        part += line
        if len(part) >= 1 << 20:
            yield bytes(part)
            part.clear()
    yield bytes(part)


def quarantine(folder: Path, name: str, offset: int, parts: Callable[[], Iterable[bytes]]) -> Path:
    """Keep bytes that are about to be cut as `<name>-at-<offset>-<hash>.bin`; the same cut twice is harmless.

    `parts`: gives them; called twice, for the hash and for the bytes.
    """
    digest = hashlib.blake2b(digest_size=4)
    for part in parts():
        digest.update(part)
    target = folder / f"{name}-at-{offset:012d}-{digest.hexdigest()}.bin"
    try:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fsync_folder(folder.parent)
    except OSError as error:
        raise io_error(folder, "creating", error) from error
    write_atomic(target, parts())
    return target


def cache_root() -> Path:
    base = os.environ.get("CAI_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache").expanduser() / "cai"
