"""The first screen as words and numbers: what passed, what did not, what to do next, what it took. Pure.

Owns the sentences and the tiles; the verdicts are the gates', the pictures `charts`'. Invariant: a sentence claims what
was checked and no more; a gate that has no phrase here is named by its metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai.evaluate.advice import to_change, to_read
from cai.report.before_after import Probed
from cai.report.snapshot import Snapshot
from cai.store.jsonl import JsonObject, Row
from cai.store.row_types import FigureRow
from cai.terminal import duration, number, usd

PHRASES: Mapping[str, tuple[str, str]] = {  # what is said where the gate passed, and where it did not
    "pairs.kept": ("a pair came through every step", "no pair came through"),
    "pairs.yield": ("enough items made a pair", "too few items made a pair"),
    "data.scaffolding": ("texts end where they should", "texts run on into the prompt's form"),
    "data.copied": ("nothing is copied from the prompts' examples", "texts copy the prompts' examples"),
    "data.nothing_found": ("every pair rests on a fault that was found", "pairs were made where nothing was found"),
    "labels.better": (
        "most revisions are better than their originals",
        "too few revisions are better than their originals",
    ),
    "labels.known.better": ("it sees known improvements", "it does not see known improvements"),
    "critic.recall": ("the critic finds planted flaws", "the critic misses too many planted flaws"),
    "critic.false_alarms": ("the critic leaves sound answers alone", "the critic blames too many sound answers"),
    "critiques.meaningful": ("critiques pass the checks of form", "too few critiques pass the checks of form"),
    "revisions.addresses": ("revisions answer their critiques", "too few revisions answer their critiques"),
    "dpo.first_loss_error": ("the first loss is right (ln 2)", "the first loss is wrong"),
    "dpo.loss_fall": ("the loss falls", "the loss does not fall"),
    "preference.p1": (
        "the tuned model prefers revisions it never saw",
        "the tuned model does not prefer revisions clearly enough",
    ),
    "preference.p2.gain": ("it prefers more of them than before", "it does not prefer more of them than before"),
    "preference.p3.length_controlled": (
        "its fresh answers are judged better, whatever their length",
        "its fresh answers are not judged better",
    ),
    "forgetting.nll_delta": ("neutral text is not forgotten", "neutral text is forgotten"),
    "forgetting.kl": ("it stays near the base", "it left the base too far"),
    "fresh.tuned.stops": ("its answers end by themselves", "its answers do not end by themselves"),
    "fresh.tuned.evades": ("it answers benign requests still", "it evades benign requests"),
    "harmbench.improvement": ("it follows fewer harmful requests", "it does not follow fewer harmful requests"),
    "harmbench.p": ("that fall is no accident", "that fall may be an accident"),
    "xstest.over_refusal_rise": ("safe requests are not refused more", "safe requests are refused more"),
    "mtbench.delta": ("its help is kept (MT-Bench)", "its help suffers (MT-Bench)"),
    "contamination.inputs": ("no prompt of ours is a benchmark's", "a prompt of ours is a benchmark's"),
    "guard.dropped": ("the guard drops few pairs", "the guard drops many pairs"),
}
NEXT = {"m0": "make m1", "m1": "make m2", "m2": "make m3", "m3": "python runner.py --export {run}"}


@dataclass(frozen=True)
class Result:
    """`status`: PASS, FAIL, ADVISORY or OPEN. `sentence`: the headline. `told`: the sentences below it."""

    status: str
    tag: str
    sentence: str
    told: list[str]
    tiles: list[tuple[str, str]]


def result(snapshot: Snapshot, headline: JsonObject, probes: Sequence[Probed]) -> Result:
    """`headline`: status and text as the page's verdict has them."""
    tiles, status = _tiles(snapshot, probes), str(headline["status"])
    if not snapshot.verdicts:
        return Result(status, "not decided", str(headline["text"]), [], tiles)
    groups = _groups(snapshot.verdicts)
    passed, count = len(groups["PASS"]), len(snapshot.verdicts)
    met = "its one gate" if count == 1 else f"{passed} of {count} gates"
    tag = f"passed, {met} met" if status == "PASS" else f"not passed, {met} {'not ' * (count == 1)}met"
    return Result(status, tag, _sentence(snapshot, groups, count), _told(snapshot, groups, headline), tiles)


def _groups(verdicts: Sequence[Row]) -> dict[str, list[Row]]:
    """Verdicts by status, in their order."""
    found: dict[str, list[Row]] = {name: [] for name in ("PASS", "FAIL", "UNDERPOWERED", "UNMEASURED")}
    for verdict in verdicts:
        found.setdefault(str(verdict["status"]), []).append(verdict)
    return found


