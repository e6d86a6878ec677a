"""From arguments to an open run: recipe, inputs, run folder (new or resumed), and the context the stages share.

Owns which files are inputs and their hashes, what a new run folder holds, and the checks of a resume. Doesn't own the
order of the pipeline (runner.py) nor the folder's mechanics (run.py).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from cai import errors, world
from cai.data import chain, rounds
from cai.engine import Rules
from cai.engine.model import Model
from cai.errors import CaiError, Stopped
from cai.inputs import Inputs, copy_inputs, in_run, later_sets, runs_root
from cai.models import threads
from cai.models.loading import check_modules
from cai.models.policy import load
from cai.preflight.download import download_line
from cai.recipe import load as recipes
from cai.run import lines, replica, resuming, words
from cai.run.budget import hourly
from cai.run.context import Context
from cai.run.folder import Run, Taken, check_identity
from cai.run.manifest import read_manifest, refuse_edited
from cai.run.progress import Progress
from cai.run.run_ids import new_run_id, resolve_run
from cai.run.stop import StopSwitch
from cai.run.tracker import open_tracker
from cai.store.files import holds, write_atomic
from cai.store.jsonl import JsonObject, Row
from cai.terminal import say, word
from cai.world import gather

VERSIONED = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", "accelerate", "datasets")


def open_run(inputs: Inputs, args: argparse.Namespace) -> Run:
    """A new run folder, or an existing one whose data this recipe continues (else exit 3, key by key)."""
    recipe, root = inputs.recipe, runs_root(inputs.source, inputs.recipe)
    if not args.resume:
        return create_run(inputs, args)
    path = resolve_run(args.resume, root)
    _check_resume(read_manifest(path / "manifest.json"), inputs, args, path)  # a run that is refused stays as it was
    run = Run.open(path, **start_facts(inputs, args))
    try:
        _check_resume(run.manifest, inputs, args, path)  # again: another runner may have had it in between
        if "training_identity" in run.manifest:
            then, now = run.manifest["training_identity"], inputs.identity(training=True, then=True)
            if resuming.more_items(then, now):
                kept = resuming.train_anew(run)
                say(f"more items: training begins again; what was trained on fewer is kept in {kept}")
        if not holds(run.resolved_path, recipes.dump(recipe)):
            write_atomic(run.resolved_path, recipes.dump(recipe))
            run.event("recipe_changed")
        if inputs.grown_from:  # before the copy: a kill in between leaves what the next resume mends
            run.update_manifest(identity=inputs.identity(), stages=inputs.stages(), files=inputs.hashes)
            run.event("instructions_grew", before=inputs.grown_from.sha, now=inputs.hashes["instructions.file"])
        _keep_recipe(run, inputs, args)
        if inputs.override != run.manifest.get("override", ""):
            run.update_manifest(override=inputs.override)
        if run.manifest.get("files") != inputs.hashes:  # edited probes or judge prompts: no part of the identity
            run.update_manifest(files=inputs.hashes)
        copy_inputs(inputs, run.path)  # a kill may have come before the first copy
    except BaseException:
        run.__exit__(*sys.exc_info())
        raise
    return run


def _check_resume(manifest: JsonObject, inputs: Inputs, args: argparse.Namespace, path: Path) -> None:
    """Errors: CaiError(DRIFT) with the lines that go on; a fork keeps the run's milestone and --set by itself.

    CaiError(CORRUPT) before that, where the manifest is not what the program wrote: it decides what is the same.
    """
    refuse_edited(manifest, path / "manifest.json")
    asked = " ".join(map(word, (args.recipe, *lines.set_words(args.set))))
    path = lines.near(path)
    resuming.check_milestone(manifest, path, args.milestone, f"{asked} --milestone {args.milestone}")
    now, training = inputs.identity(then=True), inputs.identity(training=True, then=True)
    resuming.check(manifest, now, training, path, asked)


def _keep_recipe(run: Run, inputs: Inputs, args: argparse.Namespace) -> None:
    """The run's recipe.toml and --set from now on: the line that goes on with them must give this very recipe."""
    if not in_run(inputs.source) and not holds(run.recipe_path, inputs.source.data):
        write_atomic(run.recipe_path, inputs.source.data)
    if not in_run(inputs.source) and (home := _home(inputs, run.path.parent)) != run.manifest.get("home"):
        run.update_manifest(home=home)
    if given := _given_sets(inputs, args):
        run.update_manifest(sets=later_sets(run.manifest.get("sets", []), given))
    items = {"items": inputs.recipe.items, "heldout_items": inputs.recipe.heldout.items}
    if any(run.manifest.get(name) != count for name, count in items.items()):
        run.update_manifest(**items)


