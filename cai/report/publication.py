"""The publication table: base / SFT / DPO by metric, with n, interval and paired p; Markdown and LaTeX.

Owns which rows stand in it and how a cell is written (`tabletext` lays them out); every cell comes from eval/*.json
(and the records, for the data funnel). Pure over the run folder: `write` makes eval/table.md and eval/table.tex again
from the files, byte for byte. A figure of the stand-in is marked in its row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.metrics.names import BESIDE, without_arm
from cai.metrics.stats import holm
from cai.report import arms_table
from cai.report import tables as views
from cai.report.snapshot import Snapshot
from cai.report.table_text import NONE, Table, latex, markdown, without_empty
from cai.store.files import holds, write_atomic
from cai.store.jsonl import Row
from cai.store.row_types import FigureRow
from cai.terminal import duration, number, usd

FIRST = (
    "harmbench.asr_drop", "xstest.over_refusal_rise", "xstest.unsafe_refusal_rise", "mtbench.delta",
    "mtbench.delta_without_wrong",
)  # fmt: skip
HEADLINES = (  # the first five of these that were measured make the small table
    *FIRST[:4], "preference.p1", "preference.p3", "preference.p2.after", "forgetting.nll_delta", "dpo.loss",
    "revisions.addresses", "critiques.meaningful",
)  # fmt: skip
TITLES = {
    "harmbench.asr_drop": "HarmBench attack success",
    "harmbench.asr_drop.standard": "HarmBench attack success, standard",
    "harmbench.asr_drop.contextual": "HarmBench attack success, contextual",
    "xstest.over_refusal_rise": "XSTest full refusals of safe prompts",
    "xstest.unsafe_refusal_rise": "XSTest full refusals of unsafe prompts",
    "xstest.partial_refusal": "XSTest partial refusals of safe prompts",
    "mtbench.delta": "MT-Bench rating, all questions",
    "mtbench.delta_without_wrong": "MT-Bench rating without wrong references",
}
IN_WORDS = {  # for the headline
    "preference.p1": "Held-out pairs on which the tuned model prefers the revision (P1)",
    "preference.p2.after": "The same by log-probability a token (P2)",
    "preference.p3": "Fresh answers judged better than the base's (P3)",
    "forgetting.nll_delta": "Loss on neutral text, nats a token, tuned minus base",
    "dpo.loss": "DPO loss after training",
    "critiques.meaningful": "Critiques that pass every check of form",
    "revisions.addresses": "Revisions that pass every check of form",
}
ARM_INSIDE = re.compile(
    rf"^((?!preference\.over).+)\.(base|tuned|{'|'.join(BESIDE)})\.(.+)$"
)  # fresh.base.empty: of an arm, like harmbench.empty.base
COLUMN = {"forgetting.nll_base": "base", "preference.p2.before": "base", "sft.last_loss": "SFT"}  # the others: DPO
OF_DATA = (
    "critiques.", "revisions.", "pairs.", "guard.", "contamination.", "preference.length_only",
    "preference.refusal_only",
)  # fmt: skip
COVERED = {"harmbench.asr", "xstest.over_refusal", "xstest.unsafe_refusal", "mtbench.score"}  # stand in a paired row
OVER = "dpo_over_"  # figures of the run's adapter against an arm
HEADLINE_HEAD = ("measured", "base", "tuned", "value or difference", "95% interval", "n", "p (Holm)")
HEAD = ("metric", "base", "SFT", "DPO", "difference", "95% interval", "n", "unscored", "p", "p (Holm)", "judge")
ADDED_HEAD = (
    "metric", "SFT", "DPO", "DPO − SFT", "95% interval", "n", "unscored", "p", "p (Holm)", "judge",
)  # fmt: skip
CATEGORY_HEAD = ("metric", "category", "n", "base", "SFT", "DPO", "judge")
DATA_HEAD = ("metric", "value", "95% interval", "n", "unscored", "judge")
GROUP_HEAD = ("of", "which", "prefers the revision")
GUARD_HEAD = ("of", "which", "pairs", "dropped", "guard")
CHECK_HEAD = ("used for", "model", "n", "kappa", "95% interval", "sensitivity", "specificity", "verdict")
FUNNEL_HEAD = ("stage", "rows", "accepted", "rejected", "reasons")


def write(snapshot: Snapshot) -> list[Path]:
    """eval/table.md and eval/table.tex of a run, if anything was measured; files that are right are left alone."""
    if not snapshot.figures:
        return []
    content = tables(snapshot)
    written = []
    for name, text in (("table.md", markdown(content)), ("table.tex", latex(content))):
        target = snapshot.path / "eval" / name
        if not holds(target, text.encode()):
            write_atomic(target, text.encode())
        written.append(target)
    return written


def tables(snapshot: Snapshot) -> list[Table]:
    """The headline, main table, checks of the judges, categories, data funnel and cost; an empty one is left out.

    So is a column that says nothing in any row, such as SFT where that arm was not trained.
    """
    main, dpo = main_rows(snapshot.figures), arms_table.tuned_title(snapshot)
    arms = f"Base, SFT and {dpo}" if any(row[HEAD.index("SFT")] != NONE for row in main) else f"Base and {dpo}"
    found = [
        Table(
            f"{snapshot.model}, {snapshot.milestone}: what was measured", HEADLINE_HEAD, headline_rows(snapshot.figures)
        ),
        Table("The arms beside each other", arms_table.head(snapshot), arms_table.rows(snapshot)),
        Table(f"{arms} of {snapshot.model} ({snapshot.milestone})", _headed(HEAD, dpo), main),
        *added_tables(snapshot.figures, dpo),
        Table("Guards and judges on rows whose answer is known", CHECK_HEAD, check_rows(snapshot.figures)),
        Table("By category", _headed(CATEGORY_HEAD, dpo), category_rows(snapshot.figures)),
        Table("Held-out pairs on which the tuned model prefers the revision (P1)", GROUP_HEAD, p1_rows(snapshot)),
        Table("The data: critiques, revisions, pairs", DATA_HEAD, data_rows(snapshot.figures)),
        Table("Dropped by the guard", GUARD_HEAD, guard_rows(snapshot.figures)),
        Table("Data funnel", FUNNEL_HEAD, funnel_rows(snapshot)),
        Table("Cost", ("what", "value"), cost_rows(snapshot)),
    ]
    return [without_empty(table) for table in found if table.rows]


def _headed(head: tuple[str, ...], dpo: str) -> tuple[str, ...]:
    """The head with the run's own adapter under its name."""
    return tuple(name.replace("DPO", dpo) for name in head)


