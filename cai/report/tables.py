"""Tables over a snapshot: the funnel, principles, attempts, phases, memory, repairs. Pure but for names in quarantine/.

Owns what is counted and summed for the report, the status and the model card; owns no layout.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import cast

from cai.data import chain, labels
from cai.data.rounds import found_nothing
from cai.evaluate import critiques, revisions
from cai.recipe.settings_benchmarks import STAND_IN
from cai.report.snapshot import Snapshot
from cai.run.events import spent
from cai.store.jsonl import Row
from cai.store.row_types import Record
from cai.store.rows import of_stages
from cai.terminal import number

REPAIRS = {  # event kind -> what happened, in words
    "healed": "a torn tail was cut off a log; the cut bytes are in quarantine/",
    "out_of_memory": "memory ran out; the work was cut smaller and went on",
    "checkpoint_damaged": "a checkpoint did not verify and was set aside",
    "recomputed_differs": "a recomputed row differed from the one on disk, which was kept",
    "resume": "training went on from a checkpoint",
    "budget_stop": "a limit of [budget] was reached; everything finished is kept and the run can go on",
    "recipe_changed": "the recipe was changed between attempts (keys that may change)",
    "pairs_cut": "some pairs were cut or left out to fit dpo.max_length",
    "wave": "items without a pair were tried again",
    "forked": "records were taken over from another run",
    "identical_answers": "the tuned model answered a benchmark word for word as the base: is the adapter on?",
}


def funnel(snapshot: Snapshot) -> list[Row]:
    """One row a stage and round: rows, accepted, rejected, error, reasons with counts.

    A stand-in for the guard is marked in the stage's name.
    """
    groups: dict[tuple[str, int], Counter[str]] = {}
    reasons: dict[tuple[str, int], Counter[str]] = {}
    for row in snapshot.rows:  # one at a time: all of them at once are the largest thing a report would hold
        if row["stage"] not in chain.names():
            continue  # the probes' answers are no part of the chain
        key = row["stage"], chain.round_of(row)
        counts = groups.setdefault(key, Counter())
        counts["rows"] += 1
        counts[row["status"]] += 1
        counts["tokens"] += row.get("tokens") or 0
        counts["limited"] += row.get("finish") == "length"
        if row["status"] != "ok":
            reasons.setdefault(key, Counter())[str(row["reason"]).split(":")[0]] += 1
    order, model = {stage: i for i, stage in enumerate(chain.names())}, snapshot.recipe.guard.model
    found = []
    for (stage, round_), counts in sorted(groups.items(), key=lambda g: _stage_order(g[0], order)):
        label = f"guard ({STAND_IN})" if stage == "guard" and model == STAND_IN else stage
        found.append(
            {
                "stage": label,
                "round": round_,
                "name": chain.label(label, round_),
                "rows": counts["rows"],
                "ok": counts["ok"],
                "rejected": counts["rejected"],
                "errors": counts["rows"] - counts["ok"] - counts["rejected"],
                "reasons": reasons.get((stage, round_), Counter()).most_common(),
                "tokens": counts["tokens"],
                "limited": counts["limited"],
            }
        )
    return found


def _stage_order(key: tuple[str, int], order: Mapping[str, int]) -> tuple[int, int, int]:
    """Critiques and revisions of round 1, then of round 2, ...: rounds before stages once the answers stand."""
    stage, round_ = key
    place = order.get(stage, 9)
    found, first = chain.named(stage), next(i for i, stage in enumerate(chain.CHAIN) if stage.per_round)
    return (1, round_, place) if found and found.per_round else (0 if place < first else 2, place, round_)


PRINCIPLE_COUNTS = "rounds nothing kept tried meaningful meaningful_n addresses addresses_n better better_n".split()


def by_principle(snapshot: Snapshot) -> list[Row]:
    """One row a principle: rounds, critiques that find nothing; of last rounds: pairs kept, the metric's verdicts."""
    found: dict[str, Row] = {}
    for row in snapshot.rows:
        if row["stage"] == "critiques" and row["status"] == "ok":
            entry = found.setdefault(str(row["principle"]), dict.fromkeys(PRINCIPLE_COUNTS, 0))
            entry["rounds"] += 1
            entry["nothing"] += found_nothing(row)
    examples = [*snapshot.pairs.examples, *(r["example"] for r in snapshot.pairs.rejects if "example" in r)]
    kept = {example["item"] for example in snapshot.pairs.examples}
    for example in examples:
        if example["principle_id"] in found and example.get("kind") != "sampled":
            entry = found[example["principle_id"]]
            entry["tried"] += 1
            entry["kept"] += example["item"] in kept
            if (checked := example.get("label")) is not None and example.get("margin") is not None:
                entry["better_n"] += 1
                entry["better"] += not labels.fault(cast(Record, {**checked, "margin": example["margin"]}))
            scores = snapshot.scores_by_item.get(example["item"], {})
            for name, verdict in (("meaningful", critiques.verdict), ("addresses", revisions.verdict)):
                decided = verdict(scores, snapshot.recipe.evaluation).decided
                entry[name] += decided is True
                entry[f"{name}_n"] += decided is not None
    return [
        {"id": id_, "text": snapshot.principles.get(id_, ""), **entry}
        for id_, entry in sorted(found.items(), key=lambda e: str(e[0]))
    ]


