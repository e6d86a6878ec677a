"""`--export RUN --to FOLDER`: the adapter with a model card, the data set with its card, ready to load and to share.

Owns the exported folder's layout and the order of its making: files, what the model itself says of them (the probe, the
merge), the move to their place. Nothing is published unless `--push` names a repository, and then privately.
A second export of the same run into the same folder finishes or renews the first. Imports torch only where the model is
asked.

    FOLDER/adapter/   PEFT adapter, chat template, tokenizer, README.md     FOLDER/dataset/   pairs, examples, README.md
    FOLDER/merged/    bf16 weights, the same files; merged.gguf, Modelfile  FOLDER/report.html
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from cai import errors
from cai.commands.export_arm import ADAPTER_FILES, OWN, ExportedArm, arm_named, line_of, names, whole_adapter
from cai.commands.export_base import Base, base_of
from cai.commands.export_card import model_card
from cai.commands.export_lines import usage
from cai.commands.export_pairs import write_dataset
from cai.commands.export_prompt import Asking, asking, write_prompt_files
from cai.commands.push import Say, check_name, push, push_plan
from cai.engine.model import Model
from cai.errors import CaiError
from cai.report.snapshot import Snapshot, read_story
from cai.run import digests, lines
from cai.run.events import read_events
from cai.store import records
from cai.store.files import io_error, write_atomic, write_json_atomic
from cai.terminal import say, word

if TYPE_CHECKING:
    from cai.commands.merge import BaseSource

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # no other --to is the remedy
CONVERTER = "convert_hf_to_gguf.py"
PART = ".cai-export.part"  # in the target folder: what is not whole yet; the next export there begins again
TOLD = ("dataset/", "eval/", "prompts/", "constitution.yaml", "recipe.resolved.toml")
EXPORTED = {"adapter", "dataset", "report.html", "merged", "merged.gguf", "Modelfile", PART}


def command(args: argparse.Namespace) -> int:
    """Write the folder; push it if `--push` names a repository. Exit 6 where a merged model is not the adapter's."""
    from cai.inputs import locate

    run, merged = locate(args, args.export), bool(getattr(args, "merged", False))
    if args.push:
        check_name(args.push)
    if args.form:
        return _to_mark(run, args)
    if args.dry_run:
        return _dry(run, args)
    if args.to is None:
        raise CaiError("--export: needs --to FOLDER, an empty or new folder.")
    folder = export(run, args.to, say, merged=merged, arm=args.arm)
    if args.push:
        push(folder, args.push, say)
    return errors.DONE


def _to_mark(run: Path, args: argparse.Namespace) -> int:
    """Texts for an annotation tool instead of a model for a server."""
    from cai.commands import export_argilla

    export_argilla.refuse(args)
    if args.to is None and not args.dry_run:
        raise CaiError("--export: needs --to FOLDER, an empty or new folder.")
    _refuse_damage(run)
    export_argilla.export(read_story(run), None if args.dry_run else args.to, say)
    return errors.DONE


def _dry(run: Path, args: argparse.Namespace) -> int:
    """What would be written and pushed: made beside everything, listed and thrown away; the model is not asked."""
    with tempfile.TemporaryDirectory() as beside:
        folder = export(run, Path(beside) / "export", lambda line: None, probe=False, arm=args.arm)
        say("\n".join(push_plan(folder, args.push)))
    if args.merged:
        say("and merged/, the whole weights in bf16, which a dry run does not make")
    say(
        "Nothing was written and nothing was sent. Without --dry-run this exports"
        + (" and pushes." if args.push else ".")
    )
    return errors.DONE


def export(run: Path, to: Path, say: Say, *, merged: bool = False, probe: bool = True, arm: str = OWN) -> Path:
    """Adapter, data set and report of a run in `to`. Errors: CaiError for no adapter, a full folder, a bad merge.

    `probe`: the loaded model is asked whether the exported files prompt it as it was measured. `arm`: another trained
    adapter than the run's own.
    """
    _refuse_damage(run)
    untrained = not (run / "adapter").exists() and not (run / "train" / "result.json").exists()
    if not merged and arm == OWN and untrained:
        return _data_alone(run, to, say)
    trained = arm_named(run, arm)
    snapshot, adapter = read_story(run), whole_adapter(trained, run)
    base, found = base_of(snapshot), asking(snapshot)
    with _part(run, adapter, to) as part:
        _fill(snapshot, trained, base, found, part)
        if merged or probe:
            _ask_model(snapshot, trained, base, found, to, say, merged)
        else:
            _publish(to)
    say("\n".join(usage(base, found, snapshot.recipe.lora.rank, to, merged)))
    return to


