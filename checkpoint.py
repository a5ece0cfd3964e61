"""Checkpoints: plain values and tensors, written whole or not at all, opened without running anything in them.

A run folder holds `last.pt` (the one point of commit: all that continues the run), `previous.pt` (the state one epoch
before, should `last.pt` be damaged) and `best.pt` (weights only, of the best validation accuracy).
"""

import contextlib
import fcntl
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import RunError
from files import replacing
from model import ResNet, build_model
from settings import Recipe

FORMAT = 1


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write a checkpoint in place of an older one. Raises RunError where the disk refuses."""
    with replacing(path) as temporary:
        _write(temporary, payload)


def commit(folder: Path, payload: dict[str, Any]) -> None:
    """Make `payload` the run's `last.pt` and the one before its `previous.pt`. At every moment one of both is whole."""
    last = folder / "last.pt"
    with replacing(last) as temporary:
        _write(temporary, payload)
        if last.exists():
            os.replace(last, folder / "previous.pt")


def _write(path: Path, payload: dict[str, Any]) -> None:
    try:
        torch.save({"format": FORMAT, **payload}, path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise OSError(0, str(error).split("\n")[0]) from error


def load(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check a checkpoint, of one kind (`run` or `weights`) if given; tensors arrive on the CPU.

    Raises RunError where it is missing, damaged, foreign, from a newer version, or holds more than plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged:
            raise RunError(f"{path} is damaged ({damaged} has a wrong checksum)")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zip and torch raise anything from KeyError to UnpicklingError on foreign bytes
        reason = "it holds objects that are not plain values" if "WeightsUnpickler" in str(error) else "it is not whole"
        raise RunError(f"{path} cannot be used as a checkpoint: {reason}") from error
    if not isinstance(payload, dict) or not isinstance(payload.get("format"), int) or "recipe" not in payload:
        raise RunError(f"{path} is not a checkpoint of this project")
    if payload["format"] > FORMAT:
        raise RunError(f"{path} has format {payload['format']}, this version reads up to {FORMAT}; use a newer version")
    if kind is not None and payload.get("kind") != kind:
        raise RunError(f"{path} holds {payload.get('kind')!r}, not {kind!r}")
    return payload


def resume(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The state to continue from, None in a fresh folder, and a warning where `last.pt` was damaged.

    Raises RunError where no state is usable.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    try:
        if last.exists():
            return load(last, "run"), None
        return (load(previous, "run") if previous.exists() else None), None
    except RunError as error:
        if not last.exists() or not previous.exists():
            raise RunError(f"{error}; --overwrite starts anew") from error
        payload = load(previous, "run")
        os.replace(previous, last)  # or the next commit would keep the damaged file as previous.pt
        return payload, f"{error}; continuing from the state before it (previous.pt)"


@dataclass(frozen=True)
class Trained:
    """A network read from a checkpoint, with what its user needs to know."""

    model: ResNet
    recipe: Recipe
    classes: tuple[str, ...]
    eval_size: int
    epoch: int


def load_network(path: Path) -> Trained:
    """The network of a checkpoint of either kind, or of a run folder (its `best.pt`, else its `last.pt`), on the CPU.

    Where the run kept an average of the weights, that is what comes. Raises RunError.
    """
    if path.is_dir():
        path = next((path / name for name in ("best.pt", "last.pt") if (path / name).exists()), path / "best.pt")
    payload = load(path)
    try:
        recipe = Recipe.from_dict(payload["recipe"])
        classes = tuple(payload["classes"])
        model = network(recipe, len(classes))
        model.load_state_dict(payload.get("average") or payload["model"])
        model.to(memory_format=torch.channels_last).eval()
        return Trained(model, recipe, classes, int(payload["eval_size"]), int(payload["epoch"]))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise RunError(f"{path} does not fit this version's network: {str(error).splitlines()[0]}") from error


def network(recipe: Recipe, classes: int) -> ResNet:
    """The network that a recipe describes. Raises ValueError where it is over the parameter budget."""
    return build_model(
        recipe.layers, planes=recipe.planes, num_classes=classes, zero_init_residual=recipe.zero_init_residual
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the system lets go of it however the process ends. Raises RunError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in folder.glob(".*.tmp"):  # of a killed run; nobody else writes here now
            leftover.unlink(missing_ok=True)
        yield
    except BlockingIOError:
        raise RunError(f"another run is using {folder}; wait for it or choose another folder with --out") from None
    finally:
        os.close(descriptor)