def by_pool(snapshot: Snapshot) -> tuple[tuple[str, ...], list[Row]]:
    """The pools, and of each principle how many critiques of each pool were about it."""
    given = of_stages(snapshot.rows, ("instructions",))
    pools = {row["item"]: str(row.get("pool", "benign")) for row in given if row["status"] == "ok"}
    found: dict[str, Counter[str]] = {}
    for row in of_stages(snapshot.rows, ("critiques",)):
        if row["status"] == "ok":
            found.setdefault(str(row["principle"]), Counter())[pools.get(row["item"], "benign")] += 1
    names = tuple(sorted({pool for counts in found.values() for pool in counts}))
    total = {pool: sum(counts[pool] for counts in found.values()) for pool in names}
    return names, [
        {"id": id_, "cells": tuple((counts[pool], total[pool]) for pool in names)}
        for id_, counts in sorted(found.items())
    ]


def attempts(snapshot: Snapshot) -> list[Row]:
    """One row an attempt: when it began, where, how long, what it cost, how it ended."""
    found: list[Row] = []
    numbers = sorted({int(event["attempt"]) for event in snapshot.events})
    for attempt in numbers:
        own = [event for event in snapshot.events if event["attempt"] == attempt]
        first = next((e for e in own if e["kind"] == "attempt"), {})
        ends = [e for e in own if e["kind"] == "end"]
        cost = spent(own)
        found.append(
            {
                "attempt": attempt,
                "began": str(first.get("t", ""))[:19].replace("T", " "),
                "host": str(first.get("host", "")),
                "seconds": cost["seconds"],
                "usd": cost["usd"],
                "end": _ending(snapshot, ends[-1]) if ends else _open_end(snapshot, own, attempt == numbers[-1]),
            }
        )
    return found


def _open_end(snapshot: Snapshot, own: list[Row], last: bool) -> str:
    """An attempt writes its page before its end: only an earlier one without an end was certainly killed."""
    if not last:
        return "killed"
    if any(event["kind"] == "budget_stop" for event in own):
        return "stopped at the budget"
    return (
        "all steps done when this page was written"
        if snapshot.gates
        else "at work when this page was written, or killed"
    )


def _ending(snapshot: Snapshot, end: Row) -> str:
    if end.get("code") == 0:
        return "done"
    said = str(end.get("error", "")).replace(str(snapshot.path), f"{snapshot.path.parent.name}/{snapshot.run_id}")
    return f"exit {end.get('code')}: {said}"


PEAKS = {"peak_host_gib": "host", "peak_gpu_gib": "gpu", "peak_gpu_used_gib": "gpu_used"}


