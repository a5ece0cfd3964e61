"""STL-10 from its own files: find them, check them, read them, split them.

The files lie in `DIR/stl10_binary/`, as the official archive lays them out (https://cs.stanford.edu/~acoates/stl10).
Every file is read once and its size and MD5 are checked on the very bytes that are used. The expected sizes and MD5s
are an argument (`specs`), so that the demo and the tests use the same code with their own files.
"""

import dataclasses
import hashlib
import os
import random
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from augment import ViewOptions
from harness.errors import RunError, reason

FOLDER = "stl10_binary"
FOLDS_FILE = "fold_indices.txt"
TUNE_FOLDS = 5  # into which `tune_indices` splits the training images
SIDE = 96  # pixels
IMAGE_BYTES = 3 * SIDE * SIDE
TRAIN_IMAGES = 4000  # of the 5,000, in the default split: the number that the recipes' views are chosen for
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")  # label 1 first

# Augmentations by name: the original project's views, milder ones, and stronger ones with CutMix for runs that would
# otherwise overfit their images.
MILD = ViewOptions(
    crop_scale=(0.25, 1.0), rotation=10.0, vflip=0.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)
STRONG = dataclasses.replace(
    MILD, crop_scale=(0.15, 1.0), brightness=0.6, contrast=0.6, saturation=0.8, cutmix=1.0, mix_probability=0.75
)
AUGMENTATIONS = {"original": ViewOptions(), "mild": MILD, "strong": STRONG}


class FileSpec(NamedTuple):
    """The size in bytes and the MD5, in hexadecimal, that a file must have."""

    bytes: int
    md5: str


Specs = Mapping[str, FileSpec]

OFFICIAL: Specs = {
    "test_X.bin": FileSpec(221_184_000, "7f263ba9f9e0b06b93213547f721ac82"),
    "test_y.bin": FileSpec(8_000, "36f9794fa4beb8a2c72628de14fa638e"),
    "train_X.bin": FileSpec(138_240_000, "918c2871b30a85fa023e0c44e0bee87f"),
    "train_y.bin": FileSpec(5_000, "5a34089d4802c674881badbb80307741"),
    FOLDS_FILE: FileSpec(47_794, "4bbf8cd098ab9f87fe03fbcb37c06b28"),
}


class MissingFiles(RunError):
    """Files of the data set are absent (none is damaged), so fetching them is worth a try."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """`images` uint8 (N, 3, H, W), rows first; `labels` int64 (N,), from 0; `classes[label]` is a label's name.

    `digest` identifies a user's own pictures; it is empty for files that are checked against `specs`.
    `given_split`: int64 indices of the training and of the validation images, where the files themselves fix a split.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    digest: str = ""
    given_split: tuple[Tensor, Tensor] | None = None


class Split(NamedTuple):
    """A data set, with the int64 indices of its training images and of its validation images."""

    dataset: DataSet
    train: Tensor
    val: Tensor


def images_digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of uint8 images (N, 3, H, W) and int64 labels (N,), in this order."""
    digest = hashlib.sha256(images.cpu().contiguous().numpy().data)
    digest.update(labels.cpu().numpy().data)
    return digest.hexdigest()


def load(data_dir: Path, split: str, specs: Specs = OFFICIAL) -> DataSet:
    """Read the `train` (5,000 images) or `test` (8,000 images) files; no others are touched, nothing is written.

    Raises MissingFiles if one is absent, RunError if one is not what `specs` says or cannot be read.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    image_file, label_file = (Path(data_dir) / FOLDER / f"{split}_{kind}.bin" for kind in "Xy")
    _require((image_file, label_file))
    labels = _labels(label_file, specs[label_file.name])
    pixels = torch.frombuffer(read_file(image_file, specs[image_file.name]), dtype=torch.uint8)
    if len(pixels) != len(labels) * IMAGE_BYTES:
        raise ValueError(f"specs disagree: {len(pixels)} bytes do not hold {len(labels)} images of 3x{SIDE}x{SIDE}")
    columns_first = pixels.view(-1, 3, SIDE, SIDE)
    return DataSet(columns_first.transpose(2, 3).contiguous(), labels, CLASSES)


def read_file(path: Path, spec: FileSpec) -> bytearray:
    """The content of `path`, if its size and MD5 are those of `spec`. Raises RunError if not, or if unreadable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RunError(f"{path} is not a file: move it away, or name another folder with --data-dir")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = bytearray(spec.bytes if size == spec.bytes else 0)
            complete = file.readinto(content) == spec.bytes
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason(error)}; name another folder with --data-dir") from error
    anew = "so that it is fetched again" if path.name.startswith("train") else "and put the official one there"
    way_out = f"delete it {anew}, or name another folder with --data-dir"
    if not complete:
        raise RunError(f"{path} has {size:,} bytes, expected {spec.bytes:,}: {way_out}")
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != spec.md5:
        raise RunError(f"{path} is damaged or a different file (MD5 {md5}, expected {spec.md5}): {way_out}")
    return content


def split_indices(labels: Tensor | Sequence[int], seed: int = 1337, val_fraction: float = 0.2) -> tuple[Tensor, Tensor]:
    """Stratified split of (N,) labels into (train, val): int64 indices, ascending; 400 + 100 per class on STL-10.

    The default seed gives the original project's 1,000 validation images. Its rule, kept exactly: the images of a class
    are called "{index}.bmp", sorted as strings and shuffled by a generator that starts afresh for every class; the
    first ones train, the rest validate. Each part gets at least one image of every class.

    Raises ValueError for a fraction outside (0, 1) or a class of fewer than two images.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, not {val_fraction}")
    members: dict[int, list[int]] = {}
    for index, label in enumerate(torch.as_tensor(labels).tolist()):
        members.setdefault(label, []).append(index)
    train, val = [], []
    for label, indices in members.items():
        if len(indices) < 2:
            raise ValueError(f"class {label} has only one image: a split into train and val needs two")
        indices.sort(key=lambda index: f"{index}.bmp")
        random.Random(seed).shuffle(indices)
        val_count = min(max(round(len(indices) * val_fraction), 1), len(indices) - 1)
        train += indices[:-val_count]
        val += indices[-val_count:]
    return _ascending(train), _ascending(val)


