"""Views against torchvision's functional operations and samplers, and against closed forms."""

import math
import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

import augment
from augment import COLUMNS, ViewParameters, Views, draw, erase, mix, normalise, view, view_parameters

ORIGINAL = Views()
NO_COLOUR = Views(brightness=0, contrast=0, saturation=0, hue=0)
PLAIN = replace(NO_COLOUR, crop_scale=(1, 1), crop_ratio=(1, 1), rotation=0, hflip=0, vflip=0)
FIRST_ORDER = (0, 1, 2, 3)


def random_uniforms(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, COLUMNS, generator=torch.Generator().manual_seed(seed))


def noise(n: int, height: int = 96, width: int = 96, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def smooth(n: int) -> torch.Tensor:
    """Coloured waves, in which two resamplings differ little from one."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    phase = torch.arange(n * 3).view(n, 3, 1, 1) * 1.7
    return (127.5 + 110 * torch.sin(x / 17 + phase) * torch.cos(y / 23 - 2 * phase)).to(torch.uint8)


def parameters(n: int = 1, **given: float) -> ViewParameters:
    """The same parameters for each of n samples; by default those of an unchanged 96 × 96 image."""
    values = dict.fromkeys(ViewParameters._fields, 0.0) | {"crop_height": 96.0, "crop_width": 96.0} | given
    for flip in ("hflip", "vflip"):
        values[flip] = bool(values[flip])
    return ViewParameters(**{name: torch.tensor([value] * n) for name, value in values.items()})


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov: the largest difference between two samples' distribution functions."""
    points = np.concatenate((a, b))
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


# Colour


def colours() -> torch.Tensor:
    """Random colours, greys, primaries, black and white as images (4, 3, 20, 20) in [0, 1]."""
    x = torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    x[1] = x[1].round()
    x[2] = x[2, :1]
    x[3, :, :10] *= 0.01
    return x


@pytest.mark.parametrize(
    ("ours", "torchvisions", "amounts"),
    [
        (augment._adjust_brightness, tv.adjust_brightness, (0.0, 0.7, 1.0, 1.3)),
        (augment._adjust_contrast, tv.adjust_contrast, (0.0, 0.7, 1.0, 1.3)),
        (augment._adjust_saturation, tv.adjust_saturation, (0.0, 0.7, 1.0, 1.3)),
        (augment._adjust_hue, tv.adjust_hue, (-0.5, -0.23, 0.0, 0.5)),
        (augment._adjust_hue, tv.adjust_hue, (0.01, 1 / 3, -1 / 3, 0.3)),
    ],
)
def test_colour_operation_agrees_with_torchvision(ours, torchvisions, amounts):
    x = colours()
    expected = torch.stack([torchvisions(image, amount) for image, amount in zip(x, amounts, strict=True)])
    torch.testing.assert_close(ours(x, torch.tensor(amounts).view(-1, 1, 1, 1)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_colours_and_flips_of_a_whole_image_agree_with_torchvision_in_every_order(order):
    views = replace(ORIGINAL, crop_scale=(1, 1), crop_ratio=(1, 1), rotation=0)
    images, uniforms = noise(4), random_uniforms(4, seed=order[0])
    p = view_parameters(uniforms, 96, 96, views)
    for i, result in enumerate(view(images, uniforms, order, 96, views)):
        expected = images[i] / 255
        for operation in order:
            name = ("brightness", "contrast", "saturation", "hue")[operation]
            expected = getattr(tv, f"adjust_{name}")(expected, getattr(p, name)[i].item())
        expected = tv.horizontal_flip(expected) if p.hflip[i] else expected
        expected = tv.vertical_flip(expected) if p.vflip[i] else expected
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)  # sampling positions are rounded to 1e-7 × 96


def test_normalise_agrees_with_torchvision():
    x = torch.rand(2, 3, 5, 5)
    expected = tv.normalize(x, list(augment.MEAN), list(augment.STD))
    before = x.clone()
    torch.testing.assert_close(normalise(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)
    assert normalise(x, inplace=True) is x
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


# Geometry


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("vflip", [False, True])
@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 96, 96), (10, 31, 40, 52), (56, 0, 40, 30)])
def test_crop_and_flips_agree_with_torchvision(top, left, height, width, hflip, vflip):
    image, size = noise(1), 70
    p = parameters(top=top, left=left, crop_height=height, crop_width=width, hflip=hflip, vflip=vflip)
    result = augment._sample(image, p, size, rotated=False)
    expected = tv.resized_crop(image / 255, top, left, height, width, [size, size], antialias=False)
    expected = tv.horizontal_flip(expected) if hflip else expected
    expected = tv.vertical_flip(expected) if vflip else expected
    edge = math.ceil(size / min(height, width) / 2)  # there torchvision repeats the crop's edge, ours looks beyond it
    inner = (..., slice(edge, -edge), slice(edge, -edge))
    torch.testing.assert_close(result[inner], expected[inner], rtol=0, atol=5e-5)
    assert (result - expected).abs().mean() < 0.01


