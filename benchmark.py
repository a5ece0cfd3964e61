#!/usr/bin/env python3
"""The classic way and this project's engine side by side: images a second, arithmetic, memory and a forecast.

    python3 benchmark.py                                 # the original recipe's two stages, on drawn pictures
    python3 benchmark.py --recipe cpu --data-dir data    # another recipe's, on the real ones
    python3 benchmark.py --size 96 --batch 256 --json speed.json

Classic is what a careful user writes: torchvision's transforms on one PIL image at a time, in as many persistent
DataLoader workers as there are cores, float32 NCHW steps, and `.item()` at each of them. Both sides take turns, so that
whatever else the machine does hits both; the figures are medians, the ratios those of neighbouring turns.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
import errors
import files
import scoring
from commands import whole_number
from engine import Engine
from learner import Learner
from record import duration
from settings import RECIPES, Recipe, Runtime, Stage

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CLASSES = 10
DRAWN = 50  # pictures a class
TRAIN_IMAGES = 4_000  # of STL-10's 5,000; what a forecast is for


class Point(NamedTuple):
    """What is measured: training at `size` px in batches of `batch`, scoring at `eval_size` px."""

    size: int
    batch: int
    eval_size: int


class Job(NamedTuple):
    """All that a side needs; plain values, so that a child process can be given them."""

    recipe: Recipe
    runtime: Runtime
    data_dir: Path | None
    point: Point
    steps: int

    @property
    def samples(self) -> int:
        return self.steps * self.point.batch


class Pictures(Dataset):
    """Transformed PIL images and labels, `length` of them."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor], length: int) -> None:
        self.images, self.labels, self.transform, self.length = images.numpy(), labels, transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index %= len(self.images)
        return self.transform(Image.fromarray(self.images[index].transpose(1, 2, 0))), self.labels[index]


class Classic:
    """The usual training script's way. Each method below handles the job's samples and returns when that is done."""

    def __init__(self, job: Job, machine: Engine) -> None:
        self.device, self.samples = machine.device, job.samples
        images, labels = load(job.data_dir)
        to_tensor = [transforms.ToTensor(), transforms.Normalize(augment.MEAN, augment.STD)]
        self.pictures = Pictures(images, labels, classic_views(job.recipe.view, job.point.size, to_tensor), job.samples)
        resize = transforms.Compose([transforms.Resize(job.point.eval_size), *to_tensor])
        shared = {
            "batch_size": job.point.batch,
            "num_workers": CORES,
            "persistent_workers": True,
            "pin_memory": self.device.type == "cuda",
        }
        self.loader = DataLoader(self.pictures, shuffle=True, drop_last=True, **shared)
        self.eval_loader = DataLoader(Pictures(images, labels, resize, job.samples), **shared)
        self.net = checkpoint.network(job.recipe, CLASSES).to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, weight_decay=1e-4)
        self.batch = torch.randn(job.point.batch, 3, job.point.size, job.point.size, device=self.device)
        self.targets = torch.arange(job.point.batch, device=self.device) % CLASSES
        self.steps = job.steps

    def views(self) -> None:
        for index in range(self.samples):
            self.pictures[index]

    def train_steps(self) -> None:
        for _ in range(self.steps):
            self._step(self.batch, self.targets)

    def end_to_end(self) -> None:
        for x, labels in self.loader:
            self._step(x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))

    def score(self) -> None:
        self.net.eval()
        hits = 0
        with torch.no_grad():
            for x, labels in self.eval_loader:
                scores = self.net(x.to(self.device, non_blocking=True))
                hits += (scores.argmax(1).cpu() == labels).sum().item()
        self.net.train()

    def _step(self, x: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self.net(x), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def classic_views(views: augment.Views, size: int, to_tensor: list[Callable]) -> transforms.Compose:
    """The recipe's views in torchvision's own transforms, in the original project's order."""
    return transforms.Compose(
        [
            transforms.RandomRotation(views.rotation),
            transforms.RandomResizedCrop(size, views.crop_scale, views.crop_ratio),
            transforms.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue),
            transforms.RandomHorizontalFlip(views.hflip),
            transforms.RandomVerticalFlip(views.vflip),
            *to_tensor,
        ]
    )


