"""`--compare A B`: what differs between two runs: recipe, gates, and paired statistics on the prompts they share.

Owns that screen. Reads both folders, writes nothing. Prompts are paired by their text; a figure that only one run has
is shown beside a dash. Paired tests: exact McNemar for yes/no outcomes, a bootstrap interval for mean differences, both
over shared prompts, with Holm's correction over the tests shown.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cai import errors
from cai.data import chain
from cai.evaluate import critiques, revisions
from cai.evaluate.verdict import Scores, TextVerdict
from cai.metrics.figure import is_finite
from cai.metrics.stats import bootstrap_mean, holm, mcnemar_exact
from cai.metrics.text import rouge_l, words
from cai.recipe.settings_evaluation import EvaluationSection
from cai.report.snapshot import Snapshot, read_story
from cai.report.tables import phases
from cai.store.row_types import Example, FigureRow
from cai.terminal import aligned, columns, duration, interval, number, say, usd

NAMES = string.ascii_uppercase
FOLDED = 6  # names of equal figures that are shown


def command(args: argparse.Namespace) -> int:
    """Print the comparison of two runs or more; the first is what the others are held against."""
    from cai.inputs import locate

    stories = [read_story(locate(args, name)) for name in args.compare]
    say("\n".join(lines(*stories, columns=columns())))
    return errors.DONE


def lines(*snapshots: Snapshot, columns: int = 0) -> list[str]:
    """The whole screen: which runs, what differs, what both measured alike in one line, paired statistics.

    `columns`: where the figures do not stand side by side in so many, they stand under each other.
    """
    found = [
        f"{name}  {snapshot.run_id}: {snapshot.milestone} on {snapshot.model}"
        for name, snapshot in zip(NAMES, snapshots, strict=False)
    ]
    found += [f"{name}  {read.edited}" for name, read in zip(NAMES, snapshots, strict=False) if read.edited]
    found += ["", *_recipe_lines(snapshots), "", *_figure_lines(snapshots, columns), ""]
    sides = [side(snapshot) for snapshot in snapshots]
    tests = [paired(sides[0], other) for other in sides[1:]]
    adjusted = _holm(tests)
    for place, (other, results) in enumerate(zip(sides[1:], tests, strict=True)):
        found += _paired_lines(f"A -> {NAMES[place + 1]}", sides[0], other, results, adjusted[place])
    return found


def differences(*snapshots: Snapshot) -> list[tuple[str, ...]]:
    """(key, A, B, ...) of every resolved recipe key, input file and version that differs."""
    from cai.recipe.load import flatten

    tables = [flatten(snapshot.recipe.model_dump(mode="json")) for snapshot in snapshots]
    for table, snapshot in zip(tables, snapshots, strict=True):
        table |= {f"sha256({name})": str(sha) for name, sha in (snapshot.manifest.get("files") or {}).items()}
        table |= {f"version of {name}": str(v) for name, v in (snapshot.manifest.get("versions") or {}).items()}
        table |= {"backend": snapshot.backend, "model loaded": snapshot.model}
    keys = sorted(set().union(*tables))
    rows = [(key, *(table.get(key, "–") for table in tables)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _recipe_lines(snapshots: Sequence[Snapshot]) -> list[str]:
    changed = differences(*snapshots)
    if not changed:
        return ["Recipe, inputs and versions: no difference."]
    shown = [f"  {key}: {' -> '.join(map(_short, values))}" for key, *values in changed]
    arrows = "" if len(snapshots) == 2 else f" ({' -> '.join(NAMES[: len(snapshots)])})"
    what = "1 difference" if len(changed) == 1 else f"{len(changed)} differences"
    return [f"{what} of recipe, inputs and versions{arrows}:", *shown]


def _short(text: str) -> str:
    return text if len(text) <= 70 else text[:67] + "..."


def _figure_lines(snapshots: Sequence[Snapshot], columns: int) -> list[str]:
    """What differs, gates first; then what only some measured, and the equal figures, by name alone; then cost."""
    status = [{v["metric"]: v["status"] for v in snapshot.verdicts} for snapshot in snapshots]
    names = [*dict.fromkeys(name for known in status for name in known)]
    names += sorted(set().union(*(snapshot.figures for snapshot in snapshots)) - set(names))
    differing: list[tuple[str, ...]] = []
    equal: list[tuple[str, ...]] = []
    partly: list[tuple[str, ...]] = []
    for name in names:
        cells = [
            _cell(snapshot.figures.get(name), known.get(name))
            for snapshot, known in zip(snapshots, status, strict=True)
        ]
        if set(cells) == {"–"}:
            continue
        several, gated = len(set(cells) - {"–"}) > 1, any(name in known for known in status)
        group = equal if len(set(cells)) == 1 else differing if several or gated else partly
        group.append((name, *cells))
    kept = [f"{len(s.pairs.kept)} of {len(s.pairs.kept) + len(s.pairs.rejects)}" for s in snapshots]
    cost = [f"{duration(s.spent['seconds'])}, {usd(s.spent['usd'])}" for s in snapshots]
    rows = [("figure", *NAMES[: len(snapshots)]), *differing]
    rows += [("pairs kept", *kept), ("time, money", *cost), ("tokens/s", *map(_speed, snapshots))]
    found = _side_by_side(rows, columns)
    if partly:
        found += ["", f"{len(partly)} figures are not in every run: {_listed(partly)}"]
    if equal:
        found += ["", f"{len(equal)} figures are equal: {_listed(equal)}"]
    return found


def _side_by_side(rows: Sequence[tuple[str, ...]], columns: int) -> list[str]:
    lines = aligned(rows)
    if 0 < columns < max(map(len, lines)):
        return [
            text
            for name, *cells in rows[1:]
            for text in (name, *(f"  {run}  {cell}" for run, cell in zip(rows[0][1:], cells, strict=True)))
        ]
    return lines


def _listed(rows: Sequence[tuple[str, ...]]) -> str:
    names = [f"{name} {cells[0]}" if len(set(cells)) == 1 else name for name, *cells in rows[:FOLDED]]
    return ", ".join(names) + (f" and {len(rows) - FOLDED} more" if len(rows) > FOLDED else "")


def _cell(measured: FigureRow | None, status: str | None) -> str:
    if not measured or measured.get("value") is None:
        return f"{status} (not measured)" if status else "–"
    shown = number(measured["value"]) + interval(measured.get("low"), measured.get("high"))
    return f"{status + ' ' if status else ''}{shown} (n={measured.get('n', 0)})"


def _speed(snapshot: Snapshot) -> str:
    rows = [
        row for row in phases(snapshot) if row["tokens"] and row["phase"] in chain.names()
    ]  # of a fork, that draws none: –
    seconds = sum(row["seconds"] for row in rows)
    return number(sum(row["tokens"] for row in rows) / seconds) if seconds else "–"


# --- paired statistics


@dataclass(frozen=True)
class Paired:
    """One measure over shared prompts. `low`, `high`: 95% interval of the mean difference B - A (None for yes/no)."""

    name: str
    n: int
    one: float
    two: float
    p: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Side:
    """A snapshot with what is looked up by item."""

    snapshot: Snapshot
    examples: dict[int, Example]
    kept: set[int]


def side(snapshot: Snapshot) -> Side:
    whole = [*snapshot.pairs.examples, *(r["example"] for r in snapshot.pairs.rejects if "example" in r)]
    return Side(snapshot, {e["item"]: e for e in whole}, {pair["item"] for pair in snapshot.pairs.kept})


def shared(one: Side, two: Side) -> list[tuple[int, int]]:
    """(item in A, item in B) of every instruction that both runs have a whole example of; the first tries."""
    left, right = _by_instruction(one), _by_instruction(two)
    return [(left[text], right[text]) for text in left if text in right]


def _by_instruction(of: Side) -> dict[str, int]:
    return {of.examples[item]["instruction"]: item for item in sorted(of.examples, reverse=True)}


def paired(one: Side, two: Side) -> list[Paired]:
    """Yes/no outcomes (kept, critique meaningful, revision addresses) and numbers (words, edit, CSI, CRI, margin)."""
    pairs = shared(one, two)
    found = [_compared(name, one, two, pairs, outcome, yes_no=True) for name, outcome in OUTCOMES.items()]
    found += [_compared(name, one, two, pairs, value, yes_no=False) for name, value in VALUES.items()]
    return [p for p in found if p is not None]


SCORED = ("critiques.gates", "critiques.csi", "critiques.judge", "revisions.gates", "revisions.cri", "revisions.judge")


def _decided(verdict: Callable[[Scores, EvaluationSection], TextVerdict]) -> Callable[[Side, int], bool | None]:
    def outcome(of: Side, item: int) -> bool | None:
        scores = {name: of.snapshot.scores[name, item] for name in SCORED if (name, item) in of.snapshot.scores}
        return verdict(scores, of.snapshot.recipe.evaluation).decided

    return outcome


def _score(metric: str) -> Callable[[Side, int], float | None]:
    def value(of: Side, item: int) -> float | None:
        found = of.snapshot.scores.get((metric, item), {}).get("real")
        return float(found) if isinstance(found, int | float) else None

    return value


def _margin(of: Side, item: int) -> float | None:
    """How much more than the reference the tuned model prefers the chosen text, in nats: without beta."""
    row = of.snapshot.scores.get(("preference.pairs", item), {})
    if "ref_chosen" not in row:
        return None
    start = of.snapshot.scores.get(("preference.start", item), {})  # the SFT stage, where DPO went on from one
    chosen, rejected = start.get("chosen", row["ref_chosen"]), start.get("rejected", row["ref_rejected"])
    sides = (row["chosen"], chosen, row["rejected"], rejected)
    if not all(map(is_finite, sides)):
        return None
    return float((sides[0] - sides[1]) - (sides[2] - sides[3]))


def _reward_margin(of: Side, item: int) -> float | None:
    """beta x that: the implicit reward's margin, as the figure dpo.margin and the training log have it."""
    nats = _margin(of, item)
    return None if nats is None else of.snapshot.recipe.dpo.beta * nats


