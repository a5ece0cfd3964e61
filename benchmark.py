#!/usr/bin/env python3
"""The usual way and this project's side by side: images a second, arithmetic, memory and a forecast.

    python3 benchmark.py                                 # the original recipe's two stages, on drawn pictures
    python3 benchmark.py --recipe cpu --data-dir data    # another recipe's, on the real ones
    python3 benchmark.py --size 96 --batch 256 --json speed.json

Baseline is what a careful user writes: torchvision's transforms on one PIL image at a time, in as many persistent
DataLoader workers as there are cores, float32 NCHW steps, and `.item()` at each of them. Each side has a process of its
own, trains there until it gets no faster, and then both take turns, so that whatever else the machine does affects
both alike. Rates are medians over the turns. The ratio is the median over pairs of neighbouring turns, given with the
lowest and the highest.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from harness import errors

if __name__ == "__main__":
    errors.before_imports()  # which take seconds

import torch

from augment import Batch, EpochDraws, draw_epoch, make_batch
from data import TRAIN_IMAGES
from harness import cost, files, scoring
from harness.baseline import CLASS_COUNT, CORES, Baseline, Job, load, timed
from harness.cli import MACHINE_FLAGS, Runtime, add_flags, file_path, machine_settings, whole_number
from harness.machine import choose_device, start_machine
from harness.text import duration
from recipes import RECIPES, Recipe, Stage, build_network
from train import Trainer

SIDES = ("usual", "this project")
SETTLING = 16  # steps whose median rate is compared with that of as many before
SETTLED = 1.03  # times the rate before: less does not count as faster
LONGEST_SETTLING = 20 * SETTLING
PRODUCT_SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product shows what a machine can reach


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    runtime = machine_settings(parser, args)
    recipe, machine = RECIPES[args.recipe], start_machine(runtime)
    load(args.data_dir)
    if args.json and not os.access(args.json, os.W_OK):
        files.try_to_write_in(args.json.parent)  # before anything is measured
    how = ", compiled" if machine.compile else ""
    print(f"{machine}{how}, {CORES} cores, PyTorch {torch.__version__}", flush=True)
    steps = args.steps or (100 if machine.device.type == "cuda" else 2)
    measured = []
    for point in points(recipe, args.size, args.batch):
        measured.append(measure(Job(recipe, runtime, args.data_dir, *point, steps), args.turns))
    seconds = forecast(recipe, measured)
    if seconds:
        print(
            f"\nAt these end-to-end rates, training recipe {recipe.name} on {TRAIN_IMAGES:,} images takes "
            f"{duration(seconds['this project'])}; the usual way takes {duration(seconds['usual'])}."
        )
    if args.json:
        about = {**machine.as_dict(), "cores": CORES, "torch": torch.__version__, "recipe": recipe.name}
        files.write_text(args.json, json.dumps({**about, "points": measured, "seconds": seconds}, indent=2) + "\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="Measure the usual training script and this project in turns.",
        allow_abbrev=False,
    )
    names = [name for name in RECIPES if name != "demo"]
    parser.add_argument("--recipe", choices=names, default="original", help="whose views, sizes and batches to measure")
    parser.add_argument(
        "--size", type=whole_number(32, 1024), metavar="N", help="crop size in px (default: the recipe's)"
    )
    parser.add_argument("--batch", type=whole_number(2, 65_536), metavar="N", help="batch size (default: the recipe's)")
    parser.add_argument("--turns", type=whole_number(1, 1000), default=5, metavar="N", help="turns each (default: 5)")
    steps = "batches per turn (default: 2, on CUDA 100)"
    parser.add_argument("--steps", type=whole_number(1, 100_000), metavar="N", help=steps)
    parser.add_argument(
        "--data-dir", type=file_path, metavar="PATH", help="folder that holds stl10_binary (default: drawn pictures)"
    )
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write all figures, including each turn's")
    add_flags(parser, Runtime, (*MACHINE_FLAGS, "compile"), with_defaults=True)
    return parser


class ThisProject:
    """This project's way, by the very code that `train.py` runs; the methods are those of `Baseline`."""

    def __init__(self, job: Job) -> None:
        self.job, self.machine = job, start_machine(job.runtime)
        self.images, self.labels = (part.to(self.machine.device) for part in load(job.data_dir))
        self.trainer = Trainer(job.recipe, CLASS_COUNT, self.machine)
        self.stage = Stage(1, (job.size,), job.eval_size, job.batch, 1e-3)
        self.trainer.begin_stage(self.stage, job.samples)
        self.index = torch.arange(job.samples) % len(self.images)
        self.draws = self._draw()
        self.batch = self._batch(0)

    def _draw(self) -> EpochDraws:
        return draw_epoch(self.index, 1, self.job.batch, self.job.recipe.augmentation, (0,)).to(self.machine.device)

    def _batch(self, step: int) -> Batch:
        job, rows = self.job, self.machine.share_of_batch(step, self.job.batch)
        return make_batch(self.images, self.labels, self.draws, step, rows, job.size, job.recipe.augmentation)

    def views(self) -> int:
        for step in range(self.job.steps):
            self._batch(step)
        return self.job.samples

    def train_steps(self) -> int:
        self.trainer.net.train()
        for _ in range(self.job.steps):
            self.trainer.step(self.batch)
        return self.job.samples

    def end_to_end(self) -> int:
        draws, size = self._draw(), self.job.size
        self.trainer.train_epoch(self.images, self.labels, draws, self.stage, size, after_step=lambda: None)
        return self.job.samples

    def score(self) -> int:
        images = self.images[self.index.to(self.machine.device)]
        scoring.logits(self.trainer.eval_model, images, self.job.eval_size, precision=self.machine.precision)
        return self.job.samples

    def matmul_tflops(self) -> float:
        """TFLOP/s that the machine reaches in a large square matrix product in this precision: the median of nine."""
        side = PRODUCT_SIDE[self.machine.device.type]
        a, b = torch.randn(2, side, side, device=self.machine.device).to(self.machine.precision)
        torch.mm(a, b)
        return 2 * side**3 / statistics.median(timed(lambda: torch.mm(a, b))[0] for _ in range(9)) / 1e12