def _given_sets(inputs: Inputs, args: argparse.Namespace) -> list[str]:
    return [*args.set, *([f"items={inputs.recipe.items}"] if args.limit else [])]


def _home(inputs: Inputs, root: Path) -> str:
    return os.path.relpath(inputs.folder, root / "a-run")


def start_facts(inputs: Inputs, args: argparse.Namespace) -> Row:
    """What an attempt's first event says, and when the program began: reading the inputs counts as well."""
    price, began = hourly(inputs.recipe), getattr(args, "began", None)
    argv, here = shlex.join(sys.argv[1:]), world.world()
    facts = {"began": began, "usd_per_hour": price, "argv": argv, "python": sys.version.split()[0]}
    return facts | ({"processes": here.size} if here.several else {})


def create_run(inputs: Inputs, args: argparse.Namespace) -> Run:
    """A new, locked run folder with the recipe and copies of its inputs."""
    recipe, root = inputs.recipe, runs_root(inputs.source, inputs.recipe)
    identity = inputs.identity()
    content = {"recipe.toml": inputs.source.data, "recipe.resolved.toml": recipes.dump(recipe)}
    manifest = {
        "milestone": recipe.milestone,
        "sets": later_sets(inputs.sets, _given_sets(inputs, args)),
        "backend": inputs.backend,
        "home": _home(inputs, root),
        "identity": identity,
        "stages": inputs.stages(),
        "files": inputs.hashes,
        "items": recipe.items,
        "heldout_items": recipe.heldout.items,
        "versions": versions(),
    }
    manifest |= {"override": inputs.override} if inputs.override else {}
    run_id = new_run_id(recipe.milestone, identity)
    for attempt in itertools.count():
        with contextlib.suppress(Taken):  # runs that start within one second
            name = run_id + (f"-{attempt}" if attempt else "")
            run = Run.create(root, name, content, manifest, **start_facts(inputs, args))
            break
    copy_inputs(inputs, run.path)
    return run


@lru_cache(maxsize=1)
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
        self.model: Model | None = None

    def __call__(self) -> Model:
        if self.model is None:
            recipe = self.inputs.recipe
            self.run.status(now=True, stage="load the model")
            self._preflight_machine()
            if line := download_line(recipe, self.inputs.backend):
                say(line)
            if self.inputs.backend != "fake":
                say("model: loading, alive; a large one takes minutes, and more where it is downloaded")
            self.model = load(recipe.model, self.inputs.backend, seed=recipe.seed, say=say)
            self.model.rules = Rules(recipe.sampling.min_p, recipe.sampling.no_repeat_ngram)
            self._check_loaded(self.model)
            known, facts = self.run.manifest.get("model"), self.model.facts
            self.run.event("model_loaded", **facts)
            if not known:
                self.run.update_manifest(model=facts)
                self._tell_room(self.model)
            how = f"{facts.get('quantization', 'none')}, {self.model.device}"
            if isinstance(count := facts.get("threads"), int):
                how += f", {threads.in_words(count, os.environ)}"
            say(f"model: {facts['model']} loaded in {facts.get('load_seconds', 0)} s ({how})")
            if isinstance(count, int):
                self._tell_threads(count, known or {})
            self._preflight_model(self.model)
        return self.model

    def _tell_threads(self, count: int, known: Mapping[str, object]) -> None:
        """What else wants the cores, and whether a resume has as many threads as the run began with."""
        for line in (
            threads.advice(count, os.getloadavg()[0], threads.usable_cores()),
            threads.drift(known.get("threads"), count),
        ):
            if line:
                say(line)

    def _tell_room(self, model: Model) -> None:
        """Which reviews will all be refused (`prompt_too_long`), before anything is drawn."""
        inputs, recipe = self.inputs, self.inputs.recipe
        if not recipe.pairs.revised:
            return
        for stage, ids in rounds.without_room(recipe, inputs.prompts, inputs.constitution, model).items():
            named = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            say(
                f"{stage}: under {named} the examples of {inputs.prompts[stage].path} leave no room in "
                f"model.max_seq_length = {recipe.model.max_seq_length}: all are refused (prompt_too_long). "
                "Shorten them or raise it."
            )

    def set_aside(self) -> None:
        self.model = None

    def _check_loaded(self, model: Model) -> None:
        """It is the run's model and has the projections to train; today is the day on which the run began."""
        known = self.run.manifest.get("model") or {}
        then = {name: str(known[name]) for name in ("revision", "tokenizer") if name in known}
        if then.get("revision") != "local":  # a folder, in runs from before its content was kept
            check_identity(then, {name: str(model.facts.get(name)) for name in then}, str(self.run.path))
        if self.inputs.backend != "fake":
            from cai.training.loss import head_of

            check_modules(model.hf, self.inputs.recipe.lora.target_modules)
            head_of(model.hf)  # a head that training cannot compute is refused before the first token is drawn
            model.tokenizer.date = datetime.fromisoformat(str(self.run.manifest["created"]))

    def _preflight_machine(self) -> None:
        """On a GPU: driver, versions, disk and memory, before gigabytes are read or downloaded."""
        if self.inputs.backend == "cuda":
            from cai.preflight import machine as doctor

            runs = runs_root(self.inputs.source, self.inputs.recipe)
            doctor.preflight("machine", doctor.machine_checks(self.inputs.recipe, "cuda", runs), self.run.event, say)

    def _preflight_model(self, model: Model) -> None:
        """On a GPU all checks of the loaded model; on the embedded one, that a padded batch equals its rows alone."""
        from cai.preflight import machine as doctor
        from cai.preflight import model_checks as doctor_model

        if self.inputs.backend != "fake":
            look = doctor_model.model_checks if self.inputs.backend == "cuda" else doctor_model.short_checks
            doctor.preflight("model", look(model, self.inputs.recipe, self.inputs.prompts), self.run.event, say)