def tune_indices(labels: Tensor, train: Tensor, fold: int) -> tuple[Tensor, Tensor]:
    """Split the training images once more, to choose settings by: (train, val), int64, ascending indices.

    The members of each class in `train` are taken in ascending order, and every fifth one validates, starting at
    number `fold` (0 … TUNE_FOLDS - 1). So over all folds each training image validates once, and no others ever do.
    `labels`: of all images, int64 (N,). Raises ValueError for a fold out of range, or a class of fewer than five.
    """
    if not 0 <= fold < TUNE_FOLDS:
        raise ValueError(f"fold must lie between 0 and {TUNE_FOLDS - 1}, not {fold}")
    ordered = train.sort().values
    validates = torch.zeros(len(ordered), dtype=torch.bool)
    for label in labels[ordered].unique():
        places = (labels[ordered] == label).nonzero()[:, 0]
        if len(places) < TUNE_FOLDS:
            raise ValueError(f"class {label} has {len(places)} training images: {TUNE_FOLDS} folds need {TUNE_FOLDS}")
        validates[places[fold::TUNE_FOLDS]] = True
    return ordered[~validates], ordered[validates]


def balanced_indices(indices: Tensor, labels: Tensor, seed: Sequence[int]) -> Tensor:
    """Draw as many indices as are given, each class equally often, give or take one; `labels`: int64, of all images.

    Some or all images of a small class repeat, and some of a large one are left out; which ones depends on `seed`, a
    sequence of non-negative integers.
    """
    rng = np.random.default_rng((*seed, 1))  # a stream of its own, apart from the views of this seed
    classes = labels[indices].unique()
    drawn = []
    for number, label in enumerate(classes):
        members = indices[labels[indices] == label]
        count = (len(indices) + len(classes) - 1 - number) // len(classes)
        rounds = [members[torch.from_numpy(rng.permutation(len(members)))] for _ in range(-(-count // len(members)))]
        drawn.append(torch.cat(rounds)[:count])
    return torch.cat(drawn)


def fold_indices(data_dir: Path, fold: int, count: int, specs: Specs = OFFICIAL) -> tuple[Tensor, Tensor]:
    """Official fold `fold` (0 to 9) of `count` images: (train, val), int64, ascending; 1,000 train, 4,000 validate.

    Raises ValueError for a fold that the file lacks, RunError if the file is missing or not what `specs` says.
    """
    path = Path(data_dir) / FOLDER / FOLDS_FILE
    if _is_absent(path):
        raise RunError(
            f"the official folds need {path}, which is missing; it comes last in the archive and is not fetched: "
            f"unpack it with `tar xzf {FOLDER}.tar.gz {FOLDER}/{FOLDS_FILE}` and put it there"
        )
    lines = read_file(path, specs[FOLDS_FILE]).decode("ascii").splitlines()
    if not 0 <= fold < len(lines):
        raise ValueError(f"fold must lie between 0 and {len(lines) - 1}, not {fold}")
    train = {int(index) for index in lines[fold].split()}
    if not train <= set(range(count)):
        raise ValueError(f"fold {fold} names images beyond the {count} at hand")
    return _ascending(train), _ascending(set(range(count)) - train)


def _require(paths: Iterable[Path]) -> None:
    absent = [path for path in paths if _is_absent(path)]
    if absent:
        outer, name = absent[0].parent.parent.absolute(), absent[0].name
        if (outer / name).is_file():
            right = f"give --data-dir {outer.parent}" if outer.name == FOLDER else f"move the files to {outer / FOLDER}"
            raise RunError(f"{name} is in {outer} itself, but --data-dir names the folder above {FOLDER}/: {right}")
        names = " and ".join(path.name for path in absent)
        raise MissingFiles(
            f"{names} not found in {absent[0].parent}: name the folder that holds {FOLDER}/ with --data-dir, "
            "or try `train.py --demo`, which needs no files"
        )


def _is_absent(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # it may well be there: reading it will say what is wrong
    return False


def _labels(path: Path, spec: FileSpec) -> Tensor:
    labels = torch.frombuffer(read_file(path, spec), dtype=torch.uint8).long()
    low, high = labels.min().item(), labels.max().item()
    if low < 1 or high > len(CLASSES):
        raise RunError(f"{path} holds labels from {low} to {high}, expected 1 to {len(CLASSES)}: another data set?")
    return labels - 1


def _ascending(indices: Iterable[int]) -> Tensor:
    return torch.tensor(sorted(indices), dtype=torch.int64)
