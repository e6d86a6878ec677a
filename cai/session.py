"""From arguments to an open run: recipe, inputs, run folder (new or resumed), and the context the stages share.

Owns which files are inputs and their hashes, what a new run folder holds, and the checks of a resume. Doesn't own the
order of the pipeline (runner.py) nor the folder's mechanics (run.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai.data.stage import Context
from cai.engine import Rules
from cai.errors import CaiError
from cai.intake import files as intake_files
from cai.intake import instructionfile, told
from cai.intake.files import InputFile
from cai.intake.instructionfile import Intake
from cai.models.policy import Backend, LoadedModel, backend_of, load
from cai.recipe import load as recipes
from cai.recipe.constitution import Constitution, check_rounds, load_constitution
from cai.recipe.grid import Grid, load_grid
from cai.recipe.load import Recipe, Source
from cai.recipe.paths import expanded
from cai.recipe.prompts import Prompt, load_prompt
from cai.run.folder import Run, Taken, check_identity, new_run_id, resolve_run
from cai.run.manifest import read_manifest
from cai.run.progress import Progress
from cai.store.files import holds, write_atomic
from cai.terminal import StopSwitch

LONGEST_NAME = 100  # of a file that a run may make, its id included
PROMPTS = ("instructions", "answers", "critiques", "revisions", "policy")
VERSIONED = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Inputs:
    """Everything the recipe names, read and checked. `files`: name in the run folder -> path, bytes and hash.

    `sets`: what --set says, now and when the run began. `override`: why gates are overridden, likewise; "" if not.
    `given`: the user's own instructions. `grown_from`: the run's copy of that file if it only grew since.
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
    grown_from: InputFile | None = None

    @property
    def hashes(self) -> dict[str, str]:
        return {name: file.sha for name, file in self.files.items()}

    @property
    def hashes_then(self) -> dict[str, str]:
        """The hashes as the run knows them: a file of instructions that only grew counts as what it was."""
        return self.hashes | ({intake_files.NAME: self.grown_from.sha} if self.grown_from else {})

    def identity(self, training: bool = False, *, then: bool = False) -> dict[str, str]:
        model = {"model.backend": self.backend}
        return recipes.identity(self.recipe, self.hashes_then if then else self.hashes, training=training) | model

    def stages(self, *, then: bool = False) -> dict[str, dict[str, str]]:
        hashes = self.hashes_then if then else self.hashes
        return {stage: recipes.stage_identity(self.recipe, stage, hashes) for stage in recipes.STAGES}

    @property
    def folder(self) -> Path:
        """Where the data files that the recipe names lie: relative paths mean the original's place, in a copy too."""
        return home(self.source)

    @property
    def told(self) -> list[str]:
        """What is to be said about the files before anything starts."""
        notes = [file.note for file in self.files.values() if file.note] + list(self.constitution.notes)
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
    """`root`, unless no folder of that name can be: too long, with a NUL, below a file, not to be looked into."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(root / ("x" * LONGEST_NAME))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CaiError(f"{source.path}: runs: {str(root)[:200]!r}: {why}. Name a folder that can be made.") from None
    return root


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Recipe, constitution, prompts and grid, every fault of theirs before anything is spent."""
    source = recipes.read(args.recipe)
    manifest = _manifest_of(args)
    milestone = args.milestone or manifest.get("milestone", "")
    sets = [*manifest.get("sets", []), *args.set]
    backend = _peek_backend(source, milestone, sets)
    recipe = recipes.resolve(source, milestone=milestone, sets=sets, embedded=backend == "embedded")
    runs_root(source, recipe)
    if args.limit:
        recipe = recipe.model_copy(update={"items": min(recipe.items, args.limit)})
    run = locate(args, args.resume) if args.resume else None
    named = {text.partition("=")[0].strip() for text in args.set}
    files = intake_files.read_all(_paths(source, recipe), run, named)
    constitution = load_constitution(files["constitution.yaml"].path, files["constitution.yaml"].data)
    check_rounds(constitution, recipe.rounds)
    prompts = {name: _load_prompt(files[f"prompts/{name}.yaml"], recipe) for name in PROMPTS}
    grid = load_grid(files["prompts/grid.yaml"].path, files["prompts/grid.yaml"].data)
    why = [str(manifest.get("override") or ""), (args.override_gate or "").strip()]
    override = "; ".join(dict.fromkeys(filter(None, why)))
    given = _given(recipe, files)
    inputs = Inputs(source, recipe, backend, constitution, prompts, grid, files, sets, override, given)
    return _since(inputs, run, manifest) if run else inputs


def _paths(source: Source, recipe: Recipe) -> dict[str, Path]:
    """Name in the run folder -> where that file is."""
    inside = in_run(source)
    prompts = source.folder / ("prompts" if inside else recipe.prompts)
    paths = {"constitution.yaml": source.folder / ("constitution.yaml" if inside else recipe.constitution)}
    paths |= {f"prompts/{name}.yaml": prompts / f"{name}.yaml" for name in (*PROMPTS, "grid")}
    if recipe.instructions.file:
        copy = source.folder / intake_files.NAME
        paths[intake_files.NAME] = copy if inside and copy.is_file() else home(source) / recipe.instructions.file
    return paths