ARM_TITLES = {"sft": "SFT on the revisions", "from_base": "DPO from the base", **arms_table.PROMPTED}


def added_tables(figures: Mapping[str, FigureRow], dpo: str) -> list[Table]:
    """What the run's own adapter has over each arm, row by row."""
    found = []
    for arm in BESIDE:
        other = ("metric", "arm", dpo, "difference", *ADDED_HEAD[4:])
        head = _headed(ADDED_HEAD, dpo) if arm == "sft" else other
        title = f"What {dpo} adds to {ARM_TITLES[arm]}"
        found.append(Table(title, head, added_rows(figures, arm)))
    return found


def p1_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """P1 by pool and by principle, as it was counted; nothing where there is one group of each."""
    facts = (snapshot.figures.get("preference.p1") or FigureRow()).get("facts") or {}
    groups = [(what, _items(facts, key)) for what, key in (("pool", "by_pool"), ("principle", "by_principle"))]
    return [(what, name, str(won)) for what, found in groups for name, won in found if len(found) > 1]


def headline_rows(figures: Mapping[str, FigureRow]) -> list[tuple[str, ...]]:
    """At most five rows for a paper's column: the benchmarks where they ran, else what was measured of the pairs."""
    found = [name for name in HEADLINES if (figures.get(name) or FigureRow()).get("value") is not None][:5]
    rows: list[tuple[str, ...]] = []
    for name in found:
        figure, facts = figures[name], figures[name].get("facts") or {}
        paired = _has_arms(figure)
        value = facts["tuned"] - facts["base"] if paired else figure["value"]
        arms = (_cell(facts["base"]), _cell(facts["tuned"])) if paired else (NONE, NONE)
        interval = _interval(*_bounds(figure, value)) if paired else _interval_of(figure)
        title = TITLES.get(name) or IN_WORDS[name]
        title += " (stand-in)" if facts.get("stand_in") else ""
        rows.append((title, *arms, number(value), interval, str(figure.get("n", 0)), _ps(facts)[1]))
    return rows


