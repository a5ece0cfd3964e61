"""Views against torchvision's functional operations and samplers, and against closed forms."""

import math
import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from uniforms import ORIGINAL, random_uniforms

import augment
import operations
from augment import ViewOptions, ViewParameters, denormalise, normalise, view_parameters

NO_COLOUR = ViewOptions(brightness=0, contrast=0, saturation=0, hue=0)
PLAIN = replace(NO_COLOUR, crop_scale=(1, 1), crop_ratio=(1, 1), rotation=0, hflip=0, vflip=0)
FIRST_ORDER = (0, 1, 2, 3)


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
        (operations.adjust_brightness, tv.adjust_brightness, (0.0, 0.7, 1.0, 1.3)),
        (operations.adjust_contrast, tv.adjust_contrast, (0.0, 0.7, 1.0, 1.3)),
        (operations.adjust_saturation, tv.adjust_saturation, (0.0, 0.7, 1.0, 1.3)),
        (operations.adjust_hue, tv.adjust_hue, (-0.5, -0.23, 0.0, 0.5)),
        (operations.adjust_hue, tv.adjust_hue, (0.01, 1 / 3, -1 / 3, 0.3)),
    ],
)
def test_colour_operation_agrees_with_torchvision(ours, torchvisions, amounts):
    x = colours()
    expected = torch.stack([torchvisions(image, amount) for image, amount in zip(x, amounts, strict=True)])
    torch.testing.assert_close(ours(x, torch.tensor(amounts).view(-1, 1, 1, 1)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_colours_and_flips_of_a_whole_image_agree_with_torchvision_in_every_order(order):
    options = replace(ORIGINAL, crop_scale=(1, 1), crop_ratio=(1, 1), rotation=0)
    images, uniforms = noise(4), random_uniforms(4, seed=order[0])
    p = view_parameters(uniforms, 96, 96, options)
    for i, result in enumerate(augment.augment(images, uniforms, order, 96, options)):
        expected = images[i] / 255
        for operation in order:
            name = ("brightness", "contrast", "saturation", "hue")[operation]
            expected = getattr(tv, f"adjust_{name}")(expected, getattr(p, name)[i].item())
        expected = tv.horizontal_flip(expected) if p.hflip[i] else expected
        expected = tv.vertical_flip(expected) if p.vflip[i] else expected
        # sampling positions are rounded to 1e-7 × 96
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


def test_normalise_agrees_with_torchvision():
    x = torch.rand(2, 3, 5, 5)
    expected = tv.normalize(x, list(augment.MEAN), list(augment.STD))
    before = x.clone()
    torch.testing.assert_close(normalise(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)
    assert normalise(x, inplace=True) is x
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_denormalise_is_the_inverse_of_normalise():
    x = colours()
    before = x.clone()
    torch.testing.assert_close(denormalise(normalise(x)), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(normalise(denormalise(x)), x, rtol=0, atol=1e-6)
    zero = denormalise(torch.zeros(1, 3, 2, 2))
    torch.testing.assert_close(zero, torch.tensor(augment.MEAN).view(1, 3, 1, 1).expand(1, 3, 2, 2))
    assert torch.equal(x, before)


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
        unsure = (
            torch.minimum(source_x, width - source_x).abs().minimum(torch.minimum(source_y, height - source_y).abs())
            < 1e-4
        )
        pixel_x, pixel_y = (source_x - 0.5).clamp(0, width - 1), (source_y - 0.5).clamp(0, height - 1)
        expected = torch.stack((2 * pixel_x, 3 * pixel_y, 255 - pixel_x - pixel_y)) * inside
        torch.testing.assert_close(result[i] * ~unsure, expected * ~unsure, rtol=0, atol=2e-3)


def test_whole_chain_agrees_with_torchvisions():
    images, uniforms, order, size = smooth(32), random_uniforms(32), (3, 1, 0, 2), 70
    p = view_parameters(uniforms, 96, 96, ORIGINAL)
    views = augment.augment(images, uniforms, order, size, ORIGINAL)

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
    x = augment.augment(noise(16), random_uniforms(16), (2, 0, 3, 1), 70, ORIGINAL)
    assert x.dtype == torch.float32 and x.shape == (16, 3, 70, 70) and not x.requires_grad
    assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6


def test_a_plain_view_is_the_image():
    images = noise(3)
    plain = augment.augment(images, random_uniforms(3), FIRST_ORDER, 96, PLAIN)
    torch.testing.assert_close(plain, images / 255, rtol=0, atol=1e-5)


def test_every_sample_has_its_own_view():
    views = augment.augment(noise(1).expand(32, -1, -1, -1), random_uniforms(32), FIRST_ORDER, 32, ORIGINAL).flatten(1)
    distances = torch.cdist(views, views) + torch.eye(32) * 100
    assert distances.min() > 1
    for name, values in view_parameters(random_uniforms(32), 96, 96, ORIGINAL)._asdict().items():
        assert len(values.unique()) > (1 if name in ("hflip", "vflip") else 15), name


def test_a_view_does_not_depend_on_its_batch_nor_on_the_pieces_it_is_made_in(monkeypatch):
    images, uniforms = noise(70), random_uniforms(70)
    together = augment.augment(images, uniforms, FIRST_ORDER, 70, ORIGINAL)
    assert augment.CACHED_PIXELS // 70**2 < 35  # so these are three pieces
    for i in (0, 31, 32, 69):
        alone = augment.augment(images[i : i + 1], uniforms[i : i + 1], FIRST_ORDER, 70, ORIGINAL)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
    monkeypatch.setattr(augment, "CACHED_PIXELS", 70**3)
    torch.testing.assert_close(
        augment.augment(images, uniforms, FIRST_ORDER, 70, ORIGINAL), together, rtol=0, atol=1e-6
    )


# Options and real images


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
        ViewOptions(**{name: value})


@pytest.mark.skipif("STL10_DIR" not in os.environ, reason="STL10_DIR, the folder of the real images, is not set")
def test_on_real_images_the_missing_antialias_filter_changes_little():
    """At the original's largest reduction, 96 to 70 pixels, and so at every smaller one."""
    path = Path(os.environ["STL10_DIR"]) / "stl10_binary" / "train_X.bin"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    images = torch.from_numpy(np.fromfile(path, np.uint8, 64 * 3 * 96 * 96).reshape(-1, 3, 96, 96)).transpose(2, 3)
    ours = augment.augment(images, random_uniforms(64), FIRST_ORDER, 70, PLAIN)
    filtered = tv.resize(images / 255, [70, 70], antialias=True)
    assert (ours - filtered).abs().mean() < 0.015


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_strength_switches_its_own_operation_alone(name: str):
    images, uniforms, options = noise(4), random_uniforms(4), replace(PLAIN, **{name: 0.3})
    amounts = getattr(view_parameters(uniforms, 96, 96, options), name).tolist()
    views = augment.augment(images, uniforms, FIRST_ORDER, 96, options)
    for image, amount, view in zip(images, amounts, views, strict=True):
        torch.testing.assert_close(view, getattr(tv, f"adjust_{name}")(image / 255, amount), rtol=0, atol=2e-5)


def test_colours_are_normalised_by_the_published_figures():
    """Which no checkpoint holds: by others, every network trained before would see other colours."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)))
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(normalise(x), (x - mean) / std, rtol=1e-5, atol=1e-6)
