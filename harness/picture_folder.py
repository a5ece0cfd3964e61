"""The user's own data set: a folder of pictures for each class, made into squares once and loaded as one tensor.

`DIR/CLASS/…` is split by the recipe; a split that the folder itself states is taken as is (see picture_split). What
is read and what is passed over: docs/PICTURES.md.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import DataSet, images_digest
from harness import files, picture_cache, picture_search, picture_split
from harness.errors import RunError, reason
from harness.picture_search import PassedOver, named_in_full
from harness.picture_split import visible_name
from harness.text import listed, printable

ALMOST_BLACK = 16  # of 255: every picture that a person can make out reaches it
SHOWN_CLASSES = 12


class Listing(NamedTuple):
    """The pictures below a folder of class folders, class by class; `labels` int64 (N,)."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[Path]
    labels: Tensor


def load(folder: Path, size: int) -> DataSet:
    """All pictures of a folder at `size` px; `given_split` is set where the folder itself splits them.

    Prints what is passed over, and what is odd. Raises RunError for fewer than two classes, a class without pictures,
    a file that cannot be opened, and a picture that is in two classes or in both train and val.
    """
    passed = PassedOver()
    layout = picture_split.find_layout(folder, passed)
    if layout.train is None:
        raise RunError(f"{printable(folder)} holds no folder named train with class folders in it")
    if layout.train != folder:
        parts = {name: part.relative_to(folder) for name, part in layout._asdict().items() if part}
        parts.setdefault("val", "drawn from train")
        print(f"{printable(folder)}: " + ", ".join(f"{name} is {printable(part)}" for name, part in parts.items()))
    listings = [_list(part, passed) for part in (layout.train, layout.val) if part]
    for line in passed.lines(folder):
        print(line)
    return _read(listings, size, announce=True)


def load_test(folder: Path, size: int) -> tuple[DataSet, DataSet | None]:
    """The pictures of a folder's part named test at `size` px, and those of its other parts if there are any.

    Raises RunError as `load` does, and also if there is no such part, or a picture in it is in train or val too.
    """
    passed = PassedOver()
    layout = picture_split.find_layout(folder, passed)
    if layout.test is None:
        _look_into(folder, PassedOver())  # or say why it cannot be read
        raise RunError(f"{printable(folder)} holds no folder named test with class folders in it")
    listing = _list(layout.test, passed)
    for line in passed.lines(folder):
        print(line)
    images = picture_cache.squares(listing.folder, listing.paths, size)
    kept = _distinct(images, listing.labels, torch.zeros_like(listing.labels), listing.paths, announce=True)
    test = DataSet(images[kept], listing.labels[kept], listing.classes)
    parts = [_list(part, PassedOver()) for part in (layout.train, layout.val) if part]
    if not parts:
        return test, None
    others = _read(parts, size, announce=False)
    known = set(_digests(others.images))
    leaks = [printable(path) for path, digest in zip(listing.paths, _digests(images), strict=True) if digest in known]
    if leaks:
        are, them = ("is", "it") if len(leaks) == 1 else ("are", "them")
        raise RunError(f"{named_in_full(leaks)} {are} in train or val too, pixel for pixel; take {them} out of test")
    return test, others


def _look_into(folder: Path, passed: PassedOver) -> tuple[list[Path], list[Path]]:
    try:
        return picture_search.look_into(folder, passed)
    except OSError as error:
        raise RunError(f"cannot read the folder {printable(folder)}: {reason(error)}") from error


def _list(folder: Path, passed: PassedOver) -> Listing:
    folders, loose = _look_into(folder, passed)
    for path in loose:
        passed.add(picture_search.OUTSIDE, path)
    members: dict[str, list[Path]] = {}
    for path in folders:
        members.setdefault(visible_name(path), []).append(path)
    classes = tuple(sorted(members))
    if len(classes) < 2:
        found = f"only one class ({classes[0]})" if classes else "no class folders"
        found += f" but {len(loose):,} loose pictures" if loose and not classes else ""
        raise RunError(
            f"{printable(folder)} holds {found}; it needs a folder of pictures for each of two or more classes"
        )
    pictures = [_pictures_of(name, members[name], passed) for name in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(paths) for paths in pictures]))
    return Listing(folder, classes, [path for paths in pictures for path in paths], labels)


