"""data.py against files written byte by byte, and against the official files where they are at hand."""

import hashlib
import os
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from harness import files
from harness.errors import RunError

DEFAULT_VAL_SHA256 = "269aa1cd2834e192f31738f7754a0d951efd21597a88b80b33187ed29a72b4d6"  # int64 indices, ascending
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


def spec_of(content: bytes) -> data.FileSpec:
    return data.FileSpec(len(content), hashlib.md5(content).hexdigest())


def write(folder: Path, **contents: bytes) -> dict[str, data.FileSpec]:
    """Write `train_X=...` as folder/stl10_binary/train_X.bin and return the specs."""
    (folder / "stl10_binary").mkdir(exist_ok=True)
    specs = {}
    for name, content in contents.items():
        (folder / "stl10_binary" / f"{name}.bin").write_bytes(content)
        specs[f"{name}.bin"] = spec_of(content)
    return specs


@pytest.fixture
def small(tmp_path: Path) -> dict[str, data.FileSpec]:
    """Four train and three test images of random bytes in `tmp_path`."""
    pixels = random.Random(0)
    return write(
        tmp_path,
        train_X=pixels.randbytes(4 * 27648),
        train_y=bytes([10, 1, 3, 3]),
        test_X=pixels.randbytes(3 * 27648),
        test_y=bytes([2, 9, 10]),
    )


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def official() -> data.DataSet:
    if "STL10_DIR" not in os.environ:
        pytest.skip("needs the official training files: set STL10_DIR to the folder that holds stl10_binary/")
    return data.load(Path(os.environ["STL10_DIR"]), "train")


@pytest.mark.parametrize(("split", "labels"), [("train", [9, 0, 2, 2]), ("test", [1, 8, 9])])
def test_pixels_and_labels_are_those_of_the_format(tmp_path, small, split, labels):
    loaded = data.load(tmp_path, split, small)
    assert loaded.images.shape == (len(labels), 3, 96, 96) and loaded.images.dtype == torch.uint8
    assert loaded.images.is_contiguous()
    assert loaded.labels.tolist() == labels and loaded.labels.dtype == torch.int64
    assert loaded.classes == data.CLASSES
    raw = (tmp_path / "stl10_binary" / f"{split}_X.bin").read_bytes()
    places = random.Random(1)
    for _ in range(500):
        image, channel, row, column = places.randrange(len(labels)), *(places.randrange(n) for n in (3, 96, 96))
        assert loaded.images[image, channel, row, column] == raw[image * 27648 + channel * 9216 + column * 96 + row]


@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_files_of_the_split_are_needed_and_nothing_is_written(tmp_path, small, split):
    for name in FILES:
        if not name.startswith(split):
            (tmp_path / "stl10_binary" / name).unlink()
    before = contents(tmp_path)
    data.load(tmp_path, split, small)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("gone", [FILES[:1], FILES[1:2], FILES[:2]])
def test_missing_files_are_named(tmp_path, small, gone):
    for name in gone:
        (tmp_path / "stl10_binary" / name).unlink()
    with pytest.raises(data.MissingFiles) as caught:
        data.load(tmp_path, "train", small)
    assert [name for name in FILES if name in str(caught.value)] == list(gone)
    assert "--data-dir" in str(caught.value)


def test_missing_folders_count_as_missing_files(tmp_path, small):
    (tmp_path / "file").write_text("")
    for data_dir in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(data.MissingFiles, match=r"train_X.bin and train_y.bin not found in .*stl10_binary"):
            data.load(data_dir, "train", small)


@pytest.mark.parametrize(
    "name, told", [("stl10_binary", "give --data-dir {}"), ("stl", "move the files to {}/stl/stl10_")]
)
def test_the_folder_of_the_files_itself_is_no_data_dir(name, told, tmp_path, small):
    """Else they would be fetched once more, into it."""
    inner = (tmp_path / "stl10_binary").rename(tmp_path / name)
    with pytest.raises(RunError, match=re.escape(told.format(tmp_path))) as caught:
        data.load(inner, "train", small)
    assert not isinstance(caught.value, data.MissingFiles)


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "short": lambda content: content[:-1],
    "long": lambda content: content + b"\1",
    "bit": flip_a_bit,
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_by_name(tmp_path, small, name, damage):
    path = tmp_path / "stl10_binary" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(RunError) as caught:
        data.load(tmp_path, name.split("_")[0], small)
    message = str(caught.value)
    way_out = "delete it so that it is fetched" if "train" in name else "delete it and put the official one there"
    assert str(path) in message and way_out in message and "--data-dir" in message and "\n" not in message
    sized = path.stat().st_size == small[name].bytes
    assert (small[name].md5 if sized else f"expected {small[name].bytes:,}") in message
    assert not isinstance(caught.value, data.MissingFiles)
    assert contents(tmp_path) == before


def test_swapped_files_are_refused(tmp_path, small):
    folder = tmp_path / "stl10_binary"
    (folder / "train_X.bin").rename(folder / "aside")
    (folder / "test_X.bin").rename(folder / "train_X.bin")
    (folder / "aside").rename(folder / "test_X.bin")
    for split in ("train", "test"):
        with pytest.raises(RunError, match=f"{split}_X.bin"):
            data.load(tmp_path, split, small)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", FILES[:2])
def test_what_is_no_file_is_refused(tmp_path, small, name, make):
    path = tmp_path / "stl10_binary" / name
    path.unlink()
    make(path)
    with pytest.raises(RunError, match=f"{name} is not a file"):
        data.load(tmp_path, "train", small)