def _changed(example: Example) -> float:
    return 1.0 - rouge_l(example["initial_answer"], example["revised_answer"])


OUTCOMES: dict[str, Callable[[Side, int], bool | None]] = {
    "kept as a pair": lambda of, item: item in of.kept,
    "critique meaningful": _decided(critiques.verdict),
    "revision addresses it": _decided(revisions.verdict),
}
VALUES: dict[str, Callable[[Side, int], float | None]] = {
    "words of the revision": lambda of, item: float(len(words(of.examples[item]["revised_answer"]))),
    "share of words changed": lambda of, item: _changed(of.examples[item]),
    "CSI": _score("critiques.csi"),
    "CRI": _score("revisions.cri"),
    "dpo.margin (beta x nats)": _reward_margin,
    "margin in nats, without beta": _margin,
}
Pairs = list[tuple[int, int]]


def _compared(
    name: str, one: Side, two: Side, pairs: Pairs, value: Callable[[Side, int], float | None], *, yes_no: bool
) -> Paired | None:
    """The measure on the prompts on which both runs have it: McNemar's p for yes or no, else the interval."""
    each = [(value(one, a), value(two, b)) for a, b in pairs]
    both = [(a, b) for a, b in each if a is not None and b is not None]
    if not both:
        return None
    p = mcnemar_exact([bool(a) for a, _ in both], [bool(b) for _, b in both]) if yes_no else None
    interval = (None, None) if yes_no else bootstrap_mean([b - a for a, b in both]) or (None, None)
    first, second = (sum(side) / len(both) for side in zip(*both, strict=True))
    return Paired(name, len(both), first, second, p, *interval)