class Ours:
    """This project's way, by the very code that `train.py` runs."""

    def __init__(self, job: Job, machine: Engine) -> None:
        self.job, self.machine = job, machine
        self.images, self.labels = (part.to(machine.device) for part in load(job.data_dir))
        self.learner = Learner(job.recipe, CLASSES, machine)
        self.stage = Stage(1, (job.point.size,), job.point.eval_size, job.point.batch, 1e-3)
        self.learner.begin(self.stage, len(self.images))
        self.learner.net.train()
        self.index = torch.arange(job.samples) % len(self.images)
        self.draws = self._draw()
        self.batch = self._view(0)

    def _draw(self) -> augment.Draws:
        draws = augment.draw(self.index, 1, self.job.point.batch, self.job.recipe.view, (0,))
        return draws.to(self.machine.device)

    def _rows(self, step: int) -> slice:
        return slice(step * self.job.point.batch, (step + 1) * self.job.point.batch)

    def _view(self, step: int) -> Tensor:
        draws, rows = self.draws, self._rows(step)
        images, order = self.images[draws.order[rows]], draws.colour_orders[step]
        x = augment.view(images, draws.uniforms[rows], order, self.job.point.size, self.job.recipe.view)
        return augment.normalise(x, inplace=True)

    def views(self) -> None:
        for step in range(self.job.steps):
            self._view(step)

    def train_steps(self) -> None:
        for step in range(self.job.steps):
            rows = self._rows(step)
            labels = self.labels[self.draws.order[rows]]
            self.learner._step(self.batch, labels, self.draws.mix[rows], self.draws.uniforms[rows])

    def end_to_end(self) -> None:
        size = self.job.point.size
        self.learner.train_epoch(self.images, self.labels, self._draw(), self.stage, size, tick=lambda: None)

    def score(self) -> None:
        images = self.images[self.index.to(self.machine.device)]
        scoring.logits(self.learner.scored, images, self.job.point.eval_size, precision=self.machine.precision)


def main(argv: list[str] | None = None) -> int:
    line = build_parser()
    given = line.parse_args(argv)
    try:
        runtime = Runtime(**{name: getattr(given, name) for name in ("device", "threads", "precision", "compile")})
    except ValueError as error:
        line.error(f"--{error}")
    recipe, machine = RECIPES[given.recipe], engine.start(runtime)
    steps = given.steps or (100 if machine.device.type == "cuda" else 2)
    print(f"{machine}{', compiled' if machine.compile else ''}, {CORES} cores, PyTorch {torch.__version__}")
    measured = []
    for point in points(recipe, given.size, given.batch):
        measured.append(measure(Job(recipe, runtime, given.data_dir, point, steps), machine, given.turns))
        print("\n" + text(measured[-1]), flush=True)
    forecasts = forecast(recipe, measured)
    if forecasts:
        print(
            f"\nAt these rates the recipe {recipe.name} trains on {TRAIN_IMAGES:,} images "
            f"for {duration(forecasts['engine'])}, in the classic way for {duration(forecasts['classic'])}."
        )
    if given.json:
        whole = {**machine.as_dict(), "cores": CORES, "torch": torch.__version__, "recipe": recipe.name}
        files.write_text(given.json, json.dumps({**whole, "points": measured, "seconds": forecasts}, indent=2) + "\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    line = argparse.ArgumentParser(
        prog="benchmark.py",
        description="Measure the usual training script's way and this project's engine in turns.",
        allow_abbrev=False,
    )
    recipes = [name for name in RECIPES if name != "demo"]
    line.add_argument("--recipe", choices=recipes, default="original", help="whose views, sizes and batches to measure")
    line.add_argument("--size", type=whole_number(32, 1024), metavar="N", help="another crop size, in px")
    line.add_argument("--batch", type=whole_number(2, 65_536), metavar="N", help="another batch")
    line.add_argument("--turns", type=whole_number(1, 1000), default=5, metavar="N", help="turns a side (default: 5)")
    steps = "batches a turn (default: 2, on CUDA 100)"
    line.add_argument("--steps", type=whole_number(1, 100_000), metavar="N", help=steps)
    line.add_argument("--data-dir", type=Path, metavar="PATH", help="folder of stl10_binary (default: drawn pictures)")
    line.add_argument("--json", type=Path, metavar="FILE", help="write all figures, each turn's too")
    for item in (Runtime.__dataclass_fields__[name] for name in ("device", "threads", "precision", "compile")):
        if item.name == "compile":
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": type(item.default), "choices": item.metadata.get("choices")}
        line.add_argument(f"--{item.name}", default=item.default, help=item.metadata["help"], **kind)
    return line


def points(recipe: Recipe, size: int | None, batch: int | None) -> list[Point]:
    """What to measure of a recipe: each of its crop sizes, or only `size` px, in its batches or those of `batch`."""
    found = [Point(s, batch or stage.batch, stage.eval_size) for stage in recipe.stages for s in stage.crop_size]
    return [found[0]._replace(size=size)] if size else list(dict.fromkeys(found))


