"""`--inverse`'s page: the rules that the base proposed, what they state, and how much of the constitution came back.

Owns what stands there; the figures are `cai.evaluate.inverse`'s. Pure but for `write`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cai.metrics.figure import Figure
from cai.report.against import cell
from cai.report.templating import write_pages
from cai.store.jsonl import JsonObject, Row
from cai.terminal import number

NAME = "rules"


def gather(
    run: str,
    pairs: int,
    tried: int,
    about: Mapping[str, int],
    above: float,
    sensitivity: Figure,
    arms: Mapping[str, Row],
) -> Row:
    """Everything on the page, as plain values. `arms`: of the pairs as labelled, and with their labels swapped."""
    found = {one["nearest"] for one in arms["labels"]["rules"] if one["matched"]}
    return {
        "run": run,
        "pairs": pairs,
        "tried": tried,
        "bar": above,
        "sensitivity": sensitivity.as_dict(),
        "arms": dict(arms),
        "principles": [{"id": id_, "pairs": count, "back": id_ in found} for id_, count in sorted(about.items())],
    }


def write(folder: Path, content: JsonObject) -> Path:
    """rules.json, .md and .html; gives the last one's path."""
    shown = {**content, "cell": cell, "lines": lines(content)}
    return write_pages(folder, NAME, "inverse", content, shown)


def lines(content: JsonObject) -> list[str]:
    """The result on the screen, with its control and the bar's own error."""
    labels, swapped = content["arms"]["labels"], content["arms"]["swapped"]
    copied = f" ({labels['copied']} more copied one of the prompt's examples)" if labels["copied"] else ""
    found = [f"rules from {content['pairs']} pairs: {len(labels['rules'])}{copied}"]
    found.append(f"  recovered of the principles that pairs were about: {cell(labels['recovered'])}; "
                 f"with swapped labels {cell(swapped['recovered'])}")  # fmt: skip
    found.append(
        f"  invented, of the rules: {cell(labels['invented'])}; with swapped labels {cell(swapped['invented'])}"
    )
    bar = f"{number(content['bar'])} nats a token"
    found.append(f"  a match is above {bar}; of the principles' own requests {cell(content['sensitivity'])} are found")
    for one in labels["rules"][:5]:
        states = f"states {one['nearest']}" if one["matched"] else "invented"
        found.append(f"  {states}: {one['rule']}")
    return found
