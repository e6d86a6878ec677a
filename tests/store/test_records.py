"""The log: what is committed stays, what is torn heals, what is damaged is named. F01-F03, F05-F09, F11."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cai import errors
from cai.errors import CaiError
from cai.store import files
from cai.store.jsonl import encode
from cai.store.records import RecordLog, read
from cai.terminal import printable

HOSTILE = "{name} <|im_end|><script>alert(1)</script>\x1b]52;c;aGk=\x07\u2028\x85\r\n\0 \ufeff\u202e"


def row(item: int, stage: str = "answers", round: int = 0, text: str | None = None) -> dict[str, Any]:
    return {
        "v": 1,
        "stage": stage,
        "item": item,
        "round": round,
        "text": text or f"text {item} \u2028 \u00e4",
        "seed": item,
    }


def filled(folder: Path, batches: list[list[dict[str, Any]]]) -> Path:
    path = folder / "records.jsonl"
    with RecordLog.open(path, folder / "quarantine") as log:
        for batch in batches:
            log.append(batch)
    return path


def reopened(path: Path) -> RecordLog:
    return RecordLog.open(path, path.parent / "quarantine")


def cut_bytes(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((folder / "quarantine").glob("*")))


BATCHES = [[row(0), row(1)], [row(2)], [row(3, text=HOSTILE), row(4), row(5, round=1)]]


def test_rows_read_back_as_they_were_appended(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    with reopened(path) as log:
        assert log.rows == [r for batch in BATCHES for r in batch] == read(path)
        assert log.get("answers", 3)["text"] == HOSTILE and log.get("answers", 5) is None and log.get("answers", 5, 1)
        assert len(log.by_stage("answers")) == 6 and log.by_stage("revisions") == []
        assert log.healed is None
    assert path.read_bytes().count(b"\n") == 6, "U+2028 and U+0085 inside a text end no line"


def test_every_append_is_one_write_and_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_write, real_sync = files._write, files._fdatasync
    with reopened(tmp_path / "records.jsonl") as log:
        monkeypatch.setattr(files, "_write", lambda fd, data: calls.append(f"write {fd}") or real_write(fd, data))
        monkeypatch.setattr(files, "_fdatasync", lambda fd: calls.append(f"sync {fd}") or real_sync(fd))
        log.append([row(i) for i in range(50)])
        assert calls == [f"write {log._fd}", f"sync {log._fd}", f"write {log._sum_fd}"], "the sum follows the sync"


@pytest.mark.runs
@pytest.mark.parametrize("with_sums", [True, False])
def test_f01_cut_at_every_byte_ends_in_the_same_log(tmp_path: Path, with_sums: bool) -> None:
    """G1, G2, G5: whole lines survive every cut, the torn bytes are kept aside, redoing gives the same bytes."""
    batches = [[row(0, text="a"), row(1, text="\u2028")], [row(2, text="c")]]
    (tmp_path / "whole").mkdir()
    whole = filled(tmp_path / "whole", batches)
    data, sums = whole.read_bytes(), whole.with_suffix(".sum").read_bytes()
    for cut in range(len(data) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        path = folder / "records.jsonl"
        path.write_bytes(data[:cut])
        if with_sums:
            path.with_suffix(".sum").write_bytes(sums)
        kept = data.rfind(b"\n", 0, cut) + 1
        with reopened(path) as log:
            assert path.read_bytes() == data[:kept]
            assert cut_bytes(folder) == data[kept:cut]
            if with_sums and kept < len(data):
                assert log.healed["committed_bytes_missing"] == len(data) - kept, "a shortened log is noticed"
            for batch in batches:
                log.append(batch)
        assert path.read_bytes() == data
        assert path.with_suffix(".sum").read_bytes().split() == sums.split()
        with reopened(path) as log:
            assert log.healed is None


def test_f02_a_whole_last_line_without_newline_is_torn(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    glued = encode(row(6))[:-1]
    with path.open("ab") as file:
        file.write(glued)
    assert len(read(path)) == 6, "a reader passes over it"
    with reopened(path) as log:
        assert log.get("answers", 6) is None and log.healed["cut_bytes"] == len(glued)
        assert log.notice == f"records.jsonl: {len(glued)} torn bytes cut from its end (kept in quarantine/)"
        log.append([row(6)])
    assert cut_bytes(tmp_path) == glued
    assert len(read(path)) == 7


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"\0" * 4096, id="NULs"),
        pytest.param(b"\0" * 10 + b"\n", id="NULs and newline"),
        pytest.param(b"garbage", id="garbage"),
        pytest.param(b"garbage\n", id="garbage and newline"),
        pytest.param(b'{"v":1,"stage":"a', id="half JSON"),
        pytest.param("\u00e4".encode()[:1], id="half UTF-8"),
        pytest.param(b"\xff\xfe\n", id="no UTF-8"),
        pytest.param(b"[]\n", id="a list"),
        pytest.param(b'{"stage":["answers"],"item":9,"round":0}\n', id="a key that is a list"),
        pytest.param(b"{}\n", id="an empty object"),
        pytest.param(b"\n", id="an empty line"),
    ],
)
@pytest.mark.parametrize("with_sums", [True, False])
def test_f03_tails_heal_and_are_kept_in_quarantine(tmp_path: Path, tail: bytes, with_sums: bool) -> None:
    path = filled(tmp_path, BATCHES)
    before = path.read_bytes()
    if not with_sums:
        path.with_suffix(".sum").unlink()
    path.write_bytes(before + tail)
    with reopened(path) as log:
        assert path.read_bytes() == before and cut_bytes(tmp_path) == tail
        assert log.healed["offset"] == len(before)
        kept = next((tmp_path / "quarantine").iterdir()).name
        assert kept.startswith(f"records.jsonl-at-{len(before):012d}-")
        log.append([row(6)])
    assert len(read(path)) == 7


def test_f05_bytes_that_were_never_synced_may_vanish_in_any_way(tmp_path: Path) -> None:
    """A power cut keeps any mix of the unsynced batch's bytes: shorter, NUL blocks, holes. Synced rows all stay."""
    path = filled(tmp_path, BATCHES[:2])
    synced, sums = path.read_bytes(), path.with_suffix(".sum").read_bytes()  # the sums never lead the sync
    with reopened(path) as log:
        log.append(BATCHES[2])
    full, lost = path.read_bytes(), path.read_bytes()[len(synced) :]
    draw = random.Random(5)
    for _ in range(200):
        kept = bytearray(lost[: draw.randrange(len(lost) + 1)])
        for _ in range(draw.randrange(3)):
            start, length = draw.randrange(len(kept) + 1), draw.randrange(40)
            kept[start : start + length] = b"\0" * len(kept[start : start + length])
        path.write_bytes(synced + bytes(kept))
        path.with_suffix(".sum").write_bytes(sums)
        with reopened(path) as log:
            assert path.read_bytes().startswith(synced)
            for batch in BATCHES:
                log.append(batch)
        assert path.read_bytes() == full


