"""Random views: distributed as torchvision's, each image equally often, the same again from the same seed."""

import hashlib
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from uniforms import DRAWS, ORIGINAL, ks_distance, random_uniforms

import augment
from augment import COLUMNS, ViewOptions, draw_epoch, view_parameters

CLOSE = 0.02  # of two samples of one distribution, about one pair in 1,500 is further apart


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (96, 96, (0.08, 1.0), (3 / 4, 4 / 3)),
        (60, 96, (0.5, 1.0), (0.5, 2.0)),  # often no fit at the first try
        (96, 96, (0.9, 1.0), (1.5, 3.0)),  # never a fit
        (96, 40, (0.9, 1.0), (0.35, 0.6)),  # sometimes none in ten tries
    ],
)
def test_crops_are_distributed_as_torchvisions(height, width, scale, ratio):
    torch.manual_seed(3)
    image = torch.empty(3, height, width)
    sampler = v2.RandomResizedCrop(8, scale, ratio)
    draws = 1_000 if scale[0] * ratio[0] > 1 else DRAWS  # of what is always the same a few will do
    theirs = [sampler.make_params([image]) for _ in range(draws)]
    theirs = {name: np.array([crop[name] for crop in theirs]) for name in ("top", "left", "height", "width")}
    p = view_parameters(random_uniforms(DRAWS), height, width, ViewOptions(crop_scale=scale, crop_ratio=ratio))
    ours = {"top": p.top, "left": p.left, "height": p.crop_height, "width": p.crop_width}
    ours = {name: values.double().numpy() for name, values in ours.items()}
    for crops in (ours, theirs):
        crops["area"], crops["ratio"] = crops["height"] * crops["width"], crops["width"] / crops["height"]
        crops["bottom"] = crops["top"] + crops["height"]
    for name in ours:
        assert ks_distance(ours[name], theirs[name]) < CLOSE, name
    assert (ours["bottom"] <= height).all() and (ours["left"] + ours["width"] <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (96, 96, (1.0, 1.0), (3.0, 3.0)),
        (96, 96, (1.0, 1.0), (1 / 3, 1 / 3)),
        (95, 96, (1.0, 1.0), (2.2, 2.5)),
        (60, 97, (1.0, 1.0), (0.4, 0.7)),
        (60, 90, (1.0, 1.0), (1.5, 1.5)),  # the whole image fits
    ],
)
def test_fallback_crop_is_torchvisions(height, width, scale, ratio):
    expected = v2.RandomResizedCrop(8, scale, ratio).make_params([torch.empty(3, height, width)])
    p = view_parameters(random_uniforms(50), height, width, ViewOptions(crop_scale=scale, crop_ratio=ratio))
    for values, name in ((p.top, "top"), (p.left, "left"), (p.crop_height, "height"), (p.crop_width, "width")):
        assert (values == expected[name]).all(), name


