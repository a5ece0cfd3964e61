"""The machine: device, precision, threads, memory, and whether steps are compiled."""

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness import distributed
from harness.cli import Runtime
from harness.errors import RunError

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch reads it at a process's first tensor


@dataclass(frozen=True)
class Machine:
    """A device that has been set up, the precision used on it, and whether steps are compiled.

    Of `world` processes that train together this is number `rank`; number 0 leads.
    """

    device: torch.device
    precision: torch.dtype
    compile: bool
    rank: int = 0
    world: int = 1

    def __str__(self) -> str:
        return f"{self.name}, {PRECISIONS[self.precision]}"

    @property
    def name(self) -> str:
        """The machine in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `config.json` and `summary.json`."""
        return {
            "machine": self.name,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "precision": PRECISIONS[self.precision],
            "compile": self.compile,
            "processes": self.world,
        }

    @property
    def leads(self) -> bool:
        """Whether this process keeps the run folder: validates, writes and prints."""
        return self.rank == 0

    def share_of_batch(self, step: int, batch: int) -> slice:
        """This process's equal share of the epoch's samples in a step of `batch`, which `world` divides."""
        share = batch // self.world
        first = step * batch + self.rank * share
        return slice(first, first + share)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network runs forward."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision is torch.bfloat16)

    def compiled(self, net: nn.Module) -> nn.Module:
        """A compiled form of `net` for training steps, which shares its weights.

        `net` stays as it was, eager and with its own state_dict: scoring, copies and checkpoints see no difference.
        """
        torch._dynamo.config.recompile_limit = 64  # one graph per crop size
        # On CUDA a step is hundreds of kernels of a few microseconds: only captured graphs launch them in time.
        return torch.compile(net, dynamic=False, mode="reduce-overhead" if self.device.type == "cuda" else None)


def start_machine(runtime: Runtime) -> Machine:
    """Choose and set up the device; under torchrun, meet the other processes.

    Raises RunError if the device is not there, or another process.
    """
    rank, world, local_rank = distributed.rank_and_world()
    device = choose_device(runtime.device)
    if world > 1 and device.type == "cuda":
        device = choose_device(f"cuda:{local_rank}")
    native = _has_native_bf16(device)
    if runtime.precision == "bf16" and device.type == "cuda" and not native:
        raise RunError(f"{runtime.device} has no bf16 arithmetic; use --precision fp32")
    bf16 = runtime.precision == "bf16" or (runtime.precision == "auto" and native)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not runtime.deterministic  # sizes are static: the search pays at once
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 was asked for
        torch.backends.cudnn.allow_tf32 = True
    else:
        _keep_memory()
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if runtime.compile and not _can_compile(device):
        raise RunError("--compile needs a C++ compiler and, on CUDA, Triton; install them or leave the flag out")
    compile = device.type == "cuda" and _can_compile(device) if runtime.compile is None else runtime.compile
    distributed.join(device)
    return Machine(device, torch.bfloat16 if bf16 else torch.float32, compile, rank, world)


def choose_device(name: str) -> torch.device:
    """The device of that name, a CUDA device with its index; `auto` takes CUDA where there is any.

    Raises RunError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"--device {name!r} is no device; use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: on CUDA that is Triton, a GPU it supports and a C compiler."""
    if device.type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
    has_triton = importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
    return has_triton and any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))


def _keep_memory() -> None:
    """Ask glibc to keep freed memory: by default it unmaps large blocks, and each step faults its pages in again.

    And PyTorch to take large pages: fewer of them fault, and fewer addresses have to be looked up.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
