"""What a run leaves behind: configuration, one row an epoch, checkpoints, plots and a summary."""

import csv
import importlib.metadata
import io
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import checkpoint
import plots
from board import EVENT_FILES, Board
from engine import Engine
from errors import RunError
from files import write_text
from model import count_parameters
from scheduler import restart_epochs
from scoring import wilson
from settings import Recipe, Runtime

COLUMNS = (
    "stage",
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "seconds",
    "samples_per_second",
)
SECONDS_BETWEEN_PLOTS = 60.0
PLOTS = ("accuracy.png", "losses.png", "learning_rate.png", "views-stage*.png")
# in the order of removal: a kill in the middle leaves a whole run or none
OWN_FILES = ("previous.pt", "last.pt", "best.pt", "metrics.csv", "summary.json", "config.json", *PLOTS, EVENT_FILES)


class Record:
    """The run folder. `rows` is the truth: CSV and plots are drawn from it and can always be drawn again."""

    def __init__(self, folder: Path, recipe: Recipe, classes: tuple[str, ...], images: dict[str, int]) -> None:
        self.folder, self.recipe, self.classes, self.images = folder, recipe, classes, images
        self.rows: list[dict[str, Any]] = []
        self.crossings: list[dict[str, Any]] = []
        self._board: Board | None = None
        self._drawn = time.monotonic()

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return len(self.rows)

    @property
    def best(self) -> dict[str, Any] | None:
        """`best_row` of the rows so far."""
        return best_row(self.rows)

    def open(self, overwrite: bool, tensorboard: bool = False) -> dict[str, Any] | None:
        """Take up the state in the folder and return it, or None where there is none or it is to be overwritten.

        Raises RunError where the state is unusable or of a run with other settings or images.
        """
        self._board = Board(self.folder) if tensorboard else None
        self._remove(f".{name}.tmp" for name in OWN_FILES)  # of a killed run; nobody else writes here now
        if overwrite:
            self._remove(OWN_FILES)
        try:
            state, warning = checkpoint.resume(self.folder)
        except checkpoint.Damaged as error:
            raise RunError(f"{error}; --overwrite starts anew") from error
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        if state is not None:
            try:
                self._compare(state)
                self.rows, self.crossings = list(state["rows"]), list(state["crossings"])
            except checkpoint.MISFITS as error:
                raise RunError(f"{self.folder / 'last.pt'} is no state of a run; --overwrite starts anew") from error
            self._follow(state)
        return state

    def _remove(self, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                path.unlink()

    def _compare(self, state: dict[str, Any]) -> None:
        now = {**_flat(self.recipe.as_dict()), "images": self.images, "classes": list(self.classes)}
        recipe = Recipe.from_dict(state["recipe"]).as_dict()  # a setting that is newer than the state has its default
        then = {**_flat(recipe), "images": state["images"], "classes": state["classes"]}
        changed = [f"{k} was {then.get(k)}, now {now.get(k)}" for k in now | then if now.get(k) != then.get(k)]
        if changed:
            raise RunError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed)}); "
                "give the same settings, another --out, or --overwrite"
            )

    def write_config(self, runtime: Runtime, engine: Engine, parameters: int) -> None:
        """Write `config.json`: the settings and all that they met with on this machine."""
        config = {
            "recipe": self.recipe.as_dict(),
            "runtime": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(runtime).items()},
            "images": self.images,
            "parameters": parameters,
            **engine.as_dict(),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "matplotlib")},
            },
            "git": _revision(),
        }
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _write_csv(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.folder / "metrics.csv", text.getvalue())

    def draw(self, *, now: bool = True) -> None:
        """Draw the plots of the rows; with `now` false only if the last drawing is a minute old."""
        if not self.rows or (not now and time.monotonic() - self._drawn < SECONDS_BETWEEN_PLOTS):
            return
        recipe = self.recipe
        shared = {
            "title": self.folder.name,
            "restarts": self._restarts(),
            "stage_names": [f"{'→'.join(map(str, dict.fromkeys(s.crop_size)))} px" for s in recipe.stages],
        }
        if self.best is not None:
            plots.accuracy(self.folder / "accuracy.png", self.rows, val_images=self.images["val"], **shared)
        plots.losses(self.folder / "losses.png", self.rows, **shared)
        points = [(n, epoch / 8) for n, stage in enumerate(recipe.stages) for epoch in range(8 * stage.epochs)]
        plots.learning_rate(
            self.folder / "learning_rate.png",
            [recipe.start(number) + epoch for number, epoch in points],
            [recipe.rate(recipe.stages[number], epoch) for number, epoch in points],
            [number + 1 for number, _ in points],
            **shared,
        )
        self._drawn = time.monotonic()

    def _restarts(self) -> list[int]:
        if self.recipe.schedule != "restarts":
            return []
        cycle = (self.recipe.cycle, self.recipe.cycle_growth)
        stages = enumerate(self.recipe.stages)
        return [self.recipe.start(n) + epoch for n, stage in stages for epoch in restart_epochs(stage.epochs, *cycle)]

    def commit(self, row: dict[str, Any], learnt: dict[str, Any]) -> None:
        """Save an epoch's row and the learner's state, whole or not at all, and print the row."""
        self.rows.append(row)
        state = {
            "kind": "run",
            "recipe": self.recipe.as_dict(),
            "classes": list(self.classes),
            "images": self.images,
            "eval_size": self.recipe.stages[row["stage"] - 1].eval_size,
            "epoch": row["epoch"],
            "rows": self.rows,
            "crossings": self.crossings,
            **learnt,
        }
        checkpoint.commit(self.folder, state)
        self._follow(state)
        print(
            f"epoch {row['epoch']}/{self.recipe.epochs}  train loss {row['train_loss']:.3f}"
            f" accuracy {row['train_accuracy']:.1%}"
            + (f"  val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%}" if self.best else "")
            + f"  {row['samples_per_second']:,.0f} samples/s",
            flush=True,
        )

    def _follow(self, state: dict[str, Any]) -> None:
        """Write what follows from a state, after it and again when it is taken up: a kill may have come between."""
        if self.best is self.rows[-1]:
            weights = {key: state[key] for key in ("recipe", "classes", "images", "eval_size", "epoch")}
            weights |= {"val_accuracy": self.best["val_accuracy"], "model": state["average"] or state["model"]}
            checkpoint.save(self.folder / "best.pt", {"kind": "weights", **weights})
        self._write_csv()
        if self._board is not None:
            self._board.follow(self.rows)

    def finish(self, model: torch.nn.Module, engine: Engine) -> None:
        """Draw the plots, write `summary.json` and print the result, of as many epochs as there are."""
        if not self.rows:
            return
        self.draw()
        summary = {
            "run": self.folder.name,
            "finished": self.done == self.recipe.epochs,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "parameters": count_parameters(model),
            "images": self.images,
            "epochs": self.done,
            "samples": samples_seen(self.recipe, self.images["train"], [row["stage"] for row in self.rows]),
            "last": self._result(self.rows[-1]),
            "best, selected on these images": self._result(self.best),
            "stage ends at the next stage's eval size": self.crossings,
            "seconds": round(sum(row["seconds"] for row in self.rows), 1),
            **engine.as_dict(),
        }
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"{summary['parameters']:,} parameters, {summary['samples']:,} samples, {duration(summary['seconds'])}")
        for key in ("last", "best, selected on these images"):
            if summary[key]:
                low, high = summary[key]["interval_95"]
                print(
                    f"validation accuracy, {key}: {summary[key]['val_accuracy']:.1%} "
                    f"(epoch {summary[key]['epoch']}, 95 % interval {low:.1%} to {high:.1%})"
                )
        print(f"plots: {self.folder / ('accuracy.png' if self.best else 'losses.png')}")

    def _result(self, row: dict[str, Any] | None) -> dict[str, Any] | None:
        if row is None or row["val_accuracy"] is None:
            return None
        images = self.images["val"]
        low, high = wilson(round(row["val_accuracy"] * images), images)
        return {
            "epoch": row["epoch"],
            "val_accuracy": row["val_accuracy"],
            "interval_95": [round(low, 4), round(high, 4)],
            "eval_size": self.recipe.stages[row["stage"] - 1].eval_size,
            "mirror": self.recipe.mirror,
        }


