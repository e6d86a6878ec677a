"""Preflight: what would waste a rented hour, found in seconds. `--doctor` prints every line; a GPU run asks the same.

Owns the checks of machine, versions, disk and recipe, which need no model, and the two ways to ask for all of them.
The checks of the loaded model are in `doctor_model`. A check says what it saw; `fail` has a remedy. Torch is imported
inside functions.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cai.engine import FP8_CAPABILITY, INT8_CAPABILITY, memory
from cai.errors import CaiError
from cai.models.auxiliary import cached_folder
from cai.preflight.model_checks import Check, Status
from cai.recipe.load import Recipe
from cai.store.jsonl import JsonObject, Row, read_object

ROOT = Path(__file__).resolve().parents[2]
PINNED = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", "accelerate", "datasets")
REWRITTEN = {"transformers", "trl", "peft", "unsloth", "unsloth_zoo"}  # Unsloth rewrites these: exact pins or nothing
CUDA_BUILDS = ((13, 0), (12, 8), (12, 6))  # builds that torch 2.13 is published for, newest first
BYTES_A_WEIGHT = {"nf4": 0.516, "int8": 1.01, "bf16": 2.0, "fp32": 4.0}  # NF4: 4 bits, and 8-bit scales twice quantised
ADAM_BYTES = 16  # fp32 weight, gradient and two moments of each LoRA weight
FP8_ROOM_GIB = 8.0  # the KV cache that `tuning` leaves at least, and the reserve beside it
BYTES_AN_8_BIT_WEIGHT = 1 + 4 / 64  # and NF4's scales in fp32
WORKING_GIB = 2.5  # CUDA context, dequantisation buffer, logits of one chunk, activations of one short pair


def preflight(what: str, checks: Iterator[Check], event: Callable[..., None], say: Callable[[str], None]) -> None:
    """At the start of a run: what is to be seen on screen, all as one event, failures as one CaiError (exit 2)."""
    started = time.monotonic()
    found = list(checks)
    seconds = round(time.monotonic() - started, 2)
    seen = {check.name: f"{check.status}: {check.seen}" for check in found}
    event("preflight", phase=f"preflight {what}", seconds=seconds, checks=seen, **memory.peaks())
    for check in found:
        if check.status == "warn" or check.told:
            say(check.line())
    failed = [check for check in found if check.status == "fail"]
    if failed:
        raise CaiError("\n".join(f"preflight: {check.name}: {check.seen}" for check in failed))


# --- machine, versions, disk, recipe


def machine_checks(recipe: Recipe, backend: str, runs: Path) -> Iterator[Check]:
    """Everything that needs no model; about two seconds."""
    yield versions_check(installed(PINNED), pins(ROOT / "requirements.txt"), pins(ROOT / "requirements-unsloth.txt"))
    if backend == "cuda":
        memory.limit_gpu(recipe.engine.max_gpu_gb)
        yield driver_check(*cuda_versions())
        yield from gpu_checks(recipe)
        yield price_check(recipe)
    else:
        where = "runs on the CPU in float32" if backend == "cpu" else f"has the {backend} model in its place"
        yield Check("GPU", "warn", f"none in use: {recipe.model.name} {where}")
    yield from disk_checks(recipe, backend, runs)


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Package -> installed version, or "" where it is absent."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def pins(path: Path) -> dict[str, str]:
    """`name==version` lines of a requirements file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;#]+)", text, re.MULTILINE))


def versions_check(found: Mapping[str, str], *pinned: Mapping[str, str]) -> Check:
    """Packages that Unsloth rewrites must be the pinned ones; another build of the rest is worth a look."""
    wanted = {name: value for table in pinned for name, value in table.items()}
    absent = [name for name, value in found.items() if not value]
    other = {n: v for n, v in found.items() if v and n in wanted and v.split("+")[0] != wanted[n]}
    if absent:
        return Check("versions", "fail", f"{', '.join(absent)} not installed. Run: make setup")
    text = ", ".join(f"{name} {value} (pinned {wanted[name]})" for name, value in other.items())
    if REWRITTEN & set(other):
        return Check("versions", "fail", f"{text}. Unsloth rewrites these at import. Run: make setup")
    if other:
        return Check("versions", "warn", text)
    return Check("versions", "ok", ", ".join(f"{name} {value}" for name, value in found.items()))


