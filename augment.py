"""Random views of images, batched on the device, every sample with its own parameters.

All randomness of an epoch is drawn once, on the CPU (`draw_epoch`). Everything else is a pure function of images and
those draws: the same draws give the same views on every device and in every batch, and a resumed run has no random
state to restore. Nothing waits for the device: no constant is copied to it and no value is read back.

`take_samples` and `augmented_batch` make a training step's input: views, normalised, erased and mixed, in this order.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import operations
from operations import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from settings import check_limits, option

# CIFAR-100's published figures, as in the original; STL-10's are (0.447, 0.440, 0.407) and (0.260, 0.257, 0.271).
MEAN = (0.507, 0.487, 0.441)
STD = (0.267, 0.256, 0.276)

CROP_TRIES = 10

# Columns of the uniforms: which random number decides what about a sample.
ANGLE = 0
CROP_AREA = slice(1, 1 + CROP_TRIES)
CROP_RATIO = slice(CROP_AREA.stop, CROP_AREA.stop + CROP_TRIES)
TOP, LEFT, HFLIP, VFLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(CROP_RATIO.stop, CROP_RATIO.stop + 8)
ERASE, ERASE_ROW, ERASE_COLUMN, MIX_KIND, MIX_ROW, MIX_COLUMN = range(HUE + 1, HUE + 7)
COLUMNS = MIX_COLUMN + 1

CACHED_PIXELS = 160_000  # of the views made at once on a CPU, so that intermediate results stay in its caches

COLOUR_ORDERS = tuple(permutations(range(4)))  # of brightness 0, contrast 1, saturation 2, hue 3


@dataclass(frozen=True)
class ViewOptions:
    """Options of the views; the defaults are the original's. Raises ValueError where one is out of range."""

    crop_scale: tuple[float, float] = option(
        "smallest and largest area of the random crop, as a share of the image", (0.08, 1.0), above=0.0, high=1.0
    )
    crop_ratio: tuple[float, float] = option(
        "smallest and largest width / height of the random crop", (3 / 4, 4 / 3), above=0.0, high=1000.0
    )
    rotation: float = option("largest rotation either way, in degrees", 45.0, low=0.0, high=180.0)
    hflip: float = option("probability of a left-right flip", 0.5, low=0.0, high=1.0)
    vflip: float = option("probability of an upside-down flip", 0.5, low=0.0, high=1.0)
    brightness: float = option("multiply the brightness by a random factor in 1 ± X; 0: off", 0.3, low=0.0, high=100.0)
    contrast: float = option("multiply the contrast by a random factor in 1 ± X; 0: off", 0.3, low=0.0, high=100.0)
    saturation: float = option("multiply the saturation by a random factor in 1 ± X; 0: off", 0.3, low=0.0, high=100.0)
    hue: float = option("largest shift of the hue, in turns of the colour circle", 0.3, low=0.0, high=0.5)
    trivial_augment: bool = option("one more operation on each view, drawn from fourteen, at a random strength", False)
    erase: float = option("probability that a square patch is erased (cutout)", 0.0, low=0.0, high=1.0)
    erase_size: float = option("side of the erased patch, as a share of the view's side", 0.3, low=0.0, high=1.0)
    mixup: float = option("alpha of Mixup's Beta(alpha, alpha); 0: off", 0.0, low=0.0, high=1000.0)
    cutmix: float = option("alpha of CutMix's Beta(alpha, alpha); 0: off", 0.0, low=0.0, high=1000.0)
    mix_probability: float = option("share of the samples that are mixed", 1.0, low=0.0, high=1.0)

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with others."""
        return bool(self.mixup or self.cutmix)

    def __post_init__(self) -> None:
        check_limits(self)
        for name in ("crop_scale", "crop_ratio"):
            limits = getattr(self, name)
            if len(limits) != 2 or limits[0] > limits[1]:
                raise ValueError(f"{name} must be two numbers, the smaller first, not {limits}")


@dataclass(frozen=True)
class EpochDraws:
    """Everything random about an epoch of n samples."""

    order: Tensor  # int64 (n,): which image each sample shows
    uniforms: Tensor  # float32 (n, COLUMNS) in [0, 1), with trivial_augment (n, COLUMNS + operations.COLUMNS)
    own_share: Tensor  # float32 (n,) in [0, 1]: share of the sample's own image when mixed; 1 = unmixed
    colour_orders: list[tuple[int, int, int, int]]  # one per batch, known to the host; see COLOUR_ORDERS

    def to(self, device: torch.device | str, images_device: torch.device | str | None = None) -> "EpochDraws":
        """The same draws on `device`; `order`, which indexes the images, on `images_device` if one is given."""
        tensors = (self.order.to(images_device or device), self.uniforms.to(device), self.own_share.to(device))
        return EpochDraws(*tensors, self.colour_orders)


class ViewParameters(NamedTuple):
    """What happens to each of B samples: float32 (B,) except the two flips, which are bool (B,)."""

    angle: Tensor  # degrees, anticlockwise positive, about the image's centre
    top: Tensor  # of the crop, in whole pixels of the rotated image, as are the next three
    left: Tensor
    crop_height: Tensor
    crop_width: Tensor
    hflip: Tensor
    vflip: Tensor
    brightness: Tensor  # factors, 1 = unchanged
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # shift in turns, -0.5 to 0.5


def draw_epoch(
    indices: Tensor, views_per_image: int, batch: int, options: ViewOptions, seed: Sequence[int]
) -> EpochDraws:
    """Draw an epoch: `views_per_image` views of each image in `indices` (int64), shuffled, in batches of `batch`.

    `seed` holds non-negative integers, in training (seed, stage, epoch); equal arguments give equal draws, on the CPU.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.repeat(indices.cpu().numpy(), views_per_image))
    n = len(order)
    uniforms = rng.random((n, COLUMNS), dtype=np.float32)
    colour_orders = [COLOUR_ORDERS[i] for i in rng.integers(len(COLOUR_ORDERS), size=math.ceil(n / batch))]
    share = np.ones(n, np.float32)
    if options.mixes:
        alpha = np.where(uniforms[:, MIX_KIND] < _cutmix_probability(options), options.cutmix, options.mixup)
        share = np.where(rng.random(n) < options.mix_probability, rng.beta(alpha, alpha), 1).astype(np.float32)
    if options.trivial_augment:  # drawn last, so that all earlier draws are the same without it
        uniforms = np.concatenate([uniforms, rng.random((n, operations.COLUMNS), dtype=np.float32)], axis=1)
    return EpochDraws(torch.from_numpy(order), torch.from_numpy(uniforms), torch.from_numpy(share), colour_orders)


