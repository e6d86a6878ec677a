"""Everything that the recipe names, read, checked and hashed before anything is spent.

Owns which files are inputs and where runs lie; `session` opens a run with them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cai.data import chain, own_pairs
from cai.errors import CaiError
from cai.models.policy import Backend, backend_of
from cai.recipe import identity
from cai.recipe import load as recipes
from cai.recipe import probes as probe_files
from cai.recipe.constitution import Constitution, check_rounds, load_constitution
from cai.recipe.grid import Grid, load_grid
from cai.recipe.intake import input_files as intake_files
from cai.recipe.intake import instructionfile, pairfile, told
from cai.recipe.intake.input_files import InputFile
from cai.recipe.intake.instructionfile import Intake
from cai.recipe.intake.pairfile import PairIntake
from cai.recipe.load import Recipe, Source
from cai.recipe.panels import without_panel
from cai.recipe.paths import expanded
from cai.recipe.probes import Probe
from cai.recipe.prompts import Prompt
from cai.run.manifest import read_manifest
from cai.run.run_ids import resolve_run
from cai.store.files import holds, write_atomic
from cai.store.jsonl import JsonObject, Row

LONGEST_NAME = 100  # of a file that a run may make, its id included
JUDGE = ("judge", "judge_pair")  # prompts that measurements read, both or neither (`evaluate.scores.load_judge`)


@dataclass(frozen=True)
class Inputs:
    """Everything the recipe names, read and checked. `files`: name in the run folder -> path, bytes and hash.

    `sets`: what --set says, now and when the run began. `override`: why gates are overridden, likewise; "" if not.
    `given`: the user's own instructions, `grown_from`: the run's copy of that file if it only grew since; `pairs`: the
    user's own pairs.
    """

    source: Source
    recipe: Recipe
    backend: Backend
    constitution: Constitution
    prompts: Mapping[str, Prompt]
    grid: Grid
    files: Mapping[str, InputFile]
    sets: Sequence[str] = ()
    override: str = ""
    given: Intake | None = None
    pairs: PairIntake | None = None
    grown_from: InputFile | None = None
    probes: Sequence[Probe] = ()

    @property
    def hashes(self) -> dict[str, str]:
        return {name: file.sha for name, file in self.files.items()}

    @property
    def hashes_then(self) -> dict[str, str]:
        """The hashes as the run knows them: a file of instructions that only grew counts as what it was."""
        return self.hashes | ({intake_files.NAME: self.grown_from.sha} if self.grown_from else {})

    def identity(self, training: bool = False, *, then: bool = False) -> dict[str, str]:
        model = {"model.backend": self.backend}
        return identity.identity(self.recipe, self._deciding(then), training=training) | model

    def stages(self, *, then: bool = False) -> dict[str, dict[str, str]]:
        hashes = self._deciding(then)
        return {stage: chain.stage_identity(self.recipe, stage, hashes) for stage in chain.names()}

    def _deciding(self, then: bool) -> dict[str, str]:
        """The hashes of what decides a record; what probes and the judge's prompts measure has marks of its own."""
        measured_with = {f"prompts/{name}.yaml" for name in JUDGE if name not in chain.prompt_files(self.recipe)}
        hashes = self.hashes_then if then else self.hashes
        return {name: sha for name, sha in hashes.items() if name not in {probe_files.NAME, *measured_with}}

    @property
    def limit_tokens(self) -> int:
        """The most tokens that one item generates when nothing is tried twice."""
        return chain.limit_tokens(self.recipe)

    @property
    def once_tokens(self) -> int:
        """The most tokens that are generated once a run: both models' answers to the probes."""
        return 2 * len(self.probes) * self.recipe.evaluation.probe_tokens

    @property
    def folder(self) -> Path:
        """Where the data files that the recipe names lie: relative paths mean the original's place, in a copy too."""
        return home(self.source)

    @property
    def told(self) -> list[str]:
        """What is to be said about the files before anything starts."""
        notes = [file.note for file in self.files.values() if file.note] + list(self.constitution.notes)
        if self.recipe.few_shot.by_topic and self.recipe.pairs.revised:
            reviews = (self.prompts[name] for name in ("critiques", "revisions"))
            notes += without_panel(reviews, self.constitution.principles)
        if self.pairs is not None:
            return [*notes, *own_pairs.about(self.pairs, str(self.files[intake_files.PAIRS].path), self.recipe)]
        if self.given is None:
            return notes
        recipe, name = self.recipe, str(self.files[intake_files.NAME].path)
        pool, heldout = recipe.instructions.pool, recipe.heldout.items
        return [*notes, *told.about(self.given, name, wanted=recipe.items, heldout=heldout, pool=pool)]


