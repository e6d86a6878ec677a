"""The one resumable loop: keys -> fixed slices -> compute -> append, for evaluation, checks, benchmarks and guard.

    for part in left(context, log, label, keys, chunk):
        write(context, log, part, <the rows of part>)
    rows = rows_of(log, keys)

Who computes stands in the loop's body, so that no callback lies between a measurement and what it asks the model.
Owns which keys are left (computed from the log alone), slicing, progress and the marked logs under eval/. A stage that
draws text (`cai.data.stage_loop`) adds redraws and streaming to the same contract. Invariants: a slice is a fixed part
of the keys, recomputed whole when only some of it is on disk; rows on disk are never rewritten; a key has one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from cai.run import sharing
from cai.run.context import Context
from cai.store.jsonl import Row, nulled
from cai.store.records import RecordLog
from cai.store.rows import Key, R
from cai.world import world

DRAWN_AT_ONCE = 256  # what a kill loses is the drawing of so many texts: half a minute, of a judge's explanations two


def left(
    context: Context,
    log: RecordLog[R],
    label: str,
    keys: Sequence[Key],
    chunk: int,
    round_: int = 0,
    per_round: bool = False,
    **ended: object,
) -> Iterator[list[Key]]:
    """The slices of `chunk` keys that miss a row, in order; each is computed whole and given to `write`.

    `ended`: fields of the event that ends the label. Errors: Stopped, between two slices.
    """
    missing = sum(not log.has(*key) for key in keys)
    if missing:
        context.progress.begin(label, round_, total=len(keys), done=len(keys) - missing, per_round=per_round)
        chunk = sharing.agreed(chunk, f"in {label}")
    slices = [list(keys[start : start + max(1, chunk)]) for start in range(0, len(keys), max(1, chunk))]
    slices = [part for part in slices if not all(log.has(*key) for key in part)]
    if slices and (shared := sharing.begin(context, log, label, round_)):
        yield from _shared(context, log, shared, slices)
    else:
        for part in slices:
            context.check_stop(f"in {label}")
            yield part
    if missing:
        context.progress.end(None, **ended)


def _shared(
    context: Context, log: RecordLog[R], shared: sharing.Shared, slices: Sequence[list[Key]]
) -> Iterator[list[Key]]:
    """The slices of this process; behind the last, the rows of all processes go into the log in order."""
    context.shared[log.path] = shared
    for number in shared.mine(slices):
        yield slices[number]
    del context.shared[log.path]
    for rows in shared.settled(slices):
        fresh = [cast(R, row) for row in rows]
        log.append(fresh)
        context.progress.committed([{"status": row.get("status", "ok")} for row in fresh])


def together(context: Context, few: int, count: int) -> int:
    """How many of `count` texts are drawn between two writes: `few` where bytes hang on the rows side by side (a CPU).

    On a GPU a process's whole share, up to DRAWN_AT_ONCE: a decode step of 16 rows takes what one of 128 does.
    """
    if context.run.manifest.get("backend") != "cuda":
        return few
    return max(few, min(DRAWN_AT_ONCE, -(-count // world().size)))


def write(
    context: Context, log: RecordLog[R], part: Iterable[Key], rows: Iterable[R], *, counted: bool = False
) -> None:
    """Append the rows, in any order, of those keys of a slice that have none yet. `counted`: their tokens are."""
    wanted = {key for key in part if not log.has(*key)}
    fresh = [row for row in rows if tuple(row[name] for name in log.key) in wanted]
    shared, made = context.shared.get(log.path), [cast(R, {"v": 1, **nulled(row)}) for row in fresh]
    if shared is not None:
        shared.put(made)
    else:
        log.append(made)
    if not counted:
        context.progress.step(sum(cast(int, row.get("tokens", 0)) for row in fresh), len(fresh))
    if shared is None:
        context.progress.committed([{"status": row.get("status", "ok")} for row in fresh])


def rows_of(log: RecordLog[R], keys: Iterable[Key]) -> list[R]:
    """The rows of `keys` in order; a key that could not be computed has none."""
    return [row for key in keys if (row := log.get(*key)) is not None]


def open_marked(context: Context, path: Path, mark: str, key: tuple[str, str, str]) -> RecordLog:
    """The log at `path`, whose first row says what it was measured of (`mark`); that of another mark is set aside."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log: RecordLog[Row] = RecordLog.open(path, context.run.quarantine, key=key, unsure=context.run.check_log)
    head = log.get("fingerprint", 0, 0)
    if head is not None and head["of"] != mark:
        log.close()
        for suffix in (".sum", ".jsonl"):  # in this order: a sum file without its log is a log that was lost
            old = path.with_suffix(suffix)
            if old.exists():
                old.rename(path.with_name(f"{path.stem}-{head['of']}{suffix}"))
        log = RecordLog.open(path, context.run.quarantine, key=key)
    log.append([{key[0]: "fingerprint", "item": 0, "round": 0, "of": mark}])
    return log