def cuda_versions() -> tuple[str, tuple[int, int], str]:
    """(driver version, highest CUDA it supports, CUDA of this torch build or ""). Imports torch."""
    import torch

    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        number.value = 0
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = (re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text) or ["", "unknown"])[1]
    except OSError:
        driver = "unknown"
    return driver, (number.value // 1000, number.value % 1000 // 10), torch.version.cuda or ""


def driver_check(driver: str, supports: tuple[int, int], built: str) -> Check:
    """The driver must know the CUDA that torch was built with; within a major version older minors serve too."""
    shown = f"driver {driver} supports CUDA {supports[0]}.{supports[1]}"
    fitting = next((b for b in CUDA_BUILDS if b <= supports or b[0] == supports[0]), None)
    remedy = "install a newer driver"
    if fitting:
        remedy = f"make setup TORCH_INDEX_URL=<the index of torch's cu{fitting[0]}{fitting[1]} builds>"
    if supports == (0, 0):
        return Check(
            "driver", "fail", "no NVIDIA driver answers: rent a machine with one, or unset CUDA_VISIBLE_DEVICES"
        )
    if not built:
        return Check("driver", "fail", f"{shown}, and this torch is a CPU build. Run: {remedy}")
    major, minor = (int(part) for part in built.split(".")[:2])
    if major > supports[0]:
        return Check("driver", "fail", f"{shown}, and this torch is built for CUDA {built}. Run: {remedy}")
    return Check("driver", "ok", f"{shown}, torch is built for {major}.{minor}")


def gpu_checks(recipe: Recipe) -> Iterator[Check]:
    """Name, bf16 and whether weights, adapter and optimiser fit."""
    import torch

    if not torch.cuda.is_available():
        yield Check("GPU", "fail", "torch sees none: see the driver line, and nvidia-smi")
        return
    card = torch.cuda.get_device_properties(0)
    free, total = memory.free_gpu_bytes(), torch.cuda.mem_get_info()[1]
    limit = f", limited to {recipe.engine.max_gpu_gb:g} GB by engine.max_gpu_gb" if recipe.engine.max_gpu_gb else ""
    yield Check("GPU", "ok", f"{card.name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free{limit}")
    if card.major >= 8:
        yield Check("bf16", "ok", f"compute capability {card.major}.{card.minor}")
    else:
        yield Check(
            "bf16", "fail", f"compute capability {card.major}.{card.minor} has no bf16: rent an Ampere or newer card"
        )
    config = local_config(recipe.model.name)
    yield memory_check(recipe, config, free / 2**30)
    if recipe.engine.rounded_products:
        yield eight_bit_check(recipe, (card.major, card.minor), config, free / 2**30)


def local_config(name: str) -> Row:
    """config.json of a local folder or of the hub cache, without the network; {} where there is none."""
    folder = Path(name) if Path(name).is_dir() else cached_folder(name)
    return read_object(folder / "config.json") if folder else {}


@dataclass(frozen=True)
class Size:
    """Parameters: `linear` quantised, `other` (embedding, head) in bf16, and LoRA's `per_rank`."""

    linear: float
    other: float
    per_rank: float

    def weights_gib(self, quantization: str) -> float:
        other = 4 if quantization == "fp32" else 2
        return (self.linear * BYTES_A_WEIGHT[quantization] + self.other * other) / 2**30


def size_of(config: JsonObject, name: str) -> Size | None:
    """From config.json, else from a "32B" in the name (LoRA estimated); None where neither says."""
    if "hidden_size" in config:
        hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        kv = config.get("num_key_value_heads", heads) * (config.get("head_dim") or hidden // heads)
        shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, ffn)] * 3
        other = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return Size(layers * sum(a * b for a, b in shapes), other, layers * sum(a + b for a, b in shapes))
    match = re.search(r"(\d+(?:\.\d+)?)\s*[bB](?![a-zA-Z])", name)
    if not match:
        return None
    billions = float(match[1]) * 1e9
    return Size(0.95 * billions, 0.05 * billions, 1460 * math.sqrt(billions) / 32)


def memory_check(recipe: Recipe, config: JsonObject, free_gib: float) -> Check:
    """Weights + adapter with its optimiser + a little to work in, against what the card has free."""
    size, quantization = size_of(config, recipe.model.name), recipe.model.quantization
    if size is None:
        return Check("memory", "warn", f"{recipe.model.name}: size unknown before the download")
    sizes = {key: size.weights_gib(key) for key in ("nf4", "int8", "bf16")}
    shown = ", ".join(f"{key} {gib:.1f}" for key, gib in sizes.items())
    adapter = size.per_rank * recipe.lora.rank * ADAM_BYTES / 2**30
    weights = size.weights_gib(quantization)
    need = weights + adapter + WORKING_GIB
    text = (
        f"weights {quantization} {weights:.1f} GiB + adapter and optimiser {adapter:.1f} + {WORKING_GIB} to work in = "
        f"{need:.1f} of {free_gib:.1f} free (all: {shown})"
    )
    if need > free_gib:
        fits = [key for key, gib in sizes.items() if gib + adapter + WORKING_GIB <= free_gib]
        largest = recipe.lora.rank * (free_gib - weights - WORKING_GIB) / adapter
        ranks = [rank for rank in (64, 32, 16, 8, 4) if rank <= largest]
        remedy = "Rent a larger card"
        if fits:
            remedy = f'Set model.quantization = "{fits[-1]}"'
        elif ranks:
            remedy = f"Set lora.rank = {ranks[0]} (and lora.alpha = {2 * ranks[0]}), or rent a larger card"
        return Check("memory", "fail", f"{text}. {remedy}.")
    if need > 0.85 * free_gib:
        return Check(
            "memory", "warn", f"{text}. Tight: gradient checkpointing and a small batch are chosen by themselves."
        )
    return Check("memory", "ok", text)


