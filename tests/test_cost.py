"""The arithmetic of the networks, and the seconds to expect of a recipe, against closed forms."""

import pytest
import torch

from harness import cost, scoring
from harness.cost import (
    forward_cost,
    modelled_rates,
    next_epoch_seconds,
    seconds_at_rates,
    step_gflop,
)
from harness.machine import Machine
from model import build_model
from recipes import RECIPES, TTA

PLAIN = Machine(torch.device("cpu"), torch.float32, compile=False)
SMALL = {"layers": (1, 1, 1), "planes": (4, 6, 8)}


@pytest.mark.parametrize("size, gflop", [(70, 0.74), (96, 1.37), (120, 2.16)])
def test_forward_gflop_of_the_original_network(size: int, gflop: float):
    with torch.device("meta"):
        assert round(forward_cost(build_model(), size)[0], 2) == gflop


def test_counting_leaves_the_network_as_it_was():
    net = build_model(**SMALL).train()
    assert step_gflop(net, 40) == 3 * forward_cost(net, 40)[0]
    assert net.training and not net._forward_hooks and net.bn1.num_batches_tracked == 0


def test_norm_outputs_are_those_of_each_norm():
    net = build_model(kind="wide", **SMALL)
    stem, first, second, third = 2 * 20**2, 4 * 10**2, 6 * 5**2, 8 * 2**2
    assert forward_cost(net, 40)[1] == stem + 2 * (first + second + third)


def test_seconds_are_samples_over_rates():
    recipe = RECIPES["original"]
    rates = {70: 100.0, 120: 40.0}
    full = 300 * 80_000 / 100 + 140 * 80_000 / 40
    assert seconds_at_rates(recipe, 4_000, rates) == pytest.approx(full)
    assert seconds_at_rates(recipe, 12_000, rates) == pytest.approx(3 * full)
    assert seconds_at_rates(recipe, 4_000, rates, epochs_done=310) == pytest.approx(130 * 80_000 / 40)
    assert seconds_at_rates(recipe, 4_000, rates, epochs_done=290, end=300) == pytest.approx(10 * 80_000 / 100)
    assert seconds_at_rates(recipe, 4_000, rates, epochs_done=440) == 0


def test_seconds_follow_the_sizes_within_a_stage():
    recipe = RECIPES["cpu"]
    sizes = [recipe.at(epoch).crop_size for epoch in range(recipe.epochs)]
    rates = {32: 200.0, 48: 90.0, 64: 50.0}
    expected = sum(1 / rates[size] for size in sizes) * 4_000 * recipe.views_per_image
    assert seconds_at_rates(recipe, 4_000, rates) == pytest.approx(expected)


def test_seconds_of_scoring_are_forward_passes_of_all_forms():
    recipe = RECIPES["cpu"]  # scored at 80 px, in the last epoch over five crops of 7/8 more
    rates = {32: 200.0, 48: 90.0, 64: 50.0, 80: 30.0}
    images = 3 * 2 + 2 * (1 + 5 * 49 / 64)
    both, training = (seconds_at_rates(recipe, 1_000, rates, val=val) for val in (600, 0))
    assert both - training == pytest.approx(600 * images / 30 / 3)


def test_the_next_epoch_costs_by_its_pixels_and_the_forms_it_is_scored_in():
    cpu = RECIPES["cpu"]  # 32, 48, 48 and 64 px; the last epoch scores five crops of 7/8 of the side more
    assert next_epoch_seconds(cpu, 1, 8.0, 1.0) == pytest.approx(8 * 2.25 + 1)
    assert next_epoch_seconds(cpu, 2, 8.0, 1.0) == pytest.approx(8 + 1)
    assert next_epoch_seconds(cpu, 3, 9.0, 1.0) == pytest.approx(9 * 16 / 9 + 1 + 5 * 49 / 64)
    original = RECIPES["original"]  # from 70 px, scored at 96, to 120 px, scored at 144
    assert next_epoch_seconds(original, 300, 49.0, 4.0) == pytest.approx(144 + 9)


def test_the_pixels_that_are_counted_are_those_that_are_scored():
    class Counter(torch.nn.Module):
        pixels = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.pixels += x[:, 0].numel()
            return x.mean((2, 3))

    for tta in TTA:
        model = Counter()
        scoring.tta_logits(model, torch.zeros(5, 3, 96, 96, dtype=torch.uint8), 64, tta)
        assert model.pixels == 5 * 64**2 * scoring.PIXELS[tta]


def test_the_rates_before_any_measurement_are_arithmetic(monkeypatch: pytest.MonkeyPatch):
    net, recipe = build_model(**SMALL), RECIPES["original"]
    monkeypatch.setattr(cost, "CPU_GFLOPS", {torch.float32: 40.0})
    monkeypatch.setattr(cost, "CPU_NORM_SECONDS", {torch.float32: 1e-8})
    sizes = (70, 96, 120, 144)  # views and clean images of both stages
    seconds = {size: 3 * forward_cost(net, size)[0] / 40 + 1e-8 * forward_cost(net, size)[1] for size in sizes}
    rates = modelled_rates(PLAIN, recipe, net)
    assert rates == pytest.approx({size: 1 / value for size, value in seconds.items()})
    total = 4_000 * 20 * (300 * seconds[70] + 140 * seconds[120])
    assert seconds_at_rates(recipe, 4_000, rates) == pytest.approx(total)


def test_on_cuda_the_rates_before_any_measurement_are_the_arithmetic_alone():
    net, machine = build_model(**SMALL), Machine(torch.device("cuda", 0), torch.bfloat16, compile=True)
    rates = modelled_rates(machine, RECIPES["original"], net)
    assert rates == pytest.approx({size: 1 / (3 * forward_cost(net, size)[0]) for size in (70, 96, 120, 144)})
