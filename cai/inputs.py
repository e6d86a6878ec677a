"""Everything that the recipe names, read, checked and hashed before anything is spent.

Owns which files are inputs and where runs lie; `session` opens a run with them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai.data import chain, slots
from cai.errors import CaiError
from cai.models.policy import Backend, backend_of
from cai.recipe import load as recipes
from cai.recipe.constitution import Constitution, check_rounds, load_constitution
from cai.recipe.grid import Grid, load_grid
from cai.recipe.load import Recipe, Source
from cai.recipe.prompts import Prompt, load_prompt
from cai.run.folder import resolve_run
from cai.run.manifest import read_manifest
from cai.store.files import holds, write_atomic

LONGEST_NAME = 100  # of a file that a run may make, its id included


@dataclass(frozen=True)
class Inputs:
    """Everything the recipe names, read and checked. `files`: name in the run folder -> (path, sha256).

    `sets`: what --set says, now and when the run began. `override`: why gates are overridden, likewise; "" if not.
    """

    source: Source
    recipe: Recipe
    backend: Backend
    constitution: Constitution
    prompts: Mapping[str, Prompt]
    grid: Grid
    files: Mapping[str, tuple[Path, str]]
    sets: Sequence[str] = ()
    override: str = ""

    @property
    def hashes(self) -> dict[str, str]:
        return {name: sha for name, (_, sha) in self.files.items()}

    def identity(self, training: bool = False) -> dict[str, str]:
        model = {"model.backend": self.backend}
        return recipes.identity(self.recipe, self.hashes, training=training) | model

    @property
    def limit_tokens(self) -> int:
        """The most tokens that one item generates when nothing is tried twice."""
        return chain.limit_tokens(self.recipe)

    @property
    def folder(self) -> Path:
        """Where the data files that the recipe names lie: relative paths mean the original's place, in a copy too."""
        return home(self.source)

    @property
    def instructions_path(self) -> Path | None:
        return self.files["instructions.file"][0] if self.recipe.instructions.file else None


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
    inside = in_run(source)
    constitution_path = source.folder / ("constitution.yaml" if inside else recipe.constitution)
    prompts_path = source.folder / ("prompts" if inside else recipe.prompts)
    constitution = load_constitution(constitution_path)
    check_rounds(constitution, recipe.rounds)
    prompts = {name: _load_prompt(prompts_path / f"{name}.yaml", recipe) for name in chain.prompts()}
    grid = load_grid(prompts_path / "grid.yaml")
    paths = {"constitution.yaml": constitution_path, "prompts/grid.yaml": prompts_path / "grid.yaml"}
    paths |= {f"prompts/{name}.yaml": prompts_path / f"{name}.yaml" for name in chain.prompts()}
    if recipe.instructions.file:
        from cai.data.instructions import read_file

        copy = source.folder / "instructions.file"
        path = copy if inside and copy.is_file() else home(source) / recipe.instructions.file
        read_file(path)
        paths["instructions.file"] = path
    if recipe.instructions.file and recipe.model.backend == "fake" and recipe.items > slots.HELDOUT:
        raise CaiError(f"{source.path}: items: at most {slots.HELDOUT}")
    files = {name: (path, hashlib.sha256(path.read_bytes()).hexdigest()[:16]) for name, path in paths.items()}
    why = [str(manifest.get("override") or ""), (args.override_gate or "").strip()]
    override = "; ".join(dict.fromkeys(filter(None, why)))
    return Inputs(source, recipe, backend, constitution, prompts, grid, files, sets, override)


def _load_prompt(path: Path, recipe: Recipe) -> Prompt:
    return replace(load_prompt(path, chain.prompts()[path.stem]), few_shot=getattr(recipe.few_shot, path.stem, -1))


def _manifest_of(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest of the run to resume: its milestone and --set hold on unless said otherwise."""
    if not args.resume:
        return {}
    return read_manifest(locate(args, args.resume) / "manifest.json")


def _peek_backend(source: Source, milestone: str, sets: list[str]) -> Backend:
    """Which backend runs, before the embedded overlay can be applied: the overlay does not choose it."""
    return backend_of(recipes.resolve(source, milestone=milestone, sets=sets).model)


def copy_inputs(inputs: Inputs, folder: Path) -> None:
    """Copies of every input file, so that the run can be moved, read, and continued when the originals change.

    Called after the identity was checked, so a copy that was damaged becomes whole again.
    """
    (folder / "prompts").mkdir(exist_ok=True)
    for name, (path, _) in inputs.files.items():
        data = path.read_bytes()
        if not holds(folder / name, data):
            write_atomic(folder / name, data)


def locate(args: argparse.Namespace, argument: str) -> Path:
    """The run folder that a command's argument names (`runs/ID`, `ID`, `runs/latest`), without opening it."""
    source = recipes.read(args.recipe)
    root = source.folder.parent if in_run(source) else source.folder / str(source.table.get("runs", "runs"))
    for text in args.set:
        if (named := recipes.parse_set(text).get("runs")) is not None:
            root = source.folder / str(named)
    return resolve_run(argument or "latest", _usable(root, source))
