"""What is said of an epoch's speed and of the run's end, on a clock that the tests set."""

import dataclasses
import datetime
import types

import pytest
import torch

from harness import cost, progress
from harness.compiled import CompiledForm
from harness.machine import Machine
from harness.progress import COLD_STEPS, WARM_STEPS, Progress, WarmClock
from harness.text import duration
from recipes import RECIPES, Recipe, Stage, build_network

CPU = torch.device("cpu")
PLAIN = Machine(CPU, torch.float32, compile=False)
SMALL = dataclasses.replace(RECIPES["original"], layers=(1, 1, 1), planes=(4, 4, 4), views_per_image=1)


class Clock:
    """Stands for the module `time`; goes on only when it is set on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def of(recipe: Recipe, machine: Machine = PLAIN, images: int = 400, **own) -> Progress:
    net = build_network(recipe, 10)
    return Progress(CompiledForm(net, machine), recipe, net, {"train": images, "val": 100} | own, 10)


def run_epoch(watch: Progress, clock: Clock, seconds: list[float], epochs_done: int = 0) -> None:
    """An epoch whose steps take so many seconds each."""
    with watch.epoch(epochs_done, []) as tick:
        for step in seconds:
            clock.now += step
            tick()


def two_stages(batch: int = 8, **changes) -> Recipe:
    stages = (Stage(2, (32,), 32, batch, 0.1), Stage(3, (48,), 48, batch, 0.1))
    return dataclasses.replace(SMALL, stages=stages, **changes)


def test_a_step_is_timed_after_the_cold_ones(clock: Clock):
    watch = WarmClock(CPU)
    for seconds in [7.0] * COLD_STEPS + [0.25] * WARM_STEPS + [3.0] * 5:
        assert watch.step_seconds == (0.25 if watch.steps >= COLD_STEPS + WARM_STEPS else 0.0)
        clock.now += seconds
        watch.tick()


def test_an_epochs_rate_is_that_of_all_its_steps(clock: Clock):
    watch = of(two_stages())
    run_epoch(watch, clock, [3.0] * 5 + [1.0] * 45)
    assert watch.cold_seconds == 0 and watch.samples_per_second == pytest.approx(400 / 60)


def test_compilation_is_no_part_of_a_rate_and_is_announced_once_a_crop_size(clock: Clock, capsys):
    watch = of(two_stages(), dataclasses.replace(PLAIN, compile=True))
    for epochs_done, cold, expected in ((0, 95.0, 0.0), (1, 0.0, 0.0), (2, 95.0, 95.0)):
        assert watch.compile_seconds(epochs_done) == pytest.approx(expected)  # of a first one nothing is known
        run_epoch(watch, clock, [1.0 + cold / 5] * 5 + [1.0] * 45, epochs_done)
        assert watch.cold_seconds == pytest.approx(cold)
        assert watch.samples_per_second == pytest.approx(400 / 50)
    announced = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compiling")]
    assert announced == ["compiling the step for 32 px …", "compiling the step for 48 px …"]


def test_once_compiling_has_failed_none_is_announced_or_expected(clock: Clock, capsys):
    watch = of(two_stages(), dataclasses.replace(PLAIN, compile=True))
    run_epoch(watch, clock, [20.0] * 5 + [1.0] * 45)
    assert watch.compile_seconds(2) == pytest.approx(95.0)

    def step() -> None:
        if watch.form.compiles:
            raise RuntimeError("no compiler")

    watch.form.attempt(step, (8, 3, 32, 32))
    assert watch.compile_seconds(2) == 0.0
    capsys.readouterr()
    run_epoch(watch, clock, [20.0] * 5 + [1.0] * 45, epochs_done=2)
    assert "compiling the step" not in capsys.readouterr().out and watch.cold_seconds == 0.0


@pytest.mark.parametrize("steps, cold", [(18, 8), (50, 25), (1000, 150)])
def test_what_graphs_cost_while_they_are_captured_is_no_part_of_a_rate(steps: int, cold: int, clock: Clock):
    watch = of(two_stages(), dataclasses.replace(PLAIN, compile=True, graphs=True), images=8 * steps)
    run_epoch(watch, clock, [2.0] * cold + [1.0] * (steps - cold))
    assert watch.cold_seconds == pytest.approx(cold)
    assert watch.samples_per_second == pytest.approx(8)


def test_scoring_is_forecast_too():
    """As many images to validate on as to train on, scored at the views' size: a third of the training each epoch."""
    watch, alone = of(two_stages(), images=36_000, val=36_000), of(two_stages(), images=36_000, val=0)
    assert "(in 4.0 hours)" in watch.forecast(2, 10.0).splitlines()[0]
    assert "(in 3.0 hours)" in alone.forecast(2, 10.0)