def _given(recipe: Recipe, files: Mapping[str, InputFile]) -> Intake | None:
    if (file := files.get(intake_files.NAME)) is None:
        return None
    section = recipe.instructions
    return instructionfile.read(file.data, str(file.path), key=section.key, pool=section.pool)


def grown_since(inputs: Inputs, run: Path, manifest: Mapping[str, Any]) -> Inputs:
    """The inputs, marked if the file of instructions differs from the run's by more lines alone."""
    then = manifest.get("files", {}).get(intake_files.NAME)
    if inputs.given is None or then in (None, inputs.hashes[intake_files.NAME]):
        return inputs
    section = inputs.recipe.instructions
    copy = intake_files.grown_from(run, manifest, inputs.given, key=section.key, pool=section.pool)
    return replace(inputs, grown_from=copy)


def _since(inputs: Inputs, run: Path, manifest: Mapping[str, Any]) -> Inputs:
    """On a resume: new lines are taken until training began; from then on the run's own copy holds."""
    inputs = grown_since(inputs, run, manifest)
    if inputs.grown_from is None or "training_identity" not in manifest:
        return inputs
    note = f"{intake_files.NAME}: has grown since training began; this run goes on with its own copy (--fork takes all)"
    files = {**inputs.files, intake_files.NAME: replace(inputs.grown_from, note=note)}
    return replace(inputs, files=files, given=_given(inputs.recipe, files), grown_from=None)


def _load_prompt(file: InputFile, recipe: Recipe) -> Prompt:
    return replace(load_prompt(file.path, content=file.data), few_shot=getattr(recipe.few_shot, file.path.stem, -1))


