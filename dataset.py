"""Which images a run is about: STL-10's, the demo's, or a folder of one's own; and which of them train and validate."""

import json
from pathlib import Path

import torch
from torch import Tensor

import data
import demo
import download
import folder
from checkpoint import Trained
from data import DataSet
from errors import RunError
from settings import Recipe, Runtime


def load(
    recipe: Recipe, data_dir: Path, images: Path | None = None, *, fetch: bool = True
) -> tuple[DataSet, Tensor, Tensor]:
    """A recipe's images, and the int64 indices of those to train on and to validate on (none with train_on all).

    They come from the folder `images` where one is given, else from `data_dir`; official files that are missing there
    are fetched first, with `fetch`. Raises RunError.
    """
    found, parts = _read(recipe, data_dir, images, fetch)
    count = len(found.labels)
    if recipe.train_on == "all":
        return found, torch.arange(count), torch.arange(0)
    if parts is None and recipe.fold is not None:
        parts = data.fold_indices(data_dir, recipe.fold, count)
    if parts is None:
        for name, images_of_class in zip(found.classes, found.labels.bincount().tolist(), strict=True):
            if images_of_class < 2:
                raise RunError(f"class {name} has one picture only; a split into train and val needs two or more")
        parts = data.split_indices(found.labels, recipe.split_seed, recipe.val_fraction)
    return found, *parts


def _read(
    recipe: Recipe, data_dir: Path, images: Path | None, fetch: bool
) -> tuple[DataSet, tuple[Tensor, Tensor] | None]:
    """All training and validation images, and the split where the files themselves state one."""
    if images is not None:
        return folder.load(images, recipe.image_size)
    if recipe.name == "demo":
        return data.load(data_dir / "demo", "train", demo.make(data_dir / "demo"), demo.DEMO_CLASSES), None
    try:
        return data.load(data_dir, "train"), None
    except data.MissingFiles as missing:
        if not fetch:
            raise
        print(missing)
        download.fetch(data_dir)
        return data.load(data_dir, "train"), None


def load_test(trained: Trained, data_dir: Path, images: Path | None = None) -> DataSet:
    """The test images for a trained network: the official files', the demo's, or those of `images`/test.

    Nothing is fetched. Raises RunError where there are none, or where they have other classes.
    """
    if images is not None:
        found = folder.load_test(images, trained.recipe.image_size)
    elif trained.recipe.name == "demo":
        found = data.load(data_dir / "demo", "test", demo.make(data_dir / "demo"), demo.DEMO_CLASSES)
    else:
        found = data.load(data_dir, "test")
    if found.classes != trained.classes:
        raise RunError(
            f"the test images in {images or data_dir} have the classes {', '.join(found.classes)}, "
            f"the network {', '.join(trained.classes)}; name their folder with --images"
        )
    return found


def places(path: Path) -> tuple[Path, Path | None]:
    """Where the run of a checkpoint or run folder found its images, as its `config.json` says: (data_dir, images).

    Without such a file it is what `train.py` takes by default.
    """
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        runtime = json.loads(config.read_text(encoding="utf-8"))["runtime"]
        images = runtime.get("images")
        return Path(runtime["data_dir"]), Path(images) if images else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Runtime.data_dir, None


def identity(found: DataSet, train: Tensor, val: Tensor) -> dict[str, int | str]:
    """What a checkpoint keeps to know its images again: how many train and validate, and the digest of one's own."""
    return {"train": len(train), "val": len(val)} | ({"digest": found.digest} if found.digest else {})


def of_trained(trained: Trained, data_dir: Path, images: Path | None = None) -> tuple[DataSet, Tensor, Tensor]:
    """`load`, without fetching, for a trained network. Raises RunError where it was trained with other images.

    With others the split would be another one too, and images that the network has learnt would validate it.
    """
    if images is None and "digest" in trained.images:
        raise RunError("this network was trained with pictures of one's own; name their folder with --images")
    found, train, val = load(trained.recipe, data_dir, images, fetch=False)
    if found.classes != trained.classes or identity(found, train, val) != trained.images:
        raise RunError(
            f"{images or data_dir} does not hold the images that this network was trained with; "
            f"name the right folder with {'--images' if images else '--data-dir'}"
        )
    return found, train, val