def eight_bit_check(recipe: Recipe, card: tuple[int, int], config: JsonObject, free_gib: float) -> Check:
    """Whether `engine.linears = "fp8"` or "int8" can be: known before gigabytes are read."""
    name, remedy, wish = "8-bit drawing", 'Set engine.linears = "auto"', recipe.engine.linears
    if recipe.model.quantization != "nf4":
        text = f'"{wish}" is made of NF4 weights, and model.quantization is "{recipe.model.quantization}"'
        return Check(name, "fail", f"{text}. {remedy}.")
    least, cards = (FP8_CAPABILITY, "Ada, Hopper") if wish == "fp8" else (INT8_CAPABILITY, "Ampere and later")
    if card < least:
        text = f'"{wish}" needs compute capability {least[0]}.{least[1]} ({cards}), this card has {card[0]}.{card[1]}'
        return Check(name, "fail", f"{text}. {remedy}.")
    size = size_of(config, recipe.model.name)
    if size is None:
        return Check(name, "ok", f"compute capability {card[0]}.{card[1]}")
    copies = size.linear * BYTES_AN_8_BIT_WEIGHT / 2**30
    need = size.weights_gib("nf4") + copies + FP8_ROOM_GIB
    text = (
        f"8-bit copies {copies:.1f} GiB beside the weights, {need:.1f} with the smallest cache, of {free_gib:.1f} free"
    )
    return Check(name, "ok", text) if need <= free_gib else Check(name, "fail", f"{text}. {remedy}.")


def price_check(recipe: Recipe) -> Check:
    price = recipe.budget.usd_per_hour
    if price > 0:
        return Check("price", "ok", f"${price:.2f} an hour")
    return Check("price", "warn", "budget.usd_per_hour is 0: no cost will be shown")


def disk_checks(recipe: Recipe, backend: str, runs: Path) -> Iterator[Check]:
    """Room for the download, the run and its checkpoints; how fast a sync is."""
    folder = existing(runs)
    free = shutil.disk_usage(folder).free / 2**30
    size = size_of(local_config(recipe.model.name), recipe.model.name)
    states = 3 * (size.per_rank * recipe.lora.rank * 12 / 2**30 if size and backend == "cuda" else 0.1)
    need = states + 1.0
    status: Status = "ok" if free > need else "fail"
    remedy = "" if status == "ok" else ". Free space, or set runs to a folder on a larger disk"
    yield Check("disk for runs", status, f"{free:.1f} GiB free in {folder.name or '/'}, {need:.1f} needed{remedy}")
    if backend == "cuda" and size is not None and not local_config(recipe.model.name):
        yield download_check(size, recipe.model.quantization)
    yield speed_check(folder)


def existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def download_check(size: Size, quantization: str) -> Check:
    cache = existing(Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")))
    free = shutil.disk_usage(cache).free / 2**30
    need = size.weights_gib("nf4" if quantization == "nf4" else "bf16") * 1.05
    if free > need:
        return Check("disk for download", "ok", f"{free:.1f} GiB free in the hub cache, {need:.1f} needed")
    return Check("disk for download", "fail", f"{free:.1f} GiB free, {need:.1f} needed. Set HF_HOME to a larger disk")


def speed_check(folder: Path, size: int = 32 * 2**20) -> Check:
    """Write and sync 32 MiB where the runs lie."""
    path = folder / f".write-speed-{os.getpid()}"
    try:
        began = time.monotonic()
        with path.open("wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
        rate = size / 2**20 / (time.monotonic() - began)
    except OSError as error:
        return Check(
            "write speed", "fail", f"can't write in {folder.name or '/'}: {error.strerror}. Set runs to another folder"
        )
    finally:
        path.unlink(missing_ok=True)
    return Check("write speed", "ok" if rate >= 20 else "warn", f"{rate:.0f} MiB/s with a sync")