class Follower(Record):
    """The record in a process that follows: takes up the same state, counts the epochs, writes and prints nothing."""

    def _remove(self, patterns: Iterable[str]) -> None: ...

    def write_config(self, runtime: Runtime, engine: Engine, parameters: int) -> None: ...

    def draw(self, *, now: bool = True) -> None: ...

    def commit(self, row: dict[str, Any], learnt: dict[str, Any]) -> None:
        """Count the row."""
        self.rows.append(row)

    def _follow(self, state: dict[str, Any]) -> None: ...

    def finish(self, model: torch.nn.Module, engine: Engine) -> None: ...


def best_row(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the highest validation accuracy, the first of equals; None without validation."""
    scored = (row for row in rows if row["val_accuracy"] is not None)
    return max(scored, key=lambda row: row["val_accuracy"], default=None)


def samples_seen(recipe: Recipe, images: int, stages: Iterable[int]) -> int:
    """Samples trained on in epochs of these stages (from 1) over `images` images: whole batches only."""
    batches = (recipe.stages[stage - 1].batch for stage in stages)
    return sum(images * recipe.views // batch * batch for batch in batches)


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values under one name each; tuples as lists, as they come back from JSON."""
    flat = {k: v for k, v in recipe.items() if k not in ("stages", "view")} | recipe["view"]
    for number, stage in enumerate(recipe["stages"]):
        flat |= {f"{k} of stage {number + 1}": v for k, v in stage.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}


def _revision() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
