"""A run as plain tables, for notebooks and scripts: `cai.open_run("runs/latest")`.

Owns the tables' names and columns, which docs/api.md lists; what stands in them is read by `snapshot` and judged by the
evaluation. Reads only: no lock, no model, no torch. Invariant: a table's columns are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cai.errors import CaiError
from cai.report.examples import judge_critique, judge_revision
from cai.report.snapshot import Snapshot, read_story
from cai.store.jsonl import Row
from cai.store.row_types import Example

COLUMNS: dict[str, tuple[str, ...]] = {
    "examples": (
        "item",
        "pool",
        "split",
        "instruction",
        "initial_answer",
        "principle_id",
        "critique",
        "revised_answer",
        "meaningful",
        "addresses",
        "margin",
    ),
    "rounds": ("item", "round", "principle_id", "principle", "before", "critique", "after"),
    "pairs": ("item", "pool", "split", "prompt", "chosen", "rejected", "margin", "used"),
    "rejects": ("item", "reason", "detail"),
    "figures": ("metric", "value", "low", "high", "n", "unscored", "judge"),
    "gates": ("metric", "status", "value", "low", "high", "n", "reason", "why"),
    "curves": ("split", "step", "loss", "margin", "accuracy", "grad_norm"),
}
NAMES = {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}  # TRL's -> ours


class OpenedRun:
    """One run folder. Each table is a pandas DataFrame, or a list of dicts where pandas is absent or not wanted."""

    def __init__(self, path: str | Path, *, pandas: bool | None = None) -> None:
        """`pandas`: True for DataFrames, False for lists of dicts, None for the first where it is installed."""
        folder = Path(path).expanduser()
        if not (folder / "manifest.json").is_file():
            raise CaiError(f"{path}: is no run folder (it has no manifest.json). Give runs/<id> or runs/latest.")
        self._frame = _frame_of(pandas)
        self.snapshot: Snapshot = read_story(folder.resolve())

    def __repr__(self) -> str:
        read = self.snapshot
        return f"<run {self.id}: {read.milestone} on {read.model}, {len(read.pairs.kept)} pairs>"

    @property
    def id(self) -> str:
        return self.snapshot.run_id

    @property
    def gaps(self) -> list[str]:
        """What could not be read, or is not there yet, in words."""
        return list(self.snapshot.gaps)

    @property
    def facts(self) -> Row:
        """Milestone, model, backend, seconds and dollars over all attempts, and whether the gates passed."""
        read = self.snapshot
        passed = read.gates.get("passed") if read.gates else None
        spent = {name: read.spent[name] for name in ("seconds", "usd")}
        return {"milestone": read.milestone, "model": read.model, "backend": read.backend, "passed": passed} | spent

    @cached_property
    def examples(self) -> Any:
        """One row an accepted item; `critique` and the verdicts (yes, no, nothing, unscored) are of its last round."""
        return self._table("examples", map(self._example, self.snapshot.pairs.examples))

    @cached_property
    def rounds(self) -> Any:
        """One row a round of an accepted item: the text before, the critique, the text after."""
        return self._table("rounds", (row for example in self.snapshot.pairs.examples for row in _rounds(example)))

    @cached_property
    def pairs(self) -> Any:
        """One row a pair; `used`: trained on (held-out pairs and what hygiene left out are not)."""
        used = {pair["item"] for pair in self.snapshot.cleaned.kept}
        return self._table("pairs", ({**pair, "used": pair["item"] in used} for pair in self.snapshot.pairs.kept))

    @cached_property
    def rejects(self) -> Any:
        """One row an item that made no pair."""
        return self._table("rejects", self.snapshot.pairs.rejects)

    @cached_property
    def figures(self) -> Any:
        """One row a figure of eval/*.json, with its 95% interval, n and judge."""
        return self._table("figures", (self.snapshot.figures[name] for name in sorted(self.snapshot.figures)))

    @cached_property
    def gates(self) -> Any:
        """One row a gate: PASS, FAIL, UNDERPOWERED or UNMEASURED, and why."""
        return self._table("gates", map(_gate, self.snapshot.verdicts))

    @cached_property
    def curves(self) -> Any:
        """One row a training step, and one a measurement of the held-out pairs (dpo.eval_steps)."""
        heldout = [event for event in self.snapshot.of_kind("heldout") if "arm" not in event]
        train = ({"split": "train", **_named(entry)} for entry in self.snapshot.log)
        return self._table("curves", [*train, *({"split": "heldout", **_named(event)} for event in heldout)])

    def _example(self, example: Example) -> Row:
        scores, section = self.snapshot.scores_by_item.get(example["item"], {}), self.snapshot.recipe.evaluation
        meaningful, addresses = judge_critique(scores, section).status, judge_revision(scores, section).status
        return {**example, "meaningful": meaningful, "addresses": addresses}

    def _table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Any:
        columns = COLUMNS[name]
        table = [{column: row.get(column) for column in columns} for row in rows]
        return self._frame(table, columns=list(columns)) if self._frame else table


def _frame_of(wanted: bool | None) -> Any:
    """pandas.DataFrame, or None for lists of dicts. Error: CaiError where it is asked for and absent."""
    if wanted is False:
        return None
    try:
        from pandas import DataFrame
    except ImportError:
        if wanted:
            raise CaiError("open_run: pandas is not installed. Install it, or leave pandas=True out.") from None
        return None
    return DataFrame


def _rounds(example: Example) -> Iterable[Row]:
    before = example["initial_answer"]
    for number, entry in enumerate(example["rounds"], 1):
        after = entry["revised_answer"]
        yield {**entry, "item": example["item"], "round": number, "before": before, "after": after}
        before = after


def _gate(verdict: Row) -> Row:
    measured = verdict.get("measured") or {}
    criterion = verdict.get("criterion") or {}
    return {
        **measured,
        **{name: verdict.get(name) for name in ("metric", "status", "reason")},
        "why": criterion.get("why"),
    }


def _named(entry: Row) -> Row:
    return {NAMES.get(name, name): value for name, value in entry.items()}
