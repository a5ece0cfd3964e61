"""What a run leaves behind: configuration, one row an epoch, checkpoints, plots and a summary."""

import csv
import io
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import torch
import torchvision

import checkpoint
import plots
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
OWN_FILES = ("last.pt", "previous.pt", "best.pt", "config.json", "metrics.csv", "summary.json", "*.png")


class Record:
    """The run folder. `rows` is the truth: CSV and plots are drawn from it and can always be drawn again."""

    def __init__(self, folder: Path, recipe: Recipe, classes: tuple[str, ...], images: dict[str, int]) -> None:
        self.folder, self.recipe, self.classes, self.images = folder, recipe, classes, images
        self.rows: list[dict[str, Any]] = []
        self.crossings: list[dict[str, Any]] = []
        self._drawn = time.monotonic()

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return len(self.rows)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the highest validation accuracy, the first of equals; None without validation."""
        scored = [row for row in self.rows if row["val_accuracy"] is not None]
        return max(scored, key=lambda row: row["val_accuracy"], default=None)

    def open(self, overwrite: bool) -> dict[str, Any] | None:
        """Take up the state in the folder and return it, or None where there is none or it is to be overwritten.

        Raises RunError where the state is unusable or of a run with other settings or images.
        """
        if overwrite:
            self._clear()
        state, warning = checkpoint.resume(self.folder)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        if state is not None:
            self._compare(state)
            self.rows, self.crossings = state["rows"], state["crossings"]
        self._write_csv()
        return state

    def _clear(self) -> None:
        for pattern in OWN_FILES:  # the states first, so that a kill leaves no half of a run
            for path in self.folder.glob(pattern):
                path.unlink()

    def _compare(self, state: dict[str, Any]) -> None:
        now = {**_flat(self.recipe.as_dict()), "images": self.images, "classes": list(self.classes)}
        then = {**_flat(state["recipe"]), "images": state["images"], "classes": state["classes"]}
        changed = [f"{k} was {then.get(k)}, now {now.get(k)}" for k in now | then if now.get(k) != then.get(k)]
        if changed:
            raise RunError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed)}); "
                "give the same settings, another --out, or --overwrite"
            )

    def write_config(self, runtime: Runtime, engine: Engine) -> None:
        """Write `config.json`: the settings and all that they met with on this machine."""
        config = {
            "recipe": self.recipe.as_dict(),
            "runtime": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(runtime).items()},
            "images": self.images,
            **engine.as_dict(),
            "versions": {
                "python": platform.python_version(),
                **{module.__name__: module.__version__ for module in (torch, torchvision, numpy, matplotlib)},
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

    def _append_csv(self) -> None:
        path = self.folder / "metrics.csv"
        try:
            with open(path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(self.rows[-1])
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}; the same command continues") from error

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

    def commit(self, row: dict[str, Any], state: dict[str, Any], weights: dict[str, Any]) -> None:
        """Save an epoch's row and state, and print the row: best weights, then the point of commit, then the CSV."""
        self.rows.append(row)
        shared = {
            "recipe": self.recipe.as_dict(),
            "classes": list(self.classes),
            "images": self.images,
            "eval_size": self.recipe.stages[row["stage"] - 1].eval_size,
            "epoch": row["epoch"],
        }
        if self.best is row:
            best = {"kind": "weights", **shared, "val_accuracy": row["val_accuracy"], "model": weights}
            checkpoint.save(self.folder / "best.pt", best)
        run = {"kind": "run", **shared, "rows": self.rows, "crossings": self.crossings, **state}
        checkpoint.commit(self.folder, run)
        self._append_csv()
        print(
            f"epoch {row['epoch']}/{self.recipe.epochs}  train loss {row['train_loss']:.3f}"
            f" accuracy {row['train_accuracy']:.1%}"
            + (f"  val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%}" if self.best else "")
            + f"  {row['samples_per_second']:,.0f} samples/s",
            flush=True,
        )

    def finish(self, model: torch.nn.Module, engine: Engine) -> None:
        """Draw the plots, write `summary.json` and print the result, of as many epochs as there are."""
        if not self.rows:
            return
        self.draw()
        trained = [self.recipe.stages[row["stage"] - 1].batch for row in self.rows]
        samples = self.images["train"] * self.recipe.views
        summary = {
            "run": self.folder.name,
            "finished": self.done == self.recipe.epochs,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "parameters": count_parameters(model),
            "images": self.images,
            "epochs": self.done,
            "samples": sum(samples // batch * batch for batch in trained),
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
