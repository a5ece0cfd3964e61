"""The usual training script, for benchmark.py to measure against this project's way, and helpers for both."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import augment
import data
from harness import demo_shapes
from harness.cli import Runtime
from harness.machine import LARGE_PAGES, choose_device, own_threads, usable_cores
from recipes import Recipe, build_network

CORES = usable_cores()
# How a standalone script would start workers. A spawned process would spawn them too, and each would import PyTorch.
START_METHOD = "fork" if sys.platform == "linux" else None
CLASS_COUNT = len(data.CLASSES)
DRAWN = 50  # pictures per class
PIL_VIEWS = 1024  # at most per turn: one core makes 700 to 2,000 a second


class Job(NamedTuple):
    """What is measured: training at `size` px in `steps` batches of `batch`, and scoring as many at `eval_size` px."""

    recipe: Recipe
    runtime: Runtime
    data_dir: Path | None
    size: int
    batch: int
    eval_size: int
    steps: int

    @property
    def samples(self) -> int:
        return self.steps * self.batch


class Pictures(Dataset):
    """`length` transformed PIL images and their labels."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor], length: int) -> None:
        self.images, self.labels, self.transform, self.length = images.numpy(), labels, transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index %= len(self.images)
        return self.transform(Image.fromarray(self.images[index].transpose(1, 2, 0))), self.labels[index]


class Baseline:
    """The usual training script's way. Each public method handles a job's samples and returns their number."""

    def __init__(self, job: Job) -> None:
        os.environ.pop(LARGE_PAGES, None)  # specific to this project, which set it before this process began
        torch.set_num_threads(job.runtime.threads or own_threads())
        self.job, self.device = job, choose_device(job.runtime.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the one to wait for, and whose memory is read
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        images, labels = load(job.data_dir)
        to_tensor = [transforms.ToTensor(), transforms.Normalize(augment.MEAN, augment.STD)]
        views = transforms.Compose([*pil_views(job.recipe.augmentation, job.size), *to_tensor])
        resize = transforms.Compose([transforms.Resize(job.eval_size), *to_tensor])
        self.pictures = Pictures(images, labels, views, job.samples)
        workers = {"num_workers": CORES, "persistent_workers": True, "multiprocessing_context": START_METHOD}
        shared = {"pin_memory": self.device.type == "cuda", **workers}
        self.loader = DataLoader(self.pictures, job.batch, shuffle=True, drop_last=True, **shared)
        self.eval_loader = DataLoader(Pictures(images, labels, resize, job.samples), job.batch, **shared)
        self.net = build_network(job.recipe, CLASS_COUNT).to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, weight_decay=1e-4)
        self.x = torch.randn(job.batch, 3, job.size, job.size, device=self.device)
        self.y = torch.arange(job.batch, device=self.device) % CLASS_COUNT

    def views(self) -> int:
        count = min(self.job.samples, PIL_VIEWS)
        for index in range(count):
            self.pictures[index]
        return count

    def train_steps(self) -> int:
        for _ in range(self.job.steps):
            self._step(self.x, self.y)
        return self.job.samples

    def end_to_end(self) -> int:
        for x, labels in self.loader:
            self._step(x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
        return self.job.samples

    def score(self) -> int:
        self.net.eval()
        hits = 0
        with torch.no_grad():
            for x, labels in self.eval_loader:
                hits += (self.net(x.to(self.device)).argmax(1) == labels.to(self.device)).sum().item()
        self.net.train()
        return self.job.samples

    def _step(self, x: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self.net(x), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def pil_views(options: augment.ViewOptions, size: int) -> list[Callable]:
    """The recipe's views as torchvision's own transforms of PIL images, in the original project's order.

    Erasing, mixing and the extra operation of `trivial_augment` are left out: the usual script does less work.
    """
    return [
        transforms.RandomRotation(options.rotation),
        transforms.RandomResizedCrop(size, options.crop_scale, options.crop_ratio),
        transforms.ColorJitter(options.brightness, options.contrast, options.saturation, options.hue),
        transforms.RandomHorizontalFlip(options.hflip),
        transforms.RandomVerticalFlip(options.vflip),
    ]


def load(data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """STL-10's training images uint8 (N, 3, 96, 96) and labels int64 (N,), or drawn pictures without a folder."""
    if data_dir is not None:
        found = data.load(data_dir, "train")
        return found.images, found.labels
    return demo_shapes.draw_shapes("train", DRAWN)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, on a GPU too, and what it returns."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result
