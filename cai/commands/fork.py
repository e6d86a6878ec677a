"""`--fork runs/ID`: a new run that keeps the records whose inputs have not changed.

Owns which rows stay. A row stays if nothing that made it changed, its own stage's inputs and every stage before it:
instructions -> answers -> critiques r0 -> revisions r0 -> critiques r1 -> ... -> guard. Later tries of a slot exist
because of how an earlier pair came out, so they stay only if every stage does. Invariant: the fork ends with the rows
that a run from nothing with the new recipe would end with (on a CPU, where no text depends on its batch), and with its
very bytes unless items were added, which stand behind the rows that were kept (and give way to those that they are near
to), or taken away: rows that are no longer wanted stay in the log, and make no pair. Rows of `label_bar` are no item's:
they stay in front of what is made again. What wrote the kept rows goes along.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cai.data import chain, marks, on_policy
from cai.data.marks import REVIEW_KEY
from cai.data.slots import slot_of, slots, try_of
from cai.data.stage import Stage
from cai.data.stages import CHAIN
from cai.errors import CaiError
from cai.evaluate import taken
from cai.inputs import Inputs, grown_since
from cai.recipe.arm_costs import ASIDE
from cai.recipe.intake.input_files import PAIRS
from cai.recipe.load import Recipe
from cai.run import digests
from cai.run.events import lineage, read_events
from cai.run.folder import Run
from cai.run.manifest import read_manifest, refuse_edited
from cai.run.standing import Standing
from cai.store import records
from cai.store.jsonl import JsonObject, Row
from cai.store.records import differing
from cai.store.row_types import Record
from cai.store.rows import Lines, Rows, keys_of, of_stages
from cai.store.scan import SCORE_KEY, Damage
from cai.store.walk import CHANGED, CUT_OFF

Identity = Mapping[str, str]
BATCH = 256
BATCH_KEY = "engine.batch_size"
EXAM = "critic.jsonl"


@dataclass(frozen=True)
class Rate:
    """Seconds a generated token, or a row of a stage that only scores."""

    per_token: float
    per_row: float

    def seconds(self, rows: int, tokens: int) -> float:
        return tokens * self.per_token + rows * self.per_row


@dataclass(frozen=True)
class ForkPlan:
    """`kept` rows in file order, `again` rows that must be made anew; `changed`: stage -> what changed for it.

    `unwanted`: rows that do not stay and that the recipe asks for no more. `off`: stages that it does without.
    """

    source: Path
    kept: Sequence[Record]
    again: Sequence[Record]
    changed: dict[str, list[str]]
    rates: dict[str, Rate]
    model: Row = field(default_factory=dict)  # what wrote the kept rows
    rebatched: bool = False  # engine.batch_size is another one now
    unwanted: Sequence[Record] = ()
    off: frozenset[str] = frozenset()


def plan_fork(source: Path, identity: Identity, stages: Mapping[str, Identity]) -> ForkPlan:
    """Compare the run's manifest ("identity", "stages") with the recipe as it is now. Reads only.

    Errors: CaiError(CORRUPT) if the source's log is damaged or its manifest was edited, CaiError(USAGE) if it knows no
    stages.
    """
    manifest = read_manifest(source / "manifest.json")
    refuse_edited(manifest, source / "manifest.json")
    if "stages" not in manifest:
        raise CaiError(f"{source}/manifest.json: names no stages, so nothing can be reused: start anew")
    digests.check_log(source, source / "records.jsonl", digests.left(read_events(source / "events.jsonl"))[0])
    rows = verified_rows(source / "records.jsonl")
    differs = changed_stages(manifest["stages"], stages)
    changed = differing(manifest["identity"], identity)
    if "model.backend" in changed:
        differs.setdefault("instructions", []).append("model.backend")
    if pairs := [key for key in changed if key.startswith("pairs.")]:
        differs["pairs"] = pairs
    files = "pairs.file", f"sha256({PAIRS})"  # other pairs of one's own, or none any more: no row is theirs
    if named := [key for key in files if key in changed]:
        differs.setdefault("instructions", []).extend(named)
    kept, again = parted(rows, differs, first_tries_only=bool(differs))
    model = dict(manifest.get("model", {})) if kept else {}
    return ForkPlan(source, kept, again, differs, _rates(source), model, rebatched=BATCH_KEY in changed)


def plan_of(source: Path, inputs: Inputs) -> ForkPlan:
    """The plan of a fork with these inputs; a file of instructions that only grew counts as what it was."""
    then = grown_since(inputs, source, read_manifest(source / "manifest.json"))
    plan, recipe = plan_fork(source, then.identity(then=True), then.stages(then=True)), inputs.recipe
    assert isinstance(plan.again, Rows)
    wanted = set(slots(recipe))
    again, unwanted = _parts(plan.again, (asked_for(recipe, wanted, *key) for key in plan.again.each_key()))
    off = frozenset(stage.name for stage in CHAIN if not stage.enabled(recipe))
    return replace(plan, again=again, unwanted=unwanted, off=off)


def asked_for(recipe: Recipe, wanted: Set[int], stage: str, item: int, round_: int) -> bool:
    """Whether a run of this recipe, with these slots, makes such a row."""
    found = chain.named(stage)
    if found is None:
        return recipe.guard.enabled or stage != chain.GUARD
    if not found.enabled(recipe) or (found.per_round and round_ >= recipe.rounds):
        return False
    if found.aside:
        return item < recipe.sft.answers
    return found.items is not Stage.items or slot_of(item) in wanted  # some stages have numbers of their own


def verified_rows(path: Path) -> Rows[Record]:
    """The rows of a log after checking its hashes, left on disk; a torn tail is passed over."""
    records.refuse_missing(path)
    found = records.walked(path, path.with_suffix(".sum"))
    if found is None:
        return Rows(Lines(path))
    rows: Rows[Record] = records.rows_of(found)
    tail, changed = found.damage, found.changed
    if changed is None and tail and tail.offset < found.committed and tail.reason != CUT_OFF:
        changed = Damage(tail.line, tail.offset, CHANGED)
    if changed:
        raise records.corrupt(path, changed)
    return rows


def changed_stages(then: Mapping[str, Identity], now: Mapping[str, Identity]) -> dict[str, list[str]]:
    """Stage -> keys of its own inputs that differ. A stage aside that the source had not is only drawn, not again."""
    asked = [name for name in chain.names() if then.get(name) or not chain.is_aside(name)]
    changed = {stage: differing(then.get(stage, {}), now.get(stage, {})) for stage in asked}
    return {stage: keys for stage, keys in changed.items() if keys}


def parted(rows: Rows[Record], differs: JsonObject, *, first_tries_only: bool) -> tuple[Rows[Record], Rows[Record]]:
    """The rows that stay and the others, in file order; told by their keys, none of them is read."""
    fates, stay = dict[tuple[str, int], bool](), bytearray()
    for stage, item, round_ in rows.each_key():
        if (fate := fates.get((stage, round_))) is None:
            fate = fates[stage, round_] = stays(stage, round_, differs)
        stay.append(fate and not (first_tries_only and try_of(item)))
    return _parts(rows, stay)


def _parts(rows: Rows[Record], stay: Iterable[int]) -> tuple[Rows[Record], Rows[Record]]:
    """The rows of which this is true, and the others."""
    parts = (array("L"), array("L"))
    for number, fate in zip(rows.numbers, stay, strict=True):
        parts[not fate].append(number)
    first, second = (Rows[Record](rows.lines, numbers) for numbers in parts)
    return first, second


def stays(stage: str, round_: int, differs: JsonObject) -> bool:
    """Whether nothing before or in this stage changed."""
    if stage not in chain.names() or chain.CHAIN[0].name in differs:
        return False
    return not any(name in differs for name in chain.upstream(stage, round_))


def _rates(source: Path) -> dict[str, Rate]:
    """What a stage took in the source, or where that took its rows over, in the run that made them."""
    found: dict[str, Rate] = {}
    for run in lineage(source):
        events = [event for event in read_events(run / "events.jsonl") if event.get("kind") == "stage"]
        for stage in {str(event.get("stage")) for event in events} - found.keys():
            of = [event for event in events if event.get("stage") == stage]
            seconds, tokens, items = (sum(float(e.get(key) or 0) for e in of) for key in ("seconds", "tokens", "items"))
            if tokens or items:
                found[stage] = Rate(seconds / tokens if tokens else 0.0, 0.0 if tokens else seconds / items)
    return found


def describe(plan: ForkPlan, usd_per_hour: float = 0.0, whole: str = "") -> list[str]:
    """Lines for `--fork --dry-run`: what changed, what stays, what is made again and its cost as the source ran.

    `whole`: the estimate of the fork, training and evaluation counted.
    """
    own = sum(key[0] not in chain.names() for key in keys_of(plan.again))
    beside = f" ({own} of them the tuned model's own: probes, guard)" if own else ""
    lines = [f"fork of {plan.source}: {len(plan.kept)} records stay, {len(plan.again)} are made again{beside}"]
    if plan.unwanted:
        lines.append(f"  {len(plan.unwanted)} others go, which this recipe does not ask for")
    for stage, keys in plan.changed.items():
        if stage in plan.off:
            continue
        lines.append(f"  changed for {stage}: {', '.join(keys)}")
    if plan.rebatched and plan.kept:
        lines.append(f"  {BATCH_KEY} changed: what stays was drawn in batches of the old size")
    total, unknown = 0.0, False
    for stage in chain.names():
        each = [int(row.get("tokens") or 0) for row in of_stages(plan.again, (stage,))]
        if each:
            tokens, rate = sum(each), plan.rates.get(stage)
            seconds = rate.seconds(len(each), tokens) if rate else 0.0
            total, unknown = total + seconds, unknown or rate is None
            took = f"{seconds:.0f} s" if rate else "its time was not measured"
            lines.append(f"  {stage}: {len(each)} again, about {tokens} tokens, {took}")
    money = f", ${total / 3600 * usd_per_hour:.2f}" if usd_per_hour else ""
    least = "at least" if unknown else "about"
    lines.append(f"  together {least} {total:.0f} s{money} of generation, then training and evaluation")
    if whole:
        lines.append(f"  all of it: {whole}")
    return lines


def standing(plan: ForkPlan) -> Standing:
    """How much of the drawing the kept rows are, in time as the source took it, and of how many slots.

    Of a source that was not done with its data: the slots whose chain is whole.
    """
    kept, *others = (_weights(rows, plan.rates) for rows in (plan.kept, plan.again, plan.unwanted))
    share = kept / math.fsum((kept, *others)) if kept else 0.0
    manifest = read_manifest(plan.source / "manifest.json")
    if (plan.source / "dataset" / "pairs").is_dir():
        slots = int(manifest.get("items", 0)) + int(manifest.get("heldout_items", 0))
    else:
        then = manifest["identity"]
        kind, rounds = str(then.get("pairs.kind", "")).strip("'"), int(then.get("rounds", 1))
        slots = len({slot_of(item) for item in chain.whole_items(map(dict, plan.kept), rounds, kind)})
    own = sum(key[0] == ASIDE[-1] for key in keys_of(plan.kept))
    return Standing(share, slots, not plan.changed and taken.at_hand(plan.source), own)


def _weights(rows: Sequence[Record], rates: Mapping[str, Rate]) -> float:
    """Seconds of these rows of slots; where no stage's rate is known, their tokens."""
    counts, tokens = Counter[str](), Counter[str]()
    for row in of_stages(rows, [name for name in chain.names() if name not in ASIDE]):
        counts[row["stage"]] += 1
        tokens[row["stage"]] += int(row.get("tokens") or 0)
    if not rates:
        return float(tokens.total())
    return math.fsum(rates[name].seconds(counts[name], tokens[name]) for name in counts if name in rates)