class Process:
    """A side in a process of its own; leaving the context ends it, once it has answered its current question."""

    _side: Baseline | ThisProject  # in that process only

    def __init__(self, kind: type[Baseline] | type[ThisProject], job: Job) -> None:
        self.steps = job.steps
        ignore = (signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for this process
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, initializer=signal.signal, initargs=ignore)
        handler = signal.signal(*ignore)  # inherited while the other imports; but not on Windows
        self.begun = self.pool.submit(Process._begin, kind, job)  # starts the other
        signal.signal(signal.SIGINT, handler)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(BrokenProcessPool):
            self.pool.submit(Process._end)
        self.pool.shutdown()

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer from one of the functions below. Raises what the side raises, RunError if it was killed."""
        try:
            self.begun.result()
            return self.pool.submit(question, *arguments).result()
        except BrokenProcessPool as error:
            raise errors.RunError(
                "one side of the benchmark was killed, probably for lack of memory; give a smaller --batch or --size"
            ) from error

    def settle(self) -> int:
        """Train until it gets no faster, and return how many steps that took.

        In its first steps a process asks for fresh memory, which costs more than the arithmetic; it takes dozens of
        steps until the allocator mostly reuses what it has.
        """
        rates = []
        while len(rates) * self.steps < LONGEST_SETTLING and not settled(rates, math.ceil(SETTLING / self.steps)):
            rates.append(self.ask(Process.rate, "train_steps"))
        return len(rates) * self.steps

    @staticmethod
    def _begin(kind: type[Baseline] | type[ThisProject], job: Job) -> None:
        Process._side = kind(job)

    @staticmethod
    def _end() -> None:
        del Process._side  # ends its loaders' workers; on exiting, PyTorch would wait seconds for each

    @staticmethod
    def rate(method: str, threads: int | None = None) -> float:
        """Images a second in one call of a side's method, on `threads` threads if given."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            seconds, images = timed(getattr(Process._side, method))
            return images / seconds
        finally:
            torch.set_num_threads(before)

    @staticmethod
    def call(method: str) -> Any:
        return getattr(Process._side, method)()

    @staticmethod
    def peak_memory() -> int | None:
        """Peak memory so far, in bytes: on CUDA of the GPU's tensors, else of this process without loader workers.

        None on Windows, which keeps no such count.
        """
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated()
        try:
            import resource
        except ImportError:
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def settled(rates: list[float], turns: int) -> bool:
    """Whether the median rate of the last `turns` turns is less than 3 % above that of the `turns` before them."""
    before, last = rates[-2 * turns : -turns], rates[-turns:]
    return len(before) == turns and statistics.median(last) < SETTLED * statistics.median(before)


