"""`--status RUN`: one screen about a run, from its files alone; `--watch` shows it again every two seconds.

Owns that screen. Takes no lock, writes nothing, imports no torch, and never fails on a part that is missing or half
written: a run can be watched while it works, and a log can be read while it grows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai import errors
from cai.data import chain
from cai.evaluate.gates import whole_verdicts
from cai.run import digests, lines, words
from cai.run.events import read_events, spent
from cai.run.manifest import pair_counts, resolved_table
from cai.store.jsonl import Row, read_object
from cai.store.lock import holder_died, holder_lives
from cai.store.scan import readable
from cai.terminal import duration, duration_range, for_stream, number, printable, usd, usd_fine, word

WATCH_SECONDS = 2.0
BARS, SPARKS = "▁▂▃▄▅▆▇█", 40  # levels and stretches of the loss
SHOWS = ("eval/gates.json", "dataset/pairs/train.jsonl", "dataset/pairs/heldout.jsonl")
SHOWN = 240  # characters of the text that was made last
SILENT_SECONDS = 60.0  # an attempt without an end that was silent for longer is called silent, not running


def command(args: argparse.Namespace) -> int:
    """Print the screen of the run named (the latest by default); with --watch, until the run ends or Ctrl-C."""
    from cai.inputs import locate

    path = locate(args, args.status or "latest")
    if not args.watch:
        print(for_stream(screen(path), sys.stdout, fold=True))
        return errors.DONE
    try:
        for text in watch(path):
            shown = for_stream(text, sys.stdout, fold=True)
            print(f"\x1b[H\x1b[J{shown}" if sys.stdout.isatty() else f"{text}\n", flush=True)
            if getattr(sys.stdout, "dead", False):  # its reader or terminal is gone: nobody watches
                break
    except KeyboardInterrupt:
        pass
    return errors.DONE


def watch(path: Path, seconds: float = WATCH_SECONDS) -> Iterator[str]:
    """A new screen every `seconds`, the last one once the run's attempt has ended or its process is no more."""
    while True:
        text = screen(path, text=True)
        yield text
        if not text.split("\n")[1].startswith(("state        running", "state        silent")):
            return
        time.sleep(seconds)


def screen(path: Path, now: datetime | None = None, *, text: bool = False) -> str:
    """The whole summary, made safe for a terminal. `text`: with the text that was made last."""
    manifest, status = read_object(path / "manifest.json"), read_object(path / "status.json")
    events = read_events(path / "events.jsonl")
    recipe = resolved_table(path)
    model = (manifest.get("model") or {}).get("model") or recipe.get("model", {}).get("name", "?")
    state = _state(events, status, now or datetime.now(UTC), holder_died(path), holder_lives(path))
    skipped = any(event.get("kind") == "gates_skipped" for event in events)
    if state == "done" and not skipped and not (path / "eval" / "gates.json").is_file():
        state = "stopped where it was asked to, can go on"  # --until
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    rows = [
        ("run", f"{path.name}: {manifest.get('milestone', '?')} on {model} ({manifest.get('backend', '?')})"),
        ("state", state),
        ("spent", _spent(events, recipe.get("budget", {}), pairs := pair_counts(path))),
        *_counts(path / "records.jsonl"),
        ("pairs", f"{pairs[0]} to train on, {pairs[1]} held out{_lost(events)}" if pairs else "not written yet"),
        ("training", _training(events)),
        ("loss", sparkline(_losses(events))),
        ("just made", just_made(_rows(path / "records.jsonl")) if text else ""),
        *_gates(read_object(path / "eval" / "gates.json")),
        ("edited", digests.told(digests.edited(path, events, SHOWS.__contains__))),
        ("report", word(shown / "report.html") if (path / "report.html").is_file() else "not written yet"),
        (
            "go on",
            "" if state == "done" or state.startswith("running") else lines.resume(path),
        ),
    ]
    return printable("\n".join(f"{name:<13}{'' if len(name) < 13 else ' '}{told}" for name, told in rows if told))


def _state(events: list[Row], status: Row, now: datetime, died: bool, lives: bool) -> str:
    """running, silent, killed, done, stopped or failed; with what it is at and since when there is no sign of life."""
    if not events:
        return "nothing has happened yet"
    attempt = max(int(event["attempt"]) for event in events)
    own = [event for event in events if event["attempt"] == attempt]
    if own[-1].get("kind") == "end":
        return _ended(own[-1])
    seen = [_seconds_ago(str(text), now) for text in (own[-1].get("t"), status.get("updated")) if text]
    ago = min((value for value in seen if value is not None), default=0.0)
    if died:
        return f"killed, can go on; its last sign of life was {duration(ago)} ago"
    at = _at(status)
    if lives:
        quiet = f" (alive, {duration(ago)} in one step)" if ago > SILENT_SECONDS else ""
        return f"running, attempt {attempt}{at}{quiet}"
    if ago > SILENT_SECONDS:
        return f"silent for {duration(ago)} (killed, or in a long step){at}"
    return f"running, attempt {attempt}{at}"


def _ended(event: Row) -> str:
    code = event.get("code")
    if code == errors.DONE:
        return "done"
    word = "stopped, can go on" if code in (errors.RESUMABLE, errors.SIGINT, errors.SIGTERM) else "ended"
    return f"{word} (exit {code}): {str(event.get('error', '')).splitlines()[0] if event.get('error') else ''}"


