"""Checkpoints: plain values and tensors, written whole or not at all, opened without running anything in them.

A run folder holds `last.pt` (the one point of commit: all that continues the run), `previous.pt` (the state one epoch
before, should `last.pt` be damaged) and `best.pt` (weights only, of the best validation accuracy).
"""

import io
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import RunError
from files import replacing
from model import ResNet, WideNet, build_model
from settings import Recipe

FORMAT = 1
# what values raise that are taken for a state, or put into a network, without being made for it
MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Damaged(RunError):
    """A file that is no whole checkpoint: a broken disk or copy, or never one at all."""


def save(path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint in place of an older one, which is kept as `keep`. Raises RunError where the disk refuses."""
    packed = io.BytesIO()  # torch's own writer to files does not say why a disk refuses
    torch.save({"format": FORMAT, **payload}, packed)
    with replacing(path, keep) as temporary:
        temporary.write_bytes(packed.getbuffer())


def commit(folder: Path, payload: dict[str, Any]) -> None:
    """Make `payload` the run's `last.pt` and the one before its `previous.pt`. At every moment one of both is whole."""
    save(folder / "last.pt", payload, keep=folder / "previous.pt")


def load(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check a checkpoint, of one kind (`run` or `weights`) if given; tensors arrive on the CPU.

    Raises Damaged where it is not whole, RunError where it is missing, foreign, from a newer version, or holds more
    than plain values: nothing in the file is ever run.
    """
    try:
        payload = _read(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise RunError(f"{path} was not opened: it holds more than plain values; do not trust its source") from error
    except Exception as error:  # zip and torch raise anything from KeyError to RuntimeError on foreign bytes
        raise Damaged(f"{path} is damaged, or no checkpoint at all ({first_words(error)})") from error
    if not isinstance(payload, dict) or not isinstance(payload.get("format"), int) or "recipe" not in payload:
        raise RunError(f"{path} is not a checkpoint of this project")
    if payload["format"] > FORMAT:
        raise RunError(f"{path} has format {payload['format']}, this version reads up to {FORMAT}; use a newer version")
    if kind is not None and payload.get("kind") != kind:
        raise RunError(f"{path} holds {payload.get('kind')!r}, not {kind!r}")
    return payload


def _read(path: Path) -> Any:
    """Torch is given a copy of what has the right checksum: it looks at none, and trusts the archive's directory."""
    checked = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            copy.writestr(member.filename, archive.read(member))
    checked.seek(0)
    return torch.load(checked, map_location="cpu", weights_only=True)


def first_words(error: Exception) -> str:
    """What an exception says, on one line of bearable length."""
    words = " ".join(str(error).split())
    return words if len(words) <= 200 else words[:200] + " …"


def resume(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The state to continue from, None in a fresh folder, and a warning where `last.pt` was damaged.

    Raises Damaged where no state is whole, RunError where it is unusable for another reason.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    if not last.exists():  # a fresh folder, or killed between the two renames of a commit
        return (load(previous, "run") if previous.exists() else None), None
    try:
        return load(last, "run"), None
    except Damaged as error:
        if not previous.exists():
            raise
        try:
            payload = load(previous, "run")
        except RunError as also:
            raise Damaged(f"{error}, and {also}") from also
        os.replace(previous, last)  # or the next commit would keep the damaged file as previous.pt
        return payload, f"{error}; continuing from the state before it (previous.pt)"


@dataclass(frozen=True)
class Trained:
    """A network read from a checkpoint, with what its user needs to know."""

    file: Path
    model: ResNet | WideNet
    recipe: Recipe
    classes: tuple[str, ...]
    images: dict[str, Any]  # how many trained and validated, and the digest of a set of one's own
    eval_size: int
    epoch: int
    val_accuracy: float | None  # by which this epoch was chosen as the run's best; None for the last one

    @property
    def selected(self) -> bool:
        """Whether it is the best epoch's by validation accuracy, not the last one's."""
        return self.val_accuracy is not None


def weights_file(path: Path, last: bool = False) -> Path:
    """The checkpoint that `path` names: itself, or of a run folder its best (unless `last`), last or previous one."""
    if not path.is_dir():
        return path
    names = ("last.pt", "previous.pt") if last else ("best.pt", "last.pt", "previous.pt")
    return path / next((name for name in names if (path / name).exists()), names[0])


def load_network(path: Path) -> Trained:
    """The network of a checkpoint of either kind, or of a run folder (its `best.pt`, else its `last.pt`), on the CPU.

    Where the run kept an average of the weights, that is what comes. Raises RunError.
    """
    path = weights_file(path)
    payload = load(path)
    try:
        recipe = Recipe.from_dict(payload["recipe"])
        classes = tuple(payload["classes"])
        model = network(recipe, len(classes))
        model.load_state_dict(payload.get("average") or payload["model"])
        model.to(memory_format=torch.channels_last).eval()
        size, epoch, accuracy = int(payload["eval_size"]), int(payload["epoch"]), payload.get("val_accuracy")
        return Trained(path, model, recipe, classes, payload["images"], size, epoch, accuracy)
    except MISFITS as error:
        raise RunError(f"{path} does not fit this version's network: {first_words(error)}") from error


def network(recipe: Recipe, classes: int) -> ResNet | WideNet:
    """The network that a recipe describes. Raises ValueError where it is over the recipe's parameter budget."""
    least = sum(9 * blocks * width**2 for blocks, width in zip(recipe.layers, recipe.planes, strict=True))
    if least > recipe.budget:  # in the 3×3 convolutions alone; said before any memory is asked for
        raise ValueError(f"the network has over {least:,} parameters, more than the budget of {recipe.budget:,}")
    own = {}  # what only one of the networks has
    if recipe.network == "wide":
        own = {"cosine_stem": recipe.cosine_stem, "last_pool": recipe.last_pool}
    return build_model(
        recipe.layers,
        kind=recipe.network,
        budget=recipe.budget,
        planes=recipe.planes,
        num_classes=classes,
        zero_init_residual=recipe.zero_init_residual,
        **own,
    )