def fill(plan: ForkPlan, run: Run) -> None:
    """Copy the kept rows into the new, open run. A kill in between only means that fewer rows were reused."""
    if plan.model:  # before the first row: cards name what wrote the text, and another model is drift
        run.update_manifest(model=plan.model)
    with run.records() as log:
        for start in range(0, len(plan.kept), BATCH):
            log.append(plan.kept[start : start + BATCH])
    _take_marks(plan, run)
    _take_round(plan, run)
    _take_exam(plan, run)
    if plan.kept:
        taken.leave(plan.source, run)
    counts = Counter(key[0] for key in keys_of(plan.again))
    made = {stage: counts[stage] for stage in chain.names()}
    stands = standing(plan)
    took = {**asdict(stands), "share": round(stands.share, 4)}
    run.event("forked", source=plan.source.name, kept=len(plan.kept), again=made, changed=plan.changed, **took)


def _take_marks(plan: ForkPlan, run: Run) -> None:
    """People's marks of texts that stay go along, so that `hygiene.reviews` can train on what was marked."""
    given = marks.of_texts(marks.whole(records.read(plan.source / "reviews.jsonl", REVIEW_KEY)))
    texts = {key for key in keys_of(plan.kept) if key[0] == "revisions"} if given else set()
    rows = [row for row in given if ("revisions", row["item"], row.get("round")) in texts]
    if rows:
        _log(run, run.path / "reviews.jsonl", REVIEW_KEY, rows)


def _log(run: Run, path: Path, key: tuple[str, ...], rows: Sequence[Row]) -> None:
    """A log of the fork's with these rows."""
    log: records.RecordLog[Row] = records.RecordLog.open(path, run.quarantine, key=key)
    log.append(rows)
    log.close()


def _take_exam(plan: ForkPlan, run: Run) -> None:
    """The critic's exam, where the critic is the same: the base sat it, whatever is trained. Its mark is held to."""
    if plan.changed or plan.rebatched:
        return
    if rows := taken.unchanged(plan.source, EXAM):
        run.eval.mkdir(mode=0o700, parents=True, exist_ok=True)
        _log(run, run.eval / EXAM, SCORE_KEY, rows)


def _take_round(plan: ForkPlan, run: Run) -> None:
    """Of a further round: the adapter that answered, and the figures before it; a next round has its own."""
    start = plan.source / on_policy.FOLDER
    if start.is_dir() and not (run.path / on_policy.FOLDER).exists():
        on_policy.take(start, run)
        then = read_manifest(plan.source / "manifest.json")
        run.update_manifest(**{name: then[name] for name in ("parent", "rounds") if name in then})
