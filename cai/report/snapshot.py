"""What a run folder tells, read once into plain data for the report, the model card and the comparison.

Owns reading and its tolerance: a part that is missing or damaged is left out and named in `gaps`, never guessed.
Writes nothing, holds no lock, imports no torch. Everything is a function of the folder's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from cai.data import hygiene, marks, own_pairs
from cai.data.kinds import build
from cai.data.pairs import PairSet, plan_of
from cai.data.slots import slot_of, slots
from cai.errors import CaiError
from cai.evaluate.gates import whole_verdicts
from cai.metrics.figure import is_whole
from cai.metrics.scripts import language_note
from cai.recipe import load as recipes
from cai.recipe.constitution import Principle, load_constitution
from cai.recipe.load import Recipe, Source
from cai.run import digests
from cai.run.events import read_events, spent
from cai.store import records
from cai.store.jsonl import Row, read_object
from cai.store.row_types import FigureRow, Record
from cai.store.rows import ByItem, Latest, Rows
from cai.store.scan import SCORE_KEY


@dataclass(frozen=True)
class Snapshot:
    """One run. `figures`: metric -> Measured as a dict. `rows`: every record. Parts that are missing are empty."""

    path: Path
    manifest: Row
    recipe: Recipe
    rows: Sequence[Record]
    pairs: PairSet
    principles: dict[str, str]
    figures: dict[str, FigureRow]
    warnings: list[str]
    gates: Row
    scores: Mapping[tuple[str, int], Row]
    training: Row
    events: list[Row]
    reviews: Sequence[Row]
    gaps: list[str] = field(default_factory=list)
    edited: str = ""  # which files are not as the last attempt left them, in words

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def milestone(self) -> str:
        return str(self.manifest.get("milestone") or self.recipe.milestone)

    @property
    def backend(self) -> str:
        return str(self.manifest.get("backend", "unknown"))

    @property
    def model(self) -> str:
        facts = self.manifest.get("model") or {}
        return str(facts.get("model") or self.recipe.model.name)

    @property
    def verdicts(self) -> list[Row]:
        return whole_verdicts(self.gates)

    @property
    def spent(self) -> dict[str, float]:
        return spent(self.events)

    def of_kind(self, kind: str) -> list[Row]:
        return [event for event in self.events if event.get("kind") == kind]

    @cached_property
    def cleaned(self) -> hygiene.Hygiene:
        """The hygiene rules over the accepted training pairs, as the run applied them, less what was contaminated.

        Of the marks only those that the run applied count (eval/marks.json), not what was marked after it was trained.
        """
        applied = read_object(self.path / "eval" / "marks.json").get("removed") or []
        refused = {int(row["item"]): str(row["detail"]) for row in applied if isinstance(row, dict)}
        found = hygiene.clean(self.pairs.train, self.recipe.hygiene, refused, self.pairs.drawn)
        listed = read_object(self.path / "eval" / "contamination.json").get("removed") or []
        gone = {row.get("item") for row in listed if isinstance(row, dict)}
        return replace(found, kept=[pair for pair in found.kept if pair["item"] not in gone]) if gone else found

    @cached_property
    def scores_by_item(self) -> Mapping[int, Mapping[str, Row]]:
        """item -> metric -> the row of the last round scored."""
        return ByItem(self.scores)

    @property
    def log(self) -> list[Row]:
        """The training log, one entry a step: from the result, else from the events (a run that is still training)."""
        if self.training.get("log"):
            return list(self.training["log"])
        steps = {int(e["step"]): e for e in self.of_kind("train_step") if "step" in e and "arm" not in e}
        return [steps[step] for step in sorted(steps)]

    @property
    def usd_per_pair(self) -> float | None:
        usd, count = self.spent["usd"], len(self.pairs.kept)
        return usd / count if usd > 0 and count else None


def _language(rows: Sequence[Record], recipe: Recipe) -> list[str]:
    """What is to be said of a user's requests in languages whose refusals are not known."""
    if not recipe.instructions.file:
        return []
    asked = dict.fromkeys(row["text"] for row in rows if row["stage"] == "instructions" and row["status"] == "ok")
    note = language_note(asked)
    return [note] if note else []


