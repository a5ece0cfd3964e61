"""Slips that only a GPU would punish, found without one: fake CUDA tensors have a device and a shape but no values.

A tensor left on the CPU raises where it meets one on the device, and so does whatever would wait for the device to
hand over a value: `.item()`, `if tensor:`, indexing with a mask. The backward pass needs a real driver and stays out.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import augment
import learner
import scoring
from augment import Views
from engine import Engine
from learner import Learner
from settings import RECIPES, Recipe, Stage

CUDA = torch.device("cuda")
EVERYTHING = Views(erase=0.5, mixup=0.2, cutmix=1.0, mix_probability=0.8)
RECIPE_OF = {
    **RECIPES,
    "everything": dataclasses.replace(RECIPES["cpu"], view=EVERYTHING),
    "adamw": dataclasses.replace(RECIPES["original"], optimizer="adamw", schedule="cosine", average=0.9),
}
IMAGES, BATCH = 40, 16


def to(self: nn.Module, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    """Module.to, which cannot swap fake parameters in place."""
    for module in self.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is None:  # a bias that the layer has not
                    continue
                moved = value.detach().to(device)
                moved = moved.contiguous(memory_format=memory_format) if moved.ndim == 4 else moved
                tensors[name] = nn.Parameter(moved, value.requires_grad) if tensors is module._parameters else moved
    return self


def unfused(*arguments: Any, build: Callable = learner.build_optimizer) -> torch.optim.Optimizer:
    """The recipe's optimiser, SGD without its fused form: that, unlike Adam's, has no fake one."""
    optimizer = build(*arguments)
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            group.update(fused=False, foreach=True)
    return optimizer


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", to)
        patch.setattr(copy, "deepcopy", functools.partial(copy.deepcopy, memo={id(mode): mode}))
        patch.setattr(learner, "build_optimizer", unfused)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        yield


def machine(precision: torch.dtype = torch.bfloat16) -> Engine:
    return Engine(CUDA, precision, compile=False)


def epoch(recipe: Recipe, patch: pytest.MonkeyPatch, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Train an epoch of two steps on the fake device, gradients made up; losses and hits before they are fetched."""

    def backward(loss: torch.Tensor) -> None:
        assert loss.is_cuda and loss.shape == () and loss.requires_grad
        for parameter in mine.net.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def result(_: Learner, losses: torch.Tensor, hits: torch.Tensor, samples: int) -> tuple:
        assert mine._all_finite().is_cuda and samples == 2 * BATCH
        return losses, hits

    patch.setattr(torch.Tensor, "backward", backward)
    patch.setattr(Learner, "_result", result)
    mine = Learner(recipe, 10, machine())
    stage = Stage(1, (size,), 32, BATCH, 1e-3)
    mine.begin(stage, IMAGES)
    images = torch.zeros(IMAGES, 3, 96, 96, dtype=torch.uint8, device=CUDA)
    labels = torch.zeros(IMAGES, dtype=torch.int64, device=CUDA)
    return mine.train_epoch(images, labels, draws(recipe.view), stage, size, lambda: None)


def draws(views: Views) -> augment.Draws:
    n, zeros = IMAGES, {"device": CUDA, "dtype": torch.float32}
    order = torch.zeros(n, dtype=torch.int64, device=CUDA)
    uniforms, mix = torch.zeros(n, augment.COLUMNS, **zeros), torch.zeros(n, **zeros)
    return augment.Draws(order, uniforms, mix, [augment.COLOUR_ORDERS[5], augment.COLOUR_ORDERS[18]])


@pytest.mark.parametrize("name", RECIPE_OF)
def test_an_epoch_stays_on_the_device_and_never_waits(name: str, monkeypatch: pytest.MonkeyPatch):
    losses, hits = epoch(RECIPE_OF[name], monkeypatch)
    assert losses.device.type == hits.device.type == "cuda"
    assert (losses.shape, losses.dtype, hits.dtype) == ((2,), torch.float32, torch.int64)


@pytest.mark.parametrize("name", RECIPE_OF)
def test_views_in_every_order_of_their_colours(name: str):
    views, given = RECIPE_OF[name].view, draws(RECIPE_OF[name].view)
    images = torch.zeros(IMAGES, 3, 96, 96, dtype=torch.uint8, device=CUDA)
    for order in augment.COLOUR_ORDERS:
        x = augment.normalise(augment.view(images, given.uniforms, order, 70, views), inplace=True)
        assert x.is_cuda and x.shape == (IMAGES, 3, 70, 70) and x.dtype == torch.float32


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_the_forward_pass_runs_in_the_engines_precision(precision: torch.dtype):
    mine = Learner(RECIPES["original"], 10, machine(precision))
    seen = []
    mine.net.layer3.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with warnings.catch_warnings(action="error"), mine.engine.autocast():
        logits = mine.net(torch.zeros(2, 3, 70, 70, device=CUDA))
    assert (logits.shape, logits.dtype) == ((2, 10), precision)
    assert seen[0].dtype == precision and seen[0].is_cuda


@pytest.mark.parametrize("mirror", [False, True])
def test_scoring_stays_on_the_device(mirror: bool):
    net = Learner(RECIPES["cpu"], 10, machine()).scored
    images = torch.zeros(30, 3, 96, 96, dtype=torch.uint8, device=CUDA)
    scores = scoring.logits(net, images, 120, mirror=mirror, batch=20, precision=torch.bfloat16)
    hits, loss = scoring.hits_and_loss(scores, torch.zeros(30, dtype=torch.int64, device=CUDA))
    assert scores.is_cuda and scores.shape == (30, 10) and scores.dtype == torch.float32
    assert hits.is_cuda and hits.dtype == torch.int64 and loss.is_cuda


def test_control_a_value_fetched_within_the_epoch_raises(monkeypatch: pytest.MonkeyPatch):
    honest = Learner._forward

    def hasty(self: Learner, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, right = honest(self, *batch)
        loss.item()
        return loss, right

    monkeypatch.setattr(Learner, "_forward", hasty)
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        epoch(RECIPES["demo"], monkeypatch)


def test_control_a_tensor_left_on_the_cpu_raises(monkeypatch: pytest.MonkeyPatch):
    honest = learner.normalise
    monkeypatch.setattr(learner, "normalise", lambda x, inplace: honest(x, inplace) + torch.zeros(32, 32))
    with pytest.raises(RuntimeError, match="device"):
        epoch(RECIPES["demo"], monkeypatch)


def test_control_a_branch_on_a_tensor_raises_in_the_views(monkeypatch: pytest.MonkeyPatch):
    honest = augment.view_parameters

    def branching(uniforms: torch.Tensor, *rest) -> augment.ViewParameters:
        return honest(uniforms.clamp(0, 1) if uniforms.max() > 1 else uniforms, *rest)

    monkeypatch.setattr(augment, "view_parameters", branching)
    with pytest.raises(DataDependentOutputException):
        epoch(RECIPES["demo"], monkeypatch)
