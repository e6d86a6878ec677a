"""`--runs`: one table of all runs below the recipe's folder, and runs/index.html beside them.

Owns that table and that page. Reads small files of each run (manifest, resolved recipe, gates, figures, events, line
counts), never its records: a list of a hundred runs takes seconds. A run that cannot be read is a row that says so.
What differs is told against the recipe as it is now, resolved for the run's milestone and kind of machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai import errors
from cai.errors import CaiError
from cai.inputs import folder_of_runs
from cai.recipe import load as recipes
from cai.recipe.load import Source, flatten
from cai.recipe.paths import expanded
from cai.report.templating import rendered
from cai.run import digests
from cai.run.events import read_events, spent
from cai.run.lines import near
from cai.run.manifest import pair_counts, read_manifest, resolved_table
from cai.run.run_ids import latest_run, refuse_pipes, run_folders
from cai.store.files import write_atomic
from cai.store.jsonl import read_object
from cai.store.lock import holder_lives
from cai.terminal import aligned, columns, duration, interval, number, printable, say, usd, word

SHOWN = 4  # differences that are named; more are counted
INDEX = "index.html"
HEADS = ("run", "milestone", "model", "pairs", "P1", "loss", "time", "$", "verdict")


@dataclass(frozen=True)
class Line:
    """One run. `cells` in the order of HEADS; `differs`: key=value of what the recipe now says otherwise."""

    run: str
    cells: tuple[str, ...]
    differs: tuple[str, ...] = ()
    report: bool = False
    latest: bool = False

    @property
    def differences(self) -> str:
        more = f" and {len(self.differs) - SHOWN} more" if len(self.differs) > SHOWN else ""
        return ", ".join(self.differs[:SHOWN]) + more


def command(args: argparse.Namespace) -> int:
    """Print the table, newest first, and write the page."""
    root, source = folder_of_runs(args), recipes.read(args.recipe)
    found = listed(root, source)
    if not found:
        print(f"{near(root)}: no run yet. Start one with make m0.")
        return errors.DONE
    say("\n".join(table(found, columns())))
    try:
        write_atomic(root / INDEX, page(found).encode())
        print(f"the same with links to the reports: {word(near(root / INDEX))}")
    except CaiError as error:  # a folder that one may only read is no reason to show nothing
        print(printable(f"not written: {error}"), file=sys.stderr)
    return errors.DONE


def listed(root: Path, source: Source) -> list[Line]:
    """Every run folder below `root`, newest first. Of what differs, that in which runs differ from each other first."""
    latest = latest_run(root)
    folders = [path for path in reversed(run_folders(root)) if (path / "manifest.json").exists()]
    found = [line(path, source, latest) for path in folders]
    everywhere = set.intersection(*(set(run.differs) for run in found)) if len(found) > 1 else set()
    return [replace(run, differs=tuple(sorted(run.differs, key=everywhere.__contains__))) for run in found]


def line(path: Path, source: Source, latest: str = "") -> Line:
    """One run as far as its files tell."""
    try:
        manifest = read_manifest(path / "manifest.json")
    except CaiError:
        return Line(path.name, (path.name, *("–" for _ in HEADS[2:]), "manifest.json cannot be read"))
    try:
        refuse_pipes(path)
    except CaiError:
        return Line(path.name, (path.name, *("–" for _ in HEADS[2:]), "a pipe or a device stands for a file"))
    events, figures = read_events(path / "events.jsonl"), _figures(path)
    cost, gates = spent(events), read_object(path / "eval" / "gates.json")
    changed = digests.edited(path, events, ("eval/gates.json", "eval/measured.json").__contains__)
    model = str((manifest.get("model") or {}).get("model") or resolved_table(path).get("model", {}).get("name", "?"))
    cells = (
        path.name,
        str(manifest.get("milestone", "?")),
        model,
        _pairs(path),
        _p1(figures),
        _loss(events),
        duration(cost["seconds"]),
        usd(cost["usd"]) if cost["usd"] else "–",
        verdict(path, gates, events) + (f"; edited since: {', '.join(changed)}" if changed else ""),
    )
    report = (path / "report.html").is_file()
    return Line(path.name, cells, differs(path, manifest, source), report, path.name == latest)


def differs(path: Path, manifest: Mapping[str, Any], source: Source) -> tuple[str, ...]:
    """`key=value` of the run for every key and input file in which the recipe as it is now differs."""
    try:
        milestone, embedded = str(manifest.get("milestone", "m0")), manifest.get("backend") == "embedded"
        now = recipes.resolve(source, milestone=milestone, embedded=embedded)
    except CaiError:
        return ("the recipe as it is now cannot be read",)
    ours, its = flatten(now.model_dump(mode="json")), flatten(resolved_table(path))
    off = {"milestone", *(key for key in ours if key.startswith("sft.") and "sft.enabled" not in its)}
    keys = [key for key in ours if key in its and key not in off and ours[key] != its[key]]
    found = [f"{key}={_plain(its[key])}" for key in keys]
    names = {"constitution.yaml": now.constitution} | {
        name: f"{now.prompts}/{name.removeprefix('prompts/')}"
        for name in manifest.get("files", {})
        if name.startswith("prompts/")
    }
    for name, where in names.items():
        sha = manifest.get("files", {}).get(name)
        if sha and sha != _sha(source.folder / expanded(where)):
            found.append(f"{name} (another text)")
    return tuple(found)


def verdict(path: Path, gates: Mapping[str, Any], events: list[dict[str, Any]]) -> str:
    """PASS, or how many gates were not; of a run without verdicts, where it stands."""
    verdicts = [v for v in gates.get("verdicts") or [] if isinstance(v, dict)]
    if verdicts:
        missed = [v for v in verdicts if v.get("status") != "PASS"]
        if not missed:
            return "PASS"
        word = "overridden" if gates.get("override") else "FAIL" if gates.get("enforced") else "advisory"
        return f"{len(verdicts) - len(missed)} of {len(verdicts)} ({word})"
    last = events[-1] if events else {}
    if last.get("kind") != "end" and holder_lives(path):
        return "running"
    code = last.get("code") if last.get("kind") == "end" else None
    if code == errors.DONE:
        begun = any(event.get("kind") == "stage" for event in events)
        return "no gates" if (path / "adapter").exists() else "stopped as asked" if begun else "forked, not begun"
    if code is None:
        return "killed"
    return "stopped" if code in (errors.RESUMABLE, errors.SIGINT, errors.SIGTERM) else f"ended, exit {code}"


def table(found: list[Line], columns: int = 0) -> list[str]:
    """The lines on screen: a row a run, and under it what differs; a block a run where `columns` are too few."""
    rows = [HEADS, *((f"{entry.cells[0]}{' *' if entry.latest else ''}", *entry.cells[1:]) for entry in found)]
    lines = aligned(rows)
    if 0 < columns < max(map(len, lines)):
        return [text for entry in found for text in _block(entry)]
    told = [lines[0]]
    for text, entry in zip(lines[1:], found, strict=True):
        told += [text, *([f"  differs: {entry.differences}"] if entry.differs else [])]
    return [*told, *(["* runs/latest"] if any(entry.latest for entry in found) else [])]


def _block(entry: Line) -> list[str]:
    cells = zip(HEADS[1:-1], entry.cells[1:-1], strict=True)
    named = [cell if head == "$" else f"{head} {cell}" for head, cell in cells if cell != "–"]
    rows = ["verdict    " + entry.cells[-1], "           " + ", ".join(named)]
    rows += [f"differs    {entry.differences}"] if entry.differs else []
    return [f"{entry.run}{' (latest)' if entry.latest else ''}", *(f"  {row}" for row in rows)]


def page(found: list[Line]) -> str:
    return rendered("index.html.j2", {"heads": HEADS, "lines": found})


def _plain(text: str) -> str:
    text = text[1:-1] if text[:1] == text[-1:] == "'" else text
    return text if len(text) <= 40 else text[:37] + "..."


def _sha(path: Path) -> str:
    try:
        return digests.digest_of(path)[:16]
    except OSError:
        return ""


def _figures(path: Path) -> Mapping[str, Any]:
    found = read_object(path / "eval" / "measured.json").get("figures")
    return found if isinstance(found, dict) else {}


def _value(figure: Any) -> tuple[float, Any, Any] | None:
    if not isinstance(figure, dict) or not isinstance(figure.get("value"), int | float):
        return None
    return float(figure["value"]), figure.get("low"), figure.get("high")


def _p1(figures: Mapping[str, Any]) -> str:
    """On held-out pairs with its interval; where none were held out, on the training pairs, and said to be."""
    if (held := _value(figures.get("preference.p1"))) is not None:
        return number(held[0]) + interval(*held[1:])
    trained = _value(figures.get("preference.p1.train"))
    return f"{number(trained[0])} (train)" if trained is not None else "–"


def _loss(events: list[dict[str, Any]]) -> str:
    steps = [e["loss"] for e in events if e.get("kind") == "train_step" and "arm" not in e and "loss" in e]
    values = [loss for loss in steps if isinstance(loss, int | float)]
    return f"{number(values[0])} to {number(values[-1])}" if values else "–"


def _pairs(path: Path) -> str:
    if (counts := pair_counts(path)) is None:
        return "–"
    return f"{counts[0]:,}" + (f" + {counts[1]:,}" if counts[1] else "")