def _cutmix_probability(options: ViewOptions) -> float:
    """Probability that a mixed sample takes CutMix rather than Mixup."""
    if options.cutmix and options.mixup:
        return 0.5
    return 1.0 if options.cutmix else 0.0


def view_parameters(uniforms: Tensor, height: int, width: int, options: ViewOptions) -> ViewParameters:
    """Turn uniforms (B, COLUMNS) into the parameters of views of images of height × width pixels.

    Distributions as in torchvision's RandomRotation, RandomResizedCrop, RandomHorizontalFlip and ColorJitter.
    """
    return ViewParameters(
        _between(-options.rotation, options.rotation, uniforms[:, ANGLE]),
        *_crop(uniforms, height, width, options),
        uniforms[:, HFLIP] < options.hflip,
        uniforms[:, VFLIP] < options.vflip,
        _factor(options.brightness, uniforms[:, BRIGHTNESS]),
        _factor(options.contrast, uniforms[:, CONTRAST]),
        _factor(options.saturation, uniforms[:, SATURATION]),
        _between(-options.hue, options.hue, uniforms[:, HUE]),
    )


@functools.cache
def _whole_numbers(count: int, device: torch.device) -> Tensor:
    """0 to `count` - 1, int64, made once, so that a captured step finds them in place."""
    return torch.arange(count, device=device)


def _between(low: float, high: float, uniform: Tensor) -> Tensor:
    return uniform * (high - low) + low


def _factor(strength: float, uniform: Tensor) -> Tensor:
    """A factor in 1 ± strength, never below 0."""
    return _between(max(0.0, 1 - strength), 1 + strength, uniform)


