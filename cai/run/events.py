"""What the attempts of a run took, from its events alone. Pure; writes nothing (cai.run.folder appends the events)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from cai.run.run_ids import RUN_ID
from cai.store.jsonl import Row
from cai.store.scan import readable

EVENT = {"attempt": int, "kind": str, "s": int | float}  # what every event has


def spent(events: Iterable[Row]) -> dict[str, float]:
    """Attempts, seconds and dollars of a run from its events (monotonic seconds, so a clock that jumps is harmless)."""
    seconds: dict[int, float] = {}
    price: dict[int, float] = {}
    for row in events:
        attempt = int(row["attempt"])
        seconds[attempt] = max(seconds.get(attempt, 0.0), float(row.get("s") or 0.0))
        if row.get("kind") == "attempt":
            price[attempt] = float(row.get("usd_per_hour") or 0.0)
    usd = sum(value / 3600 * price.get(attempt, 0.0) for attempt, value in seconds.items())
    return {"attempts": len(seconds), "seconds": sum(seconds.values()), "usd": usd}


def read_events(path: Path) -> list[Row]:
    """Events of a run that may be going: unreadable lines are passed over (events inform, they decide nothing)."""
    try:
        rows = [row for _, _, row in readable(path, ())] if path.is_file() else []  # a pipe would be waited for
    except OSError:
        return []
    return [row for row in rows if all(isinstance(row.get(name), kind) for name, kind in EVENT.items())]


def lineage(run: Path) -> Iterator[Path]:
    """A run, then the one whose rows it took over as a fork, and so on, as far as these still stand beside it."""
    seen: set[str] = set()
    while run.is_dir() and run.name not in seen:
        seen.add(run.name)
        yield run
        forked = [str(e.get("source")) for e in read_events(run / "events.jsonl") if e.get("kind") == "forked"]
        if not forked or not RUN_ID.fullmatch(forked[0]):
            return
        run = run.parent / forked[0]
