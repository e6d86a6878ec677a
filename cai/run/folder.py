"""The run folder: its names, lock, manifest, events and status. One process owns a run from open to close.

Owns every path inside `runs/<id>/`, the lock that keeps a second runner out, the attempts and their cost, and the check
that a resume continues the same data. Does not own the records' content (cai.store.records), the names of runs
(`run_ids`) nor what belongs into a recipe's identity (cai.recipe.identity). Invariants: the folder appears whole or not
at all; events are only appended; what is summed over attempts comes from the events alone, so an attempt that was
killed counts up to its last sign of life.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from cai import errors
from cai.errors import CaiError
from cai.run import digests
from cai.run.events import read_events, spent
from cai.run.heart import Heart
from cai.run.lines import command, program
from cai.run.manifest import SCHEMA, read_manifest, sealed
from cai.run.run_ids import check_run_id, latest_run
from cai.store import files
from cai.store.files import write_atomic, write_json_atomic
from cai.store.jsonl import JsonObject, Row, read_object
from cai.store.lock import take_lock, utc_now
from cai.store.records import RecordLog
from cai.store.row_types import Record
from cai.terminal import word

__all__ = ["Run", "check_identity", "write_atomic", "write_json_atomic"]

HEARTBEAT_SECONDS = 15.0  # longest time of an attempt that kill -9 can leave uncounted
STATUS_SECONDS = 0.5  # status.json is rewritten at most this often


def check_identity(
    then: Mapping[str, str], now: Mapping[str, str], run: str = "runs/ID", recipe: str = "RECIPE"
) -> None:
    """Stop a resume whose inputs are not the run's (G8): CaiError(DRIFT), one line a changed key, then the remedies."""
    changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if not changed:
        return
    lines = [f"{run}: {len(changed)} input{'s' * (len(changed) > 1)} of this run changed since it began:"]
    lines += [f"  {name}: {_show(then.get(name))} -> {_show(now.get(name))}" for name in changed]
    lines.append(f"  continue as it was: {command(Path(run) / 'recipe.toml', '--resume', Path(run))}")
    lines.append(f"  or reuse what is unchanged in a new run: {program()} {recipe} --fork {word(Path(run))}")
    raise CaiError("\n".join(lines), errors.DRIFT)


