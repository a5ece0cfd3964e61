"""A small picture set drawn by the program itself: ten shapes on cluttered backgrounds.

It stands in for the real files, to try a run without them. Every image has its own colours, place, size, tilt and
background, so that only the shape identifies the class.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from data import SIDE, DataSet

DEMO_CLASSES = ("disc", "ring", "square", "triangle", "cross", "flower", "crescent", "stripes", "checkers", "dots")
IMAGES_PER_CLASS = {"train": 150, "test": 30}
SEED = 10
FloatArray = NDArray[np.float32]
Shape = Callable[[FloatArray, FloatArray], FloatArray]


def load(split: str) -> DataSet:
    """The `train` (1,500) or `test` (300) images of the set, drawn in about a second, the same on every call."""
    return DataSet(*draw_shapes(split, IMAGES_PER_CLASS[split]), DEMO_CLASSES)


def draw_shapes(split: str, per_class: int) -> tuple[Tensor, Tensor]:
    """The images uint8 (N, 3, 96, 96), rows first, and their labels int64 (N,), from 0.

    In shuffled order, the same on every call; `train` and `test` share no random numbers.
    """
    generator = np.random.default_rng([SEED, sorted(IMAGES_PER_CLASS).index(split)])
    images = np.concatenate([_class_images(SHAPES[name], per_class, generator) for name in DEMO_CLASSES])
    order = torch.from_numpy(generator.permutation(len(images)))
    return torch.from_numpy(images)[order], torch.arange(len(DEMO_CLASSES)).repeat_interleave(per_class)[order]


def _class_images(shape: Shape, count: int, generator: Generator) -> NDArray[np.uint8]:
    """`count` images of one shape: uint8 (count, 3, 96, 96), rows first."""
    ground = generator.uniform(0, 0.5, (count, 3, 1, 1)).astype(np.float32)
    # Always lighter than the ground: a small network learns that in seconds; lighter or darker takes it minutes.
    colour = ground + generator.uniform(0.2, 0.5, (count, 3, 1, 1)).astype(np.float32)
    image = ground + 0.1 * _smooth_noise(6, count, generator)
    for _ in range(3):  # clutter: small discs of any colour
        spot = _mask(SHAPES["disc"], (3, 8), 48, count, generator)
        image += spot * (generator.uniform(0, 1, (count, 3, 1, 1)).astype(np.float32) - image)
    image += _mask(shape, (26, 44), 14, count, generator) * (colour - image)
    image += 0.06 * _smooth_noise(24, count, generator)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _smooth_noise(knots: int, count: int, generator: Generator) -> FloatArray:
    """Normal noise on a grid of knots x knots, interpolated linearly: (count, 3, 96, 96)."""
    values = generator.standard_normal((count, 3, knots, knots), dtype=np.float32)
    position = np.linspace(0, knots - 1, SIDE, dtype=np.float32)[:, None]
    weights = (1 - abs(position - np.arange(knots, dtype=np.float32))).clip(0)
    return weights @ values @ weights.T


def _mask(shape: Shape, radii: tuple[int, int], spread: int, count: int, generator: Generator) -> FloatArray:
    """Coverage of each pixel, 0 to 1: (count, 1, 96, 96). Radius within `radii`, centre within `spread` px."""
    radius, x, y, tilt = (
        generator.uniform(low, high, (count, 1, 1, 1)).astype(np.float32)
        for low, high in (radii, (-spread, spread), (-spread, spread), (-0.35, 0.35))
    )
    offset = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    right, down = (offset[None, :] - x) / radius, (offset[:, None] - y) / radius
    u, v = np.cos(tilt) * right + np.sin(tilt) * down, np.cos(tilt) * down - np.sin(tilt) * right
    return (shape(u, v) * radius + 0.5).clip(0, 1)


def _square(u: FloatArray, v: FloatArray) -> FloatArray:
    return 0.85 - np.maximum(abs(u), abs(v))


def _cross(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.minimum(0.95 - np.maximum(abs(u), abs(v)), 0.3 - np.minimum(abs(u), abs(v)))


def _dots(u: FloatArray, v: FloatArray) -> FloatArray:
    pitch = 0.58
    return np.minimum(_square(u, v), 0.19 - np.hypot(*((x + pitch / 2) % pitch - pitch / 2 for x in (u, v))))


# Roughly the distance from (u, v) to the shape's edge, positive inside, all in units of the shape's radius.
SHAPES: dict[str, Shape] = {
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "ring": lambda u, v: 0.17 - abs(np.hypot(u, v) - 0.78),
    "square": _square,
    "triangle": lambda u, v: 0.5 - np.maximum(v, 0.866 * abs(u) - 0.5 * v),
    "cross": _cross,
    "flower": lambda u, v: 0.65 + 0.3 * np.cos(5 * np.arctan2(u, -v)) - np.hypot(u, v),
    "crescent": lambda u, v: np.minimum(0.95 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.75),
    "stripes": lambda u, v: np.minimum(_square(u, v), np.cos(9 * u) / 9),
    "checkers": lambda u, v: np.minimum(_square(u, v), np.cos(9 * u) * np.cos(9 * v) / 9),
    "dots": _dots,
}
