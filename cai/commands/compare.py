"""`--compare A B`: what differs between two runs: recipe, gates, and paired statistics on the prompts they share.

Owns that screen. Reads both folders, writes nothing. Prompts are paired by their text; a figure that only one run has
is shown beside a dash. Paired tests: exact McNemar for yes/no outcomes, a bootstrap interval for mean differences, both
over shared prompts, with Holm's correction over the tests shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cai import errors
from cai.evaluate import critiques, revisions
from cai.evaluate.verdict import Scores, TextVerdict
from cai.metrics.stats import bootstrap_mean, holm, mcnemar_exact
from cai.metrics.text import rouge_l, words
from cai.recipe.settings_evaluation import EvaluationSection
from cai.report.snapshot import Snapshot, read_story
from cai.report.tables import phases
from cai.store.row_types import Example, FigureRow
from cai.terminal import duration, number, printable, usd


def command(args: argparse.Namespace) -> int:
    """Print the comparison of two runs."""
    from cai.inputs import locate

    one, two = (read_story(locate(args, name)) for name in args.compare)
    print(printable("\n".join(lines(one, two))))
    return errors.DONE


def lines(one: Snapshot, two: Snapshot) -> list[str]:
    """The whole screen."""
    found = [f"A  {one.run_id}: {one.milestone} on {one.model}", f"B  {two.run_id}: {two.milestone} on {two.model}", ""]
    found += [*_recipe_lines(one, two), ""]
    found += [*_figure_lines(one, two), ""]
    return found + _paired_lines(side(one), side(two))


def differences(one: Snapshot, two: Snapshot) -> list[tuple[str, str, str]]:
    """(key, A, B) of every resolved recipe key, input file and version that differs."""
    from cai.recipe.load import flatten

    left, right = (flatten(snapshot.recipe.model_dump(mode="json")) for snapshot in (one, two))
    for table, snapshot in ((left, one), (right, two)):
        table |= {f"sha256({name})": str(sha) for name, sha in (snapshot.manifest.get("files") or {}).items()}
        table |= {f"version of {name}": str(v) for name, v in (snapshot.manifest.get("versions") or {}).items()}
        table |= {"backend": snapshot.backend, "model loaded": snapshot.model}
    keys = sorted(left.keys() | right.keys())
    return [(k, left.get(k, "–"), right.get(k, "–")) for k in keys if left.get(k) != right.get(k)]


def _recipe_lines(one: Snapshot, two: Snapshot) -> list[str]:
    changed = differences(one, two)
    if not changed:
        return ["Recipe, inputs and versions: no difference."]
    shown = [f"  {key}: {_short(a)} -> {_short(b)}" for key, a, b in changed]
    return [f"{len(changed)} differences of recipe, inputs and versions:", *shown]


def _short(text: str) -> str:
    return text if len(text) <= 70 else text[:67] + "..."


def _figure_lines(one: Snapshot, two: Snapshot) -> list[str]:
    """Gates first, then every other figure that both or either measured; then cost."""
    status = [{v["metric"]: v["status"] for v in snapshot.verdicts} for snapshot in (one, two)]
    names = [*dict.fromkeys([*status[0], *status[1]])]
    names += sorted((one.figures.keys() | two.figures.keys()) - set(names))
    rows = [["figure", "A", "B"]]
    for name in names:
        cells = [_cell(snapshot.figures.get(name), status[i].get(name)) for i, snapshot in enumerate((one, two))]
        if cells != ["–", "–"]:
            rows.append([name, *cells])
    both = (one, two)
    kept = [f"{len(s.pairs.kept)} of {len(s.pairs.kept) + len(s.pairs.rejects)}" for s in both]
    cost = [f"{duration(s.spent['seconds'])}, {usd(s.spent['usd'])}" for s in both]
    rows += [["pairs kept", *kept], ["time, money", *cost], ["tokens/s", *map(_speed, both)]]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(measured: FigureRow | None, status: str | None) -> str:
    if not measured or measured.get("value") is None:
        return f"{status} (not measured)" if status else "–"
    low, high = measured.get("low"), measured.get("high")
    interval = "" if low is None or high is None else f" [{number(float(low))}, {number(float(high))}]"
    return f"{status + ' ' if status else ''}{number(measured['value'])}{interval} (n={measured.get('n', 0)})"


def _speed(snapshot: Snapshot) -> str:
    rows = [row for row in phases(snapshot) if row["tokens"]]
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
    found = [_yes_no(name, one, two, pairs, outcome) for name, outcome in OUTCOMES.items()]
    found += [_number(name, one, two, pairs, value) for name, value in VALUES.items()]
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
    """Implicit reward margin of the pair, in nats before beta."""
    row = of.snapshot.scores.get(("preference.pairs", item), {})
    if "ref_chosen" not in row:
        return None
    return float((row["chosen"] - row["ref_chosen"]) - (row["rejected"] - row["ref_rejected"]))


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
    "implicit margin": _margin,
}
Pairs = list[tuple[int, int]]
T = TypeVar("T")


def _both(one: Side, two: Side, pairs: Pairs, value: Callable[[Side, int], T | None]) -> list[tuple[T, T]]:
    found = [(value(one, a), value(two, b)) for a, b in pairs]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _yes_no(
    name: str, one: Side, two: Side, pairs: Pairs, outcome: Callable[[Side, int], bool | None]
) -> Paired | None:
    both = _both(one, two, pairs, outcome)
    if not both:
        return None
    a, b = [x for x, _ in both], [y for _, y in both]
    return Paired(name, len(both), sum(a) / len(a), sum(b) / len(b), mcnemar_exact(a, b))


def _number(name: str, one: Side, two: Side, pairs: Pairs, value: Callable[[Side, int], float | None]) -> Paired | None:
    both = _both(one, two, pairs, value)
    if not both:
        return None
    interval = bootstrap_mean([b - a for a, b in both]) or (None, None)
    means = [sum(side) / len(both) for side in zip(*both, strict=True)]
    return Paired(name, len(both), means[0], means[1], None, *interval)


def _paired_lines(one: Side, two: Side) -> list[str]:
    count = len(shared(one, two))
    if not count:
        return ["No prompt is in both runs, so nothing is paired. Runs of the same instructions.file share theirs."]
    found = paired(one, two)
    tests = [p for p in found if p.p is not None]
    adjusted = dict(zip([p.name for p in tests], holm([p.p or 0.0 for p in tests]), strict=True))
    rows = [f"{count} prompts are in both runs. Paired, A -> B:"]
    for p in found:
        text = f"  {p.name}: {number(p.one)} -> {number(p.two)} (n={p.n}"
        if p.p is not None:
            text += f", exact McNemar p={p.p:.3g}, Holm {adjusted[p.name]:.3g})"
        elif p.low is not None and p.high is not None:
            text += f", difference {number(p.two - p.one)} [{number(p.low)}, {number(p.high)}])"
        else:
            text += ")"
        rows.append(text)
    return rows
