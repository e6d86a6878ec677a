"""The rounds of a run side by side: each one's figures, and whether the last one added anything.

Owns which figures stand in the table and the rule of `on_policy.metric`; a run's manifest carries the figures of the
rounds before it, so that the table needs no other folder. Pure over figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cai.metrics.stats import Interval, difference
from cai.recipe.settings_rounds import OnPolicySection
from cai.report.snapshot import Snapshot
from cai.store.jsonl import JsonObject, Row
from cai.store.row_types import FigureRow
from cai.terminal import aligned, interval, number

SHOWN = (
    "preference.p3",
    "preference.p3.length_controlled",
    "preference.p1",
    "harmbench.asr.tuned",
    "xstest.over_refusal.tuned",
    "forgetting.kl",
    "forgetting.nll_delta",
    "fresh.tuned.same_as_base",
    "pairs.yield",
    "labels.better",
    "labels.margin",
)


def entry(run: str, section: OnPolicySection, figures: Mapping[str, FigureRow]) -> Row:
    """What the next round's manifest keeps of this one."""
    names = dict.fromkeys((*SHOWN, *([section.metric] if section.metric else ())))
    kept = {name: figures[name] for name in names if name in figures and figures[name].get("value") is not None}
    values = {name: {key: row.get(key) for key in ("value", "low", "high", "n")} for name, row in kept.items()}
    return {"round": section.round, "run": run, "figures": values}


def of_run(snapshot: Snapshot) -> list[Row]:
    """Every round up to this run's, the first one first."""
    own = entry(snapshot.run_id, snapshot.recipe.on_policy, snapshot.figures)
    return [*snapshot.manifest.get("rounds", []), own]


def compared(snapshot: Snapshot) -> Row:
    """The table; {} for a run of one round."""
    rounds = of_run(snapshot)
    if len(rounds) == 1:
        return {}
    every = dict.fromkeys((*SHOWN, *(name for of in rounds for name in of["figures"])))
    names = [name for name in every if any(name in of["figures"] for of in rounds)]
    rows = [[name, *(_cell(of["figures"].get(name)) for of in rounds)] for name in names]
    head = ["figure", *(f"round {of['round']} ({of['run']})" for of in rounds)]
    return {"head": head, "rows": rows, "verdict": verdict(rounds, snapshot.recipe.on_policy)[1]}


def verdict(rounds: Sequence[JsonObject], section: OnPolicySection) -> tuple[bool, str]:
    """Whether a further round may begin, and why. After round one it may: there is nothing to compare with yet."""
    if len(rounds) < 2 or not section.metric:
        return True, ""
    figures = [of["figures"].get(section.metric) or {} for of in rounds[-2:]]
    before, now = (figure.get("value") for figure in figures)
    last = rounds[-1]["round"]
    if before is None or now is None:
        which = last if now is None else last - 1
        return (
            False,
            f"{section.metric} was not measured in round {which}: it is open whether round {last} adds anything",
        )
    ends = _gain_interval(*figures)
    adds = (ends[0] if ends else now - before) > section.min_gain
    said = "adds" if adds else "adds nothing"
    between = interval(*ends) if ends else ""
    wanted = f"{'a lower end above' if ends else 'more than'} {section.min_gain:g} is wanted"
    rule = f"{number(before)} to {number(now)}, a gain of {number(now - before)}{between}; {wanted}"
    return adds, f"round {last} {said}: {section.metric} {rule}"


def _gain_interval(before: JsonObject, now: JsonObject) -> Interval | None:
    """95% interval of the gain from those of the two figures; None where one of them has none."""
    if any(figure.get(end) is None for figure in (before, now) for end in ("low", "high")):
        return None
    old, new = ((figure["value"], (figure["low"], figure["high"])) for figure in (before, now))
    return difference(old, new)


def lines(snapshot: Snapshot) -> list[str]:
    """The table for the screen."""
    found = compared(snapshot)
    if not found:
        return []
    told = aligned([found["head"], *found["rows"]])
    return [*told, *([found["verdict"]] if found["verdict"] else [])]


def _cell(figure: JsonObject | None) -> str:
    """Value and interval."""
    if figure is None:
        return "–"
    return number(figure["value"]) + interval(figure.get("low"), figure.get("high"))