def _holm(tests: Sequence[Sequence[Paired]]) -> list[dict[str, float]]:
    """Measure -> Holm's p, over all tests on the screen; one table a comparison."""
    named = [(place, p.name, p.p) for place, found in enumerate(tests) for p in found if p.p is not None]
    adjusted: list[dict[str, float]] = [{} for _ in tests]
    for (place, name, _), value in zip(named, holm([p for _, _, p in named]), strict=True):
        adjusted[place][name] = value
    return adjusted


def _paired_lines(
    which: str, one: Side, two: Side, found: Sequence[Paired], adjusted: Mapping[str, float]
) -> list[str]:
    """`which`: the two runs, as `A -> B`. What is equal on every prompt is named in one line."""
    count = len(shared(one, two))
    if not count:
        same = "Runs of the same instructions.file share theirs."
        return [f"{which}: No prompt is in both runs, so nothing is paired. {same}"]
    rows = [f"{count} prompts are in both runs. Paired, {which}:"]
    equal = [p for p in found if _no_difference(p)]
    for p in (p for p in found if p not in equal):
        text = f"  {p.name}: {number(p.one)} -> {number(p.two)} (n={p.n}"
        if p.p is not None:
            text += f", exact McNemar p={p.p:.3g}, Holm {adjusted[p.name]:.3g})"
        elif p.low is not None and p.high is not None:
            text += f", difference {number(p.two - p.one)} [{number(p.low)}, {number(p.high)}])"
        else:
            text += ")"
        rows.append(text)
    return rows + ([f"  equal: {', '.join(f'{p.name} {number(p.one)}' for p in equal)}"] if equal else [])


def _no_difference(found: Paired) -> bool:
    """Equal means and no spread: the texts are the same ones."""
    return found.one == found.two and (found.p == 1.0 if found.p is not None else found.low == found.high == 0.0)
