"""Two GPUs (or more) against one, in one run on one machine: generation, DPO, memory, and whether all hold one model.

    python bench/make_model.py 32b /dev/shm/random-32b
    python bench/ranks_gpu.py /dev/shm/random-32b --to FOLDER                  # all of it; never run on two GPUs yet
    python bench/ranks_gpu.py /dev/shm/random-32b --to FOLDER --only dpo

Generation is a whole run of `runner.py` up to its pairs (bench/noise.py: random weights pass as text), as one process
and as one a GPU; compared are the seconds of its stages, and those from the loaded model to the data set. DPO is the
pipeline's own training on made pairs; in its first two steps all gradients are hashed behind the exchange, and every
trained tensor behind the step. The legs with one process run side by side, each on a GPU of its own, so that the
machine is as busy as it is with several. Printed: a line a bar. FOLDER gets ranks.json with the machine's name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

GENERATION = (
    "rounds=1", "heldout.items=0", "pairs.replacements=0", "pairs.retries=0", "principles.choice=uniform",
    "sampling.instructions.max_new_tokens=48", "sampling.answers.max_new_tokens=128",
    "sampling.critiques.max_new_tokens=128", "sampling.revisions.max_new_tokens=128", "gates.m2=[]",
)  # fmt: skip
BARS = (("generation", 1.9), ("dpo", 1.8))
CARD_GB = 80.0
HASHED = (1, 2)  # steps; the time of a step is the median of later ones: 1 GB of gradients takes a second to hash


def words(processes: int, program: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), *program]


def start(command: list[str], log: Path, device: int | None) -> subprocess.Popen[bytes]:
    one = {} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **one}
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def generation(options: argparse.Namespace, processes: int, to: Path) -> list[str]:
    keys = [
        *GENERATION, f"model.name={options.model}", f"items={options.items}", f"engine.max_gpu_gb={CARD_GB}",
        f"runs={to / f'runs-{processes}'}", *options.set,
    ]  # fmt: skip
    sets = [word for key in keys for word in ("--set", key)]
    return words(processes, ["bench/noise.py", "cai.toml", "--milestone", "m2", "--until", "pairs", *sets])


def dpo(options: argparse.Namespace, processes: int, to: Path) -> list[str]:
    return words(processes, [__file__, options.model, "--to", str(to), "--leg", "--steps", str(options.steps),
                             "--pairs", str(options.pairs), "--tokens", str(options.tokens)])  # fmt: skip


def leg(options: argparse.Namespace) -> None:
    """One process of the DPO legs; the first one writes dpo-N.json."""
    from cai import world

    here = world.enter()
    from dpo import ALPHA, BETA, RANK, Clock
    from dpo_models import SEED, cap, made_model, make_rows

    from cai.models.policy import load
    from cai.recipe.settings import DpoSection, LoraSection, ModelSection
    from cai.training import adapter, ranks
    from cai.training.job import Job

    world.join()
    made = options.model.startswith("made:")
    model = made_model(options.model) if made else load(ModelSection(name=options.model, format="base"), "cuda")
    lora = LoraSection(rank=RANK, alpha=ALPHA)
    model.to_lora(lora, SEED)
    model.mode("train")
    cap(CARD_GB)
    settings = DpoSection(
        max_steps=options.steps, batch_size=1, gradient_accumulation=options.pairs, beta=BETA, learning_rate=5e-6,
        warmup_ratio=0.0, scheduler="constant", save_steps=10_000, save_minutes=0.0,
    )  # fmt: skip
    clock, hashes, exchanges = Clock(options.pairs), [], []
    add = ranks.add_gradients

    def timed(parameters: Any, doing: str) -> None:
        began, parameters = time.monotonic(), list(parameters)
        add(parameters, doing)
        exchanges.append(time.monotonic() - began)
        if len(exchanges) in HASHED:
            hashes.append(sum_of(p.grad for p in parameters if p.requires_grad))

    ranks.add_gradients = timed

    def event(kind: str, **facts: Any) -> None:
        if kind == "train_step":
            clock.step(facts["loss"], facts["rewards/margins"])
            if len(exchanges) in HASHED:
                hashes.append(sum_of(p.data for _, p in sorted(adapter.lora_parameters(model.hf))))

    with tempfile.TemporaryDirectory() as folder:
        from dpo import no_saving

        no_saving()
        job = Job(model, make_rows(options.pairs * 4, options.tokens, 200), lora, settings, Path(folder), SEED, event,
                  lambda: False, lambda *_: None)  # fmt: skip
        clock.began = clock.last = time.monotonic()
        _, shape, _ = job.run()
    told = json.dumps([hashes, clock.result()["peak_reserved_gib"]]).encode()
    everyone = [json.loads(part) for part in world.gather(told, "what was measured")]
    facts = {"micro_batch": shape.micro_batch, "accumulation": shape.accumulation, "exchange_seconds": exchanges,
             "equal": all(each[0] == everyone[0][0] for each in everyone), "hashed": len(hashes),
             "peak_reserved_gib_each": [each[1] for each in everyone]}  # fmt: skip
    if here.first:
        (options.to / f"dpo-{here.size}.json").write_text(json.dumps(clock.result() | facts))


def sum_of(tensors: Any) -> str:
    """sha256 over the bytes of all tensors, 16 digits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def stages(to: Path, processes: int) -> dict[str, Any]:
    """Seconds of each stage of that run, of all of them, from the loaded model to the data set, and peak memory."""
    run = (to / f"runs-{processes}" / "latest").resolve()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    each: dict[str, float] = {}
    for event in events:
        if event["kind"] == "stage":
            each[event["stage"]] = each.get(event["stage"], 0.0) + event["seconds"]
    at = {kind: next(e["s"] for e in events if e["kind"] == kind) for kind in ("model_loaded", "dataset")}
    preflight = max((e["s"] for e in events if e["kind"] == "preflight"), default=at["model_loaded"])
    made = sum(e["tokens"] for e in events if e["kind"] == "stage")
    memory = json.loads((run / "manifest.json").read_text())["memory"]
    return {
        "stages": each, "seconds": sum(each.values()), "preflight_to_pairs": at["dataset"] - preflight,
        "load_to_pairs": at["dataset"] - at["model_loaded"], "tokens": made,
        "rows": sum(1 for _ in (run / "records.jsonl").open("rb")),
        "peak_gpu_used_gib": max(found.get("peak_gpu_used_gib", 0.0) for found in memory.values()),
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    parts = [name for name in ("generation", "dpo") if options.only in ("", name)]
    make = {"generation": generation, "dpo": dpo}
    alone = {
        name: start(make[name](options, 1, options.to), options.to / f"{name}-1.log", device)
        for device, name in enumerate(parts)
    }
    codes = {(name, 1): child.wait() for name, child in alone.items()}
    for name in parts:
        log = options.to / f"{name}-{options.gpus}.log"
        codes[name, options.gpus] = start(make[name](options, options.gpus, options.to), log, None).wait()
    found: dict[str, Any] = {"machine": machine(), "gpus": options.gpus}
    found["exit"] = {f"{name}, {n}": code for (name, n), code in codes.items()}
    for name in parts:
        for count in (1, options.gpus):
            path = options.to / f"dpo-{count}.json"
            try:
                found[f"{name}-{count}"] = (
                    stages(options.to, count) if name == "generation" else json.loads(path.read_text())
                )
            except (OSError, StopIteration, ValueError, KeyError) as error:
                found[f"{name}-{count}"] = {"error": repr(error)}
    return found


def machine() -> str:
    if not shutil.which("nvidia-smi"):
        return "CPU"
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return ", ".join(done.stdout.split("\n")).strip(", ")


def show(found: dict[str, Any]) -> None:
    one, several = found.get("generation-1", {}), found.get(f"generation-{found['gpus']}", {})
    if "seconds" in one and "seconds" in several:
        print(f"generation: {one['seconds'] / several['seconds']:.2f}x (bar 1.9)")
        for name, each in (("one", one), ("several", several)):
            print(f"  {name}: {each['seconds']:.1f} s of stages, {each['preflight_to_pairs']:.1f} s to the pairs; "
                  f"{each['rows']} rows, {each['tokens']} tokens; {each['peak_gpu_used_gib']:.0f} GiB")  # fmt: skip
            print("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in each["stages"].items()))
    one, several = found.get("dpo-1", {}), found.get(f"dpo-{found['gpus']}", {})
    if "losses" in one and "losses" in several:
        exchange = statistics.median(several["exchange_seconds"][1:])
        print(
            f"dpo: {one['seconds_a_pair'] / several['seconds_a_pair']:.2f}x (bar 1.8); exchange {exchange:.3f} s a step"
        )
        for name, each in (("one", one), ("several", several)):
            print(f"  {name}: {each['seconds_a_pair']:.4f} s a pair; micro-batch {each['micro_batch']}; first loss "
                  f"{each['losses'][0]:.6f}; peak {max(each['peak_reserved_gib_each']):.1f} GiB")  # fmt: skip
            print(f"  losses {[round(loss, 4) for loss in each['losses']]}")
        print(f"  {several['hashed']} hashes of gradients and trained tensors, equal on all: {several['equal']}")
    for name, part in found.items():
        if isinstance(part, dict) and "error" in part:
            print(f"{name}: {part['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", choices=("generation", "dpo"), default="")
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=16, help="pairs an optimiser step")
    parser.add_argument("--tokens", type=int, default=1160, help="tokens a pair, the prompt counted twice")
    parser.add_argument("--leg", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    if options.leg:
        leg(options)
        return
    found = measure(options)
    (options.to / "ranks.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['machine']}; exit codes {found['exit']}")
    show(found)


if __name__ == "__main__":
    main()
