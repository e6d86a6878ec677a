"""Generation side by side on one checkpoint: the same requests, the same forced lengths, every backend.

Requests are shaped like the M3 recipe: five stages, each with a few-shot prefix of 600-1,000 tokens that its prompts
share, inputs of 20-900 tokens (log-uniform in the stage's range) and outputs of 20-500 (uniform), drawn from a fixed
seed. The length of an output is forced (no eos, no stop string), so all backends draw the same number of tokens.
Useful tokens/s = drawn tokens / wall time of the whole stage, prefill and idle rows included, set-up excluded.

Groups of backends run in processes of their own (Unsloth rewrites transformers at import, vLLM loads its own weights):
    stock      hf1 (HF generate, batch 1)  hf (HF generate, static batches)  hfcb (HF's continuous batching)
    vllm       on the same NF4 checkpoint; vllm-bf16 on the one of --bf16-model; an error line where not installed
    unsloth    unsloth (Unsloth generate, static batches)  native  native-bnb/-fused/-bf16/-fp8/-int8 (linears)
`+kv` behind a native one: keys and values in 8 bits. `@80` caps the process's memory to 80 GB. `:N` takes N requests of
each stage (default --per-stage), `:N/a+b` only of stages a and b. `--mix`: six rotations of the instructions' examples,
and 8% of the rest drawn again; only the last draw is useful. `--together`: all stages at once, as one pool has them.

In place of a folder, "made:SHAPE/LAYERS" makes random weights of a shape of bench/families.py on the card, without a
file and without Unsloth: "made:qwen2-32b/16" has a quarter of the layers. With a quarter of the memory (`@20`) what is
copied to bf16 and held as keys keeps its share, and ratios of ways of computing hold, but for the head.

    python bench/make_model.py 32b /dev/shm/random-32b
    python bench/generate.py /dev/shm/random-32b --run hf1:1 unsloth:128 native native@80 --out generate.json
    python bench/generate.py embedded --per-stage 10 --scale 0.25 --run static native
    python bench/generate.py made:qwen2-32b/16 --mix --per-stage 768 --steps --run native@25 native-int8@25
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decode_step import ceilings, profile_steps, roofline, step_times
from shapes import STAGES, Again, never, the_requests

from cai.engine import Request, Sampling

GIGABYTE = 1e9


@dataclass(frozen=True)
class Wanted:
    """One run: `name[@80][:N[/stages]]`."""

    name: str
    cap_gb: float  # 0: the whole card
    count: int
    stages: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, per_stage: int) -> Wanted:
        head, _, tail = text.partition(":")
        count, _, stages = tail.partition("/")
        name, _, cap = head.partition("@")
        chosen = tuple(stages.split("+")) if stages else tuple(stage.name for stage in STAGES)
        return cls(name, float(cap or 0), int(count) if count else per_stage, chosen)

    @property
    def group(self) -> str:
        """Backends of one group share a process and its weights."""
        if self.name in ("hf1", "hf", "hfcb"):
            return "stock"
        return self.name if self.name.startswith("vllm") else "unsloth"


class PlainTokenizer:
    """Forced lengths need no text."""

    def decode(self, ids: Any) -> str:
        return ""


@dataclass
class Weights:
    """What `make_engine` reads of a LoadedModel."""

    hf: Any
    tokenizer: Any
    device: str


def load_stock(folder: str) -> Weights:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    return Weights(model.eval(), PlainTokenizer(), device)


def load_real(folder: str) -> Weights:
    """Through the pipeline's own loader."""
    from cai.models import policy as model
    from cai.recipe.settings import ModelSection

    backend = "embedded" if folder == "embedded" else "cuda"
    section = ModelSection() if folder == "embedded" else ModelSection(name=folder, backend="cuda")
    loaded = model.load(section, backend)
    print(f"# loaded in {loaded.facts['load_seconds']} s", flush=True)
    loaded.mode("generate")
    return Weights(loaded.hf, PlainTokenizer(), str(loaded.device))


def load_nothing(folder: str) -> Weights:
    """vLLM loads for itself; the bench needs the config only."""
    from transformers import AutoConfig

    return Weights(SimpleNamespace(config=AutoConfig.from_pretrained(folder), folder=folder), PlainTokenizer(), "cuda")


def load_made(text: str) -> Weights:
    """Random weights of a shape, made where they are used."""
    import torch
    from families import made

    shape, _, layers = text.removeprefix("made:").partition("/")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Weights(made(shape, device, int(layers or 0)), PlainTokenizer(), device)


LOADERS = {"stock": load_stock, "unsloth": load_real, "vllm": load_nothing, "vllm-bf16": load_nothing}