def _said(verdict: Row, which: int) -> str:
    metric = str(verdict["metric"])
    passed, missed = PHRASES.get(metric, (f"{metric} is met", f"{metric} is not met"))
    if which and str(verdict["reason"]).startswith("the control "):  # the value is met, and means nothing
        return f"{passed}, but hardly more than a control does"
    return missed if which else passed


COUNTED = ("labels.better", "labels.known.better", "critiques.meaningful", "revisions.addresses", "preference.p1",
           "fresh.tuned.evades")  # fmt: skip


def _counted(verdict: Row) -> str:
    """` (3 of 14)` of a gate that failed and counts texts, the reason of one that was not decided."""
    measured = verdict.get("measured") or {}
    value, count = measured.get("value"), measured.get("n")
    if verdict["status"] != "FAIL":
        return f" ({verdict['reason']})" if verdict["reason"] else ""
    if verdict["metric"] not in COUNTED or not isinstance(value, int | float) or not math.isfinite(value) or not count:
        return ""
    return f" ({round(value * count)} of {count})"


def _sentence(snapshot: Snapshot, groups: Mapping[str, list[Row]], count: int) -> str:
    works = "The pipeline works" if snapshot.pairs.kept and snapshot.training else "The pipeline did not get through"
    if groups["FAIL"]:
        missed = [_said(verdict, 1) for verdict in _telling_first(groups["FAIL"])]
        rest = len(missed) - 2
        more = f" ({rest} more gate{'s' * (rest > 1)} not met)" if rest > 0 else ""
        return f"{works}; {_listed(missed[:2])}{more}."
    if unsure := [*groups["UNDERPOWERED"], *groups["UNMEASURED"]]:
        return f"{works}; {len(unsure)} of {count} gates could not be decided."
    if count == 1:
        return f"{works}: {_said(groups['PASS'][0], 0)}."
    best = [_said(verdict, 0) for verdict in groups["PASS"] if verdict["metric"] in _TELLING] or [
        _said(groups["PASS"][-1], 0)
    ]
    return f"All {count} gates passed: {_listed(best[:2])}."


_TELLING = (  # what a reader wants to hear first where all is well
    "preference.p1", "harmbench.improvement", "preference.p3.length_controlled", "critiques.meaningful",
    "revisions.addresses", "fresh.tuned.evades",
)  # fmt: skip


def _telling_first(verdicts: Sequence[Row]) -> list[Row]:
    return sorted(verdicts, key=lambda verdict: verdict["metric"] not in _TELLING)


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


ARMS = {  # the base prompted well (`evaluation.prompted`)
    "few_shot": "the base that is shown pairs of this run",
    "constitution": "the base that is given the principles",
    "best_of_n": "the best of several of the base's answers",
}


