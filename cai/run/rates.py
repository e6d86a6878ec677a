"""How fast things went: in earlier runs (from their events), and in a table of rates measured once.

Owns reading the rates; `budget` scales them. Each rate names its source and machine. Pure over files; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cai.errors import CaiError
from cai.recipe.arm_costs import ASIDE
from cai.recipe.load import Recipe
from cai.run.events import read_events, spent
from cai.run.manifest import read_manifest
from cai.run.run_ids import refuse_pipes, run_folders
from cai.store.jsonl import JsonObject, Row
from cai.world import world

# Only an estimate's margins: what one run's rate says about the next run's. Linear scaling, -30% / +50%.
LOW, HIGH = 0.7, 1.5


class Range(NamedTuple):
    low: float
    high: float

    def plus(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class TableRates:
    """`tokens_per_second`: batch size -> generated tokens/s. `set_up`: seconds before the first training step.

    `answer_scored`: seconds until the principle of an answer is chosen; `compared`: of one comparison of two texts.
    """

    source: str
    tokens_per_second: Mapping[int, float]
    seconds_per_pair: Range | None = None
    set_up: Range | None = None
    rest: Range | None = None  # loading, preflight, the critic's exam and evaluation of a run of few items
    answer_scored: float = 0.0
    compared: float = 0.0

    def at(self, items: int) -> float:
        """Tokens/s with `items` sequences side by side: the largest measured batch that they fill."""
        fits = [rate for batch, rate in self.tokens_per_second.items() if batch <= max(items, 1)]
        return max(fits, default=0.0)

    def gain(self, before: int, after: int) -> float:
        """How much faster `after` items may go than `before` did, because their batches are fuller."""
        slow, fast = self.at(before), self.at(after)
        return max(1.0, fast / slow) if slow and fast else 1.0


# Measured once, on the machine named; not a promise for another one.
EMBEDDED = TableRates(
    "table: SmolLM2-135M, float32, 2 CPU cores, whole runs, prompts and redraws included",
    {1: 11.0, 8: 26.0, 16: 56.0},
    Range(2.0, 4.2),  # 500 to 768 tokens a pair
    Range(5.0, 15.0),
    Range(80.0, 153.0),  # of an M0 and an M1: 19 s loading, the rest evaluation; without the critic's exam
)
H200 = TableRates(
    "table: a model of Qwen2.5-32B's shape in NF4 on one H200 held to 80 GB; an A100 was not measured",
    {1: 24.0, 10: 200.0, 160: 1876.0, 1500: 2559.0},
    Range(0.23, 0.40),  # about 1,160 tokens a pair
    Range(10.0, 30.0),  # set-up of the trainer and the first, compiling step
    answer_scored=0.114,  # 13 principles, those of a pool; both as bench/results/m3-phases-h200.json has them
    compared=0.123,  # both orders; a pair has one for each of its principles and one under none
)
ALONE = 0.3  # of a comparison's prompt tokens, where each text is asked about by itself: 450 of 1,533, not timed
NOTHING = TableRates("nothing was measured for the fake model", {})


def table_rates(backend: str) -> TableRates:
    return {"embedded": EMBEDDED, "cuda": H200}.get(backend, NOTHING)


def scored_seconds(recipe: Recipe, rates: TableRates) -> dict[str, float]:
    """Of one slot, in the stages that read likelihoods: which principle its answers break, which text is the better.

    Nothing of pairs that were made elsewhere. Two sampled answers are compared whatever `pairs.label` says.
    """
    section, judged = recipe.pairs, recipe.pairs.label == "judge"
    if section.file:
        return {}
    alone = section.by == "answer"
    barred = alone or (judged and section.false_labels > 0)  # under none in particular, too
    under = rates.compared * (ALONE if alone else 1.0) * (recipe.rounds + barred)
    found = {
        "relevance": rates.answer_scored * (recipe.rounds if section.revised else 1),
        "labels": under,
        "comparisons": under,
    }
    asked = {
        "relevance": recipe.principles.choice == "relevant",
        "labels": judged and section.revised,
        "comparisons": "sampled" in section.kinds,
    }
    return {name: seconds for name, seconds in found.items() if asked[name]}


GROWING = ("evaluate critiques", "evaluate revisions", "evaluate preference.pairs")  # labels whose rows are the items'
OF_BASE = ("evaluate critiques", "evaluate revisions", "critic's exam")


@dataclass(frozen=True)
class Speed:
    """What a whole run took. `rest_seconds`: loading, evaluation, all that is neither generation nor training.

    `growing_seconds`: the part of the rest that grows with the items (critiques, revisions and pairs are scored).
    """

    run_id: str
    backend: str
    slots: int
    rounds: int
    tokens: int
    generation_seconds: float
    training_seconds: float
    pairs_seen: float
    seconds: float
    growing_seconds: float = 0.0
    base_seconds: float = 0.0  # the part of the rest that a fork takes along: scores of the base, the critic's exam
    probed: bool = False  # the probes were answered, which the rest holds
    labels: frozenset[str] = frozenset()  # of everything that the numbers above hold
    own_answers: int = 0  # to further requests, for an SFT stage: with their requests, no part of the generation
    own_tokens: int = 0
    own_seconds: float = 0.0
    arms_seconds: float = 0.0  # training of arms, the SFT stage among them: an estimate counts them as pairs seen

    @property
    def rest_seconds(self) -> float:
        parts = (self.generation_seconds, self.training_seconds, self.own_seconds, self.arms_seconds)
        return max(self.seconds - math.fsum(parts), 0.0)


def measured_before(root: Path, recipe: Recipe, backend: str) -> Speed | None:
    """The latest finished run below `root` of the same backend, model and quantization."""
    each = (_measured(folder, recipe, backend) for folder in reversed(run_folders(root)))
    return next(filter(None, each), None)


def _measured(folder: Path, recipe: Recipe, backend: str) -> Speed | None:
    """None also for a run that is damaged: it is no reason not to start another."""
    try:
        refuse_pipes(folder)
        manifest = read_manifest(folder / "manifest.json")
        identity = manifest.get("identity", {})
        same = all(
            identity.get(key) in (None, repr(value))
            for key, value in (("model.name", recipe.model.name), ("model.quantization", recipe.model.quantization))
        )
        if manifest.get("backend") != backend or not same or not (folder / "eval" / "gates.json").is_file():
            return None
        return from_events(folder.name, manifest, read_events(folder / "events.jsonl"))
    except (CaiError, ValueError, TypeError):
        return None


def from_events(run_id: str, manifest: JsonObject, events: list[Row]) -> Speed | None:
    """None where the events don't tell what generation took (no stage event, or a fork that took records over)."""
    known = manifest.get("stages", {})  # evaluation and training have events of this kind, too
    slots = [name for name in known if name not in ASIDE]  # what SFT alone is shown grows with `sft.answers`
    stages = [e for e in events if e["kind"] == "stage" and e.get("stage") in slots]
    if not stages or any(e["kind"] == "forked" and e.get("kept") for e in events):
        return None
    worked = {e["attempt"] for e in events if e["kind"] in ("stage", "trained")}
    if len(worked) > 1 or any(e["kind"] in ("trained_anew", "budget_stop") for e in events):
        return None  # a run that was killed or stopped says how long it lay in pieces, not how long a whole one takes
    if any(e["kind"] == "attempt" and e["attempt"] in worked and e.get("processes", 1) != world().size for e in events):
        return None
    own = [e for e in events if e["kind"] == "stage" and e.get("stage") in ASIDE]
    trained = [e for e in events if e["kind"] == "trained" and "arm" not in e]
    arms = [e for e in events if e["kind"] == "trained" and "arm" in e]
    rounds = {e.get("round", 0) for e in stages if e.get("stage") != "instructions"}  # whose rounds are tries
    return Speed(
        run_id=run_id,
        backend=str(manifest.get("backend")),
        slots=int(manifest.get("items", 0)) + int(manifest.get("heldout_items", 0)),
        rounds=len(rounds) or 1,
        tokens=sum(int(e.get("tokens") or 0) for e in stages),
        generation_seconds=sum(float(e.get("seconds") or 0) for e in stages),
        training_seconds=sum(float(e.get("seconds") or 0) for e in trained),
        pairs_seen=sum(
            float(e.get("steps") or 0) * float(e.get("micro_batch") or 1) * float(e.get("accumulation") or 1)
            for e in trained
        ),
        seconds=spent(e for e in events if e["attempt"] in worked)["seconds"],
        growing_seconds=_seconds(events, GROWING),
        base_seconds=_seconds(events, OF_BASE),
        labels=frozenset(str(e.get("stage")) for e in events if e["kind"] == "stage").difference(ASIDE),
        own_answers=sum(int(e.get("items") or 0) for e in own if e["stage"] == ASIDE[-1]),
        own_tokens=sum(int(e.get("tokens") or 0) for e in own),
        own_seconds=sum(float(e.get("seconds") or 0) for e in own),
        arms_seconds=sum(float(e.get("seconds") or 0) for e in arms),
        probed=any(e["kind"] == "stage" and str(e.get("stage")).startswith("probes") for e in events),
    )


def _seconds(events: list[Row], labels: tuple[str, ...]) -> float:
    named = [e for e in events if e["kind"] == "stage" and str(e.get("stage")).startswith(labels)]
    return sum(float(e.get("seconds") or 0) for e in named)
