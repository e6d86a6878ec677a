"""The report of a run: report.html, one offline page without scripts, and report.md, the same in short.

Owns what the two pages hold and in which order (verdicts first); `snapshot` reads the folder, `exhibits` prepares the
examples, the templates lay them out. A pure function of the run folder: the same files give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cai.data import hygiene
from cai.evaluate.gates import SIGNS
from cai.metrics import names as metrics
from cai.report import arms_table, before_after, examples, kinds, people, publication, rounds, tables
from cai.report.agreement import agreement
from cai.report.drawing import inline
from cai.report.drawn import Standing
from cai.report.examples import GLOSSARY, exhibits, rejected_exhibits
from cai.report.notes import by_item, notes
from cai.report.pictures import charts_of, plots
from cai.report.result import result
from cai.report.snapshot import Snapshot, read_story
from cai.report.templating import rendered
from cai.run import digests
from cai.run.folder import Run
from cai.store.files import write_atomic
from cai.store.jsonl import JsonObject, Row
from cai.store.row_types import FigureRow
from cai.terminal import duration, number, usd, usd_fine

SMALL = ("m0", "m1")
MARKDOWN_EXAMPLES = 30  # report.md holds every example of M0 and M1, and the first ones of larger runs
TARGETS = {"m0": (0.5, 0.87), "m1": (1.0, 1.74), "m2": (3.0, 5.22), "m3": (5.0, None)}  # hours, dollars: the plan


def write_report(run: Run) -> None:
    """Write report.html and report.md of a run that is open or peeked at. Errors: CaiError(IO)."""
    write_pages(run.path)


def write_pages(path: Path) -> None:
    standing = Standing(path)
    snapshot = read_story(path)  # once: with 5,000 items it is a third of what a run holds
    content = gather(snapshot) | {"picture": standing.inline}
    digests.drop_page_sums(path)
    write_atomic(path / "report.html", page(content).encode())
    write_atomic(path / "report.md", markdown(content).encode())
    if snapshot.recipe.milestone not in SMALL:  # a paper shows no milestone of ten items
        standing.write_plots(path / "eval" / "plots", plots(content))
    standing.write()
    del content
    publication.write(snapshot)
    digests.write_page_sums(path)


def page(content: JsonObject) -> str:
    return rendered("report.html.j2", {"picture": inline, **content})


def markdown(content: JsonObject) -> str:
    return rendered("report.md.j2", content)


def gather(snapshot: Snapshot) -> Row:
    """Everything the templates print, as plain values."""
    principles, found = tables.by_principle(snapshot), people.people(snapshot)
    return {
        **_first_screen(snapshot),
        **charts_of(snapshot, principles),
        **_examples(snapshot),
        "snapshot": snapshot,
        "verdicts": [verdict_row(v) for v in snapshot.verdicts],
        "controls": _controls(snapshot),
        "funnel": tables.funnel(snapshot),
        "reject_reasons": list(snapshot.pairs.reasons.items()),
        "hygiene": snapshot.cleaned,
        "hygiene_lines": hygiene.lines(snapshot.cleaned.facts),
        "principles": principles,
        "judged_better": has(principles, "better_n"),
        "figures": figure_rows(snapshot.figures),
        "left_out": sum(measured.get("value") is None for measured in snapshot.figures.values()),
        "meanings": metrics.meanings(name for name, m in snapshot.figures.items() if m.get("value") is not None),
        "benchmarks": benchmark_rows(snapshot.figures),
        "added": added(snapshot),
        "kinds": kinds.compared(snapshot.figures),
        "rounds": rounds.compared(snapshot),
        "arms": arms(snapshot),
        "training": training_rows(snapshot),
        "instructions": (snapshot.of_kind("instructions_summary") or [{}])[-1],
        "attempts": tables.attempts(snapshot),
        "phases": tables.phases(snapshot),
        "weights": tables.weights(snapshot),
        "repairs": tables.repairs(snapshot),
        "money": money(snapshot),
        "reviews": agreement(snapshot),
        "people": found,
        "people_lines": people.lines(found),
        "notes": notes(snapshot.reviews),
        "command": tables.command_line(snapshot),
        "plan": identity_rows(snapshot),
        "has": has,
    }


def has(rows: Sequence[Row], column: str) -> bool:
    """Whether a column holds anything: one of empty cells is not shown."""
    return any(row[column] for row in rows)


def _first_screen(snapshot: Snapshot) -> Row:
    """The result in words, and what was answered before and after."""
    probes, said = before_after.probed(snapshot.rows), headline(snapshot)
    return {
        "headline": said,
        "result": result(snapshot, said, probes),
        "probes": probes,
        "probe_summary": before_after.summary(probes) if probes else "",
        "first_probe": before_after.first_shown(probes),
    }


def _examples(snapshot: Snapshot) -> Row:
    """The examples, what they are found by, and where a principle's are."""
    shown, rejected = exhibits(snapshot), rejected_exhibits(snapshot)
    choices = examples.filters([*shown, *rejected])
    links = {label: name for choice in choices if choice.name == "principle" for name, label in choice.options}
    return {
        "examples": shown,
        "first_example": examples.first_shown(shown),
        "filters": choices,
        "classes": examples.classes,
        "links": links,
        "noted": by_item(notes(snapshot.reviews)),
        "glossary": GLOSSARY,
        "markdown_examples": shown[:MARKDOWN_EXAMPLES],
        "total_examples": len(snapshot.pairs.examples),
        "rejected": rejected,
        "total_rejected": sum("example" in reject for reject in snapshot.pairs.rejects),
    }