def phases(snapshot: Snapshot) -> list[Row]:
    """Seconds, dollars, items, tokens and peak GiB by stage (and training), over rounds and attempts; then the rest.

    `host`: the process's peak up to then; `gpu`, `gpu_used`: reserved and allocated at most within the phase.
    """
    price = {e["attempt"]: float(e.get("usd_per_hour") or 0.0) for e in snapshot.of_kind("attempt")}
    found: dict[str, Row] = {}

    def add(name: str, event: Row, seconds: float | None) -> None:
        entry = found.setdefault(name, _phase(name))
        entry["seconds"] += float(seconds or 0)
        entry["usd"] += float(seconds or 0) / 3600 * price.get(event["attempt"], 0.0)
        for peak, short in PEAKS.items():
            if isinstance(event.get(peak), int | float):
                entry[short] = max(entry[short] or 0.0, float(event[peak]))

    for event in snapshot.of_kind("model_loaded"):
        add("load the model", event, event.get("load_seconds"))
    for event in snapshot.of_kind("preflight"):
        add("preflight", event, event.get("seconds"))
    for event in snapshot.of_kind("stage"):
        name = "evaluate" if str(event.get("stage")).startswith("evaluate") else str(event.get("stage"))
        add(name, event, event.get("seconds"))
        found[name]["items"] += int(event.get("items") or 0)
        found[name]["tokens"] += int(event.get("tokens") or 0)
    if not found.get("train", {}).get("seconds"):
        for event in snapshot.of_kind("trained"):
            add("train", event, event.get("seconds"))
    rows = [row for row in found.values() if row["seconds"] or row["items"]]
    rest = {name: snapshot.spent[name] - sum(row[name] for row in rows) for name in ("seconds", "usd")}
    if rows and rest["seconds"] > 0.5:
        rows.append(_phase("everything else") | rest)
    return rows


def _phase(name: str) -> Row:
    return {"phase": name, "seconds": 0.0, "usd": 0.0, "items": 0, "tokens": 0, **dict.fromkeys(PEAKS.values())}


def weights(snapshot: Snapshot) -> Row:
    """GiB of the loaded weights and of the card, as the last load noted them; empty on a CPU."""
    loads = snapshot.of_kind("model_loaded")
    return {name: loads[-1][name] for name in ("weights_gib", "gpu_gib") if loads and loads[-1].get(name)}


def repairs(snapshot: Snapshot) -> list[Row]:
    """What went wrong and was handled: kind, how often, in words, the last event's details."""
    found: dict[str, list[Row]] = {}
    for event in snapshot.events:
        if event["kind"] in REPAIRS:
            found.setdefault(event["kind"], []).append(event)
    rows = [
        {"kind": kind, "count": len(events), "what": REPAIRS[kind], "last": _details(events[-1])}
        for kind, events in sorted(found.items())
    ]
    if kept := sorted(path.name for path in (snapshot.path / "quarantine").glob("*")):
        rows.append({"kind": "quarantine", "count": len(kept), "what": "bytes set aside", "last": ", ".join(kept[:5])})
    return rows


def _details(event: Row) -> str:
    fields = {k: v for k, v in event.items() if k not in ("t", "attempt", "n", "s", "kind")}
    return ", ".join(f"{name} {_plain(value)}" for name, value in fields.items())[:200]


def _plain(value: object) -> str:
    """A value without Python's brackets and quotes; a share of a dollar or second to three digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return number(value) if isinstance(value, float) else str(value)


def command_line(snapshot: Snapshot) -> str:
    """What makes the same run again from its own copies of the inputs."""
    sets = [part for text in snapshot.manifest.get("sets") or [] for part in ("--set", str(text))]
    words = [
        "python",
        "runner.py",
        f"{snapshot.path.parent.name}/{snapshot.run_id}/recipe.toml",
        "--milestone",
        snapshot.milestone,
        *sets,
    ]
    return shlex.join(words)