@pytest.mark.parametrize("name", ["", FILES[0], FILES[1]])
def test_unreadable_files_and_folders_are_refused(tmp_path, small, name):
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    path = tmp_path / "stl10_binary" / name
    path.chmod(0)
    try:
        with pytest.raises(RunError, match="cannot read .*Permission denied"):
            data.load(tmp_path, "train", small)
    finally:
        path.chmod(0o700)


@pytest.mark.parametrize("label", [0, 11, 255])
def test_labels_out_of_range_are_refused(tmp_path, small, label):
    specs = small | write(tmp_path, train_y=bytes([1, label, 2, 3]))
    with pytest.raises(RunError, match=r"train_y.bin holds labels from \d+ to \d+, expected 1 to 10"):
        data.load(tmp_path, "train", specs)


def test_bad_arguments_are_value_errors(tmp_path, small):
    with pytest.raises(ValueError, match="split must be"):
        data.load(tmp_path, "val", small)
    with pytest.raises(ValueError, match="specs disagree"):
        data.load(tmp_path, "train", small | write(tmp_path, train_y=bytes([1, 2, 3])))


def plain_split(labels: list[int], seed: int) -> tuple[list[int], list[int]]:
    """The original's rule for classes of 500, as it is told."""
    train, val = [], []
    for label in range(10):
        names = sorted(f"{index}.bmp" for index, other in enumerate(labels) if other == label)
        random.Random(seed).shuffle(names)
        train += names[:400]
        val += names[400:]
    return sorted(int(name[:-4]) for name in train), sorted(int(name[:-4]) for name in val)


@pytest.mark.parametrize("seed", [1337, 0, 7])
@pytest.mark.parametrize("convert", [torch.tensor, list, np.array])
def test_split_follows_the_original_rule(seed, convert):
    labels = [label for label in range(10) for _ in range(500)]
    random.Random(2).shuffle(labels)
    train, val = data.split_indices(convert(labels), seed)
    assert train.dtype == val.dtype == torch.int64
    assert (train.tolist(), val.tolist()) == plain_split(labels, seed)


def test_default_split_of_the_official_labels(official):
    train, val = data.split_indices(official.labels)
    assert (train.tolist(), val.tolist()) == plain_split(official.labels.tolist(), 1337)
    assert official.labels[train].bincount().tolist() == [400] * 10
    assert official.labels[val].bincount().tolist() == [100] * 10
    assert sorted(train.tolist() + val.tolist()) == list(range(5000))
    assert hashlib.sha256(val.numpy().tobytes()).hexdigest() == DEFAULT_VAL_SHA256


@pytest.mark.parametrize(("sizes", "fraction", "expected"), [((10, 20), 0.3, [3, 6]), ((2, 3, 4), 0.01, [1, 1, 1])])
def test_split_is_stratified_for_any_sizes(sizes, fraction, expected):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    train, val = data.split_indices(labels, val_fraction=fraction)
    assert labels[val].bincount().tolist() == expected
    assert sorted(train.tolist() + val.tolist()) == list(range(sum(sizes)))
    assert not torch.equal(data.split_indices(labels.repeat(9), 1)[1], data.split_indices(labels.repeat(9), 2)[1])


def test_split_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="class 1 has only one image"):
        data.split_indices([0, 0, 1])
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="val_fraction"):
            data.split_indices([0, 0], val_fraction=fraction)


@pytest.fixture
def folds(tmp_path) -> dict[str, data.FileSpec]:
    content = b"4 0 2\n5 1 0\n"
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "fold_indices.txt").write_bytes(content)
    return {"fold_indices.txt": spec_of(content)}


def test_folds_are_the_lines_of_the_file(tmp_path, folds):
    train, val = data.fold_indices(tmp_path, 1, 7, folds)
    assert (train.tolist(), val.tolist()) == ([0, 1, 5], [2, 3, 4, 6])
    assert train.dtype == val.dtype == torch.int64


def test_bad_folds_are_refused(tmp_path, folds):
    for fold in (-1, 2):
        with pytest.raises(ValueError, match="fold must lie between 0 and 1"):
            data.fold_indices(tmp_path, fold, 7, folds)
    with pytest.raises(ValueError, match="beyond the 5 at hand"):
        data.fold_indices(tmp_path, 1, 5, folds)
    path = tmp_path / "stl10_binary" / "fold_indices.txt"
    path.write_bytes(b"4 0 2\n5 1 3\n")
    with pytest.raises(RunError, match="fold_indices.txt is damaged"):
        data.fold_indices(tmp_path, 1, 7, folds)
    path.unlink()
    with pytest.raises(RunError, match="fold_indices.txt, which is missing.*tar xzf") as caught:
        data.fold_indices(tmp_path, 1, 7, folds)
    assert str(path) in str(caught.value)


def test_official_folds(official):
    for fold in range(10):
        train, val = data.fold_indices(Path(os.environ["STL10_DIR"]), fold, 5000)
        assert (len(train), len(val)) == (1000, 4000)
        assert sorted(train.tolist() + val.tolist()) == list(range(5000))
        assert official.labels[train].bincount().tolist() == [100] * 10


def test_class_names_are_the_official_ones(official):
    assert data.CLASSES == tuple((Path(os.environ["STL10_DIR"]) / data.FOLDER / "class_names.txt").read_text().split())


def test_who_comes_second_says_so_and_waits_for_the_folder(tmp_path, capsys):
    entered = threading.Event()

    def enter() -> None:
        with files.locked(tmp_path / "pictures", wait=True):
            entered.set()

    with files.locked(tmp_path / "pictures", wait=True) as folder:
        assert folder == tmp_path / "pictures" and folder.is_dir()
        second = threading.Thread(target=enter)
        second.start()
        assert not entered.wait(0.2)
    second.join(10)
    assert entered.is_set()
    assert capsys.readouterr().err == f"waiting for another process that is filling {folder} …\n"
