"""What a dress rehearsal measured: read from the run's own files and from the attempts that `rehearsal.py` noted.

Owns the figures, the table and what counts as a fault. Starts nothing but `--verify` and `--report`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai import errors
from cai.data import chain
from cai.evaluate.benchmarks.sources import NAMES, SEEN
from cai.run.events import read_events

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
FINISHED = (errors.DONE, errors.GATE)
MEMORY_BAR = 1.3
IN_ORDER = ("start", "load the model", *chain.names(), "train", "evaluation")  # then the benchmarks


@dataclass
class Leg:
    """One run of runner.py over all its attempts; `state` is its part of the file that calls hand on."""

    name: str
    items: int
    kills: tuple[str, ...]
    folder: Path
    state: Row

    @property
    def run(self) -> Path:
        return Path(os.path.realpath(self.folder / "latest"))

    @property
    def status(self) -> Row:
        return read_json(self.folder / "latest" / "status.json")

    @property
    def log(self) -> Path:
        """What runner.py said."""
        return self.folder.parent / f"{self.name}.log"

    @property
    def finished(self) -> bool:
        return self.state.get("code") in FINISHED


def read_json(path: Path) -> Row:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def is_benchmark(stage: str) -> bool:
    return stage.removeprefix("judge ").split(" ")[0] in NAMES


def logs_of(run: Path) -> list[Path]:
    return [run / "records.jsonl", *sorted((run / "eval").rglob("*.jsonl"))]


def phase_of(stage: str) -> str:
    """The table's line: the evaluation's metrics together, a benchmark's arms and turns together."""
    if stage.startswith("evaluate "):
        return "evaluation"
    if is_benchmark(stage) and not stage.startswith("judge "):
        return f"{stage.split(' ')[0]} answers"
    return stage


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def phases(leg: Leg) -> dict[str, Row]:
    """Phase -> wall seconds over all attempts (lost work included), seconds of ended stages, rows, tokens."""
    found: dict[str, Row] = {}
    for attempt in leg.state["attempts"]:
        for stage, seconds in attempt["wall"].items():
            row = found.setdefault(phase_of(stage), {"wall_s": 0.0, "stage_s": 0.0, "rows": 0, "tokens": 0})
            row["wall_s"] += seconds
    for event in read_events(leg.run / "events.jsonl"):
        if event.get("kind") == "stage" and phase_of(str(event["stage"])) in found:
            found[phase_of(str(event["stage"]))]["stage_s"] += float(event["seconds"])
    counts = [(str(row["stage"]), row) for row in read_rows(leg.run / "records.jsonl")]
    counts += [("evaluation", row) for row in read_rows(leg.run / "eval" / "scores.jsonl")[1:]]
    for name in NAMES:
        folder = leg.run / "eval" / "benchmarks"
        counts += [(f"{name} answers", row) for row in read_rows(folder / f"{name}.jsonl")[1:]]
        counts += [(f"judge {name}", row) for row in read_rows(folder / f"{name}.verdicts.jsonl")[1:]]
    steps = read_json(leg.run / "train" / "result.json").get("steps", 0)
    counts += [("train", {})] * steps
    for phase, row in counts:
        entry = found.setdefault(phase, {"wall_s": 0.0, "stage_s": 0.0, "rows": 0, "tokens": 0})
        entry["rows"] += 1
        entry["tokens"] += int(row.get("tokens") or 0)
    place = {phase: number for number, phase in enumerate(IN_ORDER)}
    return {phase: found[phase] for phase in sorted(found, key=lambda name: (place.get(name, 99), name))}


KEYS = {"records.jsonl": "stage", "scores.jsonl": "metric", "critic.jsonl": "metric"}  # others have arms


