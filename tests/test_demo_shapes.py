"""demo_shapes.py: the same pictures each time, with something to learn in them."""

import hashlib

import numpy as np
import pytest
import torch

import data
from data import DataSet
from harness import demo_shapes


@pytest.fixture(scope="module")
def train() -> DataSet:
    return demo_shapes.load("train")


@pytest.mark.parametrize(("split", "per_class"), [("train", 150), ("test", 30)])
def test_the_pictures_are_like_stl10s(split, per_class):
    loaded = demo_shapes.load(split)
    assert loaded.images.shape == (10 * per_class, 3, 96, 96) and loaded.images.dtype == torch.uint8
    assert loaded.labels.bincount().tolist() == [per_class] * 10
    assert loaded.labels[:50].unique().numel() > 5  # mixed, not sorted
    assert loaded.classes == demo_shapes.DEMO_CLASSES and len(set(demo_shapes.DEMO_CLASSES)) == 10
    hashes = {hashlib.md5(image.numpy().tobytes()).digest() for image in loaded.images}
    assert len(hashes) == len(loaded.images)


def test_each_call_draws_the_same(train):
    again = demo_shapes.load("train")
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)


def test_train_and_val_are_stratified(train):
    indices, val = data.split_indices(train.labels)
    assert train.labels[indices].bincount().tolist() == [120] * 10
    assert train.labels[val].bincount().tolist() == [30] * 10


def test_images_are_drawn_upright(train):
    """Stripes run up and down, give or take 20 degrees: pixels differ more from the next column than the next row."""
    stripes = train.images[train.labels == demo_shapes.DEMO_CLASSES.index("stripes")].float()
    assert stripes.diff(dim=3).abs().mean() > 1.3 * stripes.diff(dim=2).abs().mean()


def test_shapes_have_the_areas_of_geometry():
    axis = np.linspace(-1.2, 1.2, 1201, dtype=np.float32)
    u, v = axis[None, :], axis[:, None]
    areas = {name: (shape(u, v) > 0).mean() * 2.4**2 for name, shape in demo_shapes.SHAPES.items()}
    assert areas["disc"] == pytest.approx(np.pi * 0.9**2, abs=0.02)
    assert areas["ring"] == pytest.approx(np.pi * (0.95**2 - 0.61**2), abs=0.02)
    assert areas["square"] == pytest.approx(1.7**2, abs=0.02)
    assert areas["triangle"] == pytest.approx(0.75 * np.sqrt(3), abs=0.02)
    assert areas["cross"] == pytest.approx(2 * 1.9 * 0.6 - 0.6**2, abs=0.02)
    assert areas["dots"] == pytest.approx(9 * np.pi * 0.19**2, abs=0.02)
