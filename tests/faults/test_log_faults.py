"""The log under a kernel that fails for real: SIGKILL, full disk, file-size limit, read-only mount, EIO from strace.

F04 (the log alone), F10, F11, F12. The seam tests of the same promises stand in tests/store/test_records.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cai import errors
from cai.commands import verify
from cai.run.folder import Run
from cai.store.records import RecordLog, read

ROOT = Path(__file__).resolve().parent.parent.parent

WRITER = """
import resource, sys
from pathlib import Path
from cai.errors import CaiError
from cai.store.records import RecordLog
folder, batches, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def row(item):
    return {"v": 1, "stage": "answers", "item": item, "round": 0, "text": f"{item} " * 300}
try:
    log = RecordLog.open(folder / "records.jsonl", folder / "quarantine")
    for batch in range(batches):
        rows = [row(item) for item in range(batch * 8, batch * 8 + 8)]
        log.append(rows)
        print(batch, flush=True)
except CaiError as error:
    print(error, flush=True)
    sys.exit(error.code)
"""


def write(folder: Path, batches: int, limit: int = 0, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", WRITER, str(folder), str(batches), str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out = process.communicate(timeout=60)[0]
    return process.returncode, out.splitlines()


@pytest.mark.slow
def test_f04_sigkill_at_random_times_30_rounds(tmp_path: Path) -> None:
    """G1, G2, G4: what was reported as committed is there after every kill, and the end is byte-identical."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "killed").mkdir()
    began = time.monotonic()
    assert finished(write(tmp_path / "alone", 120))[0] == 0
    whole = time.monotonic() - began
    draw, torn = random.Random(4), 0
    log = tmp_path / "killed" / "records.jsonl"
    for _ in range(30):
        process = write(tmp_path / "killed", 120)
        time.sleep(draw.uniform(0.1, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.communicate()[0].splitlines()]
        rows = {row["item"] for row in read(log)}
        torn += log.exists() and not log.read_bytes().endswith(b"\n")
        assert not reported or set(range((reported[-1] + 1) * 8)) <= rows
    assert finished(write(tmp_path / "killed", 120))[0] == 0
    assert log.read_bytes() == (tmp_path / "alone" / "records.jsonl").read_bytes()


@pytest.mark.runs
def test_f10_full_disk(small_disk: Path) -> None:
    """G9: one clear line, exit 74; the log ends at its last good offset and goes on once there is room."""
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 30_000)
    code, said = finished(write(small_disk, 40))
    assert code == errors.IO and "free space" in said[-1] and "records.jsonl" in said[-1]
    log = small_disk / "records.jsonl"
    committed = (int(said[-2]) + 1) * 8
    assert len(read(log)) == committed and log.read_bytes().endswith(b"\n")
    filler.unlink()
    code, said = finished(write(small_disk, committed // 8 + 1))
    assert code == errors.DONE and len(read(log)) == committed + 8


@pytest.mark.runs
def test_f12_file_size_limit(tmp_path: Path) -> None:
    code, said = finished(write(tmp_path, 40, limit=50_000))
    assert code == errors.IO and "ulimit" in said[-1]
    assert len(read(tmp_path / "records.jsonl")) == (int(said[-2]) + 1) * 8
    assert finished(write(tmp_path, 40))[0] == 0


@pytest.mark.runs
def test_f12_read_only_folder(small_disk: Path) -> None:
    assert finished(write(small_disk, 1))[0] == 0
    before = (small_disk / "records.jsonl").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, said = finished(write(small_disk, 2))
    assert code == errors.IO and "make the folder writable" in said[-1]
    assert (small_disk / "records.jsonl").read_bytes() == before and len(read(small_disk / "records.jsonl")) == 8


def test_f12_a_run_on_a_read_only_disk_can_be_verified(small_disk: Path) -> None:
    """An archived run: what cannot be asked there is skipped with its reason, nothing fails."""
    Run.create(small_disk, "20260101-000000-m0-abcdef", {}, {}).close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    found = verify.verify(small_disk / "20260101-000000-m0-abcdef")
    assert verify.sound(found), verify.table(found)
    assert [each.found for each in found if each.promise == "G7 one writer"] == [
        "the lock cannot be taken here: Read-only file system"
    ]


@pytest.mark.runs
@pytest.mark.parametrize(("call", "nth"), [("fdatasync", 1), ("fdatasync", 3)])
def test_f11_eio_from_the_kernel(tmp_path: Path, strace: str, call: str, nth: int) -> None:
    """The third sync fails: two batches stand, the third is cut off again, and nobody syncs a second time."""
    trace = tmp_path / "trace"
    inject = f"inject={call}:error=EIO:when={nth}"
    prefix = (strace, "-f", "-o", str(trace), "-e", "trace=fdatasync,fsync,ftruncate", "-e", inject)
    code, said = finished(write(tmp_path, 10, prefix=prefix))
    assert code == errors.IO and "Input/output error" in said[-1]
    assert len(read(tmp_path / "records.jsonl")) == (nth - 1) * 8
    calls = [line.split()[1].split("(")[0] for line in trace.read_text().splitlines() if "(" in line]
    failed = next(i for i, line in enumerate(trace.read_text().splitlines()) if "EIO" in line)
    assert calls[failed + 1] == "ftruncate", "cut back before anything else is synced"
    assert os.path.getsize(tmp_path / "records.jsonl") == sum(map(len, _lines(tmp_path)))
    with RecordLog.open(tmp_path / "records.jsonl", tmp_path / "quarantine") as log:
        assert log.healed is None


def _lines(folder: Path) -> list[bytes]:
    return (folder / "records.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.runs
def test_f11_eio_on_a_write(tmp_path: Path, strace: str) -> None:
    """Also the write itself: an error in the middle of a run of appends leaves whole batches only."""
    inject = "inject=write:error=EIO:when=4"
    prefix = (strace, "-f", "-o", "/dev/null", "-P", str(tmp_path / "records.jsonl"), "-e", inject)
    code, said = finished(write(tmp_path, 10, prefix=prefix))
    assert code == errors.IO and "Input/output error" in said[-1]
    assert len(read(tmp_path / "records.jsonl")) == 24