def losses(leg: Leg) -> list[str]:
    """What was committed at a kill and is not at the log's head any more, and what stands twice."""
    faults = []
    for kill, facts in leg.state["kills"].items():
        for name, head in facts["logs"].items():
            data = (leg.run / name).read_bytes() if (leg.run / name).exists() else b""
            if hashlib.sha256(data[: head["bytes"]]).hexdigest() != head["sha256"]:
                faults.append(f"{name}: its {head['rows']} rows of the kill in {kill} are not what it begins with")
    for path in logs_of(leg.run):
        key = (KEYS.get(path.name, "arm"),)
        counts = Counter(tuple(row[part] for part in (*key, "item", "round")) for row in read_rows(path))
        twice = [name for name, count in counts.items() if count > 1]
        faults += [f"{path.name}: {len(twice)} keys stand twice, first {twice[0]}"] if twice else []
    return faults


def arms_of(leg: Leg) -> dict[str, Row]:
    """Benchmark -> how many of the tuned model's answers are the base's, of all and of those given after the kill.

    An adapter that is not on after a resume shows here: then every answer after the kill is the base's.
    """
    found = {}
    for path in (leg.run / "eval" / "benchmarks" / f"{name}.jsonl" for name in NAMES):
        rows = [row for row in read_rows(path) if row.get("status") == "ok"]
        base = {(row["item"], row["round"]): row["text"] for row in rows if row["arm"] == "base"}
        kill = leg.state["kills"].get("benchmark", {}).get("logs", {})
        before = kill.get(str(path.relative_to(leg.run)), {}).get("rows", 0)
        tuned = [
            (row["text"] == base.get((row["item"], row["round"])), place >= before)
            for place, row in enumerate(read_rows(path))
            if row.get("status") == "ok" and row["arm"] == "tuned"
        ]
        later = [same for same, after in tuned if after] if kill else []
        if tuned:
            found[path.stem] = {
                "tuned": len(tuned), "same_as_base": sum(same for same, _ in tuned),
                "after_kill": len(later), "same_after_kill": sum(later),
            }  # fmt: skip
    return found


def worn_faults(arms: dict[str, Row]) -> list[str]:
    """Benchmarks whose tuned answers are the base's, every one."""
    pairs = (("tuned", "same_as_base", ""), ("after_kill", "same_after_kill", " after the kill"))
    return [
        f"{name}: all {row[n]} answers of the tuned model{when} are the base's word for word: no adapter was on"
        for name, row in arms.items()
        for n, same, when in pairs
        if row[n] >= SEEN and row[same] == row[n]
    ]


def memory_of(manifest: Row) -> dict[str, dict[str, float]]:
    """The manifest's peaks by the table's phases."""
    found: dict[str, dict[str, float]] = {}
    for stage, peaks in manifest.get("memory", {}).items():
        row = found.setdefault(phase_of(stage), {})
        for name, value in peaks.items():
            row[name] = max(row.get(name, 0.0), value)
    return found


def judges_of(run: Path) -> dict[str, int]:
    """How each figure of guard and benchmarks says who judged it -> how many say so."""
    figures = read_json(run / "eval" / "benchmarks.json").get("figures", {})
    figures |= read_json(run / "eval" / "guard.json").get("figures", {})
    return dict(Counter(figure.get("judge") or "counted" for figure in figures.values()))