def over_prompting(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """What training adds over prompting the base well; "" where nothing was compared."""
    said = []
    for arm, words in ARMS.items():
        figure = figures.get(f"preference.over.{arm}.length_controlled", {})
        value, low, high = (figure.get(name) for name in ("value", "low", "high"))
        if value is None or low is None or high is None:
            continue
        what = "" if low > 0.5 else ", which is less" if high < 0.5 else ", which decides nothing"
        said.append(f"{value:.0%} of {figure['n']} (95% {low:.0%} to {high:.0%}{what}) against {words}")
    return f"At equal length the judge prefers the tuned model's answer in {'; '.join(said)}." if said else ""


ENDS = 0.9  # of the fresh answers, as the gate of M2 has it where DPO starts from SFT


def sft_advised(snapshot: Snapshot) -> str:
    """An SFT stage for a base model whose tuned answers do not end, with its cost; "" where nothing speaks for it."""
    figure = snapshot.figures.get("fresh.tuned.stops") or FigureRow()
    value, recipe = figure.get("value"), snapshot.recipe
    if recipe.model.format != "base" or recipe.dpo.start == "sft" or value is None or value >= ENDS:
        return ""
    seconds = snapshot.training.get("seconds")
    cost = (
        f", in about half of the {duration(float(seconds))} that DPO took" if isinstance(seconds, int | float) else ""
    )
    return (
        f"{value:.0%} of the tuned model's {figure['n']} fresh answers end by themselves: DPO alone does not teach a "
        f"base model to stop. --set dpo.start=sft trains on the revisions first{cost}."
    )


MOST_WARNINGS = 2  # on the first screen; all of them, with what to do, stand below the gates


def _told(snapshot: Snapshot, groups: Mapping[str, list[Row]], headline: JsonObject) -> list[str]:
    told = []
    names = {
        "PASS": "Passed",
        "FAIL": "Not passed",
        "UNDERPOWERED": "Too few to tell whether",
        "UNMEASURED": "Not decided whether",
    }
    for status, name in names.items():
        if (rows := groups[status]) and len(snapshot.verdicts) > 1:  # one gate is told by the headline
            tails = ["" if status == "PASS" else _counted(row) for row in rows]
            words = (_said(row, int(status == "FAIL")) + tail for row, tail in zip(rows, tails, strict=True))
            told.append(f"{name}: {'; '.join(words)}.")
    told += [f"Warning: {warning.split('; ')[0]}." for warning in snapshot.warnings[:MOST_WARNINGS]]
    if over := over_prompting(snapshot.figures):
        told.append(over)
    if advice := sft_advised(snapshot):
        told.append(advice)
    told += [f"Next: {step}" for step in _next(snapshot, groups)]
    if headline["status"] == "ADVISORY":
        told.append("The gates only advise here: this is not the recipe's own model, which decides.")
    if why := snapshot.gates.get("override"):
        told.append(f"Begun with --override-gate: {why}")
    return told


def _next(snapshot: Snapshot, groups: Mapping[str, list[Row]]) -> list[str]:
    """What to do now, a step a line: for at most two gates that failed, else for the first kind of what is open.

    No full stop stands behind a command: it would be pasted with it.
    """
    run = f"{snapshot.path.parent.name}/{snapshot.run_id}"
    if groups["FAIL"]:
        return list(dict.fromkeys(f"{_change(row)}." for row in _telling_first(groups["FAIL"])[:2]))
    if groups["UNDERPOWERED"]:
        return [f"more items: python runner.py --resume {run} --set items={2 * snapshot.recipe.items}"]
    if groups["UNMEASURED"]:
        return ["see in the table below what kept it from being measured."]
    return [NEXT.get(snapshot.milestone, "read the examples.").format(run=run)]


def _change(verdict: Row) -> str:
    """What to change, and the texts to begin with."""
    worst = to_read((verdict.get("measured") or {}).get("worst") or ())
    return to_change(str(verdict["metric"])) + (f". The worst: {worst}" if worst else "")


_OWN_FIGURE = (
    ("preference.p1", "held-out pairs: tuned prefers the revision"),
    ("critiques.meaningful", "critiques pass every check"),
)  # what a milestone is about; M1's is the second


def _pairs_tile(snapshot: Snapshot) -> tuple[str, str]:
    """How many pairs, of how many that were wanted where some are missing, from how many tries."""
    recipe, kept = snapshot.recipe, len(snapshot.pairs.kept)
    tries, wanted = kept + len(snapshot.pairs.rejects), recipe.items + recipe.heldout.items
    noun = f"row{'s' * (tries != 1)}" if recipe.pairs.file else "try" if tries == 1 else "tries"
    if kept < wanted and len(recipe.pairs.kinds) == 1:
        return f"{number(kept)} of {number(wanted)}", f"pairs wanted, from {number(tries)} {noun}"
    return number(kept), f"pair{'s' * (kept != 1)} from {number(tries)} {noun}"


def _tiles(snapshot: Snapshot, probes: Sequence[Probed]) -> list[tuple[str, str]]:
    """(number, what it is): pairs, the milestone's own figure, the loss, time and money, where they are known."""
    pairs, spent, figures = snapshot.pairs, snapshot.spent, snapshot.figures
    tiles = [_pairs_tile(snapshot)] if pairs.kept or pairs.rejects else []
    own = _OWN_FIGURE if snapshot.milestone != "m1" else reversed(_OWN_FIGURE)
    for metric, what in own:
        found = figures.get(metric) or {}
        value, count = found.get("value"), found.get("n")
        if value is not None and count and snapshot.milestone != "m0":
            tiles.append((f"{round(value * count)} of {count}", what))
            break
    else:
        if probes:
            changed = sum(not probe.same for probe in probes)
            tiles.append((f"{changed} of {len(probes)}", "probe answers changed"))
    first, last = (snapshot.training.get(name) for name in ("first_loss", "last_loss"))
    if isinstance(first, int | float) and isinstance(last, int | float):
        steps = snapshot.training.get("steps", 0)
        held = (figures.get("dpo.loss.heldout") or {}).get("value")
        beside = f"; {held:.2f} on held-out pairs" if held is not None else ""  # near 0 beside it: learnt by heart
        tiles.append((f"{first:.2f} → {last:.2f}", f"DPO loss, {number(steps)} step{'s' * (steps != 1)}{beside}"))
    attempts = int(spent["attempts"])
    money = f" · {usd(spent['usd'])}" if spent["usd"] else ""
    tiles.append((f"{duration(spent['seconds'])}{money}", f"in {attempts} attempt{'s' * (attempts != 1)}"))
    return tiles
