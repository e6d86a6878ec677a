"""The processes of one run, as torchrun starts them: which one this is, and how they exchange bytes and tensors.

Owns what is read from torchrun's environment, the one GPU that a process sees, and a gloo group (a second one over NCCL
for gradients). Every process runs the same program; the first one (rank 0) owns the run folder and the terminal.
Decides nothing about work (`cai.run.sharing`, `cai.training.ranks`). Torch is imported late. Invariants: alone, every
function is the identity and no group is made; a process that ends, for whatever reason, ends the others at their next
exchange with exit 75; what they exchange carries its name, so that processes which went apart end with an error.

The groups are made directly, without `init_process_group`, and torchrun's variables are taken out of the environment:
accelerate, transformers, TRL and Unsloth then do what they do on one GPU, where all that is tested was tested.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from cai.errors import CaiError, Stopped

if TYPE_CHECKING:
    import torch
    from torch.distributed import PrefixStore, ProcessGroup, Work

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
LONGEST = timedelta(days=2)  # between two exchanges; a process that dies is seen at once, by its closed connection
POLL_SECONDS = 0.005
ENDED = "another process of this run ended"
END = "the end"
LINGER_SECONDS = 20.0  # torchrun ends the others when one has ended: the first one is to close its run before that


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; `local_rank` counts on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process owns the run folder and the terminal."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1


@dataclass
class Groups:
    """The connections of this process; `nccl` is made at the first tensor on a GPU."""

    store: PrefixStore
    gloo: ProcessGroup
    nccl: ProcessGroup | None = None


_here = World()
_groups: Groups | None = None


def world() -> World:
    """This process among those of the run; alone until `enter` has read otherwise."""
    return _here


def of_environment(variables: Mapping[str, str]) -> World:
    """What torchrun says. Errors: CaiError for a number that is none, or ranks that do not fit."""
    found = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", variables.get("RANK", "0"))):
        value = variables.get(name, alone)
        if not value.isdigit():
            raise CaiError(f"{name}={value!r} in the environment is no number: start with torchrun, or unset {name}")
        found.append(int(value))
    rank, size, local_rank = found
    if rank >= max(size, 1):
        raise CaiError(f"RANK={rank} in the environment, but WORLD_SIZE={size}: start with torchrun, or unset both")
    return World(rank, size, local_rank) if size > 1 else World()


def enter() -> World:
    """Read torchrun's environment; of several, this process sees one GPU, and only the first one prints."""
    global _here
    _here = of_environment(os.environ)
    if _here.several:
        os.environ["CUDA_VISIBLE_DEVICES"] = own_device(os.environ.get("CUDA_VISIBLE_DEVICES"), _here.local_rank)
    if not _here.first:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)
    return _here


def own_device(visible: str | None, local_rank: int) -> str:
    """The value of CUDA_VISIBLE_DEVICES that leaves one device; "" where this machine lends none to this process."""
    if visible is None:
        return str(local_rank)
    names = [name for name in visible.split(",") if name.strip()]
    return names[local_rank] if local_rank < len(names) else ""


def alone(command: str) -> None:
    """A command that is no run has no use for several processes. Errors: CaiError(USAGE)."""
    if _here.several:
        raise CaiError(f"runner.py: --{command.replace('_', '-')} is for one process: start it without torchrun.")


def tell(text: str) -> None:
    """A last line on the real stderr, with the process's number where it is not the first one."""
    stream = sys.stderr if _here.first else sys.__stderr__
    if stream is not None:
        stream.write(text if _here.first else f"process {_here.rank} of {_here.size}: {text}")
        stream.flush()