@pytest.mark.parametrize("angle", [-45.0, -10.0, 0.0, 20.0, 90.0])
def test_rotation_then_crop_agrees_with_torchvision(angle):
    image = noise(1)
    result = augment._sample(image, parameters(angle=angle, top=8, left=16, crop_height=64, crop_width=64), 64, True)
    expected = tv.rotate(image / 255, angle, InterpolationMode.BILINEAR)[..., 8:72, 16:80]
    inside = tv.rotate(torch.ones(1, 1, 96, 96), angle, InterpolationMode.BILINEAR)[..., 8:72, 16:80] > 0.999
    inside = inside & ~(torch.nn.functional.max_pool2d((~inside).float(), 5, 1, 2) > 0)
    torch.testing.assert_close(result * inside, expected * inside, rtol=0, atol=1e-4)


def test_sampling_of_a_ramp_is_its_closed_form():
    """Bilinear sampling of a linear image is exact: each view pixel tells where in the image it was taken."""
    height, width, size, n = 80, 120, 50, 64
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack((2 * x, 3 * y, 255 - x - y)).clamp(0, 255).to(torch.uint8).expand(n, -1, -1, -1)
    p = view_parameters(random_uniforms(n), height, width, ORIGINAL)
    result = augment._sample(images, p, size, rotated=True).double() * 255
    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    for i in range(n):
        across, down = (steps.flip(0) if flip else steps for flip in (p.hflip[i], p.vflip[i]))
        dx = (p.left[i] + across * p.crop_width[i] - width / 2).expand(size, size)
        dy = (p.top[i] + down * p.crop_height[i] - height / 2)[:, None].expand(size, size)
        angle = math.radians(p.angle[i])
        source_x = width / 2 + math.cos(angle) * dx - math.sin(angle) * dy
        source_y = height / 2 + math.sin(angle) * dx + math.cos(angle) * dy
        inside = (source_x >= 0) & (source_x <= width) & (source_y >= 0) & (source_y <= height)
        unsure = torch.minimum(source_x, width - source_x).abs().minimum(
            torch.minimum(source_y, height - source_y).abs()
        ) < 1e-4
        pixel_x, pixel_y = (source_x - 0.5).clamp(0, width - 1), (source_y - 0.5).clamp(0, height - 1)
        expected = torch.stack((2 * pixel_x, 3 * pixel_y, 255 - pixel_x - pixel_y)) * inside
        torch.testing.assert_close(result[i] * ~unsure, expected * ~unsure, rtol=0, atol=2e-3)


