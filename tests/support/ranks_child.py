"""Processes that train the tiny model together, forked from one that has the imports (tests/training/test_train_ranks).

A line of stdin, JSON of [folder, processes, options], asks for a training: each trains in FOLDER/RANK and leaves
FOLDER/RANK.json: how it ended, the log, and after each step a hash of every trained tensor. Answered with the exit
codes as JSON, by rank. The options: settings of [dpo], and a fault ("nan", "memory", "stop", "kill") with the process
and the step where it comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402

from cai import world  # noqa: E402
from cai.errors import CaiError  # noqa: E402
from cai.training import (  # noqa: E402
    adapter,
    sft_trainer,
    trainers,
)
from cai.training import loss as losses  # noqa: E402
from support.training import LORA, TinyModel, dpo, make_pairs, run_train  # noqa: E402


class Fault:
    """What goes wrong in one process: asked by the loss and by the stop switch."""

    def __init__(self, kind: str, rank: int, step: int) -> None:
        self.kind, self.rank, self.step, self.steps, self.memory_ended = kind, rank, step, 0, False

    def due(self) -> bool:
        return world.world().rank == self.rank and self.steps + 1 == self.step

    def in_loss(self, logps: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.due() and torch.is_grad_enabled():
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "nan":
                return logps[0] * float("nan"), logps[1]
            if self.kind == "memory" and not self.memory_ended:
                self.memory_ended = True
                raise torch.OutOfMemoryError("injected")
        return logps

    def stopped(self) -> bool:
        return self.kind == "stop" and self.due()


def main(folder: Path, options: dict) -> dict:
    model, hashes, events = TinyModel(), [], []
    fault = Fault(options.get("fault", ""), options.get("rank", 1), options.get("step", 3))
    real = losses.sequence_logps
    for module in (trainers, sft_trainer):
        module.sequence_logps = lambda *a, **k: fault.in_loss(real(*a, **k))

    def event(kind: str, **facts: object) -> None:
        events.append({"kind": kind, **facts})
        if kind == "train_step":
            fault.steps = int(facts["step"])
            tensors = sorted(adapter.lora_parameters(model.hf))
            hashes.append([hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()[:16] for _, p in tensors])

    try:
        result = trained(folder, options, model, event, fault)
    finally:
        for module in (trainers, sft_trainer):
            module.sequence_logps = real
    facts = {name: getattr(result, name) for name in ("log", "heldout_log", "kept_step", "resumed_from")}
    return {**facts, "hashes": hashes, "smaller": sum(e["kind"] == "out_of_memory" for e in events)}


def trained(folder: Path, options: dict, model: TinyModel, event, fault: Fault):
    return run_train(
        folder, model=model, pairs=make_pairs(options.get("pairs", 12)), event=event, stopped=fault.stopped,
        config=dpo(**{"max_steps": 6, "gradient_accumulation": 4, **options.get("dpo", {})}),
        objective=options.get("objective", "dpo"),
    )  # fmt: skip


def one(out: Path, options: dict) -> int:
    """A process, from meeting the others to its end."""
    rank, found, code = world.world().rank, {}, 0
    try:
        world.join()
        found = main(out / str(rank), options)
    except CaiError as error:
        code, found = error.code, {"error": str(error)}
    except RuntimeError as error:
        code, found = 1, {"error": repr(error)}
    (out / f"{rank}.json").write_text(json.dumps({**found, "code": code}))
    return code


def start(out: Path, processes: int, options: dict) -> list[int]:
    """Exit codes by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        world._here = world.World(rank, processes, rank)
        os._exit(one(out, options))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    TinyModel().to_lora(LORA)  # imports what it takes
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        out, processes, options = json.loads(line)
        os.write(answers, json.dumps(start(Path(out), processes, options)).encode() + b"\n")


if __name__ == "__main__":
    serve()
