"""`--attribute`'s page: the ranking of principles, two heat maps, and what was lost without some, in three forms.

Owns what stands there; the numbers are `cai.evaluate.attribution`'s. Pure but for `write`: the same rows give the same
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cai.evaluate import attribution
from cai.evaluate import head_to_head_figures as figures
from cai.evaluate.head_to_head import Question
from cai.evaluate.head_to_head_figures import Texts
from cai.recipe.constitution import Principle
from cai.report.against import cell
from cai.report.templating import write_pages
from cai.store.jsonl import JsonObject, Row

SHADES = 4  # on either side of one half
NAME = "principles"


def gather(
    run: str,
    questions: Sequence[Question],
    principles: Sequence[Principle],
    texts: Texts,
    rows: Sequence[Row],
    pairs: Mapping[str, int],
    left_out: Sequence[Row],
    judge: str,
) -> Row:
    """Everything on the page, as plain values. `rows`: judgements in which `ours` is the tuned model."""
    both = [q for q in questions if q.item in texts.ours and q.item in texts.theirs]
    groups = attribution.groups_of(both)
    return {
        "run": run,
        "judge": judge,
        "prompts": len(both),
        "same": sum(texts.ours[q.item] == texts.theirs[q.item] for q in both),
        "overall": figures.under("attribution.overall", figures.of_place(rows, 0), texts, judge).as_dict(),
        "ranking": attribution.ranking(rows, principles, texts, pairs, judge),
        "heat": {name: attribution.heat(rows, principles, of) for name, of in groups.items() if of},
        "without": list(left_out),
    }


def write(folder: Path, content: JsonObject) -> Path:
    """principles.json, .md and .html; gives the last one's path."""
    shown = {**content, "cell": cell, "shade": shade, "lines": lines(content)}
    return write_pages(folder, NAME, "attribution", content, shown)


def shade(wins: float | None) -> str:
    """The class of a heat map's cell: `up1` to `up4` above one half, `down1` to `down4` below, "" at it or unknown."""
    if wins is None or wins == 0.5:
        return ""
    step = min(SHADES, 1 + int(abs(wins - 0.5) * 2 * SHADES * 0.999))
    return f"{'up' if wins > 0.5 else 'down'}{step}"


def lines(content: JsonObject) -> list[str]:
    """The result on the screen: overall, the first and the last of the ranking, and what was lost without some."""
    overall, ranked = content["overall"], content["ranking"]
    found = [f"tuned over base on {content['prompts']} held-out prompts ({content['same']} answered alike):"]
    found.append(f"  wins {cell(overall['wins'])}; at equal length {cell(overall['controlled'])}")
    for row in ranked[:3] + ranked[max(3, len(ranked) - 2) :]:
        odds = cell(row["log_odds"], percents=False, unit=" nats")
        found.append(f"  {row['id']}: {odds}, wins {cell(row['wins'])}, {row['verdict']} (pairs: {row['pairs']})")
    for one in content["without"]:
        others = f"the other principles {cell(one['others'], percents=False)} ({one['others_verdict']})"
        for row in one["own"]:
            odds = cell(row["log_odds"], percents=False, unit=" nats")
            found.append(f"  with the pairs of {row['id']} over without: {odds} ({row['verdict']}); {others}")
    return found