def test_whole_chain_agrees_with_torchvisions():
    images, uniforms, order, size = smooth(32), random_uniforms(32), (3, 1, 0, 2), 70
    p = view_parameters(uniforms, 96, 96, ORIGINAL)
    views = view(images, uniforms, order, size, ORIGINAL)

    def chain(i: int, sign: int) -> torch.Tensor:
        x = tv.rotate(images[i] / 255, sign * p.angle[i].item(), InterpolationMode.BILINEAR)
        box = [int(value[i]) for value in (p.top, p.left, p.crop_height, p.crop_width)]
        x = tv.resized_crop(x, *box, [size, size], antialias=False)
        x = tv.adjust_saturation(
            tv.adjust_brightness(
                tv.adjust_contrast(tv.adjust_hue(x, p.hue[i].item()), p.contrast[i].item()), p.brightness[i].item()
            ),
            p.saturation[i].item(),
        )
        x = tv.horizontal_flip(x) if p.hflip[i] else x
        return tv.vertical_flip(x) if p.vflip[i] else x

    right, wrong = (
        torch.stack([(views[i] - chain(i, sign)).abs().mean() for i in range(len(images))]) for sign in (1, -1)
    )
    assert right.max() < 0.01
    assert wrong.mean() > 0.1


def test_edges_of_unrotated_images_are_not_darkened():
    white = torch.full((2, 3, 96, 96), 255, dtype=torch.uint8)
    for size in (70, 96, 120):
        result = augment._sample(white, parameters(2, angle=0.0), size, rotated=True)
        torch.testing.assert_close(result, torch.ones_like(result), rtol=0, atol=1e-6)


def test_a_rotated_image_is_black_outside():
    white = torch.full((1, 3, 96, 96), 255, dtype=torch.uint8)
    result = augment._sample(white, parameters(angle=45.0), 96, rotated=True)
    assert ((result < 1e-6) | (result > 1 - 1e-6)).all()
    corners = 2 * (math.sqrt(2) - 1) ** 2 / 2  # four corner triangles, as a share of the square
    assert (result < 0.5).float().mean().item() == pytest.approx(corners, abs=0.01)


def test_range_and_type_of_views():
    x = view(noise(16), random_uniforms(16), (2, 0, 3, 1), 70, ORIGINAL)
    assert x.dtype == torch.float32 and x.shape == (16, 3, 70, 70) and not x.requires_grad
    assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6


def test_a_plain_view_is_the_image():
    images = noise(3)
    plain = view(images, random_uniforms(3), FIRST_ORDER, 96, PLAIN)
    torch.testing.assert_close(plain, images / 255, rtol=0, atol=1e-5)


def test_every_sample_has_its_own_view():
    views = view(noise(1).expand(32, -1, -1, -1), random_uniforms(32), FIRST_ORDER, 32, ORIGINAL).flatten(1)
    distances = torch.cdist(views, views) + torch.eye(32) * 100
    assert distances.min() > 1
    for name, values in view_parameters(random_uniforms(32), 96, 96, ORIGINAL)._asdict().items():
        assert len(values.unique()) > (1 if name in ("hflip", "vflip") else 15), name


def test_a_view_does_not_depend_on_its_batch():
    images, uniforms = noise(12), random_uniforms(12)
    together = view(images, uniforms, FIRST_ORDER, 70, ORIGINAL)
    for i in (0, 7, 11):
        alone = view(images[i : i + 1], uniforms[i : i + 1], FIRST_ORDER, 70, ORIGINAL)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)


# Distributions

DRAWS = 20_000
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
    theirs = [sampler.make_params([image]) for _ in range(DRAWS)]
    theirs = {name: np.array([crop[name] for crop in theirs]) for name in ("top", "left", "height", "width")}
    p = view_parameters(random_uniforms(DRAWS), height, width, Views(crop_scale=scale, crop_ratio=ratio))
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
    p = view_parameters(random_uniforms(50), height, width, Views(crop_scale=scale, crop_ratio=ratio))
    for values, name in ((p.top, "top"), (p.left, "left"), (p.crop_height, "height"), (p.crop_width, "width")):
        assert (values == expected[name]).all(), name


