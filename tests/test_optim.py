import muon
import pytest
import torch
from engine import Machine
from learner import Trainer
from muon import Muon, orthogonalise
from settings import RECIPES, Stage
from torch import nn

from augment import COLUMNS


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
    monkeypatch.setattr(muon, "orthogonalise", lambda matrix, precision: seen.append(precision) or matrix)
    stage = Stage(epochs=1, crop_size=(32,), eval_size=32, batch=4, lr=0.1)
    learner = Trainer(RECIPES["cpu"], 10, Machine(torch.device("cpu"), precision, compile=False))
    learner.begin(stage, 4)
    learner._step(torch.randn(4, 3, 32, 32), torch.arange(4), torch.ones(4), torch.zeros(4, COLUMNS))
    assert seen == [precision] * 9


def test_nothing_comes_of_nothing():
    assert (orthogonalise(torch.zeros(3, 4)) == 0).all()


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Conv2d(3, 6, 3, bias=False), nn.Linear(5, 4)


def backward(conv: nn.Module, linear: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = conv(torch.randn(2, 3, 7, 7, generator=generator)).pow(2).mean()
    (loss + linear(torch.randn(2, 5, generator=generator)).pow(2).mean()).backward()


def test_steps_are_those_written_out():
    conv, linear = pair()
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
