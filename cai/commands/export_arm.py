"""Which trained adapter of a run is exported: its own, SFT's, DPO's from the base, or a seed's.

Owns the names that `--arm` takes, the folders behind them, and what a card says of such an adapter's training and
figures. Writes nothing. Invariant: an adapter is exported only as the bytes that its training wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cai import errors
from cai.errors import CaiError
from cai.recipe.arm_costs import answers_further_requests
from cai.report import arms_table
from cai.report.snapshot import Snapshot
from cai.run import digests, lines
from cai.run.events import read_events
from cai.store.jsonl import JsonObject, read_object
from cai.store.row_types import FigureRow
from cai.training import checkpoints

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
OWN = ""


@dataclass(frozen=True)
class ExportedArm:
    """`name`: what `--arm` says; "": the run's own adapter."""

    name: str
    adapter: Path
    training: Path

    @property
    def figures_end(self) -> str:
        """How the names of its figures end; "" for the run's own, and for seeds, which were not measured."""
        return self.name.replace("-", "_") if self.name in ("sft", "from-base") else ""

    def result(self) -> JsonObject:
        """What its training wrote; nothing where that is lost."""
        return read_object(self.training / "result.json")

    def figures(self, snapshot: Snapshot) -> dict[str, FigureRow]:
        """The figures of this very adapter that the report's table of arms shows."""
        found = {name: snapshot.figures.get(name) for name in arms_table.names_of(self.figures_end)}
        return {name: figure for name, figure in found.items() if figure and figure.get("value") is not None}


def arm_named(run: Path, name: str) -> ExportedArm:
    """The arm of that name. Error: no such arm in this run, with those that there are and the line for each."""
    if name == OWN:
        return ExportedArm(OWN, run / "adapter", run / "train")
    there = names(run)
    if name not in there:
        known = "; ".join(line_of(run, arm) for arm in there)
        remedy = f"There is: {known}" if known else f"None is trained yet beside it. Go on: {lines.resume(run)}"
        raise CaiError(f"--arm {name}: no such adapter in {run.name}. {remedy}")
    folder = {"sft": "sft", "from-base": "from_base"}.get(name, name)
    return ExportedArm(name, run / f"adapter-{name}", run / "train" / folder)


def names(run: Path) -> list[str]:
    """The whole adapters beside the run's own, as `--arm` calls them; a seed's own SFT stage is a part of its seed."""
    found = sorted(path.parent.name.removeprefix("adapter-") for path in run.glob(f"adapter-*/{ADAPTER_FILES[0]}"))
    return [name for name in found if not name.startswith("sft-seed-")]


def line_of(run: Path, arm: str) -> str:
    return f"{lines.export(run)} --arm {arm}"


def whole_adapter(arm: ExportedArm, run: Path) -> Path:
    """Its folder. Errors: there is none yet, with the lines to use; it is not the one that training wrote."""
    folder = arm.adapter
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        more = "".join(f"\n  or export what there is: {line_of(run, name)}" for name in names(run) if name != arm.name)
        raise CaiError(
            f"{folder}: no {missing[0]}: the run has no trained adapter. Resume it first: {lines.resume(run)}{more}"
        )
    sums = arm.result().get("files", {})  # none: a run of before, or one that lost it: --verify tells
    if sums and (why := checkpoints.differs(folder, sums, content=True)):
        raise CaiError(
            f"{folder}: {why}: not the adapter that was trained. Remove the folder and resume the run, which writes it "
            "again from the last checkpoint.",
            errors.CORRUPT,
        )
    result = arm.training / "result.json"
    edited = digests.edited(run, read_events(run / "events.jsonl"), {str(result.relative_to(run))}.__contains__)
    for name, why in edited.items() if result.is_file() else ():  # it names the adapter's sums
        raise CaiError(
            f"{run / name}: {why} since the run ended: nothing says that this adapter is the one that was trained. "
            f"Resume the run, which writes it again: {lines.resume(run)}",
            errors.CORRUPT,
        )
    return folder


def told(arm: ExportedArm, snapshot: Snapshot) -> str:
    """How this adapter was trained, before "on N pairs": part of the card's first sentence."""
    if snapshot.recipe.dpo.start != "sft" or arm.name == "from-base":
        return "DPO"
    return f"supervised fine-tuning on the revisions{further(snapshot, ' and')}, then DPO"


def further(snapshot: Snapshot, joined: str) -> str:
    """What an SFT stage was shown beside the revisions of the run."""
    own = answers_further_requests(snapshot.recipe)
    return f"{joined} its own answers to further benign requests" if own else ""
