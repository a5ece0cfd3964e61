"""Checkpoints: plain values and tensors, written whole or not at all, opened without running anything in them.

A run folder holds `last.pt` (the only commit point: all that a run needs to continue), `previous.pt` (the state one
epoch before, should `last.pt` be damaged), and weights alone: `best.pt`, from the epoch with the best validation
accuracy, and `stage1.pt` …, from the end of each stage but the last.

All hold `format`, `kind` (run or weights), `recipe`, `classes`, `images`, `eval_size`, `epoch` and the network's
weights as `model`; weights alone also hold the `val_accuracy` that selected them. A run also holds `precision`,
`processes`, `notes`, its `rows`, and the trainer's state: `average`, `averaged` (updates of it), `optimizer`,
`schedule`, `scaler`.
"""

import contextlib
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from harness.errors import RunError, is_out_of_memory, reason
from harness.files import atomic_write, rename
from model import ResNet, WideNet
from recipes import Recipe, UnknownSettings, build_network

FORMAT = 2  # format 1, which is read too, had other names for two settings (see recipes.OLD_NAMES)
WEIGHTS = ("best.pt", "stage[0-9].pt")
# exceptions raised when a readable file holds values that do not fit this state or network
MISMATCH_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Damaged(RunError):
    """A file that is not a whole checkpoint: a broken disk or copy, or never one at all."""


