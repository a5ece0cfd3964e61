"""Trained networks that a student learns from: read, refused if they know too much, and asked about each batch."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from data import DataSet, Split
from harness import checkpoint
from harness.checkpoint import TrainedNetwork
from harness.errors import RunError
from harness.images import fingerprint, split_by
from harness.machine import Machine
from harness.text import listed
from losses import softened_mean
from model import count_parameters
from recipes import Recipe

DIGEST_LENGTH = 16  # hexadecimal digits
MOVING = ("last.pt", "previous.pt", "best.pt")  # of a run folder: an epoch replaces them


class Teachers:
    """Networks on the machine, in eval mode; they give a batch's soft targets."""

    def __init__(self, networks: Sequence[nn.Module], temperature: float, machine: Machine) -> None:
        self.temperature, self.machine = temperature, machine
        self.networks = [
            net.to(machine.device, memory_format=torch.channels_last).eval().requires_grad_(False) for net in networks
        ]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Probabilities, float32 (B, K), of normalised views (B, 3, s, s)."""
        with self.machine.autocast():
            logits = [net(x) for net in self.networks]
        return softened_mean([each.float() for each in logits], self.temperature)


def load_teachers(paths: Sequence[Path], dataset: DataSet, val: Tensor, data_dir: Path) -> dict[str, TrainedNetwork]:
    """The networks of run folders or checkpoints, on the CPU, as teachers of a run that validates on the images `val`.

    Each is keyed and sorted by the digest that the student's recipe keeps of it (of its weights and statistics, all as
    loaded), so that sums are the same in whatever order the paths come.
    Raises RunError for one that cannot be read, has other classes or was trained with images other than the `dataset`,
    may have learnt any of `val`, or is named twice.
    """
    teachers: dict[str, TrainedNetwork] = {}
    for path in paths:
        teacher = checkpoint.load_network(path)
        _require_fit(teacher, dataset, val, data_dir)
        known = teachers.setdefault(digest(teacher.model), teacher)
        if known is not teacher:
            raise RunError(f"{known.file} and {teacher.file} are the same network; name it once")
        print(
            f"teacher: {teacher.file} ({teacher.recipe.name}, epoch {teacher.epoch} of {teacher.recipe.epochs}, "
            f"{count_parameters(teacher.model):,} parameters)"
        )
        if teacher.file.name in MOVING and teacher.epoch < teacher.recipe.epochs:
            way_out = f"give a copy of {teacher.file.name}"
            print(f"note: {teacher.file.parent} is not finished; if it continues, this run cannot: {way_out}")
    return dict(sorted(teachers.items()))


def digest(network: nn.Module) -> str:
    """The first digits of a SHA-256 of names, shapes and values of a network's weights and statistics."""
    known = hashlib.sha256()
    for name, value in network.state_dict().items():
        known.update(f"{name} {tuple(value.shape)} ".encode())
        known.update(value.cpu().contiguous().numpy().data)
    return known.hexdigest()[:DIGEST_LENGTH]


def _require_fit(teacher: TrainedNetwork, dataset: DataSet, val: Tensor, data_dir: Path) -> None:
    """Raise RunError for a teacher of other classes or images, or one that may have learnt any of the images `val`."""
    refused = f"{teacher.file} cannot teach this run"
    differing = sorted(set(teacher.classes) ^ set(dataset.classes))
    if differing:
        raise RunError(f"{refused}: it has other classes (not in both: {', '.join(differing)})")
    learnt, how = _learnt(teacher, dataset, data_dir)
    if learnt is None:
        raise RunError(f"{refused}: it was trained with other images, which may include this run's validation images")
    shared = int(learnt[val].sum())
    if shared:
        raise RunError(
            f"{refused}: {how} {shared:,} of this run's {len(val):,} validation images; take one with the same split"
        )


def notes_on_first_weights(network: TrainedNetwork, recipe: Recipe, split: Split, data_dir: Path) -> Iterator[str]:
    """What to say about the network whose weights a run starts from, one sentence each.

    Unlike a teacher it is not refused if it may have learnt the run's validation images, or has other classes.
    """
    classes, its_classes = split.dataset.classes, network.classes
    if its_classes != classes:
        others = "in another order" if set(its_classes) == set(classes) else f"others ({listed(sorted(its_classes))})"
        yield f"--init {network.file}: its classes are {others}, so the last layer has to be learnt from scratch"
    if network.recipe.last_pool != recipe.last_pool:
        flag = "--last-pool" if network.recipe.last_pool else "--no-last-pool"
        yield f"--init {network.file}: it was trained with {flag}, unlike this run"
    try:
        learnt, how = _learnt(network, split.dataset, data_dir)
    except RunError:  # its split cannot be made of these images
        learnt = None
    shared = 0 if learnt is None else int(learnt[split.val].sum())
    if shared:
        images = f"{shared:,} of this run's {len(split.val):,} validation images"
        yield f"--init {network.file}: {how} {images}, so accuracy on them is flattering"
    elif learnt is None and len(split.val) and set(its_classes) & set(classes):
        yield f"--init {network.file}: it may have learnt validation images of this run, as it was trained with others"


def _learnt(network: TrainedNetwork, dataset: DataSet, data_dir: Path) -> tuple[Tensor | None, str]:
    """Which images of `dataset` a network may have learnt, bool (N,), and how; None if it was trained with others."""
    if network.classes != dataset.classes:
        return None, ""
    train, held_out = split_by(network.recipe, dataset, data_dir)
    if fingerprint(Split(dataset, train, held_out)) != network.images:
        return None, ""
    learnt, how = torch.zeros(len(dataset.labels), dtype=torch.bool), "it has learnt"
    learnt[train] = True
    if network.recipe.init:  # which no recipe can vouch for
        learnt[:], how = True, f"it began with the weights of {network.recipe.init}, which may have learnt"
    elif network.recipe.teachers:  # they were refused if they had learnt what it validates on, but nothing else
        learnt[:], how = True, "it has learnt, or its own teachers may have,"
        learnt[held_out] = False
    return learnt, how