@pytest.mark.runs
def test_f06_a_flipped_byte_anywhere_is_never_silent(tmp_path: Path) -> None:
    """G6: exit 5 naming line and byte; only the very last newline's loss looks like a tear, and is noted as a loss."""
    path = filled(tmp_path, BATCHES)
    data, sums = path.read_bytes(), path.with_suffix(".sum").read_bytes()
    for offset, other in [(at, byte) for at in range(len(data)) for byte in (data[at] ^ 1, 0)]:
        path.write_bytes(data[:offset] + bytes([other]) + data[offset + 1 :])
        path.with_suffix(".sum").write_bytes(sums)
        if offset == len(data) - 1:
            with reopened(path) as log:
                assert log.healed["committed_bytes_missing"] > 0
            continue
        before = path.read_bytes()
        with pytest.raises(CaiError, match=r"line \d+, byte \d+: .*--repair") as caught:
            reopened(path)
        assert caught.value.code == errors.CORRUPT and path.read_bytes() == before, "nothing was cut"


def test_f06_damage_in_the_middle_without_a_sum_file(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    lines = path.read_bytes().split(b"\n")
    path.with_suffix(".sum").unlink()
    path.write_bytes(b"\n".join([lines[0], b"x" + lines[1], *lines[2:]]))
    with pytest.raises(CaiError, match=f"line 2, byte {len(lines[0]) + 1}: not JSON"):
        reopened(path)
    with pytest.raises(CaiError, match="line 2"):
        read(path)


def test_f07_an_edit_that_is_still_json_is_found_by_the_prefix_hash(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    data = path.read_bytes()
    second = data.index(b"\n") + 1
    path.write_bytes(data.replace(b'"text 1', b'"TEXT 1'))
    with pytest.raises(CaiError, match=f"line 2, byte {second}: changed after it was committed") as caught:
        reopened(path)
    assert caught.value.code == errors.CORRUPT
    path.write_bytes(data.replace(b'"text 2', b'"text 22'))
    with pytest.raises(CaiError, match="line 3"):
        reopened(path)
    for last in (b'"text 5', b'"txt 5', b'"t'):
        path.write_bytes(data.replace(b'"text 5', last if last != b'"text 5' else b'"text 55'))
        with pytest.raises(CaiError, match="line 6"):
            reopened(path)


def test_f07_a_removed_line_is_found(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:2] + lines[3:]))
    with pytest.raises(CaiError, match="line 3"):
        reopened(path)


