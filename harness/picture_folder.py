"""A data set of one's own: a folder of pictures for each class, brought to squares once and locked as one tensor.

`DIR/CLASS/…` is split by the recipe; `DIR/train/CLASS/…` and `DIR/val/CLASS/…` are taken as they are, and
`DIR/test/CLASS/…` may stand beside them. The squares are kept in a hidden file beside the class folders, and made anew
when a picture's name, size or time of change is no longer what it was.
"""

import contextlib
import hashlib
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import DataSet
from harness import picture_file
from harness.errors import RunError, reason
from harness.files import atomic_write

VERSION = 1  # of what `picture_file.open_square` gives: squares kept by another version are made anew
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


class Listing(NamedTuple):
    """The pictures below a folder of class folders, class after class; `labels` int64 (N,)."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[Path]
    labels: Tensor


def load(folder: Path, size: int) -> tuple[DataSet, tuple[Tensor, Tensor] | None]:
    """All pictures of a folder at `size` px, and (train, val) indices, int64, where the folder itself splits them.

    Prints a line on what is left out. Raises RunError for fewer than two classes, a class without pictures, a file
    that cannot be opened, and a picture that is there under two classes or in both train and val.
    """
    names = ("train", "val") if _is_split(folder) else (".",)
    listings = [_list(folder / name) for name in names]
    one_sided = set(listings[0].classes) ^ set(listings[-1].classes)
    if one_sided:
        raise RunError(f"class {min(one_sided)} is in only one of {folder / 'train'} and {folder / 'val'}")
    images = torch.cat([_squares(listing, size) for listing in listings])
    labels = torch.cat([listing.labels for listing in listings])
    part = torch.arange(len(names)).repeat_interleave(torch.tensor([len(listing.paths) for listing in listings]))
    kept = _distinct(images, labels, part, [path for listing in listings for path in listing.paths])
    images, labels, part = images[kept], labels[kept], part[kept]
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().data)
    split = tuple((part == number).nonzero()[:, 0] for number in (0, 1)) if len(names) == 2 else None
    return DataSet(images, labels, listings[0].classes, digest.hexdigest()), split


def load_test(folder: Path, size: int) -> DataSet:
    """The pictures of `folder`/test at `size` px.

    Raises RunError as `load` does, where there is no such folder, and for a picture that is in train or val too.
    """
    listing = _list(folder / "test")
    images = _squares(listing, size)
    known = set(_digests(load(folder, size)[0].images)) if _is_split(folder) else set()
    for path, digest in zip(listing.paths, _digests(images), strict=True):
        if digest in known:
            raise RunError(f"{path} is one picture with one in train or val; take it out of test")
    return DataSet(images, listing.labels, listing.classes)


def _is_split(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in ("train", "val"))


def _list(folder: Path) -> Listing:
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise RunError(f"cannot read the folder {folder}: {reason(error)}") from error
    folders = [path for path in entries if path.is_dir()]
    classes = tuple(path.name for path in folders)
    for path in folders:
        if path.name in SPLIT_NAMES and any(below.is_dir() for below in path.glob("[!.]*")):
            raise RunError(f"{path} holds folders itself: a split as given takes train and val, by these names")
    if len(classes) < 2:
        found = f"one class only ({classes[0]})" if classes else "no class folders"
        raise RunError(f"{folder} holds {found}; it takes a folder of pictures for each of two or more classes")
    members = [picture_file.find(path) for path in folders]
    for name, paths in zip(classes, members, strict=True):
        if not paths:
            raise RunError(f"class {name} has no pictures: {folder / name} holds no file of a known kind")
    others = [
        path for path in folder.rglob("[!.]*") if path.is_file() and path.suffix.lower() not in picture_file.SUFFIXES
    ]
    if others:
        print(f"{folder}: {len(others)} file(s) passed over, not pictures by their names ({min(others)} …)")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(paths) for paths in members]))
    return Listing(folder, classes, [path for paths in members for path in paths], labels)


def _squares(listing: Listing, size: int) -> Tensor:
    """The listed pictures as uint8 (N, 3, size, size), from the file that keeps them if it is of these very files."""
    kept = listing.folder / f".squares-{size}px.npz"
    fingerprint = _fingerprint(listing, size)
    # A damaged file raises anything from OSError to NotImplementedError, and is made anew like one that is not there.
    with contextlib.suppress(Exception), np.load(kept) as archive:  # a zip file, read with its checksums
        if str(archive["fingerprint"]) == fingerprint:
            return torch.from_numpy(archive["images"])
    images = _open(listing.paths, size)
    try:
        with atomic_write(kept) as temporary, open(temporary, "wb") as file:
            np.savez(file, fingerprint=np.array(fingerprint), images=images.numpy())
    except RunError as error:
        print(f"the pictures will be opened anew each time, as their squares cannot be kept: {error}")
    return images


def _fingerprint(listing: Listing, size: int) -> str:
    status = [(path, path.stat()) for path in listing.paths]
    files = [(path.relative_to(listing.folder).as_posix(), s.st_size, s.st_mtime_ns) for path, s in status]
    return hashlib.sha256(json.dumps([VERSION, size, files]).encode()).hexdigest()


def _open(paths: list[Path], size: int) -> Tensor:
    """Open the pictures on as many threads as PyTorch uses. Raises RunError that names the first that is broken."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    broken: list[RunError] = []

    def read(index: int) -> None:
        try:
            images[index] = picture_file.open_square(paths[index], size)
        except RunError as error:
            broken.append(error)

    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # open_square sets these two as well, but threads undo each other's filters
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        list(tqdm(pool.map(read, range(len(paths))), "opening pictures", len(paths), leave=False, disable=None))
    if broken:
        more = f", and so with {len(broken) - 1} more" if len(broken) > 1 else ""
        raise RunError(f"{min(map(str, broken))}{more}; repair it or take it out of the folder")
    return images


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.sha256(image.data).digest() for image in images.numpy()]


def _distinct(images: Tensor, labels: Tensor, part: Tensor, paths: list[Path]) -> Tensor:
    """Indices of the pictures without repetitions within a class and part; any other repetition raises RunError."""
    first: dict[bytes, int] = {}
    repeated = []
    for index, digest in enumerate(_digests(images)):
        other = first.setdefault(digest, index)
        if labels[other] != labels[index] or part[other] != part[index]:
            where = "train and val" if part[other] != part[index] else "two classes"
            raise RunError(f"{paths[other]} and {paths[index]} are one picture in {where}; take it out of one of them")
        if other != index:
            repeated.append(index)
    if repeated:
        print(f"{len(repeated)} picture(s) passed over that are there twice in a class ({paths[repeated[0]]} …)")
    kept = torch.ones(len(paths), dtype=torch.bool)
    kept[repeated] = False
    return kept.nonzero()[:, 0]