def runs_root(source: Source, recipe: Recipe) -> Path:
    """Where runs lie. A recipe inside a run folder (its copy) means that folder's parent."""
    return source.folder.parent if in_run(source) else _usable(source.folder / recipe.runs, source)


def home(source: Source) -> Path:
    """The folder of the recipe; of a run's copy, the folder of the recipe that began it (the manifest says where)."""
    if not in_run(source):
        return source.folder
    return (source.folder / read_manifest(source.folder / "manifest.json").get("home", "../..")).resolve()


def in_run(source: Source) -> bool:
    """Whether this recipe is the copy that a run folder holds."""
    return (source.folder / "manifest.json").is_file()


def _usable(root: Path, source: Source) -> Path:
    """`root`, unless no folder of that name can be (too long, with a NUL, below a file, not to be looked into) or it is
    a part of a run.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(root / ("x" * LONGEST_NAME))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CaiError(f"{source.path}: runs: {str(root)[:200]!r}: {why}. Name a folder that can be made.") from None
    for folder in (root.resolve(), *root.resolve().parents):
        if (folder / "manifest.json").is_file() and (folder / "recipe.resolved.toml").is_file():
            raise CaiError(f"{source.path}: runs: {root}: lies inside the run {folder.name}. Name a folder of its own.")
    return root


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Recipe, constitution, prompts and grid, every fault of theirs before anything is spent."""
    source = recipes.read(args.recipe)
    manifest = _manifest_of(args)
    milestone = args.milestone or manifest.get("milestone", "")
    sets = later_sets(manifest.get("sets", []), args.set)
    backend = backend_of(recipes.resolve(source, milestone=milestone, sets=sets).model)  # no overlay chooses it
    recipe = recipes.resolve(source, milestone=milestone, sets=sets, embedded=backend == "embedded")
    runs_root(source, recipe)
    if args.limit:
        recipe = recipe.model_copy(update={"items": min(recipe.items, args.limit)})
    run = locate(args, args.resume) if args.resume else None
    named = {text.partition("=")[0].strip() for text in args.set}
    files = intake_files.read_all(_paths(source, recipe), run, named)
    constitution = load_constitution(files["constitution.yaml"].path, files["constitution.yaml"].data)
    check_rounds(constitution, recipe.rounds)
    contents = {name: files[f"prompts/{name}.yaml"] for name in chain.prompt_files(recipe)}
    prompts = chain.read_prompts({name: (file.path, file.data) for name, file in contents.items()}, recipe)
    grid = load_grid(files["prompts/grid.yaml"].path, files["prompts/grid.yaml"].data)
    why = [str(manifest.get("override") or ""), (args.override_gate or "").strip()]
    override = "; ".join(dict.fromkeys(filter(None, why)))
    given, pairs = _given(recipe, files), _own_pairs(recipe, files)
    inputs = Inputs(source, recipe, backend, constitution, prompts, grid, files, sets, override, given, pairs)
    if asked := files.get(probe_files.NAME):
        inputs = replace(inputs, probes=probe_files.load_probes(asked.path, asked.data))
    return _since(inputs, run, manifest) if run else inputs


def _paths(source: Source, recipe: Recipe) -> dict[str, Path]:
    """Name in the run folder -> where that file is."""
    inside = in_run(source)
    prompts = source.folder / ("prompts" if inside else recipe.prompts)
    paths = {"constitution.yaml": source.folder / ("constitution.yaml" if inside else recipe.constitution)}
    folders = (prompts, home(source) / recipe.prompts) if inside else (prompts,)
    paths |= {f"prompts/{name}.yaml": _first(folders, f"{name}.yaml") for name in (*chain.prompt_files(recipe), "grid")}
    for folder in folders:
        judge = {f"prompts/{name}.yaml": folder / f"{name}.yaml" for name in JUDGE}
        if all(path.is_file() for path in judge.values()):
            paths = judge | paths
            break
    if recipe.evaluation.enabled and recipe.evaluation.probes:
        copy = source.folder / probe_files.NAME
        paths[probe_files.NAME] = copy if inside and copy.is_file() else home(source) / recipe.evaluation.probes
    if recipe.instructions.file:
        copy = source.folder / intake_files.NAME
        paths[intake_files.NAME] = copy if inside and copy.is_file() else home(source) / recipe.instructions.file
    if recipe.pairs.file:
        copy = source.folder / intake_files.PAIRS
        paths[intake_files.PAIRS] = copy if inside and copy.is_file() else home(source) / recipe.pairs.file
    return paths