def engine_for(wanted: Wanted, weights: Weights, batch_size: int) -> Any:
    from cai.engine.build import make_engine

    if wanted.name == "hfcb":
        from hf_continuous import ContinuousEngine

        return ContinuousEngine(weights.hf)
    if wanted.group.startswith("vllm"):
        import torch
        from vllm_engine import VllmEngine

        total = torch.cuda.get_device_properties(0).total_memory
        return VllmEngine(weights.hf.folder, min(0.92, wanted.cap_gb * GIGABYTE / total) if wanted.cap_gb else 0.92)
    if wanted.name == "hf1":
        return make_engine("reference", weights)
    if wanted.name in ("hf", "unsloth", "static"):
        return make_engine("static", weights, batch_size=batch_size)
    way, _, kv = wanted.name.partition("+")
    linears = way.partition("-")[2] or "auto"
    return make_engine("native", weights, linears=linears, kv="int8" if kv else "auto", batch_size=0)


def run_stage(engine: Any, requests: list[Request], again: Again = never) -> tuple[int, float, int]:
    """(useful tokens, seconds, draws that a refusal followed)."""
    began = time.monotonic()
    of, number = {request.id: request for request in requests}, dict.fromkeys((r.id for r in requests), 0)
    for request in requests:
        engine.submit(request)
    drawn = {}
    for done in engine.completions():
        if again(done.id, number[done.id]):
            number[done.id] += 1
            engine.submit(replace(of[done.id], seed=of[done.id].seed ^ number[done.id], first=True))
        else:
            drawn[done.id] = len(done.token_ids)
    seconds = time.monotonic() - began
    assert drawn == {request.id: request.sampling.max_new_tokens for request in requests}
    return sum(drawn.values()), seconds, sum(number.values())


def measure(wanted: Wanted, weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    """One backend over its stages."""
    cuda = weights.device == "cuda"
    if cuda:
        reset_memory(wanted.cap_gb)
    began = time.monotonic()
    engine = engine_for(wanted, weights, options.batch_size)
    vocab = weights.hf.config.vocab_size
    wide = options.mix and wanted.name.startswith("native")  # graphs of every number of rows are captured in the set-up
    list(warm_up(engine, vocab, engine.stats.batch_size if wide else 4))
    set_up = time.monotonic() - began
    shown = wanted.name + (f"@{wanted.cap_gb:g}GB" if wanted.cap_gb else "")
    row: dict[str, Any] = {"backend": shown, "requests": 0, "stages": {}, "prompt_tokens": 0}
    row |= {"set_up_s": round(set_up, 1), "batch": engine.stats.batch_size}
    tokens, seconds, computed = 0, 0.0, engine.stats.prompt_tokens_computed
    for name, requests, again in the_requests(wanted.stages, wanted.count, vocab, options):
        before = engine.stats.prompt_tokens_computed
        drawn, spent, redraws = run_stage(engine, requests, again)
        row["requests"] += len(requests)
        row["prompt_tokens"] += sum(len(request.token_ids) for request in requests)
        prefill = engine.stats.prompt_tokens_computed - before
        row["stages"][name] = {"tokens": drawn, "seconds": round(spent, 2), "prompt_tokens_computed": prefill}
        row["stages"][name] |= {"tokens_per_s": round(drawn / spent, 1), "redraws": redraws}
        tokens, seconds = tokens + drawn, seconds + spent
        print(f"# {row['backend']} {name}: {drawn} tokens, {spent:.1f} s = {drawn / spent:.0f}/s", flush=True)
    row |= {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_s": round(tokens / seconds, 1)}
    row["prompt_tokens_computed"] = engine.stats.prompt_tokens_computed - computed
    if wanted.name.startswith("native") and options.steps:
        row["ms_per_step"] = step_times(engine, options.steps, options.scale)
        full = [rows for rows in options.steps if str(rows) in row["ms_per_step"]]
        if cuda and full:
            share, kernels = profile_steps(engine, full[-1], options.scale)
            row["idle_share"], row["kernels"] = {str(full[-1]): share}, {str(full[-1]): kernels}
    row["notes"] = {key: value for key, value in engine.stats.extra.items() if isinstance(value, str | int)}
    row["out_of_memory"] = engine.stats.out_of_memory
    if cuda:
        import torch

        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    engine.close()
    return row


def reset_memory(cap_gb: float) -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * GIGABYTE / total) if cap_gb else 1.0)
    torch.cuda.reset_peak_memory_stats()


