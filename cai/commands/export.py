"""`--export RUN --to FOLDER`: the adapter with a model card, the data set with its card, ready to load and to share.

Owns the exported folder's layout, the model card, the check that a merged model is the adapter's, and the lines that
say how to use it. Nothing is published unless `--push` names a repository, and then privately. Imports torch only for
a merge.

    FOLDER/adapter/   PEFT adapter and README.md (model card)      FOLDER/dataset/   pairs, examples, README.md
    FOLDER/merged/    bf16 weights and card, if asked; merged.gguf  FOLDER/report.html
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from cai import errors
from cai.errors import CaiError
from cai.models.guard import described
from cai.report.cards import LICENSES
from cai.report.pages import figure, headline, money, verdict_row
from cai.report.snapshot import Story, read_story
from cai.report.templating import environment
from cai.run import digests
from cai.run.events import read_events
from cai.store.files import write_atomic, write_json_atomic
from cai.store.jsonl import Row
from cai.training.train import load_result

Say = Callable[[str], None]
HUB_NAMES = {"SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # where the embedded model's original lies
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
CONVERTER = "convert_hf_to_gguf.py"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
PART = ".part"  # in the target folder: what is not whole yet; the next export there begins again
PARTS = (("model", "adapter", ""), ("dataset", "dataset", "-pairs"), ("model", "merged", "-merged"))


def command(args: argparse.Namespace) -> int:
    """Write the folder; push it if `--push` names a repository. Exit 6 where a merged model is not the adapter's."""
    from cai.inputs import locate
    from cai.terminal import say

    if args.to is None:
        raise CaiError("--export: needs --to FOLDER, an empty or new folder.")
    merged = bool(getattr(args, "merged", False))
    folder = export(locate(args, args.export), args.to, say, merged=merged)
    if args.push:
        push(folder, args.push, say)
    return errors.DONE


def export(run: Path, to: Path, say: Say, *, merged: bool = False) -> Path:
    """Adapter, data set and report of a run in `to`. Errors: CaiError for no adapter, a full folder, a bad merge."""
    story = read_story(run)
    adapter = _adapter(run)
    _refuse_damage(run)
    if merged and adapter is None:
        raise CaiError(f"{run}: --merged needs a trained adapter. Resume the run first, or leave --merged out.")
    _refuse_place(run, to)
    try:
        if to.exists() and any(path.name != PART for path in to.iterdir()):
            raise CaiError(f"{to}: is not empty. Give --to a new folder.")
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(to / PART, ignore_errors=True)
        (to / PART).mkdir(mode=0o700)
    except OSError as error:  # a file, a folder that is not ours, a name that cannot be
        raise CaiError(f"{to}: {error.strerror}. Give --to a new folder in one that you may write.") from None
    try:
        _fill(story, adapter, to / PART)
        _publish(to)
        if merged and adapter is not None:
            _merge(story, adapter, to, say)
    finally:
        shutil.rmtree(to / PART, ignore_errors=True)
    if adapter is None:
        say(f"exported to {to} (the data set alone: the run has no adapter yet)")
        say(f"datasets:      load_dataset({str((to / 'dataset').resolve())!r})")
    else:
        say("\n".join(usage(story, to, merged)))
    return to


def _refuse_place(run: Path, to: Path) -> None:
    """A run folder and the folder of runs hold runs alone; a hidden folder that is no part of an export is kept."""
    place = to.resolve()
    if place == run.parent or run.parent in place.parents:
        raise CaiError(
            f"{to}: lies among the runs, where every folder is a run. Give --to a folder outside {run.parent}."
        )
    ours = {part for _, part, _ in PARTS} | {"report.html", "merged.gguf"}
    found = [path for path in (to / PART).iterdir() if path.name not in ours] if (to / PART).is_dir() else []
    if found:
        raise CaiError(f"{to}: is not empty ({PART}/{found[0].name} is no part of an export). Give --to a new folder.")


def _fill(story: Story, adapter: Path | None, part: Path) -> None:
    run = story.path
    if adapter is not None:
        _copy(adapter, part / "adapter", ADAPTER_FILES)
        _name_base(part / "adapter" / "adapter_config.json", base_name(story, adapter))
        write_atomic(part / "adapter" / "README.md", model_card(story, adapter).encode())
    if (run / "dataset").is_dir():
        names = [str(p.relative_to(run / "dataset")) for p in sorted((run / "dataset").rglob("*")) if p.is_file()]
        _copy(run / "dataset", part / "dataset", names)
    if (run / "report.html").is_file():
        _copy(run, part, ["report.html"])


def _merge(story: Story, adapter: Path, to: Path, say: Say) -> None:
    """merged/ appears when it was found to be the adapter's, merged.gguf when it is written."""
    from cai.commands.merge import merge

    merge(story, adapter, to / PART / "merged", say)
    write_atomic(to / PART / "merged" / "README.md", model_card(story, adapter, merged=True).encode())
    _publish(to)
    to_gguf(to / "merged", to / PART / "merged.gguf", say)
    _publish(to)


def _publish(to: Path) -> None:
    """What is whole moves from the part folder to its place."""
    for path in sorted((to / PART).iterdir()):
        path.rename(to / path.name)


def _adapter(run: Path) -> Path | None:
    """The run's trained adapter; None for a run that stopped before training, of which the data set is exported.

    Errors: there is neither yet; it is not what training left.
    """
    folder = run / "adapter"
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing and not (run / "train" / "result.json").exists() and (run / "dataset" / "README.md").is_file():
        return None
    if missing:
        raise CaiError(f"{folder}: no {missing[0]}: the run has no trained adapter. Resume it first.")
    if load_result(run / "train") is None:
        raise CaiError(
            f"{folder}: not the bytes that training left (train/result.json): resume the run, which exports it again",
            errors.CORRUPT,
        )
    return folder