def test_f08_an_equal_duplicate_is_ignored_a_different_one_refused(tmp_path: Path) -> None:
    """G3, and G4: a row made again must be the row that stands."""
    path = filled(tmp_path, BATCHES)
    data = path.read_bytes()
    with reopened(path) as log:
        log.append([row(0), row(1)])
        log.append([row(7), row(7)])
        assert path.read_bytes() == data + encode(row(7))
        with pytest.raises(CaiError, match=r"\('answers', 2, 0\).*text differ") as caught:
            log.append([row(8), row(2, text="another")])
        assert caught.value.code == errors.CORRUPT
        with pytest.raises(CaiError, match="differ"):
            log.append([row(9), row(9, text="another")])
        assert path.read_bytes() == data + encode(row(7)), "a refused batch writes nothing"


def test_f08_duplicates_that_already_stand_in_the_file(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    path.write_bytes(path.read_bytes() + encode(row(0)))
    with reopened(path) as log:
        assert len(log.rows) == 6
    path.write_bytes(path.read_bytes() + encode(row(0, text="another")))
    with pytest.raises(CaiError, match=r"line 8.*a second, different row"):
        reopened(path)


def test_f09_replaced_deleted_or_changed_while_running(tmp_path: Path) -> None:
    for what in ("deleted", "replaced", "changed", "shortened"):
        folder = tmp_path / what
        folder.mkdir()
        path = filled(folder, BATCHES)
        with reopened(path) as log:
            if what == "deleted":
                path.unlink()
            elif what == "replaced":
                copy = folder / "copy"
                copy.write_bytes(path.read_bytes())
                os.replace(copy, path)
            else:
                path.open("ab").write(b"x") if what == "changed" else os.truncate(path, 10)
            before = path.read_bytes() if path.exists() else None
            with pytest.raises(CaiError, match=r"while the run was going|another program changed") as caught:
                log.append([row(9)])
            assert caught.value.code == errors.IO
            assert before == (path.read_bytes() if path.exists() else None)


def test_f09_a_log_deleted_between_two_attempts_is_not_begun_again(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    path.unlink()
    with pytest.raises(CaiError, match=r"missing, but records\.sum says") as caught:
        reopened(path)
    assert caught.value.code == errors.CORRUPT and not path.exists()


def test_damage_under_eval_names_the_run_to_repair(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"{}")
    (tmp_path / "eval" / "benchmarks").mkdir(parents=True)
    path = filled(tmp_path / "eval" / "benchmarks", BATCHES)
    path.write_bytes(path.read_bytes().replace(b"text 1", b"TEXT 1"))
    with pytest.raises(CaiError, match=f"--repair {tmp_path}$"):
        reopened(path)


def noted_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """What is called from now on, as "call file"."""
    calls: list[str] = []

    def noted(name: str, real: Any) -> Any:
        def call(fd: int, *rest: Any) -> Any:
            calls.append(f"{name} {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
            return real(fd, *rest)

        return call

    for name in names:
        monkeypatch.setattr(files, name, noted(name, getattr(files, name)))
    return calls


def test_a_new_log_is_in_its_synced_folder_before_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that was synced is lost with the name of its file: G1 holds from the first row on."""
    calls = noted_calls(monkeypatch, "_fsync", "_fdatasync")
    path = filled(tmp_path, BATCHES[:1])
    assert calls == [f"_fsync {tmp_path.name}", "_fdatasync records.jsonl"]
    calls.clear()
    reopened(path).close()
    assert not calls


def test_the_cut_of_a_tail_is_synced_after_its_bytes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path, BATCHES)
    with path.open("ab") as file:
        file.write(b"torn")
    calls = noted_calls(monkeypatch, "_fsync", "_ftruncate")
    reopened(path).close()
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert calls[:2] == [f"_fsync {tmp_path.name}", f"_fsync .{kept.name}.{os.getpid()}.new"]
    assert calls[2:] == ["_fsync quarantine", "_ftruncate records.jsonl", "_fsync records.jsonl"]


@pytest.mark.parametrize("call", ["_write", "_fdatasync"])
def test_f11_a_failed_write_or_sync_is_rolled_back_and_never_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = filled(tmp_path, BATCHES)
    data = path.read_bytes()
    log = reopened(path)
    calls = []

    def fail(*arguments: Any) -> int:
        calls.append(arguments)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files, call, fail)
        with pytest.raises(CaiError, match=r"Input/output error.*copy the run folder") as caught:
            log.append([row(9)])
    assert caught.value.code == errors.IO and path.read_bytes() == data and log.get("answers", 9) is None
    with pytest.raises(CaiError, match="earlier append failed"):
        log.append([row(9)])
    assert path.read_bytes() == data
    log.close()
    with reopened(path) as log:
        log.append([row(9)])
        assert log.healed is None


def test_a_short_write_is_cut_off_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path, BATCHES)
    data, real = path.read_bytes(), os.write
    log = reopened(path)
    monkeypatch.setattr(files, "_write", lambda fd, block: real(fd, block[:7]))
    with pytest.raises(CaiError, match="short write, 7 of"):
        log.append([row(9)])
    assert path.read_bytes() == data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [1.0, float("-inf")]}])
def test_non_finite_numbers_are_refused_before_encoding(tmp_path: Path, value: Any) -> None:
    with reopened(tmp_path / "records.jsonl") as log:
        with pytest.raises(CaiError, match=r"record field score.*(nan|inf)") as caught:
            log.append([row(0), {**row(1), "score": value}])
        assert caught.value.code == errors.QUALITY and log.rows == []


def test_lone_surrogates_become_replacement_characters_at_once(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with reopened(path) as log:
        log.append([row(0, text="a\ud800b")])
        log.append([row(0, text="a\ud800b")])
        assert log.get("answers", 0)["text"] == "a\ufffdb" == read(path)[0]["text"]


def test_another_key_serves_another_log(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    with RecordLog.open(path, tmp_path / "quarantine", key=("metric", "item", "round")) as log:
        log.append([{"metric": "margin", "item": 0, "round": 0, "value": 0.5}])
        assert log.get("margin", 0)["value"] == 0.5 and len(log.by_stage("margin")) == 1


def test_symbolic_links_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "records.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CaiError, match="symbolic link"):
        reopened(tmp_path / "records.jsonl")


def test_a_torn_or_missing_sum_file_does_no_harm(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    sums = path.with_suffix(".sum")
    whole = sums.read_bytes()
    for cut in range(len(whole)):
        sums.write_bytes(whole[:cut])
        with reopened(path) as log:
            assert len(log.rows) == 6 and log.healed is None
        path.write_bytes(path.read_bytes().replace(b"text 4", b"TEXT 4"))
        with pytest.raises(CaiError, match="changed after"):
            reopened(path)  # opening had completed the sums
        path.write_bytes(path.read_bytes().replace(b"TEXT 4", b"text 4"))


def test_sum_lines_that_go_backwards_are_passed_over(tmp_path: Path) -> None:
    """A line of the unsynced sum file that a power cut mixed up accuses no row."""
    path = filled(tmp_path, BATCHES)
    with path.with_suffix(".sum").open("ab") as file:
        file.write(b"5 3 0123456789abcdef\n0 20 0123456789abcdef\n")
    with reopened(path) as log:
        assert len(log.rows) == 6 and log.healed is None


def test_a_reader_never_writes(tmp_path: Path) -> None:
    path = filled(tmp_path, BATCHES)
    path.write_bytes(path.read_bytes() + b"torn")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert len(read(path)) == 6 and read(tmp_path / "absent.jsonl") == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.floats(allow_nan=False, width=64)
VALUES = st.recursive(
    SCALARS.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.runs
@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_any_value_is_one_line_that_reads_back(value: Any) -> None:
    line = encode({"v": 1, "value": value})
    assert line.count(b"\n") == 1 and orjson.loads(line)["value"] == value
    assert len(line.decode().splitlines()) == 1, "also for readers that split on U+2028 or U+0085"


def test_f28_a_line_shows_inert_in_a_terminal_and_reads_back() -> None:
    every = "".join(map(chr, range(0x2100))) + "\ufeff \U0001f469\u200d\U0001f680 \U000e0041"
    line = encode({"text": every})
    assert orjson.loads(line)["text"] == every
    assert printable(line.decode()) == line.decode(), "nothing in it is a control any more"


class LogMachine(RuleBasedStateMachine):
    """Any sequence of appends, repeats, cuts, garbage tails and reopenings keeps: committed rows in order, once."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="log-machine-"))
        self.path = self.folder / "records.jsonl"
        self.log = reopened(self.path)
        self.rows: list[dict[str, Any]] = []

    @rule(count=st.integers(0, 5), text=st.text(max_size=20))
    def append(self, count: int, text: str) -> None:
        fresh = [row(len(self.rows) + i, text=text or None) for i in range(count)]
        self.log.append(fresh)
        self.rows += orjson.loads(orjson.dumps(fresh))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def append_again(self, data: st.DataObject) -> None:
        again = data.draw(st.lists(st.sampled_from(self.rows), max_size=4))
        self.log.append(again)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def append_another(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from(self.rows))
        with pytest.raises(CaiError):
            self.log.append([{**known, "seed": -1}])

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.log = reopened(self.path)
        assert self.log.healed is None

    @rule(tail=st.binary(min_size=1, max_size=30))
    def tear_and_reopen(self, tail: bytes) -> None:
        self.log.close()
        with self.path.open("ab") as file:
            file.write(tail)
        self.log = reopened(self.path)

    @rule(data=st.data(), drop_sums=st.booleans())
    def cut_and_reopen(self, data: st.DataObject, drop_sums: bool) -> None:
        self.log.close()
        content = self.path.read_bytes()
        keep = data.draw(st.integers(0, len(content)))
        os.truncate(self.path, keep)
        if drop_sums:
            self.path.with_suffix(".sum").unlink(missing_ok=True)
        self.rows = self.rows[: content[:keep].count(b"\n")]
        self.log = reopened(self.path)

    @invariant()
    def committed_rows_stand_once_and_in_order(self) -> None:
        assert self.log.rows == self.rows
        assert [orjson.loads(line) for line in self.path.read_bytes().split(b"\n")[:-1]] == self.rows
        assert self.path.read_bytes()[-1:] in (b"", b"\n")
        assert all(self.log.get(r["stage"], r["item"], r["round"]) == r for r in self.rows)

    def teardown(self) -> None:
        import shutil

        self.log.close()
        shutil.rmtree(self.folder)


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@pytest.mark.slow
def test_throughput_and_opening_time(tmp_path: Path) -> None:
    """Bars: 20,000 rows a second with one sync a batch, 100,000 rows open in 2 s (best of three).

    Of the processor: a machine that others use makes the wall clock tell of them.
    """
    text, appended, opened = "word " * 80, [], []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        began = time.process_time()
        with reopened(folder / "records.jsonl") as log:
            for start in range(0, 20_000, 500):
                log.append([row(i, text=text) for i in range(start, start + 500)])
        appended.append(time.process_time() - began)
        began = time.process_time()
        with reopened(folder / "records.jsonl") as log:
            assert len(log.rows) == 20_000
        opened.append(time.process_time() - began)
    assert 20_000 / min(appended) >= 20_000, f"{20_000 / min(appended):.0f} rows/s"
    assert min(opened) * 5 < 2, f"{min(opened) * 5:.2f} s for 100,000"


@pytest.mark.slow
def test_a_log_of_many_rows_takes_less_memory_than_its_size_and_seconds(tmp_path: Path) -> None:
    """200,000 rows of 560 bytes, in a process of its own: a million of them take five times as long."""
    path = tmp_path / "records.jsonl"
    with RecordLog.open(path, tmp_path / "quarantine") as log:
        rows = [{"stage": "answers", "item": i, "round": 0, "text": "word " * 100} for i in range(200_000)]
        for start in range(0, len(rows), 20_000):
            log.append(rows[start : start + 20_000])
    code = (
        "import resource, sys, time; from pathlib import Path; from cai.store.records import RecordLog\n"
        "path = Path(sys.argv[1]); at = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; t = time.process_time()\n"
        "assert len(RecordLog.open(path, path.parent / 'q').rows) == 200000; took = time.process_time() - t\n"
        "more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at; print(took, more * 1024)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=root)
    took, more = map(float, done.stdout.split())
    assert took < 4 and more < 0.8 * path.stat().st_size
