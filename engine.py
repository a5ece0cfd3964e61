"""The machine: device, arithmetic, threads, memory, and how long a recipe will take there."""

import contextlib
import ctypes
import os
import platform
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from errors import RunError
from model import ResNet
from settings import Recipe, Runtime

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Achieved GFLOP/s of the training step, for a prediction before anything has been measured (see benchmark.py).
CPU_GFLOPS = {torch.bfloat16: 110.0, torch.float32: 40.0}  # per core
CUDA_GFLOPS = {torch.bfloat16: 40_000.0, torch.float32: 10_000.0}


@dataclass(frozen=True)
class Engine:
    """A device that has been set up, the arithmetic used on it, and whether steps are compiled."""

    device: torch.device
    precision: torch.dtype
    compile: bool

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
        }

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network runs forward."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision is torch.bfloat16)

    def predict_seconds(self, recipe: Recipe, model: ResNet, images: int, done: int = 0) -> float:
        """Rough seconds of a recipe's epochs after `done` of them, from their arithmetic: no measurement."""
        gflops = CUDA_GFLOPS[self.precision]
        if self.device.type == "cpu":
            gflops = CPU_GFLOPS[self.precision] * torch.get_num_threads()
        sizes = [stage.size(epoch) for stage in recipe.stages for epoch in range(stage.epochs)][done:]
        work = sum(forward_gflop(model, size) * count for size, count in Counter(sizes).items()) * images * recipe.views
        return 3 * work / gflops  # backward costs twice the forward pass


def start(runtime: Runtime) -> Engine:
    """Choose and set up the device. Raises RunError where the asked one is not there."""
    device = _device(runtime.device)
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
    compile = device.type == "cuda" if runtime.compile is None else runtime.compile
    return Engine(device, torch.bfloat16 if bf16 else torch.float32, compile)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"--device {name!r} is no device; use cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _keep_memory() -> None:
    """Ask glibc to keep freed memory: by default it unmaps large blocks, and each step faults its pages in anew."""
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


def forward_gflop(model: ResNet, size: int) -> float:
    """GFLOP (multiply-add = 2) of the network's forward pass on one image of `size` px."""
    total = 0

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            total += 2 * output[0].numel() * module.weight[0].numel()

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    training = model.training
    try:
        with torch.no_grad():
            parameter = next(model.parameters())
            model.eval()(torch.zeros(1, 3, size, size, device=parameter.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total / 1e9
