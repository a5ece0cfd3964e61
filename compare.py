#!/usr/bin/env python3
"""Lay several runs side by side: one table, and one plot of their accuracy.

    python3 compare.py runs/original-seed0 runs/cpu-seed0

A run is read from its `config.json` and `metrics.csv` alone, finished or still going.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from harness import errors

if __name__ == "__main__":
    errors.before_imports()

from harness import plots, text
from harness.errors import RunError, reason
from harness.metrics import wilson
from harness.run_folder import COLUMNS, best_row
from harness.text import duration
from recipes import Recipe


class Run(NamedTuple):
    """A run folder's settings, numbers of images, parameters (None in older runs) and rows of metrics."""

    folder: Path
    recipe: Recipe
    images: dict[str, Any]
    parameters: int | None
    rows: list[dict[str, float | None]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Lay several runs side by side: one table, one accuracy plot.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, finished or still going")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the plot, PNG (default: comparison.png beside the runs)"
    )
    args = parser.parse_args(argv)
    runs = [read(folder) for folder in args.runs]
    names = [run.folder.resolve().name for run in runs]
    names = names if len(set(names)) == len(names) else [text.printable(run.folder) for run in runs]
    print(table(names, runs))
    print("\n".join(f"note: {note}" for note in notes(runs)))
    out = args.out or runs[0].folder.resolve().parent / "comparison.png"
    best = {name: row["val_accuracy"] for name, run in zip(names, runs, strict=True) if (row := best_row(run.rows))}
    if best:
        highest = max(best, key=best.get)
        plots.comparison(
            out,
            {name: run.rows for name, run in zip(names, runs, strict=True)},
            title=f"val accuracy: highest {best[highest]:.1%}, of {highest}",
        )
        print(f"plot: {out}")
    return 0


def read(folder: Path) -> Run:
    """What `config.json` and `metrics.csv` say. Raises RunError where they are missing or not whole."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        rows = [{key: float(line[key]) if line[key] else None for key in COLUMNS} for line in lines]
        recipe = Recipe.from_dict(config["recipe"])
        return Run(folder, recipe, config["images"], config.get("parameters"), rows)
    except OSError as error:
        raise RunError(f"{folder} is no run folder: {error.filename}: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} holds a run that cannot be read: {error}") from error


def table(names: list[str], runs: list[Run]) -> str:
    """One line a run: settings, progress, accuracy (best, and last with its 95% interval) and cost."""
    header = ("run", "recipe", "seed", "epochs", "best val", "last val (95% interval)", "time", "samples", "parameters")
    lines = []
    for name, run in zip(names, runs, strict=True):
        best, last = best_row(run.rows), run.rows[-1]["val_accuracy"] if run.rows else None
        stages = [int(row["stage"]) - 1 for row in run.rows]
        lines.append(
            [
                name,
                run.recipe.name,
                f"{run.recipe.seed}",
                f"{len(run.rows)} of {run.recipe.epochs}",
                f"{best['val_accuracy']:.1%} in epoch {best['epoch']:g}" if best else "–",
                _with_interval(last, run.images["val"]) if last is not None else "–",
                duration(sum(row["seconds"] for row in run.rows)),
                f"{run.recipe.samples(run.images['train'], stages):,}",
                f"{run.parameters:,}" if run.parameters else "–",
            ]
        )
    return text.table(header, lines)


def _with_interval(accuracy: float, images: int) -> str:
    low, high = wilson(round(accuracy * images), images)
    return f"{accuracy:.1%} ({low:.1%} to {high:.1%})"


def notes(runs: list[Run]) -> list[str]:
    """What the reader of the table must know."""
    said = ["the best val accuracy is selected on the very images that it is of; the last is not"]
    splits = ("split_seed", "val_fraction", "fold", "tune_fold")
    validated = {
        repr((run.recipe.name == "demo", run.images, *(getattr(run.recipe, name) for name in splits))) for run in runs
    }
    if len(validated) > 1:
        said.append("these runs do not all validate on the same images: small differences mean nothing")
    return said


if __name__ == "__main__":
    sys.exit(errors.report(main))