def load(data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """STL-10's training images uint8 (N, 3, 96, 96) and labels int64 (N,), or drawn pictures without a folder."""
    if data_dir is not None:
        found = data.load(data_dir, "train")
        return found.images, found.labels
    images, labels = demo.draw("train", DRAWN)
    return torch.from_numpy(images.swapaxes(2, 3).copy()), torch.from_numpy(labels).long() - 1


def measure(job: Job, machine: Engine, turns: int) -> dict[str, Any]:
    """Everything about one point, as plain values."""
    classic, ours = Classic(job, machine), Ours(job, machine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # views are compared by the core
    name = "views, GPU to one core" if machine.device.type == "cuda" else "views, one core"
    rows = [take_turns(name, classic.views, ours.views, job, turns)]
    torch.set_num_threads(threads)
    rows.append(take_turns("training step", classic.train_steps, ours.train_steps, job, turns))
    rows.append(take_turns("end to end", classic.end_to_end, ours.end_to_end, job, turns))
    rows.append(take_turns(f"scoring at {job.point.eval_size} px", classic.score, ours.score, job, turns))
    gflop = engine.step_gflop(ours.learner.net, job.point.size)
    return {
        **job.point._asdict(),
        "rows": rows,
        "step_tflops": {side: statistics.median(rows[1][side]) * gflop / 1e3 for side in ("classic", "engine")},
        "matmul_tflops": matmul_tflops(machine),
        "peak_memory": {"classic": in_child(peak_memory, Classic, job), "engine": in_child(peak_memory, Ours, job)},
    }


def take_turns(
    name: str, classic: Callable[[], None], ours: Callable[[], None], job: Job, turns: int
) -> dict[str, Any]:
    """Images a second of both sides, one figure a turn, after a turn each that does not count; and how many times
    faster the engine was, turn by turn."""
    rates: dict[str, list[float]] = {"classic": [], "engine": []}
    for _ in range(turns + 1):
        rates["classic"].append(job.samples / timed(classic))
        rates["engine"].append(job.samples / timed(ours))
    rates = {side: figures[1:] for side, figures in rates.items()}
    return {"name": name, **rates, "ratios": [b / a for a, b in zip(rates["classic"], rates["engine"], strict=True)]}


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, on a GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def matmul_tflops(machine: Engine) -> float:
    """What the machine reaches in a large product of square matrices: TFLOP/s, the median of nine."""
    side = 8192 if machine.device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=machine.device).to(machine.precision)
    torch.mm(a, b)
    return 2 * side**3 / statistics.median(timed(lambda: torch.mm(a, b)) for _ in range(9)) / 1e12


def in_child(function: Callable, *arguments: Any) -> Any:
    """Call a function in a fresh process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(side: type[Classic] | type[Ours], job: Job) -> int:
    """Most bytes held while training end to end: on CUDA the GPU's, else the process's own, loader workers left out."""
    machine = engine.start(job.runtime)
    side(job, machine).end_to_end()
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forecast(recipe: Recipe, measured: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of training that the recipe takes at either side's rates; empty where a size was not measured."""
    result = {}
    for side in ("classic", "engine"):
        rates = {point["size"]: statistics.median(point["rows"][2][side]) for point in measured}
        if all(size in rates for stage in recipe.stages for size in stage.crop_size):
            result[side] = engine.predict_seconds(recipe, TRAIN_IMAGES, rates)
    return result


def text(point: dict[str, Any]) -> str:
    """One point as a Markdown table, with a line on arithmetic and memory."""
    header = [f"{point['size']} px, batch {point['batch']}", "classic, images/s", "engine, images/s", "times faster"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---", *["---:"] * 3], *map(cells_of, point["rows"]))]
    product, memory = point["matmul_tflops"], {side: f"{n / 2**30:.2f}" for side, n in point["peak_memory"].items()}
    reached = {side: f"{tflops:.3g} ({tflops / product:.0%})" for side, tflops in point["step_tflops"].items()}
    lines += [
        "",
        f"TFLOP/s of the step: classic {reached['classic']}, engine {reached['engine']}; of a matrix product in the "
        f"engine's precision: {product:.3g}. Peak memory: {memory['classic']} and {memory['engine']} GiB.",
    ]
    return "\n".join(lines)


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row of the printed table: medians, and the median of the ratios with their spread."""
    rates = (statistics.median(row[side]) for side in ("classic", "engine"))
    ratios = row["ratios"]
    spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    return [row["name"], *(f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in rates), spread]


if __name__ == "__main__":
    sys.exit(errors.report(main))