def _manifest_of(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest of the run to resume: its milestone and --set hold on unless said otherwise."""
    if not args.resume:
        return {}
    return read_manifest(locate(args, args.resume) / "manifest.json")


def _peek_backend(source: Source, milestone: str, sets: list[str]) -> Backend:
    """Which backend runs, before the embedded overlay can be applied: the overlay does not choose it."""
    return backend_of(recipes.resolve(source, milestone=milestone, sets=sets).model)


def open_run(inputs: Inputs, args: argparse.Namespace) -> Run:
    """A new run folder, or an existing one whose data this recipe continues (else exit 3, key by key)."""
    recipe, root = inputs.recipe, runs_root(inputs.source, inputs.recipe)
    if args.resume:
        path = resolve_run(args.resume, root)
        run = Run.open(path, **start_facts(inputs))
        sets = (word for text in inputs.sets for word in ("--set", text))  # a fork knows only what it is told
        asked = shlex.join([str(args.recipe), "--milestone", recipe.milestone, *sets])
        try:
            check_identity(run.manifest.get("identity", {}), inputs.identity(then=True), str(path), asked)
            if "training_identity" in run.manifest:
                now = inputs.identity(training=True, then=True)
                check_identity(run.manifest["training_identity"], now, str(path), asked)
            if not holds(run.resolved_path, recipes.dump(recipe)):
                write_atomic(run.resolved_path, recipes.dump(recipe))
                run.event("recipe_changed")
            if inputs.grown_from:  # before the copy: a kill in between leaves what the next resume mends
                run.update_manifest(identity=inputs.identity(), stages=inputs.stages(), files=inputs.hashes)
                run.event("instructions_grew", before=inputs.grown_from.sha, now=inputs.hashes[intake_files.NAME])
            if args.set:
                run.update_manifest(sets=_later_sets(run.manifest.get("sets", []), args.set))
            if inputs.override != run.manifest.get("override", ""):
                run.update_manifest(override=inputs.override)
            copy_inputs(inputs, run.path)  # a kill may have come before the first copy
        except BaseException:
            run.__exit__(*sys.exc_info())
            raise
        return run
    return create_run(inputs, args)


def _later_sets(before: list[str], now: list[str]) -> list[str]:
    """What --set says from now on: it holds on for the next resume, and a key set again is there once."""
    again = {text.partition("=")[0].strip() for text in now}
    return [text for text in before if text.partition("=")[0].strip() not in again] + now


def start_facts(inputs: Inputs) -> dict[str, Any]:
    """What an attempt's first event says."""
    price = inputs.recipe.budget.usd_per_hour
    return {"usd_per_hour": price, "argv": shlex.join(sys.argv[1:]), "python": sys.version.split()[0]}


def create_run(inputs: Inputs, args: argparse.Namespace) -> Run:
    """A new, locked run folder with the recipe and copies of its inputs."""
    recipe, root = inputs.recipe, runs_root(inputs.source, inputs.recipe)
    identity = inputs.identity()
    content: dict[str, bytes | str] = {
        "recipe.toml": inputs.source.data,
        "recipe.resolved.toml": recipes.dump(recipe),
    }
    manifest = {
        "milestone": recipe.milestone,
        "sets": [*args.set, f"items={recipe.items}"] if args.limit else args.set,
        "backend": inputs.backend,
        "home": os.path.relpath(inputs.folder, root / "a-run"),
        "identity": identity,
        "stages": inputs.stages(),
        "files": inputs.hashes,
        "items": recipe.items,
        "heldout_items": recipe.heldout.items,
        "versions": versions(),
    }
    manifest |= {"override": inputs.override} if inputs.override else {}
    run_id, attempt = new_run_id(recipe.milestone, identity), 0
    while True:
        try:
            run = Run.create(
                root, run_id + (f"-{attempt}" if attempt else ""), content, manifest, **start_facts(inputs)
            )
            break
        except Taken:  # runs that start within one second
            attempt += 1
    copy_inputs(inputs, run.path)
    return run


def copy_inputs(inputs: Inputs, folder: Path) -> None:
    """Copies of every input file, so that the run can be moved, read, and continued when the originals change.

    Called after the identity was checked, so a copy that was damaged becomes whole again.
    """
    (folder / "prompts").mkdir(exist_ok=True)
    for name, file in inputs.files.items():
        if not holds(folder / name, file.data):
            write_atomic(folder / name, file.data)


def versions() -> dict[str, str]:
    """Installed versions of what shapes results, read from metadata (no import)."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class ModelOnDemand:
    """Loads the weights at the first call and records what was loaded; a resume with nothing left never calls it."""

    def __init__(self, inputs: Inputs, run: Run) -> None:
        self.inputs, self.run = inputs, run
        self.model: LoadedModel | None = None

    def __call__(self) -> LoadedModel:
        if self.model is None:
            recipe = self.inputs.recipe
            self.run.status(now=True, stage="load the model")
            self._preflight_machine()
            self.model = load(recipe.model, self.inputs.backend, seed=recipe.seed, say=say)
            self.model.rules = Rules(recipe.sampling.min_p, recipe.sampling.no_repeat_ngram)
            known, facts = self.run.manifest.get("model"), self.model.facts
            if known and known.get("revision") != facts.get("revision"):
                then, now = {"revision": str(known.get("revision"))}, {"revision": str(facts.get("revision"))}
                check_identity(then, now, str(self.run.path))
            self.run.event("model_loaded", **facts)
            if not known:
                self.run.update_manifest(model=facts)
            how = f"{facts.get('quantization', 'none')}, {self.model.device}"
            say(f"model: {facts['model']} loaded in {facts.get('load_seconds', 0)} s ({how})")
            self._preflight_model(self.model)
        return self.model

    def _preflight_machine(self) -> None:
        """On a GPU: driver, versions, disk and memory, before gigabytes are read or downloaded."""
        if self.inputs.backend == "cuda":
            from cai.preflight import machine as doctor

            runs = runs_root(self.inputs.source, self.inputs.recipe)
            doctor.preflight("machine", doctor.machine_checks(self.inputs.recipe, "cuda", runs), self.run.event, say)

    def _preflight_model(self, model: LoadedModel) -> None:
        """On a GPU all checks of the loaded model; on the embedded one, that a padded batch equals its rows alone."""
        from cai.preflight import machine as doctor
        from cai.preflight import model as doctor_model

        recipe = self.inputs.recipe
        if self.inputs.backend == "cuda":
            checks = doctor_model.model_checks(model, recipe, self.inputs.prompts)
            doctor.preflight("model", checks, self.run.event, say)
        elif self.inputs.backend == "embedded":
            checks = doctor_model.short_checks(model, recipe, self.inputs.prompts)
            doctor.preflight("model", checks, self.run.event, say)


def say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def session(inputs: Inputs, args: argparse.Namespace) -> Iterator[Context]:
    """An open, locked run with its log and a stop switch; everything is closed on every way out."""
    switch = StopSwitch().install()
    try:
        with open_run(inputs, args) as run, run.records() as log:
            if log.notice:
                say(log.notice)
            progress = Progress(run, inputs.recipe.budget.usd_per_hour)
            yield Context(
                recipe=inputs.recipe,
                run=run,
                log=log,
                constitution=inputs.constitution,
                prompts=inputs.prompts,
                model=ModelOnDemand(inputs, run),
                stopped=switch,
                check_stop=switch.check,
                progress=progress,
            )
    finally:
        switch.uninstall()


def free_gib(folder: Path) -> float:
    return shutil.disk_usage(folder).free / 2**30


def locate(args: argparse.Namespace, argument: str) -> Path:
    """The run folder that a command's argument names (`runs/ID`, `ID`, `runs/latest`), without opening it."""
    source = recipes.read(args.recipe)
    root = source.folder.parent if in_run(source) else source.folder / expanded(str(source.table.get("runs", "runs")))
    for text in args.set:
        if (named := recipes.parse_set(text).get("runs")) is not None:
            root = source.folder / expanded(str(named))
    return resolve_run(argument or "latest", _usable(root, source))