def _at(status: Row) -> str:
    if not status.get("stage"):
        return ""
    round_, eta = status.get("round"), status.get("eta_seconds")
    stage, place = str(status["stage"]), round_ if isinstance(round_, int) else 0
    found = chain.named(stage)
    name = words.in_words(stage, place, found is not None and found.per_round)
    if isinstance(status.get("step"), int) and status["step"] and isinstance(status.get("steps"), int):
        name = f"step {status['step']} of {status['steps']}, {name}"
    text = f": {name}" + (f": {status.get('done', 0)}/{status['total']}" if status.get("total") else "")
    if status.get("tokens_per_second"):
        text += f", {number(status['tokens_per_second'], 2)} tok/s"
    if isinstance(eta, list) and len(eta) == 2 and eta[1]:
        text += f", {duration_range(*eta)} to go in this stage"
    run = status.get("run_seconds")
    if isinstance(run, list) and len(run) == 2 and run[1]:
        text += f", {duration_range(*run)} left of the whole run"
    return text


def _seconds_ago(text: str, now: datetime) -> float | None:
    try:
        return max((now - datetime.fromisoformat(text.replace("Z", "+00:00"))).total_seconds(), 0.0)
    except ValueError:
        return None


def _spent(events: list[Row], budget: Row, pairs: tuple[int, int] | None) -> str:
    cost = spent(events)
    parts = [f"{duration(cost['seconds'])} in {int(cost['attempts'])} attempt(s)"]
    if cost["usd"]:
        parts.append(usd(cost["usd"]))
        if pairs and sum(pairs):
            parts.append(f"{usd_fine(cost['usd'] / sum(pairs))} a pair")
    limits = [f"{usd(budget['max_usd'])}"] if budget.get("max_usd") else []
    limits += [f"{budget['max_hours']:g} h"] if budget.get("max_hours") else []
    return ", ".join(parts) + (f"; limit {' and '.join(limits)}" if limits else "")


def _counts(path: Path) -> list[tuple[str, str]]:
    """One line a stage: rows accepted, rejected with the most frequent reasons."""
    counts: Counter[tuple[str, str]] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for row in _rows(path):
        stage = str(row.get("stage"))
        counts[stage, "ok" if row.get("status") == "ok" else "rejected"] += 1
        if row.get("status") != "ok":
            reasons.setdefault(stage, Counter())[str(row.get("reason")).split(":")[0]] += 1
    lines = []
    for stage in chain.names():
        kept, lost = counts[stage, "ok"], counts[stage, "rejected"]
        if kept or lost:
            why = ", ".join(f"{reason} {count}" for reason, count in reasons.get(stage, Counter()).most_common(3))
            lines.append((stage, f"{number(kept)} accepted" + (f", {lost} rejected ({why})" if lost else "")))
    return lines


def _rows(path: Path) -> Iterable[Row]:
    """Whole lines only; one that cannot be read is passed over (--verify tells of damage)."""
    with suppress(OSError):
        yield from (row for _, _, row in readable(path, ()))


def _lost(events: list[Row]) -> str:
    """What the tries without a pair came to, in the words of the run's own line."""
    made = next((event for event in reversed(events) if event.get("kind") == "dataset"), {})
    reasons, tried = made.get("reasons"), made.get("tried")
    if not isinstance(reasons, dict) or not reasons:
        return ""
    said = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    lost = sum(count for count in reasons.values() if isinstance(count, int))
    return f"; {lost} of {tried} tries made none ({said})"


def _training(events: list[Row]) -> str:
    own = [event for event in events if "arm" not in event]
    done = [event for event in own if event.get("kind") == "trained"]
    steps = [event for event in own if event.get("kind") == "train_step"]
    if done:
        text = f"{done[-1].get('steps')} steps done"
    elif steps:
        text = f"step {steps[-1].get('step')}"
    else:
        return ""
    losses = _losses(own)
    return text + (f", loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "")


def _losses(events: list[Row]) -> list[float]:
    """Of the training's steps; a step that was trained again after a kill counts as it was last."""
    own = (e for e in events if e.get("kind") == "train_step" and "arm" not in e and isinstance(e.get("step"), int))
    last = {e["step"]: float(e["loss"]) for e in own if isinstance(e.get("loss"), int | float)}
    return [last[step] for step in sorted(last) if math.isfinite(last[step])]


def sparkline(values: list[float], width: int = SPARKS) -> str:
    """`0.693 ▇▆▄▂▁ 0.351`: equal stretches of the values, each by its mean; nothing for fewer than two."""
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    bars = "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)
    return f"{values[0]:.3f} {bars} {values[-1]:.3f}"


def just_made(rows: Iterable[Row]) -> str:
    """The newest text of a run at work, on one line; a red-team text is not shown unasked."""
    last: Row = {}
    pools: dict[Any, str] = {}
    for row in rows:
        if row.get("stage") == "instructions":
            pools[row.get("item")] = str(row.get("pool", "benign"))
        elif chain.is_aside(str(row.get("stage"))):  # its numbers are its own
            row = {**row, "item": f"{row.get('item')} of its own"}
        if str(row.get("text", "")).strip() and row.get("tokens"):
            last = row
    if not last:
        return ""
    stage, round_ = str(last["stage"]), int(last.get("round") or 0)
    where = f"{chain.label(stage, round_)}, item {last.get('item')}"
    if pools.get(last.get("item"), str(last.get("pool", "benign"))) != "benign":
        return f"{where}: red-team text, folded"
    shown = " ".join(str(last["text"]).split())
    return f"{where}: {shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + '…'}"


def _gates(gates: Row) -> list[tuple[str, str]]:
    lines = []
    for verdict in whole_verdicts(gates):
        measured = verdict.get("measured") or {}
        value = measured.get("value")
        shown = f" {number(value)} (n={measured.get('n')})" if isinstance(value, int | float) else ""
        lines.append(("gate", f"{verdict.get('status'):<12} {verdict.get('metric')}{shown}: {verdict.get('reason')}"))
    return [*lines, ("override", str(gates["override"]))] if gates.get("override") else lines
