import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from augment import draw_epoch
from harness.channel_padding import PaddedChannels, padded_widths, with_padded_channels
from harness.machine import Machine
from model import build_model
from recipes import RECIPES, Stage, build_network
from train import Trainer

PLAIN = Machine(torch.device("cpu"), torch.float32, compile=False)
NETWORKS = {
    "bottleneck": {"layers": (1, 2, 1), "planes": (30, 17, 60)},
    "wide": {"layers": (1, 2, 1), "planes": (30, 17, 45), "kind": "wide", "cosine_stem": True},
    "wide, without its last pool": {"planes": (16, 29, 31), "kind": "wide", "layers": (1, 1, 1), "last_pool": False},
}


def pair(options: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module, PaddedChannels]:
    """A float64 network, a copy of it, and the copy's padded form."""
    torch.manual_seed(0)
    net = build_model(**options).double()
    twin = build_model(**options | {"planes": padded_widths(options["planes"])}).double()
    assert twin.fc.weight.shape != net.fc.weight.shape
    other = copy.deepcopy(net)
    return net, other, PaddedChannels(other, twin)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_logits_gradients_and_statistics_are_the_plain_networks(options: dict[str, Any]):
    net, other, padded = pair(options)
    for step in range(2):
        x = torch.randn(6, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        logits, same = net(x), padded(x)
        torch.testing.assert_close(same, logits)
        for output in (logits, same):
            F.cross_entropy(output, torch.arange(6)).backward()
        for (name, a), (_, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
            assert (a.grad is None) is (b.grad is None) is (not a.requires_grad), name
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)
    assert net.bn1.num_batches_tracked == other.bn1.num_batches_tracked == 2


def test_only_the_networks_own_weights_are_seen():
    _, other, padded = pair(NETWORKS["bottleneck"])
    assert [id(p) for p in padded.parameters()] == [id(p) for p in other.parameters()]
    assert {id(b) for b in padded.buffers()} == {id(b) for b in other.buffers()}


def test_widths_are_brought_up_to_cache_lines_near_by():
    assert padded_widths((30, 60, 96)) == (32, 64, 96)
    assert padded_widths((64, 160, 224)) == (64, 160, 224)
    assert padded_widths((1, 15, 17)) == (1, 15, 17)
    assert padded_widths((28, 29, 40)) == (28, 32, 40)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_training_is_that_of_the_plain_network(optimizer: str):
    recipe = dataclasses.replace(
        RECIPES["original"], layers=(1, 1, 1), planes=(30, 24, 31), zero_init_residual=True, optimizer=optimizer
    )
    lr = 0.1 if optimizer in ("sgd", "muon") else 1e-3
    stage = Stage(epochs=1, crop_size=(32,), eval_size=32, batch=8, lr=lr)
    generator = torch.Generator().manual_seed(0)
    images = (F.interpolate(torch.rand(40, 3, 6, 6, generator=generator), size=96, mode="bilinear") * 255).byte()
    labels = torch.randint(10, (40,), generator=generator)
    draws = draw_epoch(torch.arange(40), 1, stage.batch, recipe.augmentation, (0, 0, 0))
    losses = []
    for padded in (True, False):
        trainer = Trainer(recipe, 10, PLAIN)
        assert isinstance(trainer.form.net, PaddedChannels)
        if not padded:
            trainer.form.net = trainer.net
        trainer.begin_stage(stage, len(images))
        losses.append(trainer.train_epoch(images, labels, draws, stage, 32, lambda: None).losses)
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


def test_the_stem_with_most_filters_has_a_twin_too():
    """The wider twin's would have more than there are."""
    recipe = dataclasses.replace(RECIPES["cpu"], layers=(1, 1, 1), planes=(193, 32, 32))
    assert isinstance(Trainer(recipe, 10, PLAIN).form.net, PaddedChannels)


@pytest.mark.parametrize("network", [{"planes": (8, 8, 8)}, {"planes": (16, 32, 48)}])
def test_widths_that_fit_already_are_left_alone(network: dict[str, Any]):
    trainer = Trainer(dataclasses.replace(RECIPES["original"], layers=(1, 1, 1), **network), 10, PLAIN)
    assert trainer.form.net is trainer.net


def test_a_network_that_does_not_say_so_is_not_padded():
    recipe = RECIPES["original"]
    net = build_network(recipe, 10)
    assert with_padded_channels(net, recipe, 10) is not net
    net.zero_channels_stay_zero = False
    assert with_padded_channels(net, recipe, 10) is net
