"""What a recipe costs: the arithmetic of its network, and how many seconds to expect."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.machine import Machine
from harness.scoring import PIXELS
from recipes import Recipe

# What a training step costs on a CPU, to compare sizes and networks (see benchmark.py). It has two parts: convolutions
# run at the speed of a matrix product, and whatever lies between them waits for memory.
CPU_GFLOPS = {torch.bfloat16: 240.0, torch.float16: 65.0, torch.float32: 65.0}  # per core
# Per core and number that a BatchNorm outputs: with LeakyReLU, forward and backward (fp32: on an older processor).
CPU_NORM_SECONDS = {torch.bfloat16: 1.5e-9, torch.float16: 6e-9, torch.float32: 6e-9}
FORWARD_SHARE = 1 / 3  # of a training step's arithmetic: the backward pass costs twice the forward pass


def modelled_rates(machine: Machine, recipe: Recipe, net: nn.Module) -> dict[int, float]:
    """Rough samples per second of training at each of the recipe's sizes, from the arithmetic: only ratios matter."""
    sizes = {size for stage in recipe.stages for size in (*stage.crop_size, stage.eval_size)}
    return {size: _rate(machine, net, size) for size in sorted(sizes)}


def seconds_at_rates(
    recipe: Recipe, images: int, rates: Mapping[int, float], epochs_done: int = 0, end: int | None = None, val: int = 0
) -> float:
    """Seconds of a recipe's epochs from `epochs_done` to `end` (all of them), over `images` images.

    `rates` are samples per second of training at each of its crop sizes; with `val` validation images, which are scored
    after each epoch, at each eval size too.
    """
    seconds = 0.0
    for epoch in map(recipe.at, range(epochs_done, recipe.epochs if end is None else end)):
        seconds += images * recipe.views_per_image / rates[epoch.crop_size]
        if val:  # a forward pass alone, of each TTA form
            seconds += val * PIXELS[epoch.tta] * FORWARD_SHARE / rates[epoch.stage.eval_size]
    return seconds


def next_epoch_seconds(recipe: Recipe, epochs_done: int, train_seconds: float, rest_seconds: float = 0.0) -> float:
    """Expected seconds of the epoch after `epochs_done` finished ones, from what the last one's training and rest took.

    Both grow with the pixels. The rest is mostly scoring, whose pixels are those of every TTA form of an image.
    """
    last, next_one = recipe.at(epochs_done - 1), recipe.at(epochs_done)
    train_seconds *= (next_one.crop_size / last.crop_size) ** 2
    rest_seconds *= (next_one.stage.eval_size / last.stage.eval_size) ** 2 * PIXELS[next_one.tta] / PIXELS[last.tta]
    return train_seconds + rest_seconds


def _rate(machine: Machine, net: nn.Module, size: int) -> float:
    """Samples per second of training at `size` px: on one CPU core, or on a CUDA card of 1 GFLOP/s."""
    gflop, norm_outputs = forward_cost(net, size)
    if machine.device.type == "cuda":
        return FORWARD_SHARE / gflop
    waiting = CPU_NORM_SECONDS[machine.precision] * norm_outputs
    return 1 / (gflop / FORWARD_SHARE / CPU_GFLOPS[machine.precision] + waiting)


def step_gflop(net: nn.Module, size: int) -> float:
    """GFLOP of a training step on one image of `size` px."""
    return forward_cost(net, size)[0] / FORWARD_SHARE


@torch.no_grad()
def forward_cost(net: nn.Module, size: int) -> tuple[float, int]:
    """GFLOP (multiply-add = 2) of a forward pass on one image of `size` px, and how many numbers the BatchNorms output.

    Counted on a copy of the network, without memory or arithmetic.
    """
    outputs: list[int] = []
    twin = copy.deepcopy(net).to("meta").eval()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, _, output: outputs.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 1e9, sum(outputs)
