"""cai.toml -> one frozen `Recipe`: every check, `--set`, milestone and embedded overlays.

Owns reading the TOML and the messages a user sees for a bad one; what a resume may change is `identity`'s. No other
module reads the TOML. A recipe is base keys < `[embedded]` overlay (no GPU) < `[milestones.X]` < `--set`.
"""

from __future__ import annotations

import copy
import difflib
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from cai.errors import CaiError
from cai.recipe import settings
from cai.recipe.paths import at_home
from cai.recipe.settings_benchmarks import BenchmarksSection, ChecksSection, GuardSection
from cai.recipe.settings_evaluation import EvaluationSection, GatesSection, HygieneSection
from cai.recipe.settings_rounds import OnPolicySection
from cai.recipe.settings_sft import SftSection
from cai.recipe.settings_sweep import SweepSection
from cai.recipe.writing import remedy
from cai.store.jsonl import JsonObject, Row
from cai.store.reading import Missing, read_once

MOST_BYTES = 4 << 20  # of a recipe
DEEPEST_KEY = 8  # parts of a key of --set; the recipe has four

OVERLAYS = ("embedded", "milestones")
_PYTHON_WORDS = re.compile(r"tuple|dictionary or instance of \w+")  # pydantic's; TOML has lists and tables


class Recipe(settings.Section):
    """A resolved recipe: plain frozen sections that are handed down; nothing below reads the TOML."""

    milestone: str = Field("m0", pattern=r"^[a-z0-9]{1,20}$")
    items: settings.Slots = 1
    rounds: settings.Positive = 1
    seed: int = Field(0, ge=0, lt=2**63)
    constitution: str = Field("constitution.yaml", min_length=1)
    prompts: str = Field("prompts", min_length=1)
    runs: str = Field("runs", min_length=1)
    model: settings.ModelSection = settings.ModelSection()
    sampling: settings.SamplingSections = settings.SamplingSections()
    few_shot: settings.FewShotSection = settings.FewShotSection()
    engine: settings.EngineSection = settings.EngineSection()
    instructions: settings.InstructionsSection = settings.InstructionsSection()
    principles: settings.PrinciplesSection = settings.PrinciplesSection()
    critiques: settings.CritiquesSection = settings.CritiquesSection()
    heldout: settings.HeldoutSection = settings.HeldoutSection()
    pairs: settings.PairsSection = settings.PairsSection()
    hygiene: HygieneSection = HygieneSection()
    lora: settings.LoraSection = settings.LoraSection()
    dpo: settings.DpoSection = settings.DpoSection(max_steps=1)
    health: settings.HealthSection = settings.HealthSection()
    sft: SftSection = SftSection()
    evaluation: EvaluationSection = EvaluationSection()
    guard: GuardSection = GuardSection()
    benchmarks: BenchmarksSection = BenchmarksSection()
    checks: ChecksSection = ChecksSection()
    gates: GatesSection = GatesSection()
    on_policy: OnPolicySection = OnPolicySection()
    sweep: SweepSection = SweepSection()
    report: settings.ReportSection = settings.ReportSection()
    budget: settings.BudgetSection = settings.BudgetSection()

    @property
    def has_sft(self) -> bool:
        """An adapter of SFT alone comes of it: as an arm of its own, or as the stage that DPO goes on from."""
        return self.sft.enabled or self.dpo.start == "sft"

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.dpo.start == "adapter" and self.on_policy.round == 1:
            raise ValueError('dpo.start: "adapter" is that of the round before, which --next-round takes along')
        if self.critiques.found == "calibrated" and self.principles.by == "critic":
            raise ValueError(
                'critiques.found: "calibrated" adds a sign to the rule check, and principles.by is "critic". '
                'Set critiques.found = "compared", or principles.by = "rule_check"'
            )
        if "sampled" in self.pairs.kinds and not self.pairs.file and self.sampling.answers.temperature == 0:
            kind = self.pairs.kind
            raise ValueError(
                f'pairs.kind: "{kind}" compares two answers, and at temperature 0 both are the same. '
                "Set sampling.answers.temperature above 0"
            )
        return self


