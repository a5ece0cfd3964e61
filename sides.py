"""What benchmark.py measures: the classic training script and this project's engine, doing the same jobs."""

import os
import statistics
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
import checkpoint
import data
import demo
import engine
import scoring
from learner import Learner
from settings import Recipe, Runtime, Stage

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CLASSES = 10
DRAWN = 50  # pictures a class


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


class Classic:
    """The usual training script's way. Each public method handles a job's samples and returns when that is done."""

    def __init__(self, job: Job) -> None:
        os.environ.pop(engine.LARGE_PAGES, None)  # the engine's idea, which it set before this process began
        if job.runtime.threads:
            torch.set_num_threads(job.runtime.threads)
        self.job, self.device = job, engine.choose_device(job.runtime.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        images, labels = load(job.data_dir)
        to_tensor = [transforms.ToTensor(), transforms.Normalize(augment.MEAN, augment.STD)]
        views = transforms.Compose([*classic_views(job.recipe.view, job.size), *to_tensor])
        resize = transforms.Compose([transforms.Resize(job.eval_size), *to_tensor])
        self.pictures = Pictures(images, labels, views, job.samples)
        shared = {"num_workers": CORES, "persistent_workers": True, "pin_memory": self.device.type == "cuda"}
        self.loader = DataLoader(self.pictures, job.batch, shuffle=True, drop_last=True, **shared)
        self.eval_loader = DataLoader(Pictures(images, labels, resize, job.samples), job.batch, **shared)
        self.net = checkpoint.network(job.recipe, CLASSES).to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, weight_decay=1e-4)
        self.x = torch.randn(job.batch, 3, job.size, job.size, device=self.device)
        self.y = torch.arange(job.batch, device=self.device) % CLASSES

    def views(self) -> None:
        for index in range(self.job.samples):
            self.pictures[index]

    def train_steps(self) -> None:
        for _ in range(self.job.steps):
            self._step(self.x, self.y)

    def end_to_end(self) -> None:
        for x, labels in self.loader:
            self._step(x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))

    def score(self) -> None:
        self.net.eval()
        hits = 0
        with torch.no_grad():
            for x, labels in self.eval_loader:
                hits += (self.net(x.to(self.device)).argmax(1) == labels.to(self.device)).sum().item()
        self.net.train()

    def _step(self, x: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self.net(x), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def classic_views(views: augment.Views, size: int) -> list[Callable]:
    """The recipe's views in torchvision's own transforms of PIL images, in the original project's order."""
    return [
        transforms.RandomRotation(views.rotation),
        transforms.RandomResizedCrop(size, views.crop_scale, views.crop_ratio),
        transforms.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue),
        transforms.RandomHorizontalFlip(views.hflip),
        transforms.RandomVerticalFlip(views.vflip),
    ]


class Ours:
    """This project's way, by the very code that `train.py` runs; the methods are those of `Classic`."""

    def __init__(self, job: Job) -> None:
        self.job, self.machine = job, engine.start(job.runtime)
        self.images, self.labels = (part.to(self.machine.device) for part in load(job.data_dir))
        self.learner = Learner(job.recipe, CLASSES, self.machine)
        self.stage = Stage(1, (job.size,), job.eval_size, job.batch, 1e-3)
        self.learner.begin(self.stage, len(self.images))
        self.index = torch.arange(job.samples) % len(self.images)
        self.draws = self._draw()
        self.x = self._view(0)

    def _draw(self) -> augment.Draws:
        return augment.draw(self.index, 1, self.job.batch, self.job.recipe.view, (0,)).to(self.machine.device)

    def _view(self, step: int) -> Tensor:
        rows = self.machine.rows(step, self.job.batch)
        images, uniforms = self.images.index_select(0, self.draws.order[rows]), self.draws.uniforms[rows]
        x = augment.view(images, uniforms, self.draws.colour_orders[step], self.job.size, self.job.recipe.view)
        return augment.normalise(x, inplace=True)

    def views(self) -> None:
        for step in range(self.job.steps):
            self._view(step)

    def train_steps(self) -> None:
        self.learner.net.train()
        for step in range(self.job.steps):
            rows = self.machine.rows(step, self.job.batch)
            labels = self.labels[self.draws.order[rows]]
            self.learner._step(self.x, labels, self.draws.mix[rows], self.draws.uniforms[rows])

    def end_to_end(self) -> None:
        draws, size = self._draw(), self.job.size
        self.learner.train_epoch(self.images, self.labels, draws, self.stage, size, tick=lambda: None)

    def score(self) -> None:
        images = self.images[self.index.to(self.machine.device)]
        scoring.logits(self.learner.scored, images, self.job.eval_size, precision=self.machine.precision)

    def matmul_tflops(self) -> float:
        """What the machine reaches in a large product of square matrices in this precision: the median of nine."""
        side = 8192 if self.machine.device.type == "cuda" else 2048
        a, b = torch.randn(2, side, side, device=self.machine.device).to(self.machine.precision)
        torch.mm(a, b)
        return 2 * side**3 / statistics.median(timed(lambda: torch.mm(a, b)) for _ in range(9)) / 1e12


def load(data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """STL-10's training images uint8 (N, 3, 96, 96) and labels int64 (N,), or drawn pictures without a folder."""
    if data_dir is not None:
        found = data.load(data_dir, "train")
        return found.images, found.labels
    images, labels = demo.draw("train", DRAWN)
    return torch.from_numpy(images.swapaxes(2, 3).copy()), torch.from_numpy(labels).long() - 1


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, on a GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