def points(recipe: Recipe, size: int | None = None, batch: int | None = None) -> list[tuple[int, int, int]]:
    """(size, batch, eval size) of a recipe's training, each once; only one, of `size` px, if that is given."""
    found = [(side, batch or stage.batch, stage.eval_size) for stage in recipe.stages for side in stage.crop_size]
    if size:  # as in the stage that has it, else as in the first
        return [next((point for point in found if point[0] == size), (size, *found[0][1:]))]
    return list(dict.fromkeys(found))


def measure(job: Job, turns: int) -> dict[str, Any]:
    """All figures for one job, as plain values; printed as a Markdown table, each row as soon as it is known."""
    needs = f"both sides, with batches of {job.batch} at {job.size} px; give a smaller --batch or --size"
    with errors.memory_reported(lambda: needs), contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Process(kind, job)) for kind in (Baseline, ThisProject)]
        print(f"\nwarming up at {job.size} px …\n", flush=True)
        settling = {name: side.settle() for name, side in zip(SIDES, sides, strict=True)}
        by_gpu = choose_device(job.runtime.device).type == "cuda"
        makers = "views, usual by one core, here by the GPU" if by_gpu else "views by one core"
        print(heading(job.size, job.batch), flush=True)
        rows = [printed(take_turns(makers, sides, turns, "views", 1))]
        rows.append(printed(take_turns("training step", sides, turns, "train_steps")))
        rows.append(printed(take_turns("end to end", sides, turns, "end_to_end")))
        memory = {name: side.ask(Process.peak_memory) for name, side in zip(SIDES, sides, strict=True)}
        rows.append(printed(take_turns(f"scoring at {job.eval_size} px", sides, turns, "score")))
        product = sides[1].ask(Process.call, "matmul_tflops")
    gflop = cost.step_gflop(build_network(job.recipe, CLASS_COUNT), job.size)
    tflops = {name: statistics.median(rows[1][name]) * gflop / 1e3 for name in SIDES}
    about = {"size": job.size, "batch": job.batch, "samples_a_turn": job.samples, "steps_to_settle": settling}
    point = {**about, "rows": rows, "step_tflops": tflops, "matmul_tflops": product, "peak_memory": memory}
    print("\n" + footnote(point), flush=True)
    return point


def printed(row: dict[str, Any]) -> dict[str, Any]:
    """The same row, once it has been printed."""
    print(table_line(cells_of(row)), flush=True)
    return row


def take_turns(name: str, sides: list[Process], turns: int, *question: Any) -> dict[str, Any]:
    """Images a second of both sides, and how many times faster this project was, turn by turn after one to warm up."""
    rates = [[side.ask(Process.rate, *question) for side in sides] for _ in range(turns + 1)][1:]
    columns = dict(zip(SIDES, map(list, zip(*rates, strict=True)), strict=True))
    return {"name": name, **columns, "ratios": [ours / usual for usual, ours in rates]}


def forecast(recipe: Recipe, measured: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of training that the recipe takes at each side's rates; empty where a size was not measured."""
    result = {}
    for side in SIDES:
        rates = {point["size"]: statistics.median(point["rows"][2][side]) for point in measured}
        if all(size in rates for stage in recipe.stages for size in stage.crop_size):
            result[side] = cost.seconds_at_rates(recipe, TRAIN_IMAGES, rates)
    return result


def heading(size: int, batch: int) -> str:
    """A Markdown table's first two lines."""
    names = [f"{size} px, batch {batch}", "usual, images/s", "this project, images/s", "times faster"]
    return "\n".join(map(table_line, (names, ["---", *["---:"] * 3])))


def table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def footnote(point: dict[str, Any]) -> str:
    """A line on arithmetic and memory at one point."""
    product, peak = point["matmul_tflops"], point["peak_memory"]
    memory = [f"{peak[side] / 2**30:.2f}" for side in SIDES if peak[side] is not None]
    reached = {side: f"{tflops:.3g} ({tflops / product:.0%})" for side, tflops in point["step_tflops"].items()}
    return (
        f"TFLOP/s of the step: usual {reached['usual']}, this project {reached['this project']}; "
        f"of a matrix product in this precision: {product:.3g}. "
        f"Peak memory: {' and '.join(memory) + ' GiB' if memory else 'not known here'}. "
        f"Steps to settle: {point['steps_to_settle']['usual']} and {point['steps_to_settle']['this project']}."
    )


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row of the printed table: medians, and the median of the ratios with their spread."""
    rates, ratios = [statistics.median(row[side]) for side in SIDES], row["ratios"]
    spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    return [row["name"], *(f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in rates), spread]


if __name__ == "__main__":
    errors.end_process(errors.report(main))