# Keys that became constants, and their values: resolved recipes and identities of runs made before name them, and an
# identity goes on to, so that such a run resumes and its passed gates count.
RETIRED: Row = {
    "pairs.accept_noise": False,
    "hygiene.min_pairs": 1,
    "evaluation.batch": 64,
    "evaluation.min_quote_match": 0.8,
    "evaluation.permutations": 200,
    "evaluation.bootstrap_samples": 2000,
    "evaluation.lm_eval_batch_size": 64,
    "evaluation.min_critique_words": 12,
    "evaluation.max_critique_words": 300,
    "evaluation.min_revision_words": 8,
    "evaluation.max_unchanged": 0.95,
    "evaluation.min_length_ratio": 0.4,
    "evaluation.max_length_ratio": 2.5,
    "benchmarks.judge_max_new_tokens": 1024,
    "guard.margin": 0.0,
}


@dataclass(frozen=True)
class Source:
    """A recipe file as read: the raw table and where it lies; relative paths resolve against `folder`."""

    path: Path
    table: Row
    data: bytes = b""  # as read; a new run keeps a copy of it

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent


def read(path: Path) -> Source:
    """Parse the TOML. Errors: missing or unreadable file, syntax (with line and column), a table of the wrong kind."""
    try:
        data = read_once(path, where=str(path), most=MOST_BYTES, pipes=False)
    except Missing:
        raise CaiError(f"{path}: no such recipe file. Give the path of a cai.toml.") from None
    try:
        table = parse_toml(data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
    except UnicodeDecodeError as error:
        raise CaiError(f"{path}: cannot read the recipe: {error}. Give a UTF-8 text file.") from None
    except ValueError as error:
        raise CaiError(f"{path}: TOML syntax: {error}. Correct that line.") from None
    for name in OVERLAYS:
        if not isinstance(table.get(name, {}), dict):
            raise CaiError(f"{path}: {name}: must be a table. Write [{name}].")
    return Source(path, table, data)


def parse_toml(text: str) -> Row:
    """The table of TOML text. Every fault is a ValueError of one line, also what tomllib does not expect."""
    try:
        return copy.deepcopy(_parsed(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


@lru_cache(maxsize=64)  # one command reads its recipe several times
def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, OverflowError) as error:  # a number of 5,000 digits
        raise ValueError(str(error).split(";")[0]) from None


def resolve(source: Source, *, milestone: str = "", sets: Sequence[str] = (), embedded: bool = False) -> Recipe:
    """Apply the overlays and validate. All faults are reported at once, one line each, in one CaiError."""
    base = {key: value for key, value in source.table.items() if key not in OVERLAYS}
    milestone = milestone or base.get("milestone", "m0")
    overlays = _overlays(source, str(milestone), embedded)
    faults = [*_unknown(base, Recipe, ())]
    for prefix, overlay in overlays:
        faults += _unknown(overlay, Recipe, prefix)
        base = _merge(base, overlay)
    raw: dict[str, str] = {}  # what --set says, as it was written
    for text in sets:
        overlay = parse_set(text)
        raw[text.partition("=")[0].strip()] = text.partition("=")[2].strip()
        faults += [f"--set {fault}" for fault in _unknown(overlay, Recipe, ())]
        base = _merge(base, overlay)
    base["milestone"] = milestone
    recipe = None
    try:
        recipe = Recipe.model_validate(_tuples(base, Recipe))
    except ValidationError as error:
        faults += [line for fault in error.errors() if (line := _fault_line(fault, raw))]
    if faults or recipe is None:
        raise CaiError("\n".join(f"{source.path}: {fault}" for fault in dict.fromkeys(faults)))
    return at_home(recipe, str(source.path))


def _overlays(source: Source, milestone: str, embedded: bool) -> list[tuple[tuple[str, ...], Row]]:
    tables = source.table.get("milestones", {})
    if milestone not in tables:
        near = difflib.get_close_matches(milestone, tables, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(tables) or 'none'}."
        raise CaiError(f"{source.path}: milestones.{milestone}: no such milestone. {hint}")
    found: list[tuple[tuple[str, ...], Any]] = []
    if embedded:
        found.append((("embedded",), {k: v for k, v in source.table.get("embedded", {}).items() if k != "milestones"}))
    found.append((("milestones", milestone), tables[milestone]))
    if embedded:
        extra = source.table.get("embedded", {}).get("milestones", {}).get(milestone, {})
        found.append((("embedded", "milestones", milestone), extra))
    for prefix, overlay in found:
        if not isinstance(overlay, dict):
            raise CaiError(f"{source.path}: {'.'.join(prefix)}: must be a table. Write [{'.'.join(prefix)}].")
    return found


def _sections(schema: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Field name -> nested section class, or None for a leaf."""
    return {name: _section_class(field.annotation) for name, field in schema.model_fields.items()}


def _section_class(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _leaf_paths(schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[str]:
    for name, section in _sections(schema).items():
        yield ".".join((*prefix, name))
        if section is not None:
            yield from _leaf_paths(section, (*prefix, name))


def _unknown(table: JsonObject, schema: type[BaseModel], prefix: tuple[str, ...]) -> list[str]:
    """One line for each key that the schema lacks, with the nearest key that it has."""
    faults, known = [], _sections(schema)
    for key, value in table.items():
        path = ".".join((*prefix, key))
        retired = next((name for name in RETIRED if f".{path}".endswith(f".{name}")), None)
        if retired is not None:
            if value != RETIRED[retired]:
                faults.append(f"{path}: no setting any more, fixed at {RETIRED[retired]!r}. Remove the line.")
        elif key not in known:
            faults.append(f"{path}: unknown key. {_nearest(key, prefix, known)}")
        elif (section := known[key]) is not None:
            parts = {f"{key}.{i}": entry for i, entry in enumerate(value)} if isinstance(value, list) else {key: value}
            for name, part in parts.items():
                faults += _unknown(part, section, (*prefix, name)) if isinstance(part, Mapping) else []
    return faults


def _nearest(key: str, prefix: tuple[str, ...], known: JsonObject) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if near:
        return f"Did you mean {'.'.join((*prefix, near[0]))}?"
    leaves = {path.rsplit(".", 1)[-1]: path for path in _leaf_paths(Recipe)}
    near = difflib.get_close_matches(key, leaves, 1, 0.75)
    return f"Did you mean {leaves[near[0]]}?" if near else f"Known here: {', '.join(known)}."


def parse_set(text: str) -> Row:
    """`a.b=VALUE` -> nested table. VALUE is a TOML value; what is none is taken as a string."""
    path, sign, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not sign or not all(keys) or len(keys) > DEEPEST_KEY:
        raise CaiError(f"--set {text[:80]}: expected KEY=VALUE, for example --set dpo.beta=0.2")
    try:
        table = parse_toml(f"value = {value.strip()}")
        if len(table) > 1:
            raise CaiError(f"--set {path.strip()}: more than one line. Give each key a --set of its own.")
        parsed = table["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    except ValueError as error:
        raise CaiError(f"--set {path.strip()}: {error}. Write a smaller value.") from None
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed


def _merge(base: JsonObject, overlay: JsonObject) -> Row:
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    for name in ("dpo", "sft"):  # one length replaces the other
        length = overlay[name] if isinstance(overlay.get(name), Mapping) else {}
        for key, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
            if length.get(key) and other not in length:
                merged[name] = {k: v for k, v in merged[name].items() if k != other}
    return merged


def _tuples(value: Any, schema: type[BaseModel] | None) -> Any:
    """TOML arrays become tuples (strict models take no list for a tuple); unknown keys are dropped, reported before."""
    if isinstance(value, Mapping):
        known = _sections(schema) if schema else {}
        return {k: _tuples(v, known.get(k)) for k, v in value.items() if schema is None or k in known}
    if isinstance(value, list):
        return tuple(_tuples(entry, schema) for entry in value)
    return value


def _fault_line(error: Any, raw: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    shown = repr(error.get("input"))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = error["msg"][0].lower() + error["msg"][1:]
    message = _PYTHON_WORDS.sub(lambda found: "list" if found[0] == "tuple" else "table", message)
    written = remedy(error["type"], error.get("input"), raw.get(path))
    if not written:
        return f"{path}: {message} (found {shown})"
    how = f": --set {shlex.quote(f'{path}={written}')}" if path in raw and not written[0].isalnum() else ""
    return f"{path}: {message} (found {shown}). Write {written}{how}"


def dump(recipe: Recipe) -> bytes:
    """The resolved recipe as TOML, every key explicit; [sft] where it is on or says something of its own."""
    off = {"sft"} if not recipe.has_sft and recipe.sft == SftSection() else set()
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude=off)).encode()


def flatten(table: JsonObject, prefix: str = "") -> dict[str, str]:
    """Nested table -> {dotted key: repr}, in order."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = repr(value)
    return flat
