"""A run's images: STL-10's, the demo's, or a folder of the user's own; which train and which validate."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
from data import DataSet, Split
from harness import demo_shapes, download, picture_folder
from harness.checkpoint import TrainedNetwork
from harness.cli import Runtime
from harness.errors import RunError
from recipes import DEMO, Recipe


class Source(NamedTuple):
    """Where images are: in `data_dir`, or in the picture folder `images` if one is given."""

    data_dir: Path
    images: Path | None


def load_images(recipe: Recipe, data_dir: Path, images: Path | None = None, *, fetch: bool = True) -> Split:
    """A recipe's images, those that train and those that validate (none with train_on all).

    They come from the folder `images` if one is given, else from `data_dir`; with `fetch`, official files that are
    missing there are fetched first. Raises RunError.
    """
    dataset = _read(recipe, data_dir, images, fetch)
    return Split(dataset, *split_by(recipe, dataset, data_dir))


def _read(recipe: Recipe, data_dir: Path, images: Path | None, fetch: bool) -> DataSet:
    """All training and validation images."""
    if images is not None:
        return picture_folder.load(images, recipe.image_size)
    if recipe.name == DEMO.name:
        return demo_shapes.load("train")
    try:
        return data.load(data_dir, "train")
    except data.MissingFiles as missing:
        if not fetch:
            raise
        print(missing)
        download.fetch(data_dir)
        return data.load(data_dir, "train")


def split_by(recipe: Recipe, dataset: DataSet, data_dir: Path) -> tuple[Tensor, Tensor]:
    """The int64 indices of a data set's images that train under a recipe, and of those that validate.

    The file of the official folds is looked for in `data_dir`. Raises RunError.
    """
    count = len(dataset.labels)
    if recipe.train_on == "all":
        return torch.arange(count), torch.arange(0)
    if dataset.given_split is not None:
        train, val = dataset.given_split
    elif recipe.fold is not None and not dataset.digest:  # the folds are of STL-10's images, not of a user's own
        return data.fold_indices(data_dir, recipe.fold, count)
    else:
        _require_per_class(2, dataset, torch.arange(count), "a split into train and val needs two or more")
        train, val = data.split_indices(dataset.labels, recipe.split_seed, recipe.val_fraction)
    if recipe.tune_fold is None:
        return train, val
    _require_per_class(data.TUNE_FOLDS, dataset, train, "--tune-fold needs five or more of a class to train on")
    return data.tune_indices(dataset.labels, train, recipe.tune_fold)


def _require_per_class(least: int, dataset: DataSet, indices: Tensor, need: str) -> None:
    """Raise a RunError that names a class with fewer than `least` of the images `indices`."""
    counts = dataset.labels[indices].bincount(minlength=len(dataset.classes)).tolist()
    for name, count in zip(dataset.classes, counts, strict=True):
        if count < least:
            pictures = "only one picture" if count == 1 else f"only {count} pictures"
            raise RunError(f"class {name} has {pictures}; {need}")


def load_test_images(trained: TrainedNetwork, source: Source) -> DataSet:
    """The test images for a trained network: the official files', the demo's, or those of `source.images`/test.

    Nothing is fetched. Raises RunError if there are none, if they have other classes, and where the pictures beside
    them are not those that the network was trained with, since it may then have learnt some that are in test today.
    """
    _require_folder(trained, source)
    if source.images is not None:
        dataset, others = picture_folder.load_test(source.images, trained.recipe.image_size)
        if others and "digest" in trained.images:
            known = fingerprint(Split(others, *split_by(trained.recipe, others, source.data_dir)))
            if known != trained.images:
                raise RunError(
                    f"the pictures in {source.images} are not those that this network was trained with, so it may have "
                    "learnt some of test; name the right folder with --images, or one that holds only test"
                )
    elif trained.recipe.name == DEMO.name:
        dataset = demo_shapes.load("test")
    else:
        dataset = data.load(source.data_dir, "test")
    if dataset.classes != trained.classes:
        raise RunError(
            f"the test images in {source.images or source.data_dir} have the classes {', '.join(dataset.classes)}, "
            f"but the network has {', '.join(trained.classes)}; name their folder with --images"
        )
    return dataset


def recorded_source(path: Path, data_dir: Path | None = None, images: Path | None = None) -> Source:
    """Where the images of a checkpoint or run folder are: as the user says, else as its `config.json` says.

    Without such a file, or where the data folder that it names is gone, it is where `train.py` looks by default; a
    picture folder that is gone counts as none. A `data_dir` from the user means no picture folder.
    """
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        runtime = json.loads(config.read_text(encoding="utf-8"))["runtime"]
        recorded = Source(Path(runtime["data_dir"]), Path(runtime["images"]) if runtime.get("images") else None)
        if not os.path.isdir(recorded.data_dir):  # copied here from another machine: its paths are not ours
            recorded = recorded._replace(data_dir=Runtime.data_dir)
        if recorded.images and not os.path.isdir(recorded.images):
            recorded = recorded._replace(images=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        recorded = Source(Runtime.data_dir, None)
    return Source(data_dir or recorded.data_dir, images or (None if data_dir else recorded.images))


def fingerprint(split: Split) -> dict[str, int | str]:
    """What a checkpoint keeps to recognise its images: how many train and validate, and the digest of a user's own."""
    digest = {"digest": split.dataset.digest} if split.dataset.digest else {}
    return {"train": len(split.train), "val": len(split.val)} | digest


def _require_folder(trained: TrainedNetwork, source: Source) -> None:
    if source.images is None and "digest" in trained.images:
        raise RunError("this network was trained with a folder of pictures; name it with --images")


def load_for_network(trained: TrainedNetwork, source: Source, *, fetch: bool) -> Split:
    """`load_images` for a trained network. Raises RunError if it was trained with other images.

    With other images the split would differ too, and the network would be validated on images that it has learnt.
    """
    _require_folder(trained, source)
    if source.images is not None and "digest" not in trained.images:
        raise RunError(
            f"{trained.file} was not trained with a folder of pictures, so it has no validation images in "
            f"{source.images}; evaluate.py --split test scores it on class folders in {source.images / 'test'}"
        )
    split = load_images(trained.recipe, *source, fetch=fetch)
    if split.dataset.classes != trained.classes or fingerprint(split) != trained.images:
        raise RunError(
            f"{source.images or source.data_dir} does not hold the images that this network was trained with; "
            f"name the right folder with {'--images' if source.images else '--data-dir'}"
        )
    return split