def save(path: Path, payload: dict[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint in place of an older one, which is kept as `keep`. Raises RunError where the disk refuses."""
    packed = io.BytesIO()  # torch's own writer to files does not say why a disk refuses
    torch.save({"format": FORMAT, **payload}, packed)
    with atomic_write(path, keep) as temporary:
        temporary.write_bytes(packed.getbuffer())


def commit(folder: Path, payload: dict[str, Any]) -> None:
    """Make `payload` the run's `last.pt`, and the old `last.pt` its `previous.pt`. One of them is always whole."""
    save(folder / "last.pt", payload, keep=folder / "previous.pt")


def save_weights(path: Path, state: dict[str, Any], val_accuracy: float | None = None) -> None:
    """Write only the weights of a run's state: those that are scored.

    `val_accuracy`: the accuracy that made this epoch the best, None if it was not.
    """
    weights = {key: state[key] for key in ("recipe", "classes", "images", "eval_size", "epoch")}
    model = state["average"] or state["model"]
    save(path, {"kind": "weights", **weights, "val_accuracy": val_accuracy, "model": model})


def load(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check a checkpoint, of one kind (`run` or `weights`) if given; tensors arrive on the CPU.

    Raises Damaged if it is not whole, RunError if it is missing, foreign, from a newer version, or holds more
    than plain values: nothing in the file is ever run. An out-of-memory error passes unchanged.
    """
    return _load(path, kind)[0]


def _load(path: Path, kind: str | None = None) -> tuple[dict[str, Any], str]:
    """What `load` returns, and the SHA-256 of the file that it was read from."""
    try:
        with open(path, "rb") as file:  # still the same file if a run in progress replaces it
            payload = _read(file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason(error)}") from error
    except pickle.UnpicklingError as error:
        raise RunError(f"{path} was not opened: it holds more than plain values; do not trust its source") from error
    except Exception as error:  # zip and torch raise anything from KeyError to RuntimeError on foreign bytes
        if is_out_of_memory(error):  # which says nothing about the file
            raise
        raise Damaged(f"{path} is damaged, or not a checkpoint at all ({first_words(error)})") from error
    if not isinstance(payload, dict) or not isinstance(payload.get("format"), int) or "recipe" not in payload:
        raise RunError(f"{path} is not a checkpoint of this project")
    if payload["format"] > FORMAT:
        raise RunError(f"{path} has format {payload['format']}, this version reads up to {FORMAT}; use a newer version")
    if kind is not None and payload.get("kind") != kind:
        raise RunError(f"{path} holds {payload.get('kind')!r}, not {kind!r}")
    return payload, digest


def _read(file: BinaryIO) -> Any:
    """Give torch a copy with verified checksums: it checks none itself, and trusts the archive's directory."""
    checked, size = io.BytesIO(), os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(checked, "w") as copy:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            if member.file_size > size:  # as much memory is allocated as it says
                raise ValueError(f"{member.filename} is longer than the file")
            copy.writestr(member.filename, archive.read(member))
    checked.seek(0)
    return torch.load(checked, map_location="cpu", weights_only=True)


def first_words(error: Exception) -> str:
    """What an exception says, on one line of reasonable length."""
    words = " ".join(str(error).split())
    return words if len(words) <= 200 else words[:200] + " …"


def resume(folder: Path) -> tuple[dict[str, Any] | None, Damaged | None]:
    """The state to continue from, None in a fresh folder, and what is wrong with `last.pt` where it is `previous.pt`'s.

    Nothing is changed: see `go_back`. Raises Damaged where no state is whole, RunError where it is unusable for another
    reason.
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
            return load(previous, "run"), error
        except RunError as also:
            raise Damaged(f"{error}, and {also}") from also


def go_back(folder: Path, state: dict[str, Any], damage: Damaged) -> str:
    """Replace the damaged `last.pt` with `previous.pt`, which holds `state`; return what that means, as a sentence."""
    lost = _remove_weights_after(folder, state["epoch"])
    rename(folder / "previous.pt", folder / "last.pt")  # or the next commit would keep the damaged one as previous.pt
    without = f", without {' and '.join(lost)} from the lost epoch" if lost else ""
    return f"{damage}; continuing from the state before it (previous.pt){without}"


def _remove_weights_after(folder: Path, epoch: int) -> list[str]:
    """Remove a run's weights-only files from later epochs, and return their names."""
    removed = []
    for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
        with contextlib.suppress(RunError, *MISMATCH_ERRORS):
            if load(path, "weights")["epoch"] > epoch:
                path.unlink()
                removed.append(path.name)
    return removed


@contextlib.contextmanager
def mismatch_reported(source: Path | str) -> Iterator[None]:
    """Raise RunError if the block fails because the values of the checkpoint `source` do not fit what takes them."""
    try:
        yield
    except UnknownSettings as error:
        raise RunError(f"{source} has {error}") from error
    except MISMATCH_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"{source} does not fit this network: {first_words(error)}") from error


@dataclass(frozen=True)
class TrainedNetwork:
    """A network read from a checkpoint, with what its user needs to know."""

    file: Path
    model: ResNet | WideNet
    recipe: Recipe
    classes: tuple[str, ...]
    images: dict[str, Any]  # how many trained and validated, and the digest of the user's own
    eval_size: int
    epoch: int
    val_accuracy: float | None  # the one that made this epoch the run's best; None if it was not
    sha256: str  # of the file as it was read: a run in progress replaces it

    @property
    def selected(self) -> bool:
        """Whether it is from the best epoch by validation accuracy, not from the last."""
        return self.val_accuracy is not None

    def state(self) -> dict[str, Any]:
        """What `save_weights` takes."""
        return {
            "recipe": self.recipe.as_dict(),
            "classes": list(self.classes),
            "images": self.images,
            "eval_size": self.eval_size,
            "epoch": self.epoch,
            "average": None,
            "model": self.model.state_dict(),
        }


def weights_file(path: Path, best: bool = False) -> Path:
    """The checkpoint that `path` names: itself, or a run folder's last one (with `best`, its best one)."""
    if not path.is_dir():
        return path
    names = ("best.pt",) if best else ("last.pt", "previous.pt", "best.pt")
    return path / next((name for name in names if (path / name).exists()), names[0])


def load_network(path: Path | str, best: bool = False) -> TrainedNetwork:
    """The network of a checkpoint of either kind, or of a run folder (see `weights_file`), on the CPU.

    Where the run kept an average of the weights, that is what you get. Raises RunError.
    """
    path = weights_file(Path(path), best)
    payload, digest = _load(path)
    with mismatch_reported(path):
        recipe = Recipe.from_dict(payload["recipe"])
        classes = tuple(payload["classes"])
        model = build_network(recipe, len(classes))
        model.load_state_dict(payload.get("average") or payload["model"])
        model.to(memory_format=torch.channels_last).eval()
        size, epoch, accuracy = int(payload["eval_size"]), int(payload["epoch"]), payload.get("val_accuracy")
        return TrainedNetwork(path, model, recipe, classes, payload["images"], size, epoch, accuracy, digest)


def take_weights(net: nn.Module, source: str) -> TrainedNetwork:
    """Give `net` the weights of a checkpoint or run folder, which is returned as read.

    Raises RunError if they are unreadable or do not fit.
    """
    with mismatch_reported(source):
        trained = load_network(source)
        net.load_state_dict(trained.model.state_dict())
    return trained
