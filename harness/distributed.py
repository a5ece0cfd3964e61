"""Several processes, started by torchrun, that train one network: one leads and writes the run, the others follow.

Without torchrun there is no group, and the functions here do nothing or act as for one process. Decisions and figures
travel as CPU tensors over gloo, which notices at once when a process has ended. Gradients on CUDA go over NCCL.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness import errors
from harness.errors import RunError

TIMEOUT = timedelta(minutes=5)  # for gradients: only a process that hangs takes that long
# Followers wait while the leader fetches data, opens a large folder of pictures, or validates and writes. A process
# that has ended is noticed at once.
PATIENCE = timedelta(hours=12)
_decisions: dist.ProcessGroup | None = None  # of all processes, over gloo


class PeerLost(RunError):
    """Another process of the group has ended or does not answer."""


def rank_and_world() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as torchrun set them in the environment; without it 0, 1, 0.

    Raises RunError if some of them are missing.
    """
    try:
        world = int(os.environ.get("WORLD_SIZE", 1))
        return (int(os.environ["RANK"]), world, int(os.environ["LOCAL_RANK"])) if world > 1 else (0, 1, 0)
    except (KeyError, ValueError) as error:
        raise RunError(
            "WORLD_SIZE is set, but RANK or LOCAL_RANK is not a whole number; start with torchrun, or unset WORLD_SIZE"
        ) from error


def world_size() -> int:
    """How many processes train together."""
    return rank_and_world()[1]


def threads_while_others_wait() -> int:
    """CPU threads for what the leader does while the others on its machine wait: theirs as well as its own."""
    rank, world, _ = rank_and_world()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 and not rank else 1
    return torch.get_num_threads() * here


def join(device: torch.device) -> None:
    """Join the other processes; from then on only the leader prints.

    Raises PeerLost if they do not appear, RunError if the environment does not say where they meet.
    """
    rank, world, _ = rank_and_world()
    if world == 1 or _joined():
        return
    global _decisions
    with peer_loss_reported():
        nccl = device.type == "cuda" and dist.is_nccl_available()  # on Windows there is none
        try:
            dist.init_process_group("nccl" if nccl else "gloo", timeout=TIMEOUT, device_id=device if nccl else None)
        except ValueError as error:
            raise RunError(f"WORLD_SIZE is set, but {error}; start with torchrun, or unset WORLD_SIZE") from error
        _decisions = dist.new_group(backend="gloo", timeout=PATIENCE)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()  # PyTorch may have been built without it


def leave() -> None:
    """Leave the group after an orderly end. After any other, the end of the process does that, and cannot hang."""
    global _decisions
    if _joined():
        dist.destroy_process_group()
        _decisions = None


def end_process(status: int) -> NoReturn:
    """End a command's process with its exit status; one of several ends at once, without the interpreter's shutdown.

    DistributedDataParallel still holds the group, and with it gloo's threads, even after `leave`. A thread that
    releases a tensor while the interpreter shuts down is unwound by Python, and C++ then aborts the process.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed by the reader or the parent process
                stream.flush()
        os._exit(status)
    errors.end_process(status)


def parallel(net: nn.Module) -> nn.Module:
    """`net`, wrapped to average gradients over the processes and use the leader's buffers; just `net` if alone."""
    if not _joined():
        return net
    with peer_loss_reported():
        return DistributedDataParallel(net)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over the processes of a CPU tensor of one shape and dtype, which is overwritten. Raises PeerLost."""
    if _joined():
        with peer_loss_reported():
            dist.all_reduce(values, group=_decisions)
    return values


def max_over_ranks(value: int) -> int:
    """The largest of the processes' values, the same in all of them. Raises PeerLost."""
    if not _joined():
        return value
    values = torch.tensor(int(value))
    with peer_loss_reported():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=_decisions)
    return int(values)


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """The leader goes through the block before the others begin: what it fetches or removes is done by then.

    All leave it together, as the others may take long too: where no cache can be written, each opens all pictures.
    """
    rank, _, _ = rank_and_world()
    if rank:
        max_over_ranks(0)
    yield
    if not rank:
        max_over_ranks(0)
    max_over_ranks(0)


def restarted_by() -> str:
    """What restarted this command: "torchrun" (--max-restarts), "SLURM" (a requeued job), or "" for neither."""
    counts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "SLURM": "SLURM_RESTART_COUNT"}
    return next((name for name, variable in counts.items() if os.environ.get(variable, "0") != "0"), "")


def require_same(values: Mapping[str, Any]) -> None:
    """Raise RunError, in all processes, if any value is not the same in each: a file changed, or machines differ.

    Values are compared by their `repr`.
    """
    for name, value in values.items():
        number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7])
        if max_over_ranks(number) != -max_over_ranks(-number):
            raise RunError(f"the processes cannot train together, as they have read different {name}; start them again")


def is_peer_loss(error: BaseException) -> bool:
    """Whether an exception says that another process has ended or does not answer."""
    said = isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    return said or isinstance(error, getattr(dist, "DistError", ()))


@contextlib.contextmanager
def peer_loss_reported() -> Iterator[None]:
    """Raise PeerLost where the block fails because of another process. Other exceptions pass."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        rank, world, _ = rank_and_world()
        raise PeerLost(f"process {rank} has lost the other {world - 1}: one ended, or does not answer") from error
