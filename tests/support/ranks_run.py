"""Several processes of one run, forked from one that has the imports and has made a small run: `python ranks_run.py`.

A line of stdin asks for a run: JSON of `folder`, `arguments` (runner.py's), `processes`, and where one of them (`rank`,
-1 for all) is killed with SIGKILL: `point` and how often it is passed before (`after`). Answered with the exit codes as
JSON, by rank; a signal is a negative one. What they say goes to `folder`/said.

Points: "put": rows are in the process's shard; "unmerged": all of its slices are; "merging": the first slice of a step
is in the log, others are not; "merged": all are, and the shards still there (every process knows, none has gone on).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parents[1] / "faults")]

import torch.distributed  # noqa: E402, F401  (once for all of them)
import warm  # noqa: E402

import runner  # noqa: E402
from cai.run import sharing  # noqa: E402


def kills(point: str, after: int) -> None:
    """Make this process end at the point."""
    passed = [0]

    def here() -> None:
        passed[0] += 1
        if passed[0] > after:
            time.sleep(0.2)  # where all fall, each is to have come this far before the first one's connection closes
            os.kill(os.getpid(), signal.SIGKILL)

    put, settled, gather = sharing.Shared.put, sharing.Shared.settled, sharing.gather

    def killing_put(self: Any, rows: Any) -> None:
        put(self, rows)
        here()

    def killing_settled(self: Any, slices: Any) -> Iterator[Any]:
        if point == "unmerged":
            here()
        for number, rows in enumerate(settled(self, slices)):
            if point == "merging" and number == 1:
                here()
            yield rows

    def killing_gather(data: bytes, doing: str, *rest: Any) -> list[bytes]:
        parts = gather(data, doing, *rest)
        if doing.endswith(": merged"):
            here()
        return parts

    patches: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "put": (sharing.Shared, "put", killing_put),
        "unmerged": (sharing.Shared, "settled", killing_settled),
        "merging": (sharing.Shared, "settled", killing_settled),
        "merged": (sharing, "gather", killing_gather),
    }
    setattr(*patches[point])


def main(options: dict[str, Any]) -> list[int]:
    os.chdir(options["folder"])
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream, fd in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
        os.dup2(fd, stream)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size, children = int(options["processes"]), []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": port}
        if options.get("point") and options["rank"] in (-1, rank):
            kills(options["point"], int(options.get("after", 0)))
        os._exit(runner.main(options["arguments"]))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def serve() -> None:
    """Each run from a process of its own, so that none meets what an earlier one left in memory."""
    answers = os.dup(1)
    os.dup2(2, 1)
    warm.run_once()
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        heard, say = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
            os.write(say, json.dumps(main(json.loads(line))).encode())
            os._exit(0)
        os.close(say)
        with open(heard) as codes:
            os.write(answers, codes.read().encode() + b"\n")
        os.waitpid(child, 0)


if __name__ == "__main__":
    serve()