def test_angles_factors_and_flips_are_distributed_as_torchvisions():
    torch.manual_seed(4)
    p = view_parameters(random_uniforms(DRAWS), 96, 96, replace(ORIGINAL, brightness=1.5, hflip=0.3, vflip=0.8))
    rotation = v2.RandomRotation(45)
    assert ks_distance(p.angle.numpy(), np.array([rotation.make_params([])["angle"] for _ in range(DRAWS)])) < CLOSE
    jitter = v2.ColorJitter(1.5, 0.3, 0.3, 0.3)
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


# Draws


def test_an_epoch_shows_each_image_equally_often_in_random_order():
    indices = torch.tensor([5, 17, 3, 99])
    draws = draw(indices, 20, 8, ORIGINAL, (0, 0, 0))
    assert draws.order.dtype == torch.int64 and draws.uniforms.dtype == draws.mix.dtype == torch.float32
    assert draws.order.sort().values.tolist() == sorted(indices.tolist() * 20)
    assert draws.order.tolist() != indices.repeat(20).tolist() and len(set(draws.order[:20].tolist())) == 4
    assert draws.uniforms.shape == (80, COLUMNS) and draws.uniforms.min() >= 0 and draws.uniforms.max() < 1
    assert len(draws.colour_orders) == 10 and (draws.mix == 1).all()


@pytest.mark.parametrize(("n", "batches"), [(7, 1), (8, 1), (9, 2)])
def test_one_colour_order_a_batch(n, batches):
    orders = draw(torch.arange(n), 1, 8, ORIGINAL, (0,)).colour_orders
    assert len(orders) == batches and all(sorted(order) == [0, 1, 2, 3] for order in orders)


def test_all_colour_orders_occur_equally_often():
    orders = draw(torch.arange(24_000), 1, 1, ORIGINAL, (0,)).colour_orders
    counts = [orders.count(order) for order in permutations(range(4))]
    assert min(counts) > 850 and max(counts) < 1150


def test_equal_seeds_give_equal_draws_and_others_do_not():
    def drawn(*seed: int) -> augment.Draws:
        return draw(torch.arange(50), 2, 16, Views(mixup=0.2), seed)

    first, again = drawn(0, 1, 2), drawn(0, 1, 2).to("cpu")
    assert torch.equal(first.order, again.order) and torch.equal(first.uniforms, again.uniforms)
    assert torch.equal(first.mix, again.mix) and first.colour_orders == again.colour_orders
    for other in (drawn(0, 1, 3), drawn(0, 2, 2), drawn(1, 1, 2)):
        assert not torch.equal(first.order, other.order) and not torch.equal(first.uniforms, other.uniforms)
        assert not torch.equal(first.mix, other.mix)


def test_options_do_not_change_the_other_draws():
    plain, mixed = (draw(torch.arange(50), 2, 16, views, (0,)) for views in (ORIGINAL, Views(cutmix=1.0, hflip=0)))
    assert torch.equal(plain.order, mixed.order) and torch.equal(plain.uniforms, mixed.uniforms)
    assert plain.colour_orders == mixed.colour_orders and not torch.equal(plain.mix, mixed.mix)


# Mixing and erasing