def read_story(path: Path) -> Snapshot:
    """Everything a report needs. Errors: CaiError only where there is no run at all (no manifest)."""
    from cai.run.manifest import read_manifest

    gaps: list[str] = []
    manifest = read_manifest(path / "manifest.json")
    recipe = _recipe(path, gaps)
    rows = _records(path, gaps)
    principles = _principles(path, gaps)
    events = read_events(path / "events.jsonl")
    edited = digests.told(digests.edited(path, events))
    figures, warnings = _figures(path / "eval", gaps)
    warnings = [*filter(None, [edited]), *warnings]
    signs = {event["sign"]: event for event in events if event.get("kind") == "health" and "arm" not in event}
    warnings += [f"While training, seen at step {event['step']}: {event['text']}" for event in signs.values()]
    warnings += _language(rows, recipe)
    if not figures:
        gaps.append("nothing was evaluated yet")
    gates = read_object(path / "eval" / "gates.json")
    if not gates:
        gaps.append("no gate was decided yet")
    elif whole_verdicts(gates) != gates.get("verdicts"):
        gaps.append("eval/gates.json: not whole, its verdicts are shown as far as they are")
    training = read_object(path / "train" / "result.json")
    if not training:
        gaps.append("there is no finished training")
    return Snapshot(
        path=path,
        manifest=manifest,
        recipe=recipe,
        rows=rows,
        pairs=_pairs(path, rows, recipe, principles, gaps),
        principles={p.id: p.principle for p in principles},
        figures=figures,
        warnings=warnings,
        gates=gates,
        scores=_scores(path / "eval" / "scores.jsonl"),
        training=training,
        events=events,
        reviews=_reviews(path, gaps),
        gaps=gaps,
        edited=edited,
    )


def recipe_of(path: Path) -> Recipe:
    """The resolved recipe of a run. Error: CaiError where this program cannot read it."""
    source = recipes.read(path / "recipe.resolved.toml")
    name = str(source.table.get("milestone", "m0"))
    return recipes.resolve(Source(source.path, {**source.table, "milestones": {name: {}}}), milestone=name)


def _recipe(path: Path, gaps: list[str]) -> Recipe:
    """The resolved recipe; the defaults, noted as a gap, where this program cannot read it."""
    try:
        return recipe_of(path)
    except CaiError as error:
        gaps.append(f"recipe.resolved.toml: {str(error).splitlines()[0]}; thresholds shown are the defaults")
        return Recipe()  # type: ignore[call-arg]  # every key has a default


def _records(path: Path, gaps: list[str]) -> Sequence[Record]:
    try:
        return records.look(path / "records.jsonl")
    except (CaiError, OSError) as error:
        gaps.append(f"records.jsonl: {str(error).splitlines()[0]}")
        return []


def _principles(path: Path, gaps: list[str]) -> tuple[Principle, ...]:
    try:
        return load_constitution(path / "constitution.yaml").principles
    except CaiError as error:
        gaps.append(str(error).splitlines()[0])
        return ()


def _pairs(
    path: Path, rows: Sequence[Record], recipe: Recipe, principles: Sequence[Principle], gaps: list[str]
) -> PairSet:
    if recipe.pairs.file:
        try:
            return own_pairs.of_run(path, recipe, rows)
        except (CaiError, OSError) as error:
            gaps.append(f"pairs.file: {str(error).splitlines()[0]}")
            return PairSet([], [], [])
    wanted = set(slots(recipe))
    return build(rows, plan_of(recipe, principles), recipe.pairs, lambda item: slot_of(item) in wanted)


def read_figures(folder: Path) -> dict[str, FigureRow]:
    """Every figure that stands in a run's eval/*.json."""
    return _figures(folder, [])[0]


def _figures(folder: Path, gaps: list[str]) -> tuple[dict[str, FigureRow], list[str]]:
    """Every figure in eval/*.json, and the warnings beside them; gates.json is not one of them.

    One that was damaged is left out, and told.
    """
    figures: dict[str, FigureRow] = {}
    warnings: list[str] = []
    for path in sorted(folder.glob("*.json")):
        if path.name == "gates.json":
            continue
        content = read_object(path)
        found = content.get("figures", content)
        warnings += [str(w) for w in content.get("warnings", [])] if isinstance(content.get("warnings"), list) else []
        if isinstance(found, dict):
            named = {k: v for k, v in found.items() if isinstance(v, dict) and "metric" in v and "value" in v}
            figures |= (whole := {k: v for k, v in named.items() if is_whole(v)})
            if odd := len(named) - len(whole):
                gaps.append(f"eval/{path.name}: {odd} of {len(named)} figures, for they are not whole")
    return figures, warnings


def _scores(path: Path) -> Mapping[tuple[str, int], Row]:
    """(metric, item) -> the row of the last round scored."""
    rows = log_of(path, SCORE_KEY)
    return Latest(rows, 2) if isinstance(rows, Rows) else {}


def _reviews(path: Path, gaps: list[str]) -> Sequence[Row]:
    """The marks; rows that a person spoilt are left out and told."""
    rows = log_of(path / "reviews.jsonl", ("rater", "key"))
    whole = marks.whole(rows)
    if len(whole) < len(rows):
        gaps.append(f"reviews.jsonl: {len(rows) - len(whole)} of {len(rows)} marks, for they are not whole")
    return whole


def log_of(path: Path, key: tuple[str, ...]) -> Sequence[Row]:
    """The rows of a log, none of one that is missing or damaged."""
    try:
        return records.look(path, key)
    except (CaiError, OSError):
        return []
