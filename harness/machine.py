"""The machine: device, precision, threads, memory, and whether steps are compiled and captured."""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import distributed
from harness.cli import Runtime
from harness.errors import RunError, is_out_of_memory, reason
from harness.text import counted

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TENSOR_CORES = (7, 0)  # the first capability that multiplies fp16 several times faster than fp32
WITHOUT_TENSOR_CORES = re.compile(r"GTX 16|\bT(400|500|550|600|1000|1200|2000)\b|\bMX[45]50\b")  # newer, but small
TRITON = (7, 0)  # the first capability that Triton compiles for
IMAGES_SHARE = 0.5  # of the device's free memory that images may take
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch reads it at a process's first tensor


@dataclass(frozen=True)
class Machine:
    """A device that has been set up, the precision used on it, whether steps are compiled, and captured as graphs.

    Of `world` processes that train together this is number `rank`; number 0 leads. `notes` say what differs from
    the plan, a sentence each.
    """

    device: torch.device
    precision: torch.dtype
    compile: bool
    graphs: bool = False
    rank: int = 0
    world: int = 1
    notes: list[str] = field(default_factory=list, compare=False)

    def __str__(self) -> str:
        return f"{self.name}, {PRECISIONS[self.precision]}"

    @property
    def name(self) -> str:
        """The machine in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{_cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they appear in `config.json` and `summary.json`."""
        return {
            "machine": self.name,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "precision": PRECISIONS[self.precision],
            "compile": self.compile,
            "graphs": self.graphs,
            "processes": self.world,
            "notes": list(self.notes),
        }

    def note(self, sentence: str) -> None:
        """Print what differs from the plan, and keep it for `config.json` and `summary.json`."""
        if self.leads and sentence not in self.notes:
            self.notes.append(sentence)
            print(f"note: {sentence}", flush=True)

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
        return autocast(self.device, self.precision)

    def hold(self, images: Tensor) -> Tensor:
        """The images on the device, or left where they are if they would take more than half of its free memory."""
        if self.device.type != "cuda":
            return images
        gc.collect()  # in a notebook the previous run may still hold memory
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        if images.nbytes <= IMAGES_SHARE * free:
            return images.to(self.device)
        self.note(
            f"the images ({images.nbytes / 2**20:,.0f} MiB) stay in the host's memory and are fetched batch by batch: "
            f"the GPU has {free / 2**20:,.0f} MiB free"
        )
        return images


def autocast(device: torch.device, precision: torch.dtype | None) -> contextlib.AbstractContextManager:
    """The context in which a network calculates in `precision`; None is float32."""
    low = precision not in (None, torch.float32)
    return torch.autocast(device.type, dtype=precision if low else None, enabled=low)


def start_machine(runtime: Runtime) -> Machine:
    """Choose and set up the device; under torchrun, meet the other processes.

    Raises RunError if the device is missing or cannot be used, or if another process is missing.
    """
    rank, world, local_rank = distributed.rank_and_world()
    device = choose_device(runtime.device)
    if world > 1 and device.type == "cuda":
        if ":" in runtime.device:
            way_out = "give --device cuda, and name the GPUs in CUDA_VISIBLE_DEVICES"
            raise RunError(f"--device {runtime.device}: each process takes a GPU of its own; {way_out}")
        cards = torch.cuda.device_count()
        if local_rank >= cards:
            raise RunError(
                f"each process takes a GPU of its own, but this machine has {cards}: torchrun --nproc-per-node {cards}"
            )
        device = choose_device(f"cuda:{local_rank}")
    own = own_threads()  # noted before the first run changes them
    threads = runtime.threads or own
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if device.type == "cuda":
        _try_kernel(device)  # before set_device, which may fail where another program has the card to itself
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not runtime.deterministic  # sizes are static: the search pays off at once
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 was asked for
        torch.backends.cudnn.allow_tf32 = True
    else:
        _keep_memory()
    if runtime.deterministic != torch.are_deterministic_algorithms_enabled():  # by the previous run, in a notebook
        torch.use_deterministic_algorithms(runtime.deterministic)  # which imports the compiler: seconds
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any; it doubles the launches
    precision = _precision(device, runtime.precision)
    obstacle = _obstacle_to_compiling(device)
    if runtime.compile and obstacle:
        raise RunError(f"--compile: {obstacle}; leave the flag out")
    wanted = device.type == "cuda" if runtime.compile is None else runtime.compile
    distributed.join(device)
    # DistributedDataParallel's buckets wait for other processes, which a captured graph cannot
    graphs = device.type == "cuda" and wanted and world == 1
    machine = Machine(device, precision, wanted and not obstacle, graphs, rank, world)
    if wanted and obstacle:
        machine.note(f"the step is not compiled, which is slower: {obstacle}")
    return machine


@functools.cache
def own_threads() -> int:
    """This process's CPU threads before its first run: a notebook's next run must not inherit this one's --threads.

    PyTorch counts the cores that it sees. In a container that may use fewer, that many threads would hold each other
    up, so there are fewer, unless OMP_NUM_THREADS says how many.
    """
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, usable_cores())