def numbered(n: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, size, size) that are everywhere their own index, and labels that are too."""
    return torch.arange(float(n)).view(-1, 1, 1, 1).repeat(1, 3, size, size), torch.arange(n)


def mixing(n: int, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    draws = draw(torch.arange(n), 1, n, views, (5,))
    return draws.mix, draws.uniforms


def test_no_mixing_by_default():
    x, labels = numbered(4)
    mixed, others, share = mix(x, labels, *mixing(4, ORIGINAL), ORIGINAL)
    assert torch.equal(mixed, x) and torch.equal(others, labels) and torch.equal(share, torch.ones(4))


def test_mixup_blends_with_the_neighbour():
    x, labels = numbered(64)
    lam, uniforms = mixing(64, Views(mixup=1.0))
    mixed, others, share = mix(x, labels, lam, uniforms, Views(mixup=1.0))
    assert others.tolist() == [63, *range(63)]
    torch.testing.assert_close(share, lam)
    torch.testing.assert_close(mixed, (lam * labels + (1 - lam) * others).view(-1, 1, 1, 1).expand_as(x))


def test_cutmix_pastes_a_box_and_the_share_is_what_is_left():
    n, size = 256, 32
    x, labels = numbered(n, size)
    lam, uniforms = mixing(n, Views(cutmix=1.0))
    mixed, others, share = mix(x, labels, lam, uniforms, Views(cutmix=1.0))
    own = mixed == labels.view(-1, 1, 1, 1)
    assert (own | (mixed == others.view(-1, 1, 1, 1))).all()
    torch.testing.assert_close(share, own.float().mean(dim=(1, 2, 3)))
    assert len(share.unique()) > 50
    whole = 0
    for i in range(n):
        rows, columns = (~own[i, 0]).any(1).nonzero(), (~own[i, 0]).any(0).nonzero()
        side = math.floor(size * math.sqrt(1 - lam[i]))
        assert (~own[i, 0]).sum() == len(rows) * len(columns)  # a full rectangle
        if len(rows) and 0 < rows.min() and rows.max() < size - 1 and 0 < columns.min() and columns.max() < size - 1:
            whole += 1
            assert len(rows) == len(columns) == side
        assert len(rows) <= side and len(columns) <= side
    assert whole > 20


def test_each_sample_takes_mixup_or_cutmix_with_even_odds():
    n, views = 2000, Views(mixup=1.0, cutmix=1.0)
    x, labels = numbered(n, 8)
    mixed, _, share = mix(x, labels, *mixing(n, views), views)
    blended = (mixed.std(dim=(1, 2, 3)) < 1e-3) & (share > 0.02) & (share < 0.98)
    pasted = mixed.std(dim=(1, 2, 3)) > 0.1
    assert 0.4 < blended.float().mean() < 0.6 and 0.35 < pasted.float().mean() < 0.6


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 0.2), (4.0, 0.2)])
def test_lambda_follows_the_beta_distribution_of_the_kind_taken(mixup, cutmix):
    views = Views(mixup=mixup, cutmix=cutmix, mix_probability=0.25)
    draws = draw(torch.arange(DRAWS), 4, 100, views, (6,))
    taken = draws.mix < 1
    assert taken.float().mean().item() == pytest.approx(0.25, abs=0.03 if cutmix == 0.2 or mixup == 0.2 else 0.01)
    cut = draws.uniforms[:, augment.MIX_KIND] < (0.5 if mixup and cutmix else bool(cutmix))
    for kind, alpha in ((cut, cutmix), (~cut, mixup)):
        lam = draws.mix[kind & taken].double()
        if alpha:  # variance of Beta(a, a)
            assert lam.mean().item() == pytest.approx(0.5, abs=0.015)
            assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
        else:
            assert len(lam) == 0


def test_unmixed_samples_stay_as_they_are():
    n, views = 400, Views(mixup=1.0, cutmix=1.0, mix_probability=0.5)
    x, labels = numbered(n, 8)
    lam, uniforms = mixing(n, views)
    mixed, _, share = mix(x, labels, lam, uniforms, views)
    untouched = lam == 1
    assert 0.4 < untouched.float().mean() < 0.6
    assert torch.equal(mixed[untouched], x[untouched]) and (share[untouched] == 1).all()


def test_erased_patch_has_its_size_and_hangs_over_the_edge():
    views, uniforms = Views(erase=1.0, erase_size=0.25), random_uniforms(4)
    uniforms[:, augment.ERASE_ROW] = torch.tensor([0.5, 0.0, 0.5, 0.999])
    uniforms[:, augment.ERASE_COLUMN] = torch.tensor([0.5, 0.5, 0.0, 0.999])
    x = torch.ones(4, 3, 40, 40)
    erased = erase(x, uniforms, views) == 0
    assert erased.sum(dim=(2, 3)).tolist() == [[100] * 3, [50] * 3, [50] * 3, [36] * 3]
    assert erased[0, :, 15:25, 15:25].all() and erased[3, :, 34:, 34:].all()
    assert (x == 1).all()


def test_erase_happens_as_often_as_asked_and_anywhere():
    views = Views(erase=0.3, erase_size=0.2)
    erased = erase(torch.ones(4000, 1, 20, 20), random_uniforms(4000), views) == 0
    assert erased.any(dim=(1, 2, 3)).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert erased.any(dim=0).all()
    assert erase(torch.ones(1, 3, 4, 4), random_uniforms(1), ORIGINAL).all()


# Options and devices


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.5, 1.1)),
        ("crop_scale", (0.5,)),
        ("crop_ratio", (-1.0, 1.0)),
        ("crop_ratio", (1.0, math.inf)),
        ("rotation", -1.0),
        ("rotation", 181.0),
        ("hflip", 1.5),
        ("vflip", -0.1),
        ("brightness", -0.1),
        ("contrast", math.inf),
        ("saturation", math.nan),
        ("hue", 0.6),
        ("erase", 2.0),
        ("erase_size", -0.5),
        ("mixup", -1.0),
        ("cutmix", math.nan),
        ("mix_probability", 1.1),
    ],
)
def test_a_bad_option_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        Views(**{name: value})


@pytest.mark.parametrize(
    "views", [ORIGINAL, PLAIN, Views(erase=0.5, mixup=0.2), Views(erase=0.5, mixup=0.2, cutmix=1.0, rotation=0)]
)
def test_all_stays_on_the_device_and_nothing_waits_for_it(views):
    """Fake CUDA tensors refuse to meet tensors of the CPU and to be read from the host."""
    with FakeTensorMode():
        images = torch.empty(8, 3, 96, 96, dtype=torch.uint8, device="cuda")
        uniforms, lam = torch.empty(8, COLUMNS, device="cuda"), torch.empty(8, device="cuda")
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        x = erase(normalise(view(images, uniforms, FIRST_ORDER, 70, views), inplace=True), uniforms, views)
        x, others, share = mix(x, labels, lam, uniforms, views)
    assert {t.device.type for t in (x, others, share)} == {"cuda"}
    assert x.shape == (8, 3, 70, 70) and x.dtype == torch.float32
    assert others.shape == share.shape == (8,)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_same_views_without_waiting():
    views = Views(erase=0.5, mixup=0.2, cutmix=1.0)
    images, uniforms, lam, labels = noise(64), random_uniforms(64), torch.rand(64), torch.arange(64)

    def batch(device: str) -> list[torch.Tensor]:
        inputs = [t.to(device) for t in (images, uniforms, lam, labels)]
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            x = erase(normalise(view(inputs[0], inputs[1], FIRST_ORDER, 70, views), inplace=True), inputs[1], views)
            x, others, share = mix(x, inputs[3], inputs[2], inputs[1], views)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [x.cpu(), others.cpu(), share.cpu()]

    for ours, theirs in zip(batch("cpu"), batch("cuda"), strict=True):
        # A position on the edge of the rotated image may fall on either side of it.
        assert ((ours - theirs).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.skipif("STL10_DIR" not in os.environ, reason="STL10_DIR, the folder of the real images, is not set")
def test_on_real_images_the_missing_antialias_filter_changes_little():
    """At the original's largest reduction, 96 to 70 pixels, and so at every smaller one."""
    path = Path(os.environ["STL10_DIR"]) / "stl10_binary" / "train_X.bin"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    images = torch.from_numpy(np.fromfile(path, np.uint8, 64 * 3 * 96 * 96).reshape(-1, 3, 96, 96)).transpose(2, 3)
    ours = view(images, random_uniforms(64), FIRST_ORDER, 70, PLAIN)
    filtered = tv.resize(images / 255, [70, 70], antialias=True)
    assert (ours - filtered).abs().mean() < 0.015
