"""The fourteen operations against torchvision's, one sample at a time, and how they are drawn."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

import augment
import operations
from augment import ViewOptions, draw_epoch, make_batch, normalise
from operations import FACTOR, OPERATIONS, ROTATION, SHEAR, TRANSLATION, trivial_augment

SIZE, COUNT = 32, 8
STRENGTHS = (-0.97, -0.5, -0.2, 0.01, 0.3, 0.5, 0.79, 0.99)
BILINEAR = InterpolationMode.BILINEAR


def pictures() -> torch.Tensor:
    """Noise, dim noise, greys, one colour, few colours, a ramp: 8-bit values as float32 (8, 3, 32, 32) in [0, 1]."""
    x = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(4)).float()
    x[1] = (x[1] / 4 + 60).floor()
    x[2] = x[2, :1]
    x[3] = torch.tensor([10.0, 128.0, 250.0]).view(3, 1, 1)
    x[4] = (x[4] > 200) * 255.0
    x[5] = torch.arange(SIZE).view(1, 1, SIZE) * 8
    return x / 255


def uniforms_of(name: str, strengths: tuple[float, ...]) -> torch.Tensor:
    """Random numbers that choose an operation at these strengths, -1 to 1."""
    kind = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    return torch.tensor([[kind, (strength + 1) / 2] for strength in strengths])


def affine(image: torch.Tensor, shear: tuple[float, float] = (0, 0), translate: tuple[float, float] = (0, 0)):
    shear = [math.degrees(math.atan(each)) for each in shear]
    return tv.affine(image, 0, list(translate), 1.0, shear, interpolation=BILINEAR)


TORCHVISIONS = {
    "identity": lambda x, s: x,
    "shear_x": lambda x, s: affine(x, shear=(SHEAR * s, 0)),
    "shear_y": lambda x, s: affine(x, shear=(0, SHEAR * s)),
    "translate_x": lambda x, s: affine(x, translate=(TRANSLATION * SIZE * s, 0)),
    "translate_y": lambda x, s: affine(x, translate=(0, TRANSLATION * SIZE * s)),
    "rotate": lambda x, s: tv.rotate(x, ROTATION * s, interpolation=BILINEAR),
    "brightness": lambda x, s: tv.adjust_brightness(x, 1 + FACTOR * s),
    "saturation": lambda x, s: tv.adjust_saturation(x, 1 + FACTOR * s),
    "contrast": lambda x, s: tv.adjust_contrast(x, 1 + FACTOR * s),
    "sharpness": lambda x, s: tv.adjust_sharpness(x, 1 + FACTOR * s),
    "posterize": lambda x, s: tv.posterize(x, 8 - min(math.floor(7 * abs(s)), 6)),
    "solarize": lambda x, s: tv.solarize(x, 1 - abs(s)),
    "autocontrast": lambda x, s: tv.autocontrast(x),
    "equalize": lambda x, s: tv.equalize(x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_torchvision(name: str) -> None:
    x = pictures()
    expected = torch.stack([TORCHVISIONS[name](*pair) for pair in zip(x, STRENGTHS, strict=True)])
    found = trivial_augment(x.clone(), uniforms_of(name, STRENGTHS))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    if name != "identity":
        assert (found != x).any()


def test_equalize_agrees_with_torchvisions_on_bytes() -> None:
    x = (pictures() * 255).round().byte()
    found = (operations._equalize(x / 255, torch.zeros(COUNT)) * 255).round().byte()
    assert torch.equal(found, tv.equalize(x))


def test_each_sample_has_its_own_operation() -> None:
    """In one batch all of them, each as if it were alone; and the same where all are calculated and some taken."""
    x = pictures()[torch.arange(28) % COUNT]
    uniforms = torch.rand(28, 2, generator=torch.Generator().manual_seed(1))
    uniforms[:, 0] = (torch.arange(28) % 14 + 0.5) / 14
    together = trivial_augment(x.clone(), uniforms)
    alone = torch.cat(
        [trivial_augment(*(part.clone() for part in pair)) for pair in zip(x.split(1), uniforms.split(1), strict=True)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    strength = uniforms[:, 1] * 2 - 1
    for row, operation in zip(range(28), 2 * list(OPERATIONS.values()), strict=True):
        torch.testing.assert_close(together[row], operation(x.clone(), strength)[row], rtol=0, atol=1e-6)


def test_results_stay_in_range() -> None:
    uniforms = torch.rand(400, 2, generator=torch.Generator().manual_seed(2))
    uniforms[:2, 1] = torch.tensor([0.0, 1 - 2**-24])  # the strongest
    x = trivial_augment(pictures().repeat(50, 1, 1, 1) - 1e-8, uniforms)  # as rounding leaves them
    assert x.min() >= 0 and x.max() <= 1 and x.isfinite().all()


def test_draws_are_even() -> None:
    draws = draw_epoch(torch.arange(14_000), 1, 100, ViewOptions(trivial_augment=True), (3,))
    kind, strength = draws.uniforms[:, augment.COLUMNS :].unbind(1)
    counts = (kind * 14).long().bincount(minlength=14)
    assert len(counts) == 14 and (counts - 1000).abs().max() < 150
    assert np.abs(np.sort(strength.numpy()) - np.linspace(0, 1, 14_000)).max() < 0.02


def test_draws_without_it_do_not_change_by_a_bit() -> None:
    options = ViewOptions(mixup=0.2, cutmix=1.0)
    without = draw_epoch(torch.arange(50), 3, 16, options, (0, 1, 2))
    with_it = draw_epoch(torch.arange(50), 3, 16, dataclasses.replace(options, trivial_augment=True), (0, 1, 2))
    assert without.uniforms.shape[1] == augment.COLUMNS
    assert torch.equal(with_it.uniforms[:, : augment.COLUMNS], without.uniforms)
    assert torch.equal(with_it.order, without.order) and torch.equal(with_it.own_share, without.own_share)
    assert with_it.colour_orders == without.colour_orders


def test_batches_have_it() -> None:
    """After the views, before they are normalised."""
    options = ViewOptions(trivial_augment=True)
    images = (pictures() * 255).byte()
    draws = draw_epoch(torch.arange(COUNT), 2, 8, options, (5,))
    batch = make_batch(images, torch.arange(COUNT), draws, 1, slice(8, 16), 32, options)
    uniforms = draws.uniforms[8:]
    views = augment.augment(images[draws.order[8:]], uniforms, draws.colour_orders[1], 32, options)
    expected = normalise(trivial_augment(views.clone(), uniforms[:, augment.COLUMNS :]))
    assert torch.equal(batch.x, expected) and not torch.equal(batch.x, normalise(views))


def test_operations_and_their_ranges_are_those_of_torchvisions_wide_space() -> None:
    """And their order, by which the draws of a run begun before choose."""
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    theirs = {
        f"{kind}_{axis}": f"{kind.capitalize()}{axis.upper()}" for kind in ("shear", "translate") for axis in "xy"
    }
    theirs |= {"saturation": "Color", "autocontrast": "AutoContrast"}
    assert [theirs.get(name, name.capitalize()) for name in OPERATIONS] == list(space)
    amounts = {name: magnitudes(31, 96, 96) for name, (magnitudes, _) in space.items()}
    strongest = [amounts[name].max().item() for name in ("ShearX", "TranslateX", "Rotate", "Brightness")]
    assert [SHEAR, 96 * TRANSLATION, ROTATION, FACTOR] == pytest.approx(strongest)
    assert operations.FEWEST_BITS == amounts["Posterize"].min().item()