def _crop(uniforms: Tensor, height: int, width: int, options: ViewOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width of the crops, as RandomResizedCrop.get_params draws them.

    The first of ten random areas and ratios that fits is taken; if none fits, the largest central crop of an allowed
    ratio.
    """
    area = _between(*options.crop_scale, uniforms[:, CROP_AREA]) * (height * width)
    low, high = options.crop_ratio
    ratio = torch.exp(_between(math.log(low), math.log(high), uniforms[:, CROP_RATIO]))
    widths, heights = torch.sqrt(area * ratio).round_(), torch.sqrt(area / ratio).round_()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = (fits * (CROP_TRIES - _whole_numbers(CROP_TRIES, fits.device))).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)

    ratio = min(max(width / height, low), high)
    fallback_width, fallback_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    crop_width = torch.where(found, widths.gather(1, first)[:, 0], fallback_width)
    crop_height = torch.where(found, heights.gather(1, first)[:, 0], fallback_height)
    top = torch.where(found, uniforms[:, TOP] * (height - crop_height + 1), (height - fallback_height) // 2).floor_()
    left = torch.where(found, uniforms[:, LEFT] * (width - crop_width + 1), (width - fallback_width) // 2).floor_()
    return top, left, crop_height, crop_width


@torch.no_grad()
def augment(images: Tensor, uniforms: Tensor, colour_order: Sequence[int], size: int, options: ViewOptions) -> Tensor:
    """Random views of uint8 images (B, 3, H, W): float32 (B, 3, size, size) in [0, 1].

    Rotation about the centre with black outside, crop and both flips in one bilinear sampling without antialiasing;
    then brightness, contrast, saturation and hue in `colour_order`. `uniforms` are (B, COLUMNS).
    """
    count = max(1, CACHED_PIXELS // size**2)
    if images.device.type == "cpu" and len(images) > count:
        parts = zip(images.split(count), uniforms.split(count), strict=True)
        return torch.cat([augment(*part, colour_order, size, options) for part in parts])
    p = view_parameters(uniforms, *images.shape[-2:], options)
    x = _sample(images, p, size, rotated=options.rotation > 0)
    colour_steps = (
        (adjust_brightness, options.brightness, p.brightness),
        (adjust_contrast, options.contrast, p.contrast),
        (adjust_saturation, options.saturation, p.saturation),
        (adjust_hue, options.hue, p.hue),
    )
    for operation, strength, parameter in (colour_steps[i] for i in colour_order):
        if strength:
            x = operation(x, parameter.view(-1, 1, 1, 1))
    return x


def _sample(images: Tensor, p: ViewParameters, size: int, rotated: bool) -> Tensor:
    """Rotation, crop and flips as one sampling of uint8 images at an affine grid: (B, 3, size, size) in [0, 1]."""
    height, width = images.shape[-2:]
    centres = (_whole_numbers(size, images.device) * 2 + 1) / size - 1  # of the view's pixels, in -1 to 1
    columns = _along(p.left, p.crop_width, p.hflip, centres, width)[:, None, None, :]
    rows = _along(p.top, p.crop_height, p.vflip, centres, height)[:, None, :, None]
    # Written out, because affine_grid multiplies matrices, which a GPU may be set to do in reduced precision.
    angle = torch.deg2rad(p.angle)
    cos, sin = torch.cos(angle), torch.sin(angle)
    along_columns = torch.stack((cos / width, sin / height), 1)[:, :, None, None]
    along_rows = torch.stack((-sin / width, cos / height), 1)[:, :, None, None]
    grid = columns * along_columns + rows * along_rows  # x and y, (B, 2, size, size), the image being -1 to 1
    x = F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    if not rotated:
        return x.mul_(1 / 255)
    # Black outside. Padding with zeros instead would darken the outermost pixels of unrotated images.
    far_x, far_y = grid.abs_().unbind(1)
    return x.mul_(torch.maximum(far_x, far_y).le_(1).mul_(1 / 255)[:, None])


def _along(start: Tensor, length: Tensor, flip: Tensor, centres: Tensor, side: int) -> Tensor:
    """Where a view's pixels lie along one side of the image: (B, s), in half pixels from its middle."""
    return torch.where(flip, -length, length)[:, None] * centres + (2 * start + length - side)[:, None]


@torch.no_grad()
def normalise(x: Tensor, inplace: bool = False) -> Tensor:
    """Subtract MEAN from float images (B, 3, H, W) in [0, 1] and divide by STD, channel by channel."""
    x = x if inplace else x.clone()
    for channel, mean, std in zip(x.unbind(1), MEAN, STD, strict=True):  # numbers: a tensor would be copied over
        channel.sub_(mean).mul_(1 / std)
    return x


def denormalise(x: Tensor) -> Tensor:
    """The inverse of `normalise`, up to rounding."""
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return x * std + mean


def _square(row: Tensor, column: Tensor, side: int | Tensor, size: int) -> Tensor:
    """Which pixels lie in a square of `side` pixels, an int or (B, 1): bool (B, 1, size, size).

    Its centre is a uniformly chosen pixel, from uniforms `row` and `column` (B,); it may hang over the edge.
    """
    pixels = _whole_numbers(size, row.device)
    rows, columns = (pixels - (centre[:, None] * size).floor_() + side // 2 for centre in (row, column))
    rows, columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@torch.no_grad()
def erase(x: Tensor, uniforms: Tensor, options: ViewOptions) -> Tensor:
    """Set a square patch of some normalised views (B, 3, s, s) to 0, which is the mean (cutout, arXiv 1708.04552)."""
    if not options.erase:
        return x
    size = x.shape[-1]
    patch = _square(uniforms[:, ERASE_ROW], uniforms[:, ERASE_COLUMN], round(options.erase_size * size), size)
    return x.masked_fill(patch & (uniforms[:, ERASE] < options.erase).view(-1, 1, 1, 1), 0)


@torch.no_grad()
def mix(
    x: Tensor, labels: Tensor, own_share: Tensor, uniforms: Tensor, options: ViewOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each of the views (B, 3, s, s) with its neighbour in the batch; `own_share` (B,) comes from the draws.

    Returns the mixed views, the neighbours' labels and the share (B,) of each sample's own image in its view, so that
    the loss is share · loss(labels) + (1 - share) · loss(other labels).
    Mixup (arXiv 1710.09412) blends; CutMix (arXiv 1905.04899) pastes a box of area 1 - own_share, clipped at the edges.
    """
    if not options.mixes:
        return x, labels, torch.ones_like(own_share)
    size = x.shape[-1]
    own = own_share.view(-1, 1, 1, 1)
    if options.cutmix:
        box = _square(
            uniforms[:, MIX_ROW], uniforms[:, MIX_COLUMN], ((1 - own_share).sqrt() * size).floor_()[:, None], size
        )
        cut = uniforms[:, MIX_KIND] < _cutmix_probability(options)
        own = torch.where(cut.view(-1, 1, 1, 1), 1 - box.float(), own)
    return torch.lerp(x.roll(1, 0), x, own), labels.roll(1), own.mean(dim=(1, 2, 3))


class Samples(NamedTuple):
    """B drawn samples of an epoch: images uint8 (B, 3, H, W), labels int64 (B,), and their random numbers."""

    images: Tensor
    labels: Tensor
    uniforms: Tensor
    own_share: Tensor


class Batch(NamedTuple):
    """A training step's input: normalised views and their labels, each possibly mixed from two images."""

    x: Tensor  # float32 (B, 3, s, s)
    labels: Tensor  # int64 (B,)
    other_labels: Tensor  # int64 (B,), of the image mixed in
    own_share: Tensor  # float32 (B,) in [0, 1]: how much of the view belongs to `labels`


def take_samples(images: Tensor, labels: Tensor, draws: EpochDraws, rows: slice) -> Samples:
    """Samples `rows` of an epoch, on the device of its draws, from uint8 images (N, 3, H, W) and int64 labels (N,)."""
    index, uniforms = draws.order[rows], draws.uniforms[rows]
    device = uniforms.device  # the images may have stayed on the host
    pixels, labels = (x.index_select(0, index).to(device, non_blocking=True) for x in (images, labels))
    return Samples(pixels, labels, uniforms, draws.own_share[rows])


def augmented_batch(
    images: Tensor,
    labels: Tensor,
    uniforms: Tensor,
    own_share: Tensor,
    colour_order: Sequence[int],
    size: int,
    options: ViewOptions,
) -> Batch:
    """Samples as a batch of views of `size` px: randomly augmented, normalised, erased and mixed, in this order."""
    x = augment(images, uniforms, colour_order, size, options)
    if options.trivial_augment:
        x = operations.trivial_augment(x, uniforms[:, COLUMNS:])
    x = erase(normalise(x, inplace=True), uniforms, options)
    x, other_labels, own_share = mix(x, labels, own_share, uniforms, options)
    return Batch(x, labels, other_labels, own_share)


def make_batch(
    images: Tensor, labels: Tensor, draws: EpochDraws, step: int, rows: slice, size: int, options: ViewOptions
) -> Batch:
    """`take_samples`, then `augmented_batch`, without capturing graphs: step `step`'s `rows`, as views of `size` px."""
    return augmented_batch(*take_samples(images, labels, draws, rows), draws.colour_orders[step], size, options)