@contextmanager
def _part(run: Path, adapter: Path, to: Path) -> Iterator[Path]:
    """An empty part folder in `to`, which is new, empty, or holds an export of this very adapter; gone in the end."""
    if to.resolve().is_relative_to(run.parent.resolve()):
        raise CaiError(f"{to}: lies among the runs. Give --to a folder of its own.")
    try:
        there = {path.name for path in to.iterdir()} if to.exists() else set()
        if there - EXPORTED or not _same_adapter(adapter, to / "adapter"):
            raise CaiError(f"{to}: is not empty, nor an export of this run. Give --to a new folder.")
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(to / PART, ignore_errors=True)
        (to / PART).mkdir(mode=0o700)
    except OSError as error:  # a file, a folder that is not ours, a name that cannot be
        if error.errno in DISK:
            raise io_error(to, "writing", error) from None
        raise CaiError(f"{to}: {error.strerror}. Give --to a new folder in one that you may write.") from None
    try:
        yield to / PART
    finally:
        shutil.rmtree(to / PART, ignore_errors=True)


def _same_adapter(adapter: Path, exported: Path) -> bool:
    if not exported.exists():
        return True
    name = ADAPTER_FILES[0]
    return (exported / name).is_file() and (exported / name).read_bytes() == (adapter / name).read_bytes()


def _data_alone(run: Path, to: Path, say: Say) -> Path:
    """The export of a run that was stopped after its pairs: the data set and the report."""
    if not (run / "dataset").is_dir():
        raise CaiError(f"{run}: it has neither an adapter nor a data set yet. Resume it first.")
    with _part(run, run / "adapter", to) as part:
        _copy_data(run, part)
        _publish(to)
    say(f"exported to {word(to)} (the data set alone: the run has no adapter yet)")
    say(f"datasets:      load_dataset({str((to / 'dataset').resolve())!r})")
    say(f"the adapter:   {lines.resume(run)}, then: {lines.export(run)}")
    for arm in names(run):
        say(f"what is there: {line_of(run, arm)}")
    return to


def _refuse_damage(run: Path) -> None:
    """What is copied, and what the cards tell, must be what the last attempt left."""
    records.refuse_missing(run / "records.jsonl")
    left, settled = digests.left(read_events(run / "events.jsonl"))
    for name, entry in left.items() if settled else ():
        if name.startswith(TOLD) and not digests.is_log(name) and (why := digests.fault(run, name, entry)):
            remedy = "resume the run, which writes it again (what an experiment wrote, its command does)"
            raise CaiError(f"{run / name}: {why}: {remedy}", errors.CORRUPT)
    sha, page = digests.page_sums(run).get("report.html"), run / "report.html"
    if sha and page.is_file() and digests.digest_of(page) != sha:
        raise CaiError(
            f"{page}: is not as it was written; again with: {lines.command('--report', run)}", errors.CORRUPT
        )


def _fill(snapshot: Snapshot, arm: ExportedArm, base: Base, found: Asking, part: Path) -> None:
    (part / "adapter").mkdir(mode=0o700)
    for name in ADAPTER_FILES:
        write_atomic(part / "adapter" / name, (arm.adapter / name).read_bytes())
    config = _named(part / "adapter" / "adapter_config.json", base)
    write_prompt_files(found, part / "adapter")
    card = model_card(snapshot, base, found, arm, modules=config.get("target_modules"))
    write_atomic(part / "adapter" / "README.md", card.encode())
    _copy_data(snapshot.path, part)


def _copy_data(run: Path, part: Path) -> None:
    if (run / "dataset").is_dir():
        write_dataset(run / "dataset", part / "dataset")
    if (run / "report.html").is_file():
        write_atomic(part / "report.html", (run / "report.html").read_bytes())