def _first(folders: Sequence[Path], name: str) -> Path:
    """The file in the first folder that has it: a run has no copy of a prompt that only its fork asks with."""
    return next((path for folder in folders if (path := folder / name).is_file()), folders[-1] / name)


def _given(recipe: Recipe, files: Mapping[str, InputFile]) -> Intake | None:
    if (file := files.get(intake_files.NAME)) is None:
        return None
    section = recipe.instructions
    return instructionfile.read(file.data, str(file.path), key=section.key, pool=section.pool)


def _own_pairs(recipe: Recipe, files: Mapping[str, InputFile]) -> PairIntake | None:
    if (file := files.get(intake_files.PAIRS)) is None:
        return None
    if recipe.instructions.file:
        raise CaiError(f"{file.path}: pairs.file: and instructions.file: pairs have prompts already. Leave one out.")
    return pairfile.read(file.data, str(file.path), pool=recipe.instructions.pool)


def grown_since(inputs: Inputs, run: Path, manifest: JsonObject) -> Inputs:
    """The inputs, marked if the file of instructions differs from the run's by more lines alone."""
    then = manifest.get("files", {}).get(intake_files.NAME)
    if inputs.given is None or then in (None, inputs.hashes[intake_files.NAME]):
        return inputs
    section = inputs.recipe.instructions
    copy = intake_files.grown_from(run, manifest, inputs.given, key=section.key, pool=section.pool)
    return replace(inputs, grown_from=copy)


def _since(inputs: Inputs, run: Path, manifest: JsonObject) -> Inputs:
    """On a resume: new lines are taken until training began; from then on the run's own copy holds."""
    inputs = grown_since(inputs, run, manifest)
    if inputs.grown_from is None or "training_identity" not in manifest:
        return inputs
    note = f"{intake_files.NAME}: has grown since training began; this run goes on with its own copy (--fork takes all)"
    files = {**inputs.files, intake_files.NAME: replace(inputs.grown_from, note=note)}
    return replace(inputs, files=files, given=_given(inputs.recipe, files), grown_from=None)


def _manifest_of(args: argparse.Namespace) -> Row:
    """The manifest of the run to resume or fork: its milestone and --set hold on unless said otherwise."""
    if not (args.resume or args.fork):
        return {}
    found = read_manifest(locate(args, args.resume or args.fork) / "manifest.json")
    return found if args.resume else {name: found[name] for name in ("milestone", "sets") if name in found}


def later_sets(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """What --set says from now on: it holds on for the next resume, and a key set again is there once."""
    again = {text.partition("=")[0].strip() for text in now}
    return [text for text in before if text.partition("=")[0].strip() not in again] + list(now)


def kept_sets(sets: Sequence[str], now: Sequence[str]) -> list[str]:
    """Which of `later_sets` nobody said now: a fork has them of the run that it began from, recipe or not."""
    return [f"--set {shlex.quote(text)}" for text in sets if text not in now]


def copy_inputs(inputs: Inputs, folder: Path) -> None:
    """Copies of every input file, so that the run can be moved, read, and continued when the originals change.

    Called after the identity was checked, so a copy that was damaged becomes whole again.
    """
    (folder / "prompts").mkdir(exist_ok=True)
    for name, file in inputs.files.items():
        if not holds(folder / name, file.data):
            write_atomic(folder / name, file.data)


def locate(args: argparse.Namespace, argument: str) -> Path:
    """The run folder that a command's argument names (`runs/ID`, `ID`, `runs/latest`), without opening it."""
    return resolve_run(argument or "latest", folder_of_runs(args))


def folder_of_runs(args: argparse.Namespace) -> Path:
    """Where the runs of this command's recipe lie; nothing but that key is read of it."""
    source = recipes.read(args.recipe)
    root = source.folder.parent if in_run(source) else source.folder / expanded(str(source.table.get("runs", "runs")))
    for text in args.set:
        if (named := recipes.parse_set(text).get("runs")) is not None:
            root = source.folder / expanded(str(named))
    return _usable(root, source)
