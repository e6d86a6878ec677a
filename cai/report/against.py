"""`--against`'s page: what changed in behaviour between two runs, as HTML, Markdown and JSON.

Owns what stands there and in which order; the rows and figures are `head_to_head`'s. Pure but for `write`: the same log
gives the same bytes, so that a comparison that was killed and went on ends with the page of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cai.evaluate import head_to_head_figures as figures
from cai.evaluate.head_to_head import Question
from cai.evaluate.head_to_head_figures import Asked, Texts
from cai.metrics.objections import goes_along
from cai.metrics.wordings import is_refusal
from cai.report.diff import compared
from cai.report.snapshot import read_figures
from cai.report.templating import write_pages
from cai.run.manifest import read_manifest
from cai.store.jsonl import JsonObject, Row
from cai.terminal import interval, number, percent

SHOWN = 10
BENCHMARKS = ("harmbench.", "xstest.", "mtbench.")  # figures of the runs' own benchmarks, where they were on


def gather(
    a: Path,
    b: Path,
    asked: Sequence[Asked],
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[int, str]],
    rows: Sequence[Row],
    judge: str,
) -> Row:
    """Everything on the page, as plain values. `rows`: judgements in which `ours` is B."""
    both = [q for q in questions if q.item in answers["a"] and q.item in answers["b"]]
    texts = Texts({q.item: answers["b"][q.item] for q in both}, {q.item: answers["a"][q.item] for q in both})
    overall = figures.of_place(rows, 0)
    pools = figures.by_group(both, "pool")
    return {
        "a": about(a),
        "b": about(b),
        "judge": judge,
        "prompts": len(both),
        "left_out": len(questions) - len(both),
        "same": sum(texts.ours[q.item] == texts.theirs[q.item] for q in both),
        "overall": figures.under("against.overall", overall, texts, judge).as_dict(),
        "pools": {
            pool: figures.under(f"against.{pool}", figures.of_items(overall, items), texts, judge).as_dict()
            for pool, items in pools.items()
        },
        "principles": [
            {"id": one.principle.id, "principle": one.principle.principle, "whose": one.whose}
            | figures.under(f"against.{one.principle.id}", figures.of_place(rows, place), texts, judge).as_dict()
            for place, one in enumerate(asked, start=1)
        ],
        "refusals": figures.refusals(both, texts),
        "base_refuses": _base("refusals", both, answers["base"], is_refusal),
        "compliance": figures.compliance(both, texts),
        "base_complies": _base("compliance", [q for q in both if q.pool == "redteam"], answers["base"], goes_along),
        "lengths": figures.lengths(texts),
        "different": figures.most_different(both, rows, texts, SHOWN),
        "benchmarks": benchmarks(a, b),
    }


def about(run: Path) -> Row:
    """What tells a run on this page: its id and its constitution's digest."""
    manifest = read_manifest(run / "manifest.json")
    files = manifest.get("files") or {}
    model = (manifest.get("model") or {}).get("model", "")
    return {"run": run.name, "model": model, "constitution": str(files.get("constitution.yaml", ""))}


def _base(name: str, questions: Sequence[Question], base: Mapping[int, str], says: Callable[[str], bool]) -> Row:
    """The same share of the untrained base's answers, by pool: where both began."""
    groups = {"all": [q.item for q in questions], **figures.by_group(questions, "pool")}
    return {
        pool: figures.share_of(f"{name}.{pool}.base", [base[item] for item in items if item in base], says)
        for pool, items in groups.items()
    }


def benchmarks(a: Path, b: Path) -> list[Row]:
    """The tuned models' own benchmark figures where both runs have them."""
    one, two = read_figures(a / "eval"), read_figures(b / "eval")
    names = [name for name in sorted(one.keys() & two.keys()) if name.startswith(BENCHMARKS)]
    return [{"metric": name, "a": one[name], "b": two[name]} for name in names]


def write(folder: Path, name: str, content: JsonObject) -> Path:
    """NAME.json, NAME.md and NAME.html; gives the last one's path."""
    shown = {**content, "pairs": [_pair(row) for row in content["different"]], "cell": cell, "lines": lines(content)}
    return write_pages(folder, name, "against", content, shown)


def _pair(row: JsonObject) -> Row:
    """A prompt of the ten with its word difference, A on the left; red-team texts are folded."""
    told = {1.0: "B is judged better in both orders", 0.0: "A is judged better in both orders"}
    verdict = "not scored" if row["win"] is None else told.get(row["win"], "the two orders disagree: a tie")
    declines = [name for name, side in (("A", "theirs"), ("B", "ours")) if row["declines"][side]]
    declining = f"; {' and '.join(declines)} decline{'s' if len(declines) == 1 else ''}" if declines else ""
    odds = "" if row["log_odds"] is None else f" ({row['log_odds']:+.2f} nats for B)"
    return {
        **row,
        "both": compared(row["theirs"], row["ours"]),
        "told": f"{verdict}{odds}{declining}",
        "folded": row["pool"] not in ("", "benign"),
    }


def cell(figure: JsonObject, *, percents: bool = True, unit: str = "") -> str:
    """`62% [48, 75]`, or the number with its interval and `unit`; why where nothing was measured."""
    if figure["value"] is None:
        return "not measured"
    shown = percent if percents else number
    missing = f", {figure['unscored']} unscored" if figure["unscored"] else ""
    return f"{shown(figure['value'])}{interval(figure['low'], figure['high'], shown)}{unit}{missing}"


def lines(content: JsonObject) -> list[str]:
    """The result on the screen: overall, where refusals and lengths moved, and the principles that moved most."""
    overall, n, length = content["overall"], content["prompts"], content["lengths"]
    found = [f"B against A on {n} held-out prompts ({content['same']} answered alike), judge {content['judge']}:"]
    found.append(f"  B wins {cell(overall['wins'])}; at equal length {cell(overall['controlled'])}")
    for does, name, of_base in (("refuses", "refusals", "base_refuses"), ("goes along", "compliance", "base_complies")):
        for row in content[name]:
            base = content[of_base].get(row["pool"])
            began = f"base {cell(base)}, " if base else ""
            shift = f"A {cell(row['theirs'])}, B {cell(row['ours'])} (exact McNemar p={number(row['p'])})"
            found.append(f"  {does}, {row['pool']} ({row['n']}): {began}{shift}")
    if length["n"]:
        between = interval(*length["interval"]) if length["interval"] else ""
        found.append(f"  words: A {number(length['theirs'])}, B {number(length['ours'])}, difference "
                     f"{number(length['difference'])}{between}")  # fmt: skip
    ranked = [row for row in content["principles"] if row["log_odds"]["value"] is not None]
    ranked.sort(key=lambda row: -abs(row["log_odds"]["value"]))
    for row in ranked[:3]:
        odds = cell(row["log_odds"], percents=False, unit=" nats for B")
        found.append(f"  under {row['id']} ({row['whose']}): B wins {cell(row['wins'])}, {odds}")
    return found
