"""What is held of a log of 50,000 rows (27 MB), whole or damaged: keys and places, never its bytes. Sizes, not seconds.

Bar: peak below 0.8 of the file's size; 0.4 to 0.6 were measured, and one copy of the file, a list of its lines or its
rows is more. The rows are long enough that their keys are no more than a third of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest

from cai.commands import fork, repair, verify, verify_dataset, verify_files
from cai.errors import CaiError
from cai.run import digests
from cai.store.records import RecordLog, look
from cai.store.scan import encode_points, points_of

ROWS = 50_000
BAR = 0.8  # of the file's size
BASE = {"v": 1, "principle": None, "status": "ok", "reason": None, "finish": "eos", "tokens": 70}


def lines(count: int) -> Iterator[bytes]:
    for number in range(count):
        stage = ("instructions", "answers", "critiques", "revisions")[number % 4]
        text = f"{stage} {number} " + "word " * 75
        row = BASE | {"stage": stage, "item": number // 4, "round": 0, "text": text, "seed": number}
        yield orjson.dumps(row | {"prompt_sha": "0" * 16}, option=orjson.OPT_APPEND_NEWLINE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("growth") / "records.jsonl"
    path.write_bytes(b"".join(lines(ROWS)))
    path.with_suffix(".sum").write_bytes(b"".join(encode_points(points_of(lines(ROWS)))))
    return path


def torn(path: Path) -> None:
    path.open("ab").write(b'{"v":1,"stage":"revi')


def torn_at_length(path: Path) -> None:
    path.open("ab").write(bytes(5_000_000))


def without_sums(path: Path) -> None:
    path.with_suffix(".sum").unlink()


def with_half_the_sums(path: Path) -> None:
    sums = path.with_suffix(".sum")
    sums.write_bytes(sums.read_bytes()[: sums.stat().st_size // 2])


def shortened(path: Path) -> None:
    path.open("r+b").truncate(path.stat().st_size // 2)


def at_middle(path: Path, old: bytes, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        part = file.read(2000)
        file.seek(path.stat().st_size // 2 + part.index(old))
        file.write(new)


def edited(path: Path) -> None:
    at_middle(path, b"word ", b"WORD ")


def no_json(path: Path) -> None:
    at_middle(path, b'"seed"', b"\0\0\0\0\0\0")


def with_repeats(path: Path) -> None:
    data = path.read_bytes()
    path.open("ab").write(data[: data.index(b"\n", len(data) // 8) + 1])


def of_an_editor(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def peak(path: Path, doing: Callable[[], Any]) -> float:
    """Of the file's size, by how much a child that does it grows at most; a log that is refused counts as well."""
    size = path.stat().st_size
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        before, said = most(), "nan"
        try:
            with suppress(CaiError):
                doing()
            said = str((most() - before) / size)
        finally:
            os.write(into, said.encode())
            os._exit(0)
    os.close(into)
    os.waitpid(pid, 0)
    with open(out) as found:
        return float(found.read())


def most() -> int:
    """The most bytes that this process ever had in memory; a fork begins anew."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


ODD = [
    torn, torn_at_length, without_sums, with_half_the_sums, shortened, edited, no_json, with_repeats, of_an_editor,
]  # fmt: skip


@pytest.mark.runs
@pytest.mark.parametrize("damage", ODD, ids=lambda damage: damage.__name__)
def test_no_log_is_held_whatever_is_odd_in_it(whole: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "records.jsonl"
    for name in ("records.jsonl", "records.sum"):
        shutil.copy(whole.with_name(name), tmp_path)
    damage(path)
    assert peak(path, lambda: repair.plan(path)) < BAR
    assert peak(path, lambda: look(path)) < BAR
    assert peak(path, lambda: RecordLog.open(path, tmp_path / "quarantine").close()) < BAR
    assert peak(path, lambda: repair.repair(tmp_path, write=True, say=lambda line: None)) < BAR
    with RecordLog.open(path, tmp_path / "quarantine") as log:
        assert len(log.rows) == ROWS // 2 + (damage is not shortened) * (ROWS // 2) - (damage in (edited, no_json)) or (
            damage is shortened and abs(len(log.rows) - ROWS // 2) < ROWS // 50
        )


@pytest.mark.runs
def test_a_check_or_a_fork_holds_no_row(whole: Path) -> None:
    run = whole.parent
    (run / "dataset").mkdir(exist_ok=True)
    checks = (verify_files.logs, verify._once, verify._fields, verify._chain, verify_dataset.dataset)
    shares = {look.__name__: peak(whole, lambda look=look: list(look(run))) for look in checks}  # type: ignore[misc]
    shares["fork"] = peak(
        whole, lambda: fork.parted(fork.verified_rows(whole), {"revisions": ["a"]}, first_tries_only=True)
    )
    left = {"records.jsonl": [whole.stat().st_size, digests.digest_of(whole)]}
    short = run / "short"
    short.mkdir(exist_ok=True)
    shutil.copy(whole, short)
    shares["check_log"] = peak(whole, lambda: digests.check_log(short, short / "records.jsonl", left))
    assert max(shares.values()) < BAR, shares


@pytest.mark.runs
def test_secrets_are_looked_for_in_parts(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a part ends in the middle of one."""
    monkeypatch.setenv("SOME_TOKEN", "word answers 4")
    monkeypatch.setattr(verify, "PART", 1000)
    monkeypatch.setenv("OTHER_TOKEN", "nowhere in the file")
    secrets = {"SOME_TOKEN": b"sions 49999 word", "OTHER_TOKEN": b"nowhere in the file"}
    assert verify._found_in(whole, secrets) == ["SOME_TOKEN"]
    monkeypatch.setattr(verify, "PART", 1 << 20)
    assert peak(whole, lambda: verify._found_in(whole, secrets)) < 0.3