def _show(value: str | None) -> str:
    if value is None:
        return "(absent)"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Taken(CaiError):
    """A run of this id is there already."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: exists already: continue it with --resume {path}")


class Run:
    """One run folder. `Run.create` and `Run.open` hold its lock until `close`."""

    def __init__(self, path: Path, manifest: Row, lock: FileLock | None) -> None:
        self.path, self.manifest, self._lock = path, manifest, lock
        self.id = path.name
        self.attempt = 0
        self.healed: Row | None = None  # what opening events.jsonl cut
        self._events: RecordLog[Row] | None = None
        self._began = time.monotonic()
        self._last_event = self._last_status = -1e9
        self._status: Row = {}
        self._status_waits = False
        self._spent_before = {"attempts": 0.0, "seconds": 0.0, "usd": 0.0}
        self._usd_per_hour = 0.0
        self.tell: Callable[[str, Mapping[str, Any]], None] = lambda kind, fields: None  # a tracker that was asked for
        self._latest_before = ""  # what runs/latest meant before this run was created
        self._heart = Heart(self._beat, HEARTBEAT_SECONDS)
        self._left: dict[str, list[Any]] = {}  # digests of the files as the attempt before left them
        self._edited: dict[str, str] = {}  # name -> sha256 of a file that was changed since

    # names: the only place that spells them
    records_path = property(lambda self: self.path / "records.jsonl")
    events_path = property(lambda self: self.path / "events.jsonl")
    status_path = property(lambda self: self.path / "status.json")
    manifest_path = property(lambda self: self.path / "manifest.json")
    recipe_path = property(lambda self: self.path / "recipe.toml")
    resolved_path = property(lambda self: self.path / "recipe.resolved.toml")
    dataset = property(lambda self: self.path / "dataset")
    train = property(lambda self: self.path / "train")
    adapter = property(lambda self: self.path / "adapter")
    sft_train = property(lambda self: self.path / "train" / "sft")
    sft_adapter = property(lambda self: self.path / "adapter-sft")
    eval = property(lambda self: self.path / "eval")
    quarantine = property(lambda self: self.path / "quarantine")
    report_html = property(lambda self: self.path / "report.html")

    @classmethod
    def create(
        cls, root: Path, run_id: str, files_: Mapping[str, bytes | str], manifest: JsonObject, **start: object
    ) -> Run:
        """A new folder with `files_` (recipe.toml, ...) and the manifest, locked; `root/latest` points to it.

        `start` goes into the attempt's first event (usd_per_hour is used by `spent`). The folder is filled under a
        hidden name and renamed, so a kill leaves no half run. Errors: `Taken` if the id is, CaiError(IO).
        """
        path = root / check_run_id(run_id)
        if path.exists() or path.is_symlink():
            raise Taken(path)
        beside = root / f".{run_id}.{os.getpid()}.new"
        whole = sealed({"schema": SCHEMA, "run": run_id, "created": utc_now(), **manifest})
        try:
            files.make_folder(root)
            files.remove_half_folders(root)
            beside.mkdir(mode=0o700)
            for name, content in files_.items():
                write_atomic(beside / name, content.encode() if isinstance(content, str) else content)
            write_json_atomic(beside / "manifest.json", whole)
            os.rename(beside, path)
            files.fsync_folder(root)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another runner of the same second was first
                raise Taken(path) from None
            raise files.io_error(path, "creating the run folder", error) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        run = cls(path, whole, take_lock(path))
        run._latest_before = latest_run(root)
        _point_latest(root, run_id)
        return run._begin(start)

    @classmethod
    def open(cls, path: Path, **start: object) -> Run:
        """Lock an existing run and begin the next attempt. Errors: LOCKED, CORRUPT or USAGE (manifest), IO."""
        if path.is_symlink() or not path.is_dir():
            raise CaiError(f"{path}: is no run folder")
        lock = take_lock(path)
        try:
            run = cls(path, read_manifest(path / "manifest.json"), lock)
            files.remove_halves(path)
            _point_latest(path.parent, path.name)
            return run._begin(start)
        except BaseException:
            lock.release()
            raise

    def _begin(self, start: JsonObject) -> Run:
        """`start`: what the first event says; its `began` is the monotonic second from which time counts."""
        facts = dict(start)
        self._began = facts.pop("began", None) or self._began
        self._events = RecordLog.open(self.events_path, self.quarantine, key=("attempt", "n"), durable=False)
        self.healed = self._events.healed
        self.attempt = 1 + max((int(row["attempt"]) for row in self._events.rows), default=0)
        self._spent_before = spent(self._events.rows)
        self._left, _ = digests.left(self._events.rows)
        self._edited = digests.as_edited(self.path, self._events.rows)
        self._usd_per_hour = float(start.get("usd_per_hour") or 0.0)
        self._status = self.read_status()
        self.event("attempt", pid=os.getpid(), host=socket.gethostname(), **facts)
        self._heart.start()
        if self.healed:
            self.event("healed", **self.healed)
        return self

    def records(self) -> RecordLog[Record]:
        """The run's records, healed and open for appending; what was cut is noted as an event."""
        log: RecordLog[Record] = RecordLog.open(self.records_path, self.quarantine, unsure=self.check_log)
        if log.healed:
            self.event("healed", **log.healed)
        return log

    def check_log(self, path: Path) -> None:
        """Before a log is opened: where its sum file cannot tell, the digest of the attempt before does (CORRUPT)."""
        digests.check_log(self.path, path, self._left)

    def event(self, kind: str, **fields: object) -> None:
        """Append {"t", "attempt", "n", "s", "kind", ...} to events.jsonl; `s`: seconds since the attempt began."""
        with self._heart.lock:
            assert self._events is not None, "a peeked run is read-only"
            seconds = round(time.monotonic() - self._began, 3)
            head = {"t": utc_now(), "attempt": self.attempt, "n": len(self._events.rows), "s": seconds, "kind": kind}
            rest = {name: _finite(value) for name, value in fields.items() if name not in head}
            self._events.append([{**head, **rest}])
            self._last_event = time.monotonic()
        self.tell(kind, rest)

    def _beat(self) -> None:
        """A sign of life, from a thread: loading a model or comparing texts may take minutes without an event."""
        with self._heart.lock:
            if self._events is not None and time.monotonic() - self._last_event >= HEARTBEAT_SECONDS:
                self.event("heartbeat")

    def events(self, kind: str | None = None) -> list[Row]:
        """All readable events, of one kind if given; works on a peeked run."""
        rows = self._events.rows if self._events else read_events(self.events_path)
        return [row for row in rows if kind in (None, row.get("kind"))]

    def status(self, *, now: bool = False, **fields: object) -> None:
        """Merge `fields` into status.json (atomic, at most twice a second unless `now`); also the heartbeat."""
        self._status.update(fields)
        self._status_waits = True
        clock = time.monotonic()
        if now or clock - self._last_status >= STATUS_SECONDS:
            self._write_status()
        self._beat()

    def _write_status(self) -> None:
        write_json_atomic(
            self.status_path, {**self._status, "updated": utc_now(), "attempt": self.attempt}, durable=False
        )
        self._last_status, self._status_waits = time.monotonic(), False

    def read_status(self) -> Row:
        """status.json as last written; {} if there is none or it is unreadable (it is derived, never relied on)."""
        return read_object(self.status_path)

    def update_manifest(self, **fields: object) -> None:
        """Merge `fields` into manifest.json, atomically and durably."""
        self.manifest = sealed({**self.manifest, **fields}, fields.keys())
        write_json_atomic(self.manifest_path, self.manifest)

    def spent(self) -> dict[str, float]:
        """{"attempts", "seconds", "usd"} over all attempts, this one included; price as each attempt began."""
        if self._events is None:
            return spent(self.events())
        seconds = time.monotonic() - self._began
        return {
            "attempts": self._spent_before["attempts"] + 1,
            "seconds": self._spent_before["seconds"] + seconds,
            "usd": self._spent_before["usd"] + seconds / 3600 * self._usd_per_hour,
        }

    def close(self, **end: object) -> None:
        """End the attempt and free the lock. Never raises for a full or broken disk: the first error must stay seen."""
        self._heart.stop()
        with suppress(CaiError):
            if self._events is not None:
                with suppress(OSError):
                    found = digests.of_run(self.path)
                    self.event(digests.EVENT, of=digests.unmended(self._left, self._edited, found))
                self.event("end", **end)
                if self._status_waits:
                    self._write_status()
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def discard_if_empty(self) -> None:
        """Remove a run of this process in which nothing was made, and let runs/latest mean what it meant before."""
        with suppress(OSError):
            begun = self.dataset.exists() or self.train.exists()  # of pairs of one's own no record is written
            if self.attempt == 1 and not begun and not self.records_path.stat().st_size:
                if latest_run(self.path.parent) == self.id:
                    _point_latest(self.path.parent, self._latest_before)
                shutil.rmtree(self.path)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CaiError):
            self.close(code=error.code, error=str(error))
        elif error is not None:
            self.close(code=errors.BUG, error=f"{type(error).__name__}: {error}")
        else:
            self.close(code=errors.DONE)


def _finite(value: object) -> Any:
    """An event may tell of a NaN; as a word, for JSON has no such number."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _point_latest(root: Path, run_id: str) -> None:
    """`root/latest` -> `run_id` ("": to nothing), replaced by rename. A file system without links does without."""
    beside = root / f".latest.{os.getpid()}"
    with suppress(OSError):
        if not run_id:
            return (root / "latest").unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
        os.symlink(run_id, beside)
        os.replace(beside, root / "latest")
