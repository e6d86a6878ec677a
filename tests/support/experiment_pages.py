"""The pages of the experiments, filled by hand through the modules that write them: for the check in a browser.

Hostile, long and right-to-left texts stand where a model's text stands; numbers are made up.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cai.evaluate import attribution as attributed
from cai.evaluate import inverse as proposed
from cai.evaluate.head_to_head import Question
from cai.evaluate.head_to_head_figures import Texts, union
from cai.metrics.figure import Figure
from cai.recipe.constitution import Constitution, Principle, load_constitution
from cai.report import against, attribution, inverse, sweep
from cai.report.pages import write_pages
from support.pages import make_run, records
from support.runs import ROOT

JUDGE = "SmolLM2-135M-Instruct, adapter off"
HOSTILE = "</p><script>alert(1)</script> \u202egnirts " + "unbroken" * 60
REFUSES = "I'm sorry, but I can't help with that."
OTHER = "20261129-024317-m1-a8203d"
TOPICS = ("health", "money", "law", "home", "school")


def questions(count: int) -> list[Question]:
    """Prompts of both pools and several topics; the first one is hostile."""
    return [
        Question(
            500_000 + n,
            HOSTILE if n == 0 else f"How long should I rest after a sprain, number {n}?",
            "redteam" if n % 3 == 0 else "benign",
            TOPICS[n % len(TOPICS)],
        )
        for n in range(count)
    ]


def texts(asked: list[Question]) -> tuple[dict[int, str], dict[int, str]]:
    """Two arms' answers: some are equal, one is hostile, one is empty, one refuses."""
    ours = {q.item: f"Rest for {n} days, then walk. " + "See a doctor if it swells. " * n for n, q in enumerate(asked)}
    theirs = {q.item: f"Walk after {n} days. It heals by itself." for n, q in enumerate(asked)}
    ours |= {asked[0].item: REFUSES, asked[1].item: theirs[asked[1].item]}
    theirs |= {asked[0].item: HOSTILE, asked[2].item: ""}
    return ours, theirs


def judged(asked: list[Question], principles: int) -> list[dict[str, Any]]:
    """Verdicts of the judge's own wording (round 0) and under each principle; some have no number."""
    dice, rows = random.Random(0), []
    for q in asked:
        for place in range(principles + 1):
            odds = round(dice.gauss((place % 5 - 2) / 2, 1.0), 6)
            known = (q.item + place) % 11 != 0
            row = {"item": q.item, "round": place, "log_odds": odds if known else None}
            rows.append(row | {"win": (1.0 if odds > 0.3 else 0.0 if odds < -0.3 else 0.5) if known else None})
    return rows


def experiment_pages(folder: Path) -> dict[str, str]:
    """against, attribution, inverse and sweep, each with much and with next to nothing; the report of a third round."""
    shipped = load_constitution(ROOT / "constitution.yaml")
    for part in (folder / "pages", folder / "few" / "pages"):
        part.mkdir(parents=True)
    odd = Principle("odd-" + "long" * 12, HOSTILE, "Check it.", "Mend it.")
    held = {"files": {"constitution.yaml": "0f3a5c7e9b1d2f4a"}}
    a, b = (make_run(folder / name, records(), manifest=held) for name in ("a", "b"))
    found = {
        "against": _against(folder, a, b, shipped, Constitution("", "", (*shipped.principles[:2], odd)), 24),
        "against-few": _against(folder / "few", a, b, Constitution("", "", (odd,)), Constitution("", "", (odd,)), 3),
        "attribution": _attribution(folder, [*shipped.principles, odd], 24),
        "attribution-few": _attribution(folder / "few", [odd], 3),
        "inverse": _inverse(folder, [*shipped.principles, odd]),
        "inverse-none": _inverse(folder / "few", []),
        "sweep": _sweep(folder, 6),
        "sweep-one": _sweep(folder / "few", 1),
    }
    return {**found, "rounds": _rounds(folder)}


