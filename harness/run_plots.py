"""The plots of a run: its curves, and sheets of the views that it trains on."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from augment import Batch, denormalise
from harness import plots
from recipes import Recipe
from scheduler import restart_epochs

ON_SHEET = 32  # views


def views(path: Path, heading: str, batch: Batch, classes: Sequence[str]) -> None:
    """Draw the first views of a batch as the network sees them, each with its class, or with two and their shares."""
    shown = denormalise(batch.x[:ON_SHEET]).clamp(0, 1).cpu()
    mixed = zip(*(part[:ON_SHEET].tolist() for part in batch[1:]), strict=True)
    plots.sample_sheet(path, shown.numpy(), [_label(classes, *each) for each in mixed], heading=heading)


def _label(classes: Sequence[str], label: int, other: int, share: float) -> str:
    """A view's class; if two classes are mixed in it, the larger share first."""
    if label == other or round(share * 100) in (0, 100):
        return plots.beside(classes[label if share >= 0.5 else other])
    parts = sorted([(share, classes[label]), (1 - share, classes[other])], reverse=True)
    return "\n".join(plots.beside(name, f" {part:.0%}") for part, name in parts)


def curves(
    folder: Path, title: str, recipe: Recipe, rows: Sequence[Mapping[str, Any]], val_images: int
) -> dict[Path, Callable[[], None]]:
    """Functions that draw a run's accuracy (if there is one), losses and learning rate into its folder, by path."""
    shared = {
        "title": title,
        "restarts": _restarts(recipe),
        "stage_names": [f"{'→'.join(map(str, dict.fromkeys(s.crop_size)))} px" for s in recipe.stages],
    }
    val_size = recipe.at(len(rows) - 1).stage.eval_size
    accuracy, losses, rate = (folder / f"{name}.png" for name in ("accuracy", "losses", "learning_rate"))
    drawn = {
        accuracy: partial(plots.accuracy, accuracy, rows, val_images=val_images, val_size=val_size, **shared),
        losses: partial(plots.losses, losses, rows, **shared),
        rate: partial(plots.learning_rate, rate, *_rates(recipe), **shared),
    }
    if all(row["val_accuracy"] is None for row in rows):
        del drawn[accuracy]
    return drawn


def _rates(recipe: Recipe) -> tuple[list[float], list[float], list[int]]:
    """For eight points per epoch: the epochs done, the learning rate, and the stage's number."""
    points = [(done, eighth / 8, recipe.at(done)) for done in range(recipe.epochs) for eighth in range(8)]
    moves = 1 if recipe.rate_by_step else 0  # a rate that changes by epoch keeps its value from the epoch's start
    return (
        [done + part for done, part, _ in points],
        [recipe.learning_rate(epoch.stage, epoch.number + moves * part) for _, part, epoch in points],
        [epoch.stage_index + 1 for _, _, epoch in points],
    )


def _restarts(recipe: Recipe) -> list[int]:
    if recipe.schedule != "restarts":
        return []
    starts = [set(restart_epochs(stage.epochs, recipe.cycle, recipe.cycle_growth)) for stage in recipe.stages]
    epochs = map(recipe.at, range(recipe.epochs))
    return [done for done, epoch in enumerate(epochs) if epoch.number in starts[epoch.stage_index]]