def command_of(leg: Leg, flag: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "runner.py"), str(leg.run / "recipe.toml"), flag, str(leg.run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done, time.monotonic() - began


def facts_of(leg: Leg) -> Row:
    """Everything measured of a finished leg."""
    manifest, gates = read_json(leg.run / "manifest.json"), read_json(leg.run / "eval" / "gates.json")
    attempts = leg.state["attempts"]
    verify, _ = command_of(leg, "--verify")
    _, report_seconds = command_of(leg, "--report")
    return {
        "items": leg.items,
        "seconds": sum(attempt["seconds"] for attempt in attempts),
        "phases": {name: {k: round(v, 2) for k, v in row.items()} for name, row in phases(leg).items()},
        "attempts": attempts,
        "peak_host_mib": max(attempt["peak_host_mib"] for attempt in attempts),
        "memory": memory_of(manifest),
        "model": {k: v for k, v in manifest.get("model", {}).items() if k != "loaded_from"},
        "kills": leg.state["kills"],
        "losses": losses(leg),
        "arms": arms_of(leg),
        "verify": {"code": verify.returncode, "table": verify.stdout.splitlines()},
        "gates": [{k: v[k] for k in ("status", "metric", "reason")} for v in gates.get("verdicts", [])],
        "judges": judges_of(leg.run),
        "report": {"seconds": round(report_seconds, 1), "bytes": (leg.run / "report.html").stat().st_size},
    }


def table(facts: Row) -> str:
    lines = ["| phase | wall s | in stage s | rows | rows/s | tokens | tokens/s |", "| --- |" + " --- |" * 6]
    for name, row in facts["phases"].items():
        wall = max(row["wall_s"], 1e-9)
        rates = (
            f"{row['rows'] / wall:.1f}" if row["rows"] else "",
            f"{row['tokens'] / wall:.0f}" * bool(row["tokens"]),
        )
        cells = (name, f"{row['wall_s']:.1f}", f"{row['stage_s']:.1f}", row["rows"] or "", rates[0])
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, row["tokens"] or "", rates[1])) + " |")
    return "\n".join(lines)


def show(result: Row) -> None:
    facts = result["main"]
    print(
        f"\n{result['machine']}: {facts['items']} items, {facts['seconds']:.0f} s in {len(facts['attempts'])} attempts"
    )
    print(table(facts))
    for number, attempt in enumerate(facts["attempts"], start=1):
        how = f"SIGKILL in {attempt['killed_in']}" if "killed_in" in attempt else f"exit {attempt['code']}"
        print(f"attempt {number}: {attempt['seconds']:.0f} s, {how}, peak host {attempt['peak_host_mib']:.0f} MiB")
    for phase, found in facts["memory"].items():
        print(f"memory {phase}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    print("\n".join(facts["verify"]["table"]))
    for gate in facts["gates"]:
        print(f"gate {gate['status']:<12} {gate['metric']}: {gate['reason']}")
    for name, arms in facts["arms"].items():
        print(f"{name}: {arms['same_as_base']} of {arms['tuned']} tuned answers are the base's", end="")
        print(f", after the kill {arms['same_after_kill']} of {arms['after_kill']}")
    print("figures by judge: " + "; ".join(f"{count} {name}" for name, count in facts["judges"].items()))
    print(f"report: {facts['report']['bytes'] / 1e6:.2f} MB, written again in {facts['report']['seconds']} s")
    if "compare" in result:
        small, large, ratio = result["compare"]["peak_host_mib"], facts["peak_host_mib"], result["memory_ratio"]
        print(f"peak host memory: {large:.0f} MiB at {facts['items']} items, {small:.0f} at", end=" ")
        print(f"{result['compare']['items']}: {ratio:.2f}x (bar {MEMORY_BAR})")
    print("\n".join(result["faults"]) or "nothing lost, nothing twice, every kill resumed")


def faults_of(result: Row, wanted: tuple[str, ...]) -> list[str]:
    """What keeps the rehearsal from being whole and sound. Verdicts of gates are results, not faults."""
    found = []
    for name in ("main", "compare"):
        facts = result.get(name)
        if facts is None:
            continue
        found += [f"{name}: {fault}" for fault in (*facts["losses"], *worn_faults(facts["arms"]))]
        found += [f"{name}: --verify ended with exit {facts['verify']['code']}"] * bool(facts["verify"]["code"])
    missed = [phase for phase in wanted if phase not in result["main"]["kills"]]
    found += [f"no kill was sent in {phase}: it ended before anything of it was committed" for phase in missed]
    ratio = result.get("memory_ratio", 0.0)
    found += [f"peak host memory grows {ratio:.2f}x, bar {MEMORY_BAR}"] * (ratio >= MEMORY_BAR)
    return found


def machine_name(facts: Row) -> str:
    return str(facts["model"].get("gpu") or f"CPU, {os.cpu_count()} cores, {platform.machine()}")