def join() -> None:
    """Meet the other processes, then hide them from the libraries. Alone: nothing."""
    global _groups
    if not _here.several or _groups:
        return
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own store
    place = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(*place, _here.size, is_master=_here.first and not hosted, timeout=timedelta(minutes=5))
        own = PrefixStore(f"run/{attempt}", store)
        gloo = ProcessGroupGloo(PrefixStore("gloo", own), _here.rank, _here.size, LONGEST)
        _groups = Groups(own, cast("ProcessGroup", gloo))
    except RuntimeError as error:
        raise CaiError(f"the processes of this run did not meet: {str(error).splitlines()[0][:200]}") from None
    for name in VARIABLES:
        os.environ.pop(name, None)


def leave(failed: bool) -> None:
    """Close the connections, so that processes which wait for this one end now.

    A further process that failed waits for the first one's end, for a while: it has more to write.
    """
    global _groups
    if failed and _groups is not None and not _here.first:
        deadline = time.monotonic() + LINGER_SECONDS
        with suppress(Stopped):
            gather(b"", END, lambda: time.monotonic() > deadline)
    _groups = None


def lost(error: BaseException) -> bool:
    """Whether a library's error says that another process is gone."""
    said = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo/transport")
    return _here.several and isinstance(error, RuntimeError) and any(sign in said for sign in signs)


def gone(doing: str) -> Stopped:
    return Stopped(f"{ENDED} {doing}; everything finished is kept, resume to go on")


def gather(data: bytes, doing: str, stopped: Callable[[], bool] | None = None) -> list[bytes]:
    """Every process's bytes, by rank. `doing`: what all of them are at; `stopped` is asked while waiting.

    Errors: Stopped where another process ended, `stopped()` says so, or one is at something else.
    """
    if not _here.several:
        return [data]
    import torch

    mark = zlib.crc32(doing.encode())
    heads = _all(torch.tensor([len(data), mark], dtype=torch.int64), doing, stopped)
    marks = {int(head[1]) for head in heads}
    if zlib.crc32(END.encode()) in marks:
        raise gone(doing)
    if len(marks) > 1:
        raise Stopped(f"the processes of this run went apart (this one: {doing}); resume to go on")
    sizes = [int(head[0]) for head in heads]
    padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = _all(padded, doing, stopped)
    return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def _all(mine: torch.Tensor, doing: str, stopped: Callable[[], bool] | None) -> list[torch.Tensor]:
    parts = [mine.clone() for _ in range(_here.size)]
    try:
        _wait(_joined().gloo.allgather([parts], [mine]), doing, stopped)
    except RuntimeError as error:
        raise gone(doing) from error
    return parts


def _joined() -> Groups:
    assert _groups is not None, "join() comes first"
    return _groups


def _wait(work: Work, doing: str, stopped: Callable[[], bool] | None) -> None:
    """Until the others have come; the main thread stays awake for a stop."""
    while not work.is_completed():
        if stopped is not None and stopped():
            raise Stopped(f"stopped {doing}; everything finished is kept, resume to go on")
        time.sleep(POLL_SECONDS)
    work.wait()


def share(data: bytes, doing: str, stopped: Callable[[], bool] | None = None) -> bytes:
    """The first process's bytes, on all."""
    return gather(data if _here.first else b"", doing, stopped)[0]


def any_of(flag: bool, doing: str) -> bool:
    """Whether any process says yes."""
    return flag if not _here.several else any(said == b"1" for said in gather(b"1" if flag else b"0", doing))


def add_up(tensor: torch.Tensor, doing: str) -> None:
    """The sum over all processes, in place: NCCL where each has a GPU of its own, else gloo."""
    if not _here.several:
        return
    import torch

    groups = _joined()
    if tensor.is_cuda and groups.nccl is None:
        from torch.distributed import PrefixStore, ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        nccl = ProcessGroupNCCL(PrefixStore("nccl", groups.store), _here.rank, _here.size, options)
        groups.nccl = cast("ProcessGroup", nccl)
    group = groups.nccl if tensor.is_cuda and groups.nccl else groups.gloo
    try:
        group.allreduce([tensor]).wait()
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
    except RuntimeError as error:
        raise gone(doing) from error
