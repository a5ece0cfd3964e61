"""demo_shapes.py: files of the right format, the same each time, with something to learn in them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import data
from harness import demo_shapes
from harness.errors import RunError
from harness.files import LOCK_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def specs(folder) -> data.Specs:
    return demo_shapes.make(folder)


@pytest.mark.parametrize(("split", "per_class"), [("train", 150), ("test", 30)])
def test_the_files_load_as_stl10_does(folder, specs, split, per_class):
    loaded = data.load(folder, split, specs, demo_shapes.DEMO_CLASSES)
    assert loaded.images.shape == (10 * per_class, 3, 96, 96)
    assert loaded.labels.bincount().tolist() == [per_class] * 10
    assert loaded.labels[:50].unique().numel() > 5  # mixed, not sorted
    assert loaded.classes == demo_shapes.DEMO_CLASSES and len(set(demo_shapes.DEMO_CLASSES)) == 10
    hashes = {hashlib.md5(image.numpy().tobytes()).digest() for image in loaded.images}
    assert len(hashes) == len(loaded.images)


def test_train_and_val_are_stratified(folder, specs):
    labels = data.load(folder, "train", specs, demo_shapes.DEMO_CLASSES).labels
    train, val = data.split_indices(labels)
    assert labels[train].bincount().tolist() == [120] * 10
    assert labels[val].bincount().tolist() == [30] * 10


def test_no_temporary_file_is_left(folder, specs):
    assert {path.name for path in (folder / "stl10_binary").iterdir()} == {*specs, LOCK_FILE}


def test_files_that_are_right_are_kept_and_others_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_shapes, "IMAGES_PER_CLASS", {"train": 20, "test": 5})
    folder, specs = tmp_path, demo_shapes.make(tmp_path)
    paths = [folder / "stl10_binary" / name for name in specs]
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    paths[1].unlink()
    times = [path.stat().st_mtime_ns for path in paths[2:]]
    assert demo_shapes.make(folder) == specs  # the same images, too
    assert [path.stat().st_mtime_ns for path in paths[2:]] == times
    for path in paths:
        data.read_file(path, specs[path.name])


def test_images_are_drawn_upright(folder, specs):
    """Stripes run up and down, give or take 20 degrees: pixels differ more from the next column than the next row."""
    loaded = data.load(folder, "train", specs, demo_shapes.DEMO_CLASSES)
    stripes = loaded.images[loaded.labels == demo_shapes.DEMO_CLASSES.index("stripes")].float()
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


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=str(tmp_path / "file")):
        demo_shapes.make(tmp_path / "file")
