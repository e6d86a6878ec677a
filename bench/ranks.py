"""A whole M1 of the embedded model in several processes against one process: are bytes and losses the same?

Both runs have the same ten instructions, short completions and small samples of each measurement, and every stage:
answers, critiques, revisions, pairs, reference, DPO, the critic's exam, evaluation, gates, report. One after the other,
one thread a process, on gloo. Printed: a line a part, and the seconds; it ends with 1 where a bar is missed: records,
data set and reference byte-equal, losses and adapter within 1e-6.

    python bench/ranks.py --to FOLDER                       # two processes; 25 minutes on two busy cores
    python bench/ranks.py --to FOLDER --compare             # two runs that stand there already
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BAR = 1e-6
BYTES = ("records.jsonl", "dataset", "train/reference.json")
SHORT = (
    "model.backend=embedded", "instructions.file=given.txt", "engine.batch_size=4", "few_shot.critiques=0",
    "sampling.answers.max_new_tokens=24", "sampling.critiques.max_new_tokens=24",
    "sampling.revisions.max_new_tokens=24", "pairs.retries=0", "pairs.redraws=0", "pairs.replacements=0",
    "dpo.save_steps=2", "evaluation.likelihood_items=2", "evaluation.judge_items=1", "evaluation.train_pairs=2",
    "evaluation.neutral_passages=2", "evaluation.kl_passages=1", "evaluation.max_text_tokens=32",
)  # fmt: skip
INSTRUCTIONS = (
    "Explain how a lighthouse keeper stays awake on a winter night.",
    "My neighbour's dog barks all day. What can I do?",
    "Write four lines about bread for a bakery window.",
    "Which documents do I need to rent a flat abroad?",
    "Summarise why the sky looks blue to a child of six.",
    "Plan three dinners without meat for a family of five.",
    "How do I remove red wine from a white carpet?",
    "Compare trains and buses for a trip of two hundred kilometres.",
    "What should I say to a friend who lost a job?",
    "List the steps to change a bicycle tyre by the road.",
)


def made(folder: Path, processes: int) -> float:
    """A run in `folder`; the seconds that it took."""
    folder.mkdir(parents=True)
    for name in ("cai.toml", "constitution.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    (folder / "given.txt").write_text("\n".join(INSTRUCTIONS))
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    keys = [word for key in SHORT for word in ("--set", key)]
    command = [sys.executable, *starter, str(ROOT / "runner.py"), str(folder / "cai.toml"), "--milestone", "m1", *keys]
    began, environment = time.monotonic(), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "output").open("w") as output:
        done = subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment)
    assert done.returncode == 0, f"{folder / 'output'}: ended with {done.returncode}"
    return time.monotonic() - began


def bytes_of(run: Path, name: str) -> dict[str, str]:
    top = run / name
    files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(run: Path) -> list[float]:
    return [float(entry["loss"]) for entry in json.loads((run / "train" / "result.json").read_text())["log"]]


def adapter_distance(one: Path, several: Path) -> float:
    """The largest difference of any number of the two adapters; infinite where a tensor is missing."""
    from safetensors.torch import load_file

    left, right = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, several))
    if left.keys() != right.keys():
        return float("inf")
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def compared(one: Path, several: Path) -> tuple[list[tuple[str, str]], bool]:
    """(part, what was found) and whether every bar is met."""
    rows, met = [], True
    for name in BYTES:
        here, there = bytes_of(one, name), bytes_of(several, name)
        other = [file for file in here.keys() | there.keys() if here.get(file) != there.get(file)]
        rows.append((name, f"differs: {', '.join(sorted(other))}" if other else f"{len(here)} file(s), byte-equal"))
        met &= bool(here) and not other
    first, second = losses(one), losses(several)
    furthest = max((abs(a - b) for a, b in zip(first, second, strict=False)), default=float("inf"))
    furthest = furthest if len(first) == len(second) else float("inf")
    rows.append(("DPO losses", f"{len(first)} steps, {first[0]:.4f} to {first[-1]:.4f}, furthest {furthest:.1e}"))
    distance = adapter_distance(one, several)
    rows.append(("adapter", f"furthest number {distance:.1e}"))
    return rows, met and furthest <= BAR and distance <= BAR


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="a folder for the two projects")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--compare", action="store_true", help="the runs stand there already")
    args = parser.parse_args(argv)
    projects = {1: args.to / "one", args.processes: args.to / f"processes-{args.processes}"}
    took = {} if args.compare else {count: made(folder, count) for count, folder in projects.items()}
    rows, met = compared(*((folder / "runs" / "latest").resolve() for folder in projects.values()))
    rows += [(f"{count} process(es)", f"{seconds:.0f} s") for count, seconds in took.items()]
    print(f"| 1 process against {args.processes} | |\n| --- | --- |")
    for name, found in rows:
        print(f"| {name} | {found} |")
    print("every bar is met" if met else "a bar is missed")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