def _pictures_of(name: str, folders: list[Path], passed: PassedOver) -> list[Path]:
    """The pictures of a class, in its folder, or in two whose names look the same."""
    if len(folders) > 1:
        print(
            f"class {name}: the names of {len(folders)} folders look the same (composed and decomposed); taken as one"
        )
    inside = PassedOver()
    above = [files.identity(folders[0].parent)]
    pictures = [path for folder in folders for path in picture_search.find(folder, inside, above)]
    if not pictures:
        why = "".join(f"; {len(paths)} passed over: {why}" for why, paths in inside.paths.items())
        raise RunError(f"class {name} has no pictures: {printable(folders[0])} holds no file of a known kind{why}")
    passed.update(inside)
    return pictures


def _read(listings: list[Listing], size: int, announce: bool) -> DataSet:
    """The pictures of one listing, or of train's and val's; what is odd is printed if `announce`."""
    first, last = listings[0], listings[-1]
    one_sided = sorted(set(first.classes) ^ set(last.classes))
    if one_sided:
        where = first if one_sided[0] in first.classes else last
        raise RunError(
            f"class {one_sided[0]} is in only one of {printable(first.folder)} and {printable(last.folder)}: "
            f"in {where.folder.name}" + (f"; so are {len(one_sided) - 1} more" if len(one_sided) > 1 else "")
        )
    squares, broken = [], []
    for listing in listings:
        try:
            squares.append(picture_cache.squares(listing.folder, listing.paths, size))
        except RunError as error:  # the next part is opened anyway, so that everything is known and kept
            broken.append(str(error))
    if broken:
        raise RunError("; ".join(broken))
    images = torch.cat(squares) if len(squares) > 1 else squares[0]  # a copy of a large folder is worth avoiding
    squares.clear()  # the parts are held by images now
    labels = torch.cat([listing.labels for listing in listings])
    paths = [path for listing in listings for path in listing.paths]
    part = torch.arange(len(listings)).repeat_interleave(torch.tensor([len(listing.paths) for listing in listings]))
    kept = _distinct(images, labels, part, paths, announce)
    if announce:
        _name_the_dark(images, paths)
    if len(kept) < len(images):
        images, labels, part = images[kept], labels[kept], part[kept]
    split = tuple((part == number).nonzero()[:, 0] for number in (0, 1)) if len(listings) == 2 else None
    return DataSet(images, labels, first.classes, images_digest(images, labels), split)


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.sha256(image.data).digest() for image in images.numpy()]


def _distinct(images: Tensor, labels: Tensor, part: Tensor, paths: list[Path], announce: bool) -> Tensor:
    """Indices of the pictures without repetitions within a class and part; any other repetition raises RunError."""
    first: dict[bytes, int] = {}
    repeated, contradictions = [], []
    classes, parts = labels.tolist(), part.tolist()
    for index, digest in enumerate(_digests(images)):
        other = first.setdefault(digest, index)
        if other == index:
            continue
        if (classes[other], parts[other]) == (classes[index], parts[index]):
            repeated.append(index)
        else:
            where = "train and val" if parts[other] != parts[index] else "two classes"
            contradictions.append(
                f"{printable(paths[other])} and {printable(paths[index])} are the same picture in {where}"
            )
    if contradictions:
        raise RunError(f"{named_in_full(contradictions)}; take each out of one of them")
    if repeated and announce:
        where = listed([printable(paths[index]) for index in repeated])
        print(f"{len(repeated)} picture(s) passed over that are in a class twice: {where}")
    kept = torch.ones(len(paths), dtype=torch.bool)
    kept[repeated] = False
    return kept.nonzero()[:, 0]


def _name_the_dark(images: Tensor, paths: list[Path]) -> None:
    """Pictures with fewer grey levels than their file has room for, such as 12 bits in 16, arrive almost black."""
    dark = (images.flatten(1).amax(1) < ALMOST_BLACK).nonzero()[:, 0].tolist()
    if dark:
        names = named_in_full([printable(paths[index]) for index in dark])
        print(
            f"{len(dark)} picture(s) are almost black, with no value above {ALMOST_BLACK - 1} of 255 ({names}): "
            "if they should not be, scale their values to the range of their files"
        )


def summary(classes: tuple[str, ...], labels: Tensor, train: Tensor, val: Tensor) -> str:
    """What a run found: classes, and how many pictures of each train and validate."""
    counts = [labels[part].bincount(minlength=len(classes)).tolist() for part in (train, val)]
    each = [f"{name} {n:,} + {m:,}" for name, n, m in zip(classes, *counts, strict=True)]
    if len(each) > SHOWN_CLASSES:
        low, high = min(counts[0]), max(counts[0])
        each = [*each[:SHOWN_CLASSES], f"… ({low:,} to {high:,} train)"]
    return f"{len(classes):,} classes; {len(train):,} train + {len(val):,} val pictures: {', '.join(each)}"