def headline(snapshot: Snapshot) -> Row:
    """The one sentence on top: passed, not passed, or not decided; whether it counts on this model."""
    if not snapshot.gates:
        text = "No gate was decided yet: the run is not finished."
        if snapshot.events and snapshot.events[-1]["kind"] == "budget_stop":
            text += f" It stopped at its budget {snapshot.events[-1]['where']} and can go on."
        return {"status": "OPEN", "text": text}
    advisory = not snapshot.gates.get("enforced")
    open_ = [v["metric"] for v in snapshot.verdicts if v["status"] != "PASS" and not v["criterion"].get("advisory")]
    if not snapshot.verdicts:
        return {"status": "OPEN", "text": f"The recipe sets no gate for {snapshot.milestone}."}
    why = snapshot.gates.get("override")
    if not open_:
        advised = [v["metric"] for v in snapshot.verdicts if v["status"] != "PASS"]
        text = f"{snapshot.milestone} passed its {len(snapshot.verdicts) - len(advised)} gate(s)."
        text += f" Advisory and not met: {', '.join(advised)}." if advised else ""
        return {"status": "PASS", "text": f"{text} Begun with --override-gate: {why}" if why else text}
    text = f"{snapshot.milestone} did not pass: {', '.join(open_)}."
    if why:
        text += f" Overridden: {why}"
    elif advisory:
        text += " On this model the gates only advise: it is not the recipe's own."
    return {"status": "ADVISORY" if advisory else "FAIL", "text": text}


def verdict_row(verdict: JsonObject) -> Row:
    """A gate as the table shows it: status, value, interval, n, what was wanted, why."""
    criterion = verdict["criterion"]
    measured: FigureRow = verdict.get("measured") or {}
    comparison = next((name for name in SIGNS if criterion.get(name) is not None), "at_least")
    bound = "" if criterion.get("bound", "point") == "point" else f" ({criterion['bound']} bound)"
    return {
        "metric": verdict["metric"],
        "status": verdict["status"],
        "reason": verdict["reason"],
        "why": criterion.get("why", ""),
        "wanted": f"{SIGNS[comparison]} {criterion.get(comparison):g}{bound}",
        "beats": [f"{name} by {criterion.get('beats_by', 0):g}" for name in criterion.get("beats", [])],
        **figure(measured),
    }


def figure(measured: FigureRow) -> Row:
    """Value, interval, n, unscored and judge of a measured figure, as text."""
    value, low, high = measured.get("value"), measured.get("low"), measured.get("high")
    interval = "" if low is None or high is None else f"{number(float(low))} to {number(float(high))}"
    return {
        "value": number(value) if value is not None else "not measured",
        "interval": interval,
        "n": measured.get("n", 0),
        "unscored": measured.get("unscored", 0),
        "judge": measured.get("judge", ""),
        "note": measured.get("note", ""),
    }


def _controls(snapshot: Snapshot) -> list[Row]:
    """The negative controls and baselines that the gates name."""
    names = dict.fromkeys(name for v in snapshot.verdicts for name in v["criterion"].get("beats", []))
    return [{"metric": name, **figure(snapshot.figures[name])} for name in names if name in snapshot.figures]


def figure_rows(figures: Mapping[str, FigureRow]) -> list[Row]:
    """What was measured; what a milestone does not measure is not listed."""
    known = {name: measured for name, measured in figures.items() if measured.get("value") is not None}
    return [{"metric": name, **figure(measured)} for name, measured in sorted(known.items())]