def warm_up(engine: Any, vocab: int, rows: int = 4) -> Any:
    """A few tokens, so that compilation and first launches are set-up."""
    for item in range(rows):
        ids = tuple(range(10, 60 + item % 4))
        engine.submit(Request(item, ids, Sampling(0.7, 4 + item // 16), seed=item, prefix_len=20))
    yield from engine.completions()


def run_group(options: argparse.Namespace) -> None:
    """One process: load once, run its backends, write the rows."""
    wanted = [Wanted.parse(text, options.per_stage) for text in options.run]
    group = wanted[0].group
    load = load_made if options.model.startswith("made:") else LOADERS[group]
    weights = load(options.bf16_model if group == "vllm-bf16" else options.model)
    result: dict[str, Any] = {"rows": []}
    if weights.device == "cuda" and group == "unsloth" and options.steps:
        result["ceilings"] = ceilings()
        config = weights.hf.config
        result["roofline_ms"] = {rows: round(roofline(config, rows, result["ceilings"]), 2) for rows in options.steps}
    for one in wanted:
        try:
            result["rows"].append(measure(one, weights, options))
            print("#", json.dumps(result["rows"][-1]), flush=True)
        except Exception as error:  # the other rows still count
            print(f"# {one.name}: {type(error).__name__}: {error}", flush=True)
            result["rows"].append({"backend": one.name, "error": f"{type(error).__name__}: {error}"[:300]})
        Path(options.out).write_text(json.dumps(result))


def machine() -> dict[str, Any]:
    import importlib.metadata as metadata

    import torch

    found = dict.fromkeys(("torch", "transformers", "unsloth", "bitsandbytes", "triton", "vllm"), "absent")
    for name in found:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"machine": gpu or f"CPU, {torch.get_num_threads()} threads", "python": platform.python_version(), **found}


def table(result: dict[str, Any]) -> str:
    heads = "backend, batch, requests, tokens, tokens/s, prompt tokens computed / given, peak GiB, ms a step".split(
        ", "
    )
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['backend']} | {row['error']} |")
            continue
        steps = ", ".join(f"{rows}: {ms}" for rows, ms in row.get("ms_per_step", {}).items())
        lines.append(
            f"| {row['backend']} | {row['batch']} | {row['requests']} | {row['tokens']} | {row['tokens_per_s']} | "
            f"{row['prompt_tokens_computed']} / {row['prompt_tokens']} | {row.get('peak_gib', '')} | {steps} |"
        )
        for rows, share in row.get("idle_share", {}).items():
            lines.append(f"# {row['backend']}: the GPU idles {share:.2%} of a decode step of {rows} rows")
        for rows, kernels in row.get("kernels", {}).items():
            spent = ", ".join(f"{name} {part:.1%}" for name, part in kernels.items())
            lines.append(f"# {row['backend']}: kernels of decode steps of {rows} rows: {spent}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='a checkpoint folder, or "embedded"')
    parser.add_argument("--run", nargs="+", default=["hf1:1", "unsloth", "native", "native@80"])
    parser.add_argument("--bf16-model", default="", help="the folder that vllm-bf16 loads")
    parser.add_argument("--per-stage", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=0, help="of the static backends (0 = from free memory)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths, for small machines")
    parser.add_argument("--mix", action="store_true", help="rotated prefixes and redraws")
    parser.add_argument("--together", action="store_true", help="the requests of all stages at once")
    parser.add_argument("--steps", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--out", default="generate.json")
    parser.add_argument("--group", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.group:
        return run_group(options)
    result: dict[str, Any] = {
        **machine(),
        "model": options.model if options.model.startswith("made:") else Path(options.model).name,
        "per_stage": options.per_stage,
        "mix": options.mix,
        "together": options.together,
        "rows": [],
    }

    wanted = [Wanted.parse(text, options.per_stage) for text in options.run]
    for group in LOADERS:
        runs = [text for text, one in zip(options.run, wanted, strict=True) if one.group == group]
        if not runs:
            continue
        if group.startswith("vllm") and importlib.util.find_spec("vllm") is None:
            result["rows"] += [{"backend": text, "error": "vllm is not installed"} for text in runs]
            continue
        with tempfile.NamedTemporaryFile(suffix=".json") as part:
            shared = ["--per-stage", str(options.per_stage), "--batch-size", str(options.batch_size)]
            shared += ["--scale", str(options.scale), "--steps", *map(str, options.steps), "--out", part.name]
            shared += ["--bf16-model", options.bf16_model, *(["--mix"] if options.mix else [])]
            shared += ["--together"] if options.together else []
            subprocess.run([sys.executable, __file__, options.model, "--group", *shared, "--run", *runs], check=False)
            text = Path(part.name).read_text()
        found = (
            json.loads(text) if text else {"rows": [{"backend": "+".join(runs), "error": "the process ended early"}]}
        )
        result["rows"] += found.pop("rows")
        result |= found
        Path(options.out).write_text(json.dumps(result, indent=1))
    print(f"{result['machine']}: torch {result['torch']}, transformers {result['transformers']}")
    print(table(result))
    for key in ("ceilings", "roofline_ms"):
        if key in result:
            print(key, result[key])
    print((roofline.__doc__ or "").splitlines()[0])


if __name__ == "__main__":
    main()