def _against(folder: Path, a: Path, b: Path, one: Constitution, two: Constitution, count: int) -> str:
    asked, both = questions(count), union(one, two)
    ours, theirs = texts(asked)
    answers = {"base": theirs, "a": theirs, "b": ours}
    content = against.gather(a, b, both, asked, answers, judged(asked, len(both)), JUDGE)
    figure = {"value": 0.31, "low": 0.2, "high": 0.44, "unscored": 2, "n": 40}
    if count > 3:
        content["benchmarks"] = [{"metric": "harmbench.asr.tuned", "a": figure, "b": {**figure, "value": 0.6}}]
    return against.write(folder / "pages", OTHER, content).read_text()


def _attribution(folder: Path, principles: list[Principle], count: int) -> str:
    asked = questions(count)
    said, rows = Texts(*texts(asked)), judged(asked, len(principles))
    left_out = []
    if count > 3:
        names = [principles[-1].id]
        left_out = [{"run": OTHER, **attributed.without(rows, principles, names, said, JUDGE)}]
    pairs = {principle.id: n for n, principle in enumerate(principles)}
    content = attribution.gather(OTHER, asked, principles, said, rows, pairs, left_out, JUDGE)
    return attribution.write(folder / "pages", content).read_text()


def _inverse(folder: Path, principles: list[Principle]) -> str:
    rules = [f"The answer says {p.principle.split()[-1]} first." for p in principles[:8]] + [HOSTILE] * bool(principles)
    values: list[list[float | None]] = [
        [0.1 * ((i * 7 + j * 3) % 11) - 0.3 for j in range(len(principles))] for i in range(len(rules))
    ]
    names = [p.id for p in principles[:6]]
    about = {name: n + 1 for n, name in enumerate(names)}
    arm = proposed.summary(rules, values, 0.55, principles, names) | {"copied": 2}
    for one in arm["rules"]:
        one["explains"] = Figure("inverse.explains", 0.6, 0.4, 0.78, 20, judge=JUDGE).as_dict()
    swapped = proposed.summary(rules[:1], values[:1], 0.55, principles, names) | {"copied": 0}
    sensitivity = Figure("inverse.sensitivity", 0.4, 0.12, 0.77, 5, judge="likelihood of the base")
    content = inverse.gather(OTHER, 12, 20, about, 0.55, sensitivity, {"labels": arm, "swapped": swapped})
    return inverse.write(folder / "pages", content).read_text()


def _sweep(folder: Path, count: int) -> str:
    points = []
    for n in range(count):
        names = ("P3", "P3 at equal length", "P1", "KL", "harmful compliance", "over-refusal")
        seeds = tuple(
            {name: round(0.1 * ((n * 5 + place * 3 + seed) % 9) + 0.02, 3) for place, name in enumerate(names)}
            | {"pairs": 900.0}
            for seed in range(2)
        )
        settings = (("dpo.beta", f"{0.05 * (n + 1):g}"), ("instructions.red_team_share", "0.5"))
        failed = ("exit 6: no pair is left to train on",) if n == 2 else ()
        points.append(sweep.Point(settings, (f"2026112{n}-024317-m1-a8203d",) * 2, seeds, failed, stand_in=count > 1))
    return sweep.write(folder / "sweep", points).read_text()


def _rounds(folder: Path) -> str:
    """The report of a third round: the table of rounds stands in it."""
    names = ("preference.p3", "preference.p3.length_controlled", "forgetting.kl", "pairs.yield")
    figure = {"value": 0.51234, "low": 0.40123, "high": 0.61234, "n": 40}
    before = [
        {"round": n, "run": f"2026112{n}-024317-m2-a8203d", "figures": dict.fromkeys(names, figure)} for n in (1, 2)
    ]
    path = make_run(folder / "rounds", records(), manifest={"rounds": before})
    write_pages(path)
    return (path / "report.html").read_text()