def usable_cores() -> int:
    """The CPU cores that this process is bound to, but no more than its container may use."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(Path("/sys/fs/cgroup"))
    return bound if quota is None else max(1, min(bound, int(quota)))


def cpu_quota(groups: Path) -> float | None:
    """How many CPUs this container may use, by Linux's control groups of either version; None means no limit."""
    files = ([groups / "cpu.max"], [groups / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")])
    for version in files:
        with contextlib.suppress(OSError, ValueError):  # not of this version, or "max"
            quota, period = map(int, " ".join(file.read_text() for file in version).split())
            return quota / period if quota > 0 else None
    return None


def choose_device(name: str) -> torch.device:
    """The device for a name that `Runtime` takes, a CUDA device with its index; `auto` uses CUDA if available.

    Raises RunError if there is no such device here.
    """
    device = torch.device("cuda" if name == "auto" else name)
    if device.type == "cpu":
        return device
    why, driver = _why_no_cuda()
    if why and name == "auto":
        if driver:
            print(
                f"warning: there is an NVIDIA driver, but PyTorch cannot use it, so the CPU is used: {why}",
                file=sys.stderr,
            )
        return torch.device("cpu")
    index, count = device.index or 0, torch.cuda.device_count()
    if why or index >= count:
        raise RunError(f"--device {name}: {why or 'PyTorch sees ' + counted(count, 'CUDA device')}; use --device cpu")
    return torch.device("cuda", index)


def _why_no_cuda() -> tuple[str, bool]:
    """Why PyTorch finds no CUDA device, and whether the driver of an NVIDIA GPU is there; "" where it finds one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return "", True
    driver = bool(caught or Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"))
    if caught:
        return reason(caught[0].message), driver
    if not (torch.version.cuda or torch.version.hip):
        return "PyTorch was built without CUDA (pip uninstall torch, then install one with it: pytorch.org)", driver
    return "PyTorch sees no CUDA device here", driver


def _try_kernel(device: torch.device) -> None:
    """Raise RunError if the device cannot run this PyTorch's kernels."""
    major, minor = torch.cuda.get_device_capability(device)
    names = [name for name in torch.cuda.get_arch_list() if name.startswith(("sm_", "compute_"))]  # AMD's differ
    built_for = [name.split("_") for name in names]
    capabilities = [(kind, int(n.rstrip("af")[:-1]), int(n.rstrip("af")[-1])) for kind, n in built_for]
    runs = any(
        (kind == "sm" and its_major == major and its_minor <= minor)
        or (kind == "compute" and (its_major, its_minor) <= (major, minor))
        for kind, its_major, its_minor in capabilities
    )
    name = torch.cuda.get_device_name(device)
    why = f"PyTorch {torch.__version__} has no kernels for a card of capability {major}.{minor}"
    try:
        if runs or not capabilities:
            (torch.ones(1, device=device) + 1).item()
            return
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise RunError(f"{name} has no free memory: stop other programs on it, or use --device cpu") from error
        why = reason(error)
        if capabilities:  # this build has its kernels, so another build would not help
            raise RunError(f"{name} cannot be used: {why}; stop other programs on it, or use --device cpu") from error
    oldest = min(((its_major, its_minor) for _, its_major, its_minor in capabilities), default=(0, 0))
    # of the versions that this project runs with, the builds for CUDA 12.6 have the kernels for the oldest cards
    build = "its build for CUDA 12.6" if (major, minor) < oldest else "a newer build"
    raise RunError(f"{name} cannot be used: {why}; install {build} (pytorch.org), or use --device cpu")


def _precision(device: torch.device, wanted: str) -> torch.dtype:
    """The precision of that name; `auto` takes bf16 where the device has it, else fp16 where that pays, else fp32."""
    native = has_native_bf16(device)
    if wanted == "bf16" and device.type == "cuda" and not native:
        raise RunError(f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic; use --precision fp16 or fp32")
    if wanted != "auto":
        return next(precision for precision, name in PRECISIONS.items() if name == wanted)
    if native:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" and _has_tensor_cores(device) else torch.float32


def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a card has them: some report capability 7.5 but have none, and give NaN in fp16 (PyTorch issue 58123)."""
    new_enough = torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return new_enough and not WITHOUT_TENSOR_CORES.search(torch.cuda.get_device_name(device))


def has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _obstacle_to_compiling(device: torch.device) -> str:
    """What torch.compile lacks here, as a sentence with the way out; empty if nothing."""
    windows = sys.platform == "win32"
    if device.type == "cpu" and windows:
        found = any(map(shutil.which, (os.environ.get("CXX", "cl"), "cl")))
        return (
            ""
            if found
            else "it needs a C++ compiler: install Visual Studio's C++ build tools, and start from their prompt"
        )
    if device.type == "cpu":
        compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
        return "" if any(map(shutil.which, compilers)) else "it needs a C++ compiler: install g++"
    if torch.cuda.get_device_capability(device) < TRITON:
        return "Triton does not compile for cards below capability 7.0"
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton: pip install triton (on Windows: triton-windows)"
    if windows:  # where Triton brings its own compiler
        return ""
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "Triton needs a C compiler: install gcc"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton needs Python's header files: install python3-dev"
    return ""


def _keep_memory() -> None:
    """Ask glibc to keep freed memory: by default it unmaps large blocks, and each step faults its pages in again.

    Also ask PyTorch to use large pages: there are fewer page faults and fewer address look-ups.
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