def test_angles_factors_and_flips_are_distributed_as_torchvisions():
    torch.manual_seed(4)
    strengths = {"brightness": 1.5, "contrast": 0.2, "saturation": 0.6, "hue": 0.1}
    options = replace(ORIGINAL, **strengths, rotation=30, hflip=0.3, vflip=0.8)
    p = view_parameters(random_uniforms(DRAWS), 96, 96, options)
    rotation = v2.RandomRotation(30)
    assert ks_distance(p.angle.numpy(), np.array([rotation.make_params([])["angle"] for _ in range(DRAWS)])) < CLOSE
    jitter = v2.ColorJitter(*strengths.values())
    theirs = [jitter.make_params([]) for _ in range(DRAWS)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        expected = np.array([draws[f"{name}_factor"] for draws in theirs])
        assert ks_distance(getattr(p, name).numpy(), expected) < CLOSE, name
    assert p.hflip.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert p.vflip.float().mean().item() == pytest.approx(0.8, abs=0.015)


def test_parameters_are_independent_of_each_other():
    p = view_parameters(random_uniforms(DRAWS), 96, 96, ORIGINAL)._asdict()
    height, width = p.pop("crop_height"), p.pop("crop_width")
    p["area"], p["ratio"] = height * width, width / height
    p["middle row"], p["middle column"] = p.pop("top") + height / 2, p.pop("left") + width / 2
    correlation = torch.corrcoef(torch.stack([values.float() for values in p.values()])) - torch.eye(len(p))
    for name, row in zip(p, correlation, strict=True):
        assert row.abs().max() < 0.03, name


def test_an_epoch_shows_each_image_equally_often_in_random_order():
    indices = torch.tensor([5, 17, 3, 99])
    draws = draw_epoch(indices, 20, 8, ORIGINAL, (0, 0, 0))
    assert draws.order.dtype == torch.int64 and draws.uniforms.dtype == draws.own_share.dtype == torch.float32
    assert draws.order.sort().values.tolist() == sorted(indices.tolist() * 20)
    assert draws.order.tolist() != indices.repeat(20).tolist() and len(set(draws.order[:20].tolist())) == 4
    assert draws.uniforms.shape == (80, COLUMNS) and draws.uniforms.min() >= 0 and draws.uniforms.max() < 1
    assert len(draws.colour_orders) == 10 and (draws.own_share == 1).all()


@pytest.mark.parametrize(("n", "batches"), [(7, 1), (8, 1), (9, 2)])
def test_one_colour_order_a_batch(n, batches):
    orders = draw_epoch(torch.arange(n), 1, 8, ORIGINAL, (0,)).colour_orders
    assert len(orders) == batches and all(sorted(order) == [0, 1, 2, 3] for order in orders)


def test_all_colour_orders_occur_equally_often():
    orders = draw_epoch(torch.arange(24_000), 1, 1, ORIGINAL, (0,)).colour_orders
    counts = [orders.count(order) for order in permutations(range(4))]
    assert min(counts) > 850 and max(counts) < 1150


def test_equal_seeds_give_equal_draws_and_others_do_not():
    def drawn(*seed: int) -> augment.EpochDraws:
        return draw_epoch(torch.arange(50), 2, 16, ViewOptions(mixup=0.2), seed)

    first, again = drawn(0, 1, 2), drawn(0, 1, 2).to("cpu")
    assert torch.equal(first.order, again.order) and torch.equal(first.uniforms, again.uniforms)
    assert torch.equal(first.own_share, again.own_share) and first.colour_orders == again.colour_orders
    for other in (drawn(0, 1, 3), drawn(0, 2, 2), drawn(1, 1, 2)):
        assert not torch.equal(first.order, other.order) and not torch.equal(first.uniforms, other.uniforms)
        assert not torch.equal(first.own_share, other.own_share)


def test_options_do_not_change_the_other_draws():
    plain, mixed = (
        draw_epoch(torch.arange(50), 2, 16, options, (0,)) for options in (ORIGINAL, ViewOptions(cutmix=1.0, hflip=0))
    )
    assert torch.equal(plain.order, mixed.order) and torch.equal(plain.uniforms, mixed.uniforms)
    assert plain.colour_orders == mixed.colour_orders and not torch.equal(plain.own_share, mixed.own_share)


def test_draws_are_the_recorded_ones():
    """Others would end every run begun before with other bits, and no recorded figure could be repeated."""
    draws = draw_epoch(torch.arange(50), 2, 16, ViewOptions(cutmix=1.0, mix_probability=0.5), (1, 2, 3))
    exact = draws.order.numpy().tobytes() + draws.uniforms.numpy().tobytes() + str(draws.colour_orders).encode()
    assert hashlib.sha256(exact).hexdigest() == "de91ece8573ab9e90621fd5ac9a28992049cf86fb94a6b8a552e216f69858e5c"
    assert draws.own_share[:5].tolist() == pytest.approx([0.3471295, 0.2115404, 0.5808199, 0.6937956, 1.0], abs=1e-6)