def _ask_model(
    snapshot: Snapshot, arm: ExportedArm, base: Base, found: Asking, to: Path, say: Say, merged: bool
) -> None:
    """The probe, then publish; with `merged` the merge too, which appears when it was found to be the adapter's."""
    from cai.commands import probe

    model = _loaded(snapshot, arm.adapter, say, needed=merged)
    if model is None:
        return _publish(to)
    say(probe.through_template(model, snapshot, found, to / PART / "adapter"))
    _publish(to)
    if not merged:
        return None
    from cai.commands import merge

    texts = probe.prompts_of(snapshot)
    ids = [found.render(text, model.tokenizer).token_ids for text in texts]
    before, source = merge.measure(model, ids), _source(snapshot, base)
    del model
    probe.free()
    whole = to / PART / "merged"
    merge.merge(before, source, arm.adapter, whole, say)
    write_prompt_files(found, whole)
    if found.format == "base" and found.eos_id is not None:
        config = orjson.loads((whole / "config.json").read_bytes())
        write_json_atomic(whole / "config.json", config | {"eos_token_id": found.eos_id})
    write_atomic(whole / "README.md", model_card(snapshot, base, found, arm, merged=True).encode())
    _publish(to)
    made = to_gguf(to / "merged", to / PART / "merged.gguf", say)
    write_atomic(to / PART / "Modelfile", found.modelfile("./merged.gguf" if made else "./merged").encode())
    return _publish(to)


def _loaded(snapshot: Snapshot, adapter: Path, say: Say, *, needed: bool) -> Model | None:
    """The run's model with its adapter; None, with a line, where it cannot be asked here. Errors only if `needed`."""
    from cai.commands.probe import load_tuned
    from cai.models.policy import cuda_devices

    why = {"fake": "the fake model has no weights"}.get(snapshot.backend, "")
    if snapshot.backend == "cuda" and not cuda_devices():
        why = "no GPU here to load the model on"
    if not why:
        try:
            return load_tuned(snapshot, adapter)
        except CaiError as error:
            if needed:
                raise
            why = str(error)
    if needed:
        raise CaiError(f"--merged: {why}. Leave --merged out, or export where the run was made.")
    say(f"probe: skipped, {why}; that the exported files prompt the model as it was measured was not tried")
    return None


def _source(snapshot: Snapshot, base: Base) -> BaseSource:
    from cai.commands.merge import BaseSource, plain_name
    from cai.models import embedded

    if snapshot.backend == "embedded":
        return BaseSource(str(embedded.folder()))
    return BaseSource(plain_name(base.here), base.revision)


def _publish(to: Path) -> None:
    """What is whole moves from the part folder to its place; of a folder that is there already, file by file."""
    for path in sorted((to / PART).iterdir()):
        _move(path, to / path.name)


def _move(path: Path, place: Path) -> None:
    if not (path.is_dir() and place.is_dir()):
        path.replace(place)
        return
    for inner in sorted(path.iterdir()):
        _move(inner, place / inner.name)
    path.rmdir()


def _named(config: Path, base: Base) -> dict[str, object]:
    """adapter_config.json with the base as others find it, so that the adapter folder loads by itself."""
    try:
        values = orjson.loads(config.read_bytes())
    except orjson.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        remedy = "remove the run's adapter folder and resume, which exports it again"
        raise CaiError(f"{config}: not whole, as it is in the run: {remedy}", errors.CORRUPT)
    write_json_atomic(config, values | {"base_model_name_or_path": base.shared, "revision": base.revision or None})
    return values


def converter() -> Path | None:
    """llama.cpp's script, from LLAMA_CPP or the path."""
    home, found = os.environ.get("LLAMA_CPP"), shutil.which(CONVERTER)
    places = [*([Path(home) / CONVERTER] if home else []), *([Path(found)] if found else [])]
    return next((place for place in places if place.is_file()), None)


def to_gguf(merged: Path, target: Path, say: Say) -> bool:
    """Convert with llama.cpp where it is installed; says so where it is not."""
    script = converter()
    if script is None:
        say(f"no GGUF: {CONVERTER} is not installed (set LLAMA_CPP to llama.cpp's folder)")
        return False
    command = [sys.executable, str(script), str(merged), "--outfile", str(target), "--outtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CaiError(f"{script}: failed: {tail}. Convert {merged} by hand.", errors.IO)
    return True