def _facts(inputs: Inputs) -> JsonObject:
    """What a tracker shows of a run beside its curves."""
    recipe = inputs.recipe
    facts = {"milestone": recipe.milestone, "model": recipe.model.name, "backend": inputs.backend}
    return facts | {"items": recipe.items, "beta": recipe.dpo.beta, "learning_rate": recipe.dpo.learning_rate}


def _steps(inputs: Inputs) -> tuple[words.Step, ...]:
    """Every step of this run, for `step n of m`."""
    recipe = inputs.recipe
    ordered = [(stage.name, round_) for stage, round_ in chain.ordered(recipe.rounds, recipe)]
    measured = recipe.evaluation.enabled
    exam = measured and recipe.evaluation.critic_items > 0 and "revision" in recipe.pairs.kinds
    return words.plan(ordered, recipe.guard.enabled, exam, measured and bool(inputs.probes))


@contextlib.contextmanager
def session(inputs: Inputs, args: argparse.Namespace) -> Iterator[Context]:
    """An open, locked run with its log and a stop switch; everything is closed on every way out."""
    switch = StopSwitch().install()
    run = None
    try:
        world.join()
        _require_same(inputs)
        with contextlib.ExitStack() as closing, _opened(inputs, args) as (run, elsewhere), run.records() as log:
            closing.enter_context(_others_needed())
            if world.world().first:
                replica.lend(run)
            if log.notice:
                say(log.notice)
            whole = partial(chain.whole_items, rounds=inputs.recipe.rounds, kind=inputs.recipe.pairs.kind)
            asked = inputs.recipe.report.tracker if world.world().first else "none"
            tracker = open_tracker(asked, run.path, _facts(inputs))
            if tracker is not None:
                run.tell = tracker.tell
                closing.callback(tracker.close)
            progress = Progress(run, hourly(inputs.recipe), whole, _steps(inputs))
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
                elsewhere=elsewhere,
            )
    except CaiError as error:
        if run is not None and not args.resume and error.code == errors.USAGE:
            run.discard_if_empty()  # a usage fault that was found late leaves no run behind
        if run is not None and error.code == errors.RESUMABLE and "--resume" not in str(error):
            raise Stopped(f"{error}: {lines.resume(run.path)}") from error
        raise
    finally:
        world.leave(failed=sys.exc_info()[0] is not None)
        switch.uninstall()


@contextlib.contextmanager
def _opened(inputs: Inputs, args: argparse.Namespace) -> Iterator[tuple[Run, tuple[Path, int] | None]]:
    """The run; for its further processes a run on a copy of it, and where the run itself is."""
    if world.world().first:
        with open_run(inputs, args) as run:
            yield run, None
    else:
        with replica.borrowed(start_facts(inputs, args)) as found:
            yield found


def _require_same(inputs: Inputs) -> None:
    """Each process has the same recipe, and a device of the same kind. Errors: CaiError, before there is a run."""
    found = [part.decode() for part in gather(inputs.backend.encode(), "which model")]
    if len(set(found)) > 1:
        raise CaiError(f"torchrun: the processes would run on {', '.join(found)}: start as many as there are GPUs.")
    if len(set(gather(repr(sorted(inputs.identity().items())).encode(), "which recipe"))) > 1:
        raise CaiError("torchrun: the processes read different recipes or input files: every machine needs the same.")


@contextlib.contextmanager
def _others_needed() -> Iterator[None]:
    """An error of a library that says that another process is gone is a stop: the run can be resumed."""
    try:
        yield
    except RuntimeError as error:
        if world.lost(error):
            raise world.gone("while this one waited for it") from error
        raise