def _refuse_damage(run: Path) -> None:
    """What is copied from dataset/ must be what the last attempt left; the report's page likewise."""
    left, settled = digests.left(read_events(run / "events.jsonl"))
    mine = {name: entry for name, entry in left.items() if name.startswith("dataset/")}
    for name, entry in mine.items():
        if why := digests.fault(run, name, entry) if settled else "":
            raise CaiError(f"{run / name}: {why}: resume the run, which writes it again", errors.CORRUPT)


def _name_base(config: Path, base: str) -> None:
    """The base model as others find it, so that the adapter folder loads by itself."""
    try:
        values = orjson.loads(config.read_bytes())
    except orjson.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        remedy = "remove the run's adapter folder and resume, which exports it again"
        raise CaiError(f"{config}: not whole, as it is in the run: {remedy}", errors.CORRUPT)
    if values.get("base_model_name_or_path") != base:
        write_json_atomic(config, values | {"base_model_name_or_path": base})


def _copy(source: Path, target: Path, names: Any) -> None:
    for name in names:
        (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(target / name, (source / name).read_bytes())


def base_name(story: Story, adapter: Path) -> str:
    """The base model as others can find it: a hub id where one is known."""
    try:
        named = str(orjson.loads((adapter / "adapter_config.json").read_bytes()).get("base_model_name_or_path") or "")
    except (OSError, orjson.JSONDecodeError, AttributeError):
        named = ""
    for name in (story.model, named):
        if name in HUB_NAMES:
            return HUB_NAMES[name]
    name = named if HUB_ID.fullmatch(named) else story.model
    return name if HUB_ID.fullmatch(name) else Path(name).name  # a local folder: where it lay is nobody's business


def model_card(story: Story, adapter: Path, *, merged: bool = False) -> str:
    """README.md of the adapter (or the merged weights): front matter with model-index, what it is, gates, cost."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base = base_name(story, adapter)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="constitutional-ai-run",
            dataset_name=story.run_id,
            metric_type=name,
            metric_value=round(float(measured["value"]), 6),
            metric_name=f"{name} (n={measured.get('n', 0)}, judge: {measured.get('judge', '')})",
        )
        for name, measured in headline_figures(story).items()
    ]
    on_hub = "/" in base
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers" if merged else "peft",
        license=LICENSES.get(story.model) or LICENSES.get(base),
        language=["en"],
        tags=["constitutional-ai", "dpo", "trl", "unsloth", "lora", "peft"],
        model_name=story.run_id,
        eval_results=results or None,
    )
    body = (
        environment()
        .get_template("model_card.md.j2")
        .render(
            story=story,
            guard=described(story.recipe.guard),
            base=base,
            on_hub=on_hub,
            merged=merged,
            headline=headline(story),
            verdicts=[verdict_row(v) for v in story.verdicts],
            figures=[{"metric": name, **figure(m)} for name, m in headline_figures(story).items()],
            money=money(story),
            train=len(story.cleaned.kept),
        )
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def headline_figures(story: Story) -> dict[str, Row]:
    """What the gates decided on, and the controls they name; only what was measured."""
    names = [v["metric"] for v in story.verdicts]
    names += [name for v in story.verdicts for name in v["criterion"].get("beats", [])]
    found = {name: story.figures.get(name) for name in dict.fromkeys(names)}
    return {name: m for name, m in found.items() if m and m.get("value") is not None}


def usage(story: Story, to: Path, merged: bool) -> list[str]:
    """The lines that load what was exported, in vLLM, transformers, Ollama and datasets."""
    base, rank = base_name(story, to / "adapter"), story.recipe.lora.rank
    allowed = next((size for size in VLLM_RANKS if size >= rank), rank)
    adapter, dataset, whole, gguf = (to.resolve() / name for name in ("adapter", "dataset", "merged", "merged.gguf"))
    serve = f"--enable-lora --max-lora-rank {allowed} --lora-modules {shlex.quote(f'cai={adapter}')}"
    lines = [
        f"exported to {to}",
        f"vLLM:          vllm serve {base} {serve}",
        f"transformers:  AutoModelForCausalLM.from_pretrained({str(adapter)!r})",
        f"peft:          PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(adapter)!r})",
        f"datasets:      load_dataset({str(dataset)!r})",
    ]
    if merged:
        lines.append(f"merged:        vllm serve {shlex.quote(str(whole))}")
    if gguf.is_file():
        made = f"echo {shlex.quote(f'FROM {gguf}')} > Modelfile"
        lines.append(f"Ollama:        {made} && ollama create cai && ollama run cai")
    else:
        lines.append("Ollama:        needs a GGUF: export --merged with llama.cpp's converter (LLAMA_CPP=its folder)")
    return lines


def converter() -> Path | None:
    """llama.cpp's script, from LLAMA_CPP or the path."""
    home = os.environ.get("LLAMA_CPP")
    places = [Path(home) / CONVERTER] if home else []
    found = shutil.which(CONVERTER)
    places += [Path(found)] if found else []
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


def push(folder: Path, repository: str, say: Say, api: Any = None) -> None:
    """Upload each part that was exported to a private repository of its own. Only called when asked for by name."""
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    for kind, part, tail in PARTS:
        name = f"{repository}{tail}"
        if not (folder / part).is_dir():
            continue
        try:
            api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
            api.upload_folder(repo_id=name, repo_type=kind, folder_path=str(folder / part))
        except Exception as error:  # the hub library raises many kinds: network, login, name
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CaiError(f"--push {name}: {line}. Log in with `hf auth login`, then push again.", errors.IO) from None
        say(f"pushed {part} to {name} (private)")