def test_a_forecast_of_weeks_has_dates():
    words = of(two_stages(), images=10_000_000, val=0).forecast(2, 10.0).splitlines()[0]
    end = datetime.datetime.now() + datetime.timedelta(seconds=3e6)
    assert f"stage 2 ends about {end:%A}, {end.day} {end:%B} " in words


def test_nothing_is_advised_that_is_over_the_budget():
    net, images = build_network(SMALL, 10), {"train": 4_000, "val": 0}
    form = CompiledForm(net, PLAIN)
    lines = {n: Progress(form, two_stages(), net, images, n).forecast(0, 0.5) for n in (554, 555)}
    assert "--recipe cpu would" in lines[554] and "--recipe cpu" not in lines[555] and "stage 1 ends" in lines[555]


def test_the_forecast_comes_once_a_stage_from_the_leader_alone(clock: Clock, capsys):
    watch = of(two_stages(), images=1_000)
    for epochs_done in range(5):
        run_epoch(watch, clock, [1.0] * 50, epochs_done)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ends")[0] for line in lines] == ["8 samples/s: stage 1", "8 samples/s: stage 2"]
    follower = of(two_stages(), images=1_000, machine=dataclasses.replace(PLAIN, rank=1, world=2, compile=True))
    run_epoch(follower, clock, [1.0] * 50)
    assert capsys.readouterr().out == ""


def test_an_epoch_too_short_to_be_timed_is_no_forecast(clock: Clock, capsys):
    watch = of(two_stages(batch=40))
    run_epoch(watch, clock, [1.0] * 10)
    assert capsys.readouterr().out == "" and watch.samples_per_second == 40


def test_a_forecast_scales_the_modelled_rates_to_the_measured_one(monkeypatch: pytest.MonkeyPatch):
    now = datetime.datetime(2024, 5, 6, 13, 30)  # a Monday
    module = types.SimpleNamespace(timedelta=datetime.timedelta, datetime=types.SimpleNamespace(now=lambda: now))
    monkeypatch.setattr(progress, "datetime", module)
    recipe = two_stages()
    watch = of(recipe, images=36_000, val=0)
    modelled = cost.modelled_rates(PLAIN, recipe, watch.net)
    ratio = modelled[32] / modelled[48]
    first, second = 2 * 36_000 / 10, 3 * 36_000 / 10 * ratio
    end = now + datetime.timedelta(seconds=first + second)
    words = watch.forecast(0, 10.0).splitlines()
    assert words[0] == (
        f"10 samples/s: stage 1 ends about Monday 15:30, the run about {end:%A %H:%M} (in {duration(first + second)})"
    )
    assert watch.forecast(4, 10.0) == "10 samples/s: stage 2 ends about Monday 14:30 (in 60.0 minutes)"


@pytest.mark.parametrize("device, advised", [("cpu", True), ("cuda", False)])
def test_a_long_run_on_a_cpu_is_advised_of_shorter_ones(device: str, advised: bool):
    machine = dataclasses.replace(PLAIN, device=torch.device(device))
    watch = of(two_stages(), machine, images=4_000, val=0)
    shorter = cost.modelled_rates(machine, RECIPES["cpu"], build_network(RECIPES["cpu"], 10))
    speed = 0.5 / cost.modelled_rates(machine, watch.recipe, watch.net)[32]
    seconds = cost.seconds_at_rates(RECIPES["cpu"], 4_000, {size: speed * rate for size, rate in shorter.items()})
    _, *advice = watch.forecast(0, 0.5).splitlines()
    expected = f"that is long for a CPU; --recipe cpu would take about {duration(seconds)}, --demo one minute"
    assert advice == ([expected] if advised else [])
    assert len(watch.forecast(0, 20.0).splitlines()) == 1


def test_ones_own_pictures_are_forecast_with_the_views_that_they_would_get():
    watch = of(two_stages(), images=40_000, val=0, digest="of these pictures")
    recipe = dataclasses.replace(RECIPES["cpu"], views_per_image=1)
    modelled = cost.modelled_rates(PLAIN, recipe, build_network(recipe, 10))
    speed = 0.5 / cost.modelled_rates(PLAIN, watch.recipe, watch.net)[32]
    seconds = cost.seconds_at_rates(recipe, 40_000, {size: speed * rate for size, rate in modelled.items()})
    assert f"--recipe cpu would take about {duration(seconds)}, " in watch.forecast(0, 0.5)


def test_there_is_no_forecast_of_a_run_that_ends_within_a_minute():
    watch = of(two_stages(), images=1_000, val=0)
    last_epoch = 1_000 / 60
    assert watch.forecast(4, 0.99 * last_epoch) != "" and watch.forecast(4, 1.01 * last_epoch) == ""