def benchmark_rows(figures: Mapping[str, FigureRow]) -> list[Row]:
    """Figures that hold a base and a tuned value, or stand once for each of the two: benchmarks, forgetting, fresh."""
    rows = []
    for name, measured in sorted(figures.items()):
        if metrics.arm_of(name):  # of an arm beside the two
            continue
        facts = measured.get("facts") or {}
        base, tuned = facts.get("base"), facts.get("tuned")
        if isinstance(base, int | float) and isinstance(tuned, int | float):
            rows.append({"metric": name, "base": number(base), "tuned": number(tuned), **figure(measured)})
    for name, base in sorted(figures.items()):
        parts = name.split(".")
        tuned = figures.get(".".join("tuned" if part == "base" else part for part in parts))
        if "base" in parts and tuned and None not in (base.get("value"), tuned.get("value")):
            shown = {"metric": ".".join(part for part in parts if part != "base"), **figure(tuned)}
            values = {"base": number(base["value"]), "tuned": number(tuned["value"])}
            rows.append(shown | values | {"value": "", "interval": ""})
    return rows


def arms(snapshot: Snapshot) -> Row:
    """All arms beside each other; empty where there are base and tuned alone."""
    rows = arms_table.rows(snapshot)
    return {"head": arms_table.head(snapshot), "rows": rows} if rows else {}


def added(snapshot: Snapshot) -> Row:
    """What DPO adds to supervised training on the revisions; empty where that arm was not trained."""
    rows = publication.added_rows(snapshot.figures)
    arm = snapshot.figures.get("sft.last_loss")
    if not arm:
        return {}
    facts = arm.get("facts") or {}
    about = f"Both adapters began from the same weights and seed. SFT: {facts.get('steps')} steps on {arm.get('n')} "
    about += f"texts, loss {number(facts.get('first_loss'), 4)} to {number(arm.get('value'), 4)}."
    return {"about": about, "head": publication.ADDED_HEAD, "rows": rows}


def training_rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Facts of the training, first and last loss, held-out figures beside them."""
    result = snapshot.training
    if not result:
        return []
    rows = [("steps", number(result.get("steps"))), ("pairs", number(result.get("pairs")))]
    rows += [(name.replace("_", " "), number(result.get(name), 4)) for name in ("first_loss", "last_loss")]
    batch = result.get("micro_batch"), result.get("accumulation")
    if all(batch):
        rows.append(("effective batch", f"{batch[0]} x {batch[1]}"))
    rows += [("truncated pairs", number(result.get("truncated", 0)))]
    rows += [(f"held-out {name}", number(value, 4)) for name, value in (result.get("heldout") or {}).items()]
    for name in ("dpo.loss", "dpo.margin", "dpo.chosen_fall"):
        for tail in ("", ".heldout"):
            measured = snapshot.figures.get(name + tail)
            if measured and measured.get("value") is not None:
                shown = figure(measured)
                interval = f" [{shown['interval']}]" if shown["interval"] else ""
                rows.append((f"{name}{tail} after training", f"{shown['value']}{interval}, n={shown['n']}"))
    return rows


def money(snapshot: Snapshot) -> Row:
    """Time and money over all attempts, beside the plan's target."""
    spent, budget = snapshot.spent, snapshot.recipe.budget
    hours, dollars = TARGETS.get(snapshot.milestone, (budget.target_hours or None, None))
    hours = budget.target_hours or hours
    return {
        "time": duration(spent["seconds"]),
        "usd": usd(spent["usd"]) if spent["usd"] else "no price set",
        "per_pair": usd_fine(snapshot.usd_per_pair),
        "seconds_per_pair": duration(spent["seconds"] / len(snapshot.pairs.kept)) if snapshot.pairs.kept else "–",
        "target_time": duration(hours * 3600) if hours else "none",
        "target_usd": usd(dollars) if dollars else "none",
        "on_plan": snapshot.backend == "cuda",
    }


def identity_rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    """What made the run: model, versions, hashes."""
    facts, versions = snapshot.manifest.get("model") or {}, snapshot.manifest.get("versions") or {}
    rows = [("model", snapshot.model), ("backend", snapshot.backend)]
    rows += [(name, str(facts[name])) for name in ("revision", "quantization", "format", "device") if facts.get(name)]
    rows += [("created", str(snapshot.manifest.get("created", ""))), ("seed", str(snapshot.recipe.seed))]
    rows += [(name, str(version)) for name, version in sorted(versions.items())]
    rows += [(f"sha256 of {name}", str(sha)) for name, sha in sorted((snapshot.manifest.get("files") or {}).items())]
    return rows
