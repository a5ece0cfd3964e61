"""Muon, the optimisers of the recipes and the running average against closed forms and PyTorch's own."""

import copy
import dataclasses

import pytest
import torch
from run_contents import floats
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import optim
from augment import Batch
from harness.machine import Machine
from model import build_model
from optim import Muon, RunningAverage, build_optimizer, orthogonalise
from recipes import RECIPES, Recipe, Stage, build_network
from train import Trainer

STAGE = Stage(epochs=1, crop_size=(32,), eval_size=32, batch=4, lr=0.1)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5)])
def test_orthogonalise_moves_singular_values_only(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag(s) @ v
    torch.testing.assert_close(orthogonalise(matrix).double(), expected, atol=1e-5, rtol=0)
    assert s.max() < 1.3 and s.median() > 0.5


def test_orthogonalise_needs_few_digits():
    matrix = torch.randn(24, 200, generator=torch.Generator().manual_seed(0))
    exact, rough = orthogonalise(matrix), orthogonalise(matrix, torch.bfloat16)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_products_are_in_the_machines_precision(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(optim, "orthogonalise", lambda matrix, precision: seen.append(precision) or matrix)
    trainer = Trainer(RECIPES["cpu"], 10, Machine(torch.device("cpu"), precision, compile=False))
    trainer.begin_stage(STAGE, 4)
    labels = torch.arange(4)
    trainer.step(Batch(torch.randn(4, 3, 32, 32), labels, labels, torch.ones(4)))
    assert seen == [precision] * 9


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_a_first_step_that_overflows_leaves_no_momentum(name: str, monkeypatch: pytest.MonkeyPatch):
    """PyTorch's fused SGD would keep memory that nothing has filled, here with NaN."""
    recipe = dataclasses.replace(RECIPES["cpu"], optimizer=name, planes=(8, 8, 8), layers=(1, 1, 1))
    net = build_network(recipe, 10)
    optimizer = build_optimizer(recipe, STAGE, net, torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for weight, rate in ((float("inf"), 0.0), (1.0, 1.0)):
            before, twin = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
            optimizer.zero_grad()
            scaler.scale(weight * net(torch.ones(2, 3, 32, 32)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            same = [torch.equal(value, before[key]) for key, value in net.named_parameters() if value.requires_grad]
            assert all(same) if rate == 0 else not any(same)
            assert all(parameter.isfinite().all() for parameter in net.parameters())
            for state in optimizer.state.values():
                assert state["momentum_buffer"].isfinite().all() and (rate or not state["momentum_buffer"].any())
        twin(torch.ones(2, 3, 32, 32)).sum().backward()
        gradients = dict(twin.named_parameters())
        for key, value in net.named_parameters():
            if value.ndim == 1 and value.requires_grad or name == "muon" and ".conv" in key:  # without weight decay
                torch.testing.assert_close(optimizer.state[value]["momentum_buffer"], gradients[key].grad)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_comes_of_nothing():
    assert (orthogonalise(torch.zeros(3, 4)) == 0).all()


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Conv2d(3, 6, 3, bias=False), nn.Linear(5, 4)


def backward(conv: nn.Module, linear: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = conv(torch.randn(2, 3, 7, 7, generator=generator)).pow(2).mean()
    (loss + linear(torch.randn(2, 5, generator=generator)).pow(2).mean()).backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_steps_are_those_written_out(layout: torch.memory_format):
    conv, linear = pair()
    conv.to(memory_format=layout)
    _, twin = pair()
    groups = [
        {"params": linear.parameters(), "weight_decay": 0.1},
        {"params": conv.parameters(), "weight_decay": 0.0, "lr": 0.02, "orthogonal": True},
    ]
    ours = Muon(groups, lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True)
    momentum, w = torch.zeros(6, 27), conv.weight.detach().clone().flatten(1)
    for seed in range(3):
        backward(conv, linear, seed)
        backward(pair()[0], twin, seed)
        gradient = conv.weight.grad.flatten(1)
        momentum = 0.9 * momentum + gradient
        w = w / w.norm() * 6**0.5 - 0.02 * orthogonalise(gradient + 0.9 * momentum)
        ours.step()
        sgd.step()
        ours.zero_grad()
        sgd.zero_grad()
        torch.testing.assert_close(conv.weight.detach().flatten(1), w)
        assert torch.equal(linear.weight, twin.weight) and torch.equal(linear.bias, twin.bias)


def test_filters_without_a_gradient_stay():
    conv, _ = pair()
    before = conv.weight.detach().clone()
    Muon([{"params": conv.parameters(), "orthogonal": True}], lr=0.1, momentum=0.9).step()
    assert torch.equal(conv.weight, before)


def recipe(**changes) -> Recipe:
    return dataclasses.replace(RECIPES["original"], layers=(1, 1, 1), planes=(4, 4, 4), weight_decay=0.01, **changes)


def step_with(optimizer: torch.optim.Optimizer, net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(
    "name, plain",
    [
        ("adam", lambda groups: torch.optim.Adam(groups, lr=0.1, foreach=False)),
        ("adamw", lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=False)),
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=False)),
    ],
)
@pytest.mark.parametrize("decay_norms", [False, True])
def test_optimisers_are_torchs_plain_ones_with_decay_where_the_recipe_says(name, plain, decay_norms):
    net = build_model((1, 1, 1), planes=(4, 4, 4))
    twin = copy.deepcopy(net)
    optimizer = build_optimizer(recipe(optimizer=name, decay_norms=decay_norms), STAGE, net)
    decayed = [p for p in twin.parameters() if decay_norms or p.ndim > 1]
    others = [p for p in twin.parameters() if not decay_norms and p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    reference = plain([group for group in groups if group["params"]])
    for seed in range(3):
        step_with(optimizer, net, seed)
        step_with(reference, twin, seed)
    for (parameter, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, parameter=parameter: f"{parameter}: {text}")


@pytest.mark.parametrize("network", ["bottleneck", "wide"])
def test_muon_turns_all_filters_but_the_stems(network):
    net = build_model((1, 1, 1), kind=network, planes=(6, 3, 8))  # hidden layers of three channels, like the image
    optimizer = build_optimizer(
        recipe(network=network, optimizer="muon", decay_norms=False), STAGE, net, torch.bfloat16
    )
    names = {id(p): name for name, p in net.named_parameters()}
    kinds = {
        (group["orthogonal"], group["weight_decay"], group["lr"]): {names[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    convolutions = {f"{name}.weight" for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}
    assert kinds == {
        (False, 0.01, 0.1): {"conv1.weight", "fc.weight"},
        (False, 0.0, 0.1): set(names.values()) - convolutions - {"fc.weight"},
        (True, 0.0, 0.1 * 0.1): convolutions - {"conv1.weight"},
    }
    assert optimizer.precision is torch.bfloat16
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_the_running_average_is_torchs():
    net = build_model((1, 1, 1), planes=(4, 4, 4))
    ours = RunningAverage(net, 0.9)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(4):
        with torch.no_grad():
            for value in (*net.parameters(), *net.buffers()):
                value.add_(step)
        ours.update()
        theirs.update_parameters(net)
        assert torch.equal(floats(ours.net.state_dict()), floats(theirs.module.state_dict()))
    assert ours.updates == 4 and not any(p.requires_grad for p in ours.net.parameters())
