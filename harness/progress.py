"""Progress and timing of an epoch: a bar on a terminal, the rate of its warm steps, and when stage and run will end."""

import contextlib
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from harness import cost
from harness.compiled import CompiledForm
from harness.picture_defaults import fit_views
from harness.text import duration
from model import count_parameters
from recipes import CPU, NO_LIMIT, Recipe, build_network

COLD_STEPS = 5  # of an epoch: compilation, fresh memory
CAPTURES = 150  # steps after which most orders of the four colour operations have come up twice, and so been captured
WARM_STEPS = 10  # after those; these are timed
SOON, LONG, DATED = 60.0, 4 * 3600.0, 6 * 86400.0  # seconds; beyond the last, a weekday might be taken for a nearer one


class Progress:
    """Watches the epochs of a run on `images` (see `images.fingerprint`), without waiting for the device.

    `samples_per_second` and `cold_seconds` describe the epoch last watched: its rate without its cold seconds, and the
    extra time that its first steps took if they had to compile (else 0).
    """

    def __init__(
        self, form: CompiledForm, recipe: Recipe, net: nn.Module, images: Mapping[str, Any], classes: int
    ) -> None:
        self.form, self.recipe, self.net, self.classes = form, recipe, net, classes
        self.machine = machine = form.machine
        self.images, self.val = images["train"], images["val"] * machine.world  # the leader scores alone
        self._cpu_recipe = fit_views(CPU, self.images) if "digest" in images else CPU
        self.samples_per_second, self.cold_seconds = 0.0, 0.0
        self._forecast_of: int | None = None  # the stage whose end has been announced
        self._compiled: set[tuple[int, int]] = set()  # sizes in px and batches
        self._compile_seconds = 0.0  # as long as last time

    @contextlib.contextmanager
    def epoch(self, epochs_done: int, rows: Sequence[Mapping[str, Any]]) -> Iterator[Callable[[], None]]:
        """Watch the epoch after `epochs_done` finished ones; call what it yields after each step.

        The bar shows the last loss of `rows`, that of the epoch before: it must not wait for the device.
        """
        stage_index, stage, _, size, _ = self.recipe.at(epochs_done)
        steps = self.recipe.steps_per_epoch(stage, self.images)
        compiles = self.form.compiles and (size, stage.batch) not in self._compiled
        self._compiled.add((size, stage.batch))
        if compiles and self.machine.leads:
            print(f"compiling the step for {size} px …", flush=True)
        cold_steps = COLD_STEPS
        if self.machine.graphs:
            cold_steps = max(COLD_STEPS, min(CAPTURES, steps // 2, steps - WARM_STEPS))
        began, cold, clock = time.perf_counter(), 0.0, WarmClock(self.machine.device, cold_steps)
        hidden = None if self.machine.leads else True  # None: hidden where there is no terminal
        title = f"epoch {epochs_done + 1}/{self.recipe.epochs}"
        postfix = f"loss {rows[-1]['train_loss']:.3f}" if rows else ""
        with tqdm(total=steps, desc=title, postfix=postfix, unit="batch", leave=False, disable=hidden) as bar:

            def tick() -> None:
                nonlocal cold
                bar.update()
                clock.tick()
                if clock.steps == cold_steps:
                    cold = time.perf_counter() - began
                if clock.step_seconds and self._forecast_of != stage_index and self.machine.leads:
                    self._forecast_of = stage_index
                    if forecast := self.forecast(epochs_done, stage.batch / clock.step_seconds):
                        tqdm.write(forecast)
                        with contextlib.suppress(OSError):  # the epoch's own print will say it
                            sys.stdout.flush()  # into a file or a pipe, too

            yield tick
            clock.read()  # by now the device has passed both marks
        seconds = time.perf_counter() - began
        extra = cold - cold_steps * clock.step_seconds if compiles and clock.step_seconds else 0.0
        self.cold_seconds = min(max(extra, 0.0), seconds)
        self._compile_seconds = self.cold_seconds or self._compile_seconds
        self.samples_per_second = steps * stage.batch / max(seconds - self.cold_seconds, 1e-9)

    def compile_seconds(self, epochs_done: int) -> float:
        """Expected seconds of compiling in the epoch after `epochs_done` finished ones: as long as last time, or 0."""
        epoch = self.recipe.at(epochs_done)
        shape = (epoch.crop_size, epoch.stage.batch)
        return self._compile_seconds if self.form.compiles and shape not in self._compiled else 0.0

    def forecast(self, epochs_done: int, samples_per_second: float) -> str:
        """When stage and run will end, by the samples per second of the epoch after `epochs_done` finished ones.

        Empty for a run that ends soon.
        """
        recipe, machine = self.recipe, self.machine
        stage_index, stage, number, size, _ = recipe.at(epochs_done)
        modelled = cost.modelled_rates(machine, recipe, self.net)
        speed = samples_per_second / modelled[size]
        rates = {size: speed * modelled_rate for size, modelled_rate in modelled.items()}
        ends = (epochs_done - number + stage.epochs, recipe.epochs)
        part, run = (cost.seconds_at_rates(recipe, self.images, rates, epochs_done, end, self.val) for end in ends)
        if run < SOON:
            return ""
        words = f"{samples_per_second:,.0f} samples/s: stage {stage_index + 1} ends {_clock_time(part)}"
        words += f", the run {_clock_time(run)} (in {duration(run)})" if run > part else f" (in {duration(part)})"
        if machine.device.type == "cpu" and run > LONG and recipe.name != CPU.name:
            words += self._advice(speed)
        return words

    def _advice(self, speed: float) -> str:
        """What else would do on a CPU, at `speed` times the modelled rates; empty where its network is too large."""
        recipe = self._cpu_recipe
        net = build_network(dataclasses.replace(recipe, budget=NO_LIMIT), self.classes)
        if count_parameters(net) > recipe.budget:  # with many classes
            return ""
        rates = {size: speed * rate for size, rate in cost.modelled_rates(self.machine, recipe, net).items()}
        seconds = duration(cost.seconds_at_rates(recipe, self.images, rates, val=self.val))
        return f"\nthat is long for a CPU; --recipe cpu would take about {seconds}, --demo one minute"


class WarmClock:
    """Times WARM_STEPS steps after `cold` ones, by the device's own clock; `step_seconds` is 0 until it is known."""

    def __init__(self, device: torch.device, cold: int = COLD_STEPS) -> None:
        self.cuda, self.cold, self.steps, self.step_seconds = device.type == "cuda", cold, 0, 0.0
        self._marks: list = []

    def tick(self) -> None:
        """Note the end of a step."""
        self.steps += 1
        if self.steps in (self.cold, self.cold + WARM_STEPS):
            self._marks.append(torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter())
            if self.cuda:
                self._marks[-1].record()
        self.read()

    def read(self) -> None:
        """Set `step_seconds` if the device has passed both marks."""
        if len(self._marks) < 2 or self.step_seconds:
            return
        first, last = self._marks
        if not self.cuda:
            self.step_seconds = (last - first) / WARM_STEPS
        elif last.query():
            self.step_seconds = first.elapsed_time(last) / 1000 / WARM_STEPS


def _clock_time(seconds: float) -> str:
    when = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    date = f", {when.day} {when:%B}" if seconds > DATED else ""
    return f"about {when:%A}{date} {when:%H:%M}"