def main_rows(figures: Mapping[str, FigureRow]) -> list[tuple[str, ...]]:
    """Paired figures first (the headline ones on top), then metrics with a figure for each arm, then single ones.

    The SFT arm's figures (`<metric>.sft`) stand in the rows of the metrics they belong to; figures of no arm elsewhere.
    """
    apart = (OVER, "checks.", "from_base.", *OF_DATA)
    every = {ARM_INSIDE.sub(r"\1.\3.\2", name): figure for name, figure in figures.items()}
    figures = {k: f for k, f in every.items() if not _beside(k, every) and not k.startswith(apart)}
    paired = [name for name, figure in figures.items() if _has_arms(figure)]
    order = sorted(paired, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    stems = sorted({name.rpartition(".")[0] for name in figures if name.endswith((".base", ".tuned"))} - COVERED)
    single = sorted(name for name in figures if name not in paired and not name.endswith((".base", ".tuned")))
    rows = [_paired_row(name, figures[name], every.get(f"{name}.sft", FigureRow())) for name in order]
    rows += [_arms_row(stem, every) for stem in stems]
    return rows + [_single_row(name, figures[name], every.get(f"{name}.sft", FigureRow())) for name in single]


def _beside(name: str, figures: Mapping[str, FigureRow]) -> bool:
    """Whether this is a figure of an arm beside base and tuned that they have, too."""
    plain = without_arm(name)
    return plain != name and (name.endswith(".sft") or plain in figures or f"{plain}.tuned" in figures)


def added_rows(figures: Mapping[str, FigureRow], arm: str = "sft") -> list[tuple[str, ...]]:
    """The run's own adapter against an arm, paired; Holm over all of them."""
    over = f"{OVER}{arm}."
    found = {name.removeprefix(over): figure for name, figure in figures.items() if name.startswith(over)}
    order = sorted(found, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    tested = [name for name in order if isinstance((found[name].get("facts") or {}).get("p"), int | float)]
    adjusted = dict(zip(tested, holm([found[name]["facts"]["p"] for name in tested]), strict=True))
    rows: list[tuple[str, ...]] = []
    for name in order:
        figure, facts = found[name], found[name].get("facts") or {}
        arms = [facts.get(name) for name in (arm, "dpo")]
        difference = None if None in arms else arms[1] - arms[0]  # type: ignore[operator]
        ps = _ps({"p": facts.get("p"), "p_holm": adjusted.get(name)})
        cells = (_cell(arms[0]), _cell(arms[1]), _cell(difference), _interval(*_bounds(figure, difference)))
        rows.append((_title(name), *cells, *_counts(figure), *ps, _judge(figure)))
    return rows


def _has_arms(figure: FigureRow) -> bool:
    facts = figure.get("facts") or {}
    return isinstance(facts.get("base"), int | float) and isinstance(facts.get("tuned"), int | float)


def _bounds(figure: FigureRow, difference: float | None) -> tuple[float | None, float | None]:
    """The interval of `difference`: a figure that is a drop (base - tuned) is turned."""
    low, high, value = figure.get("low"), figure.get("high"), figure.get("value")
    if low is None or high is None or difference is None:
        return None, None
    return (-high, -low) if value is not None and value * difference < 0 else (low, high)


def _paired_row(name: str, figure: FigureRow, sft: FigureRow) -> tuple[str, ...]:
    facts = figure["facts"]
    difference = facts["tuned"] - facts["base"]
    interval = _interval(*_bounds(figure, difference))
    arms = (number(facts["base"]), _cell((sft.get("facts") or {}).get("tuned")), number(facts["tuned"]))
    return (_title(name), *arms, number(difference), interval, *_counts(figure), *_ps(facts), _judge(figure))


def _arms_row(stem: str, figures: Mapping[str, FigureRow]) -> tuple[str, ...]:
    base, tuned = (figures.get(f"{stem}.{arm}", FigureRow()) for arm in ("base", "tuned"))
    either = tuned or base
    sft = figures.get(f"{stem}.sft", FigureRow()).get("value")
    values = (_cell(base.get("value")), _cell(sft), _cell(tuned.get("value")))
    return (_title(stem), *values, NONE, _interval_of(tuned), *_counts(either), NONE, NONE, _judge(either))


def _single_row(name: str, figure: FigureRow, sft: FigureRow) -> tuple[str, ...]:
    """A figure of one arm, in that arm's column."""
    cells = {"base": NONE, "SFT": _cell(sft.get("value")), "DPO": NONE}
    cells[COLUMN.get(name, "DPO")] = _cell(figure.get("value"))
    ps = _ps(figure.get("facts") or {})
    return (_title(name), *cells.values(), NONE, _interval_of(figure), *_counts(figure), *ps, _judge(figure))


def data_rows(figures: Mapping[str, FigureRow]) -> list[tuple[str, ...]]:
    """What was measured of the data, which belongs to no arm."""
    found = sorted((name, figure) for name, figure in figures.items() if name.startswith(OF_DATA))
    return [(_title(n), _cell(f.get("value")), _interval_of(f), *_counts(f), _judge(f)) for n, f in found]


def guard_rows(figures: Mapping[str, FigureRow]) -> list[tuple[str, ...]]:
    """Pairs that the guard judged and dropped: of each pool, by reason and by category."""
    figure = figures.get("guard.dropped") or FigureRow()
    facts, total = figure.get("facts") or {}, str(figure.get("n", 0))
    pools = [("pool", pool, str(cell["n"]), str(cell["dropped"])) for pool, cell in _items(facts, "by_pool")]
    reasons = [("reason", reason, total, str(count)) for reason, count in _items(facts, "reasons")]
    named = [
        (name, count) for name, count in _items(facts, "by_category") if name not in dict(_items(facts, "reasons"))
    ]
    categories = [("category", name, total, str(count)) for name, count in named]
    return [(*row, _judge(figure)) for row in (*pools, *reasons, *categories)]


def _items(facts: Row, key: str) -> list[tuple[str, Any]]:
    found = facts.get(key)
    return sorted(found.items()) if isinstance(found, dict) else []


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _cell(value: object) -> str:
    return number(value) if isinstance(value, int | float) else NONE


def _interval(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{number(low)} to {number(high)}"


def _interval_of(figure: FigureRow) -> str:
    return _interval(figure.get("low"), figure.get("high"))


def _counts(figure: FigureRow) -> tuple[str, str]:
    return str(figure.get("n", 0)), str(figure.get("unscored", 0))


def _ps(facts: Row) -> tuple[str, str]:
    p, adjusted = (facts.get(key) for key in ("p", "p_holm"))
    return tuple(f"{value:.3g}" if isinstance(value, int | float) else NONE for value in (p, adjusted))  # type: ignore[return-value]


def _judge(figure: FigureRow) -> str:
    return str(figure.get("judge") or "")


def check_rows(figures: Mapping[str, FigureRow]) -> list[tuple[str, ...]]:
    """One row a guard or judge that was tried on its check set."""
    rows = []
    for name in sorted(name for name in figures if name.startswith("checks.") and name.endswith(".kappa")):
        use, kappa = name.split(".")[1], figures[name]
        rates = [_cell(figures.get(f"checks.{use}.{part}", {}).get("value")) for part in ("sensitivity", "specificity")]
        verdict = "proven" if (kappa.get("facts") or {}).get("proven") else "unproven"
        row = (use, _judge(kappa), str(kappa.get("n", 0)), _cell(kappa.get("value")), _interval_of(kappa))
        rows.append((*row, *rates, verdict))
    return rows


def category_rows(figures: Mapping[str, FigureRow]) -> list[tuple[str, ...]]:
    """One row a category of every figure that has them; without the intervals, which small groups cannot carry."""
    rows: list[tuple[str, ...]] = []
    for name in sorted(figures, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        found = (figures[name].get("facts") or {}).get("by_category")
        if name not in FIRST or not isinstance(found, dict):
            continue
        sft = ((figures.get(f"{name}.sft") or FigureRow()).get("facts") or {}).get("by_category") or {}
        for category, cell in sorted(found.items()):
            if isinstance(cell, dict) and "base" in cell:
                arms = (number(cell["base"]), _cell((sft.get(category) or {}).get("tuned")), number(cell["tuned"]))
                rows.append((_title(name), str(category), str(cell["n"]), *arms, _judge(figures[name])))
    return rows


def funnel_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """What became of the data, stage by stage, then hygiene, contamination and the training set."""
    rows = []
    for row in views.funnel(snapshot):
        reasons = ", ".join(f"{reason} {count}" for reason, count in row["reasons"][:4])
        rows.append((row["name"], *(str(row[key]) for key in ("rows", "ok", "rejected")), reasons))
    if not rows:
        return []
    cleaned = snapshot.cleaned
    before, kept = len(snapshot.pairs.train), len(cleaned.kept)
    rows.append(("training pairs after hygiene and contamination", str(before), str(kept), str(before - kept), NONE))
    removed = (snapshot.figures.get("contamination.removed") or FigureRow()).get("value")
    if isinstance(removed, int | float):
        rows.append(("of these, contaminated", NONE, NONE, number(removed), NONE))
    return rows


def cost_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """Time and money over all attempts, as the events say."""
    spent = snapshot.spent
    per_pair = usd(snapshot.usd_per_pair) if snapshot.usd_per_pair else NONE
    money = usd(spent["usd"]) if spent["usd"] else "no price set"
    return [
        ("attempts", number(spent["attempts"])),
        ("time", duration(spent["seconds"])),
        ("money", money),
        ("money a pair", per_pair),
        ("pairs", number(len(snapshot.pairs.kept))),
    ]
