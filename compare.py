#!/usr/bin/env python3
"""Lay several runs side by side: one table, and one plot of their accuracy.

    python3 compare.py runs/cpu-seed0 runs/cpu-seed1

A run is read from its `config.json` and `metrics.csv` alone, finished or still going.
"""

import argparse
import contextlib
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import errors

if __name__ == "__main__":
    errors.before_imports()  # which take seconds

from harness import canvas, continuity, files, plots, text
from harness.cli import expanded, file_path, idle_settings, png_path
from harness.errors import RunError, reason
from harness.metrics import interval
from harness.run_folder import COLUMNS, best_row
from harness.text import duration
from recipes import Recipe


class Run(NamedTuple):
    """A run folder's settings, numbers of images, parameters (None in older runs), rows, and samples so far."""

    folder: Path
    recipe: Recipe
    images: dict[str, Any]
    parameters: int | None
    rows: list[dict[str, float | None]]
    samples: int


class NoRun(RunError):
    """A path that is not a run folder, among those that are."""


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    runs, broken = gather(args.runs)
    names = [text.printable(run.folder.resolve().name) for run in runs]
    names = names if len(set(names)) == len(names) else [text.printable(run.folder) for run in runs]
    print(table(names, runs))
    print("\n".join(f"note: {note}" for note in notes(runs)))
    out = args.out or runs[0].folder.resolve().parent / "comparison.png"
    if not args.out and out.exists() and not canvas.drawn_here(out):
        raise RunError(
            f"{out} was drawn by another program, or by an older version of this one; name another file with --out"
        )
    best = {name: row["val_accuracy"] for name, run in zip(names, runs, strict=True) if (row := best_row(run.rows))}
    if best:
        highest = max(best, key=best.get)
        plots.comparison(
            out,
            {name: run.rows for name, run in zip(names, runs, strict=True)},
            title=f"val accuracy: highest {best[highest]:.1%}, of {highest}",
        )
        print(f"plot: {out}")
    return 1 if broken else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Lay several runs side by side: one table, one accuracy plot.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=file_path,
        metavar="RUN",
        help="run folder, finished or still going; anything else, as in runs/*, is skipped",
    )
    parser.add_argument(
        "--out", type=png_path, metavar="FILE", help="the plot, PNG (default: comparison.png beside the runs)"
    )
    return parser


def gather(named: Sequence[Path]) -> tuple[list[Run], bool]:
    """The runs among the named paths, each once, and whether one could not be read; skipped paths go to stderr.

    Raises RunError if there are no runs among them.
    """
    runs, skipped, broken = {}, [], False
    for path in expanded(named):
        try:
            runs.setdefault(files.identity(path), read(path))
        except RunError as error:
            skipped.append(str(error))
            broken = broken or not isinstance(error, NoRun)
    if not runs:
        raise RunError("; ".join(skipped))
    for sentence in skipped:
        print(f"skipped: {text.printable(sentence)}", file=sys.stderr)
    return list(runs.values()), broken


def read(folder: Path) -> Run:
    """A run, as its `config.json` and `metrics.csv` record it; the latter is missing before the first epoch ends.

    Raises NoRun where there is no `config.json`, RunError where one of the two cannot be used.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows = []
        with contextlib.suppress(FileNotFoundError):
            with open(folder / "metrics.csv", encoding="utf-8-sig", newline="") as file:
                rows = [{key: _number(line[key], key) for key in COLUMNS} for line in csv.DictReader(file)]
        recipe, images = Recipe.from_dict(config["recipe"]), config["images"]
        samples = recipe.samples(images["train"], len(rows))
        return Run(folder, recipe, images, config.get("parameters"), rows, samples)
    except (FileNotFoundError, NotADirectoryError):
        raise NoRun(f"{folder} is not a run folder") from None
    except OSError as error:
        raise RunError(f"{folder} cannot be read: {error.filename}: {reason(error)}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} holds a run that cannot be read: {error}") from error


def _number(text: str, column: str) -> float | None:
    if not text and column in ("val_loss", "val_accuracy"):
        return None
    number = float(text)
    if not math.isfinite(number) or (column.endswith("accuracy") and not 0 <= number <= 1):
        raise ValueError(f"{column} is {text}")
    return number


def table(names: list[str], runs: list[Run]) -> str:
    """One line per run: settings, progress, accuracy (best, and last with its 95% interval) and cost."""
    header = ("run", "recipe", "seed", "epochs", "best val", "last val (95% interval)", "time", "samples", "parameters")
    lines = []
    for name, run in zip(names, runs, strict=True):
        best, last = best_row(run.rows), run.rows[-1]["val_accuracy"] if run.rows else None
        lines.append(
            [
                name,
                run.recipe.name,
                f"{run.recipe.seed}",
                f"{len(run.rows)} of {run.recipe.epochs}",
                f"{best['val_accuracy']:.1%} in epoch {best['epoch']:g}" if best else "–",
                _with_interval(last, run.images["val"]) if last is not None else "–",
                duration(sum(row["seconds"] for row in run.rows)),
                f"{run.samples:,}",
                f"{run.parameters:,}" if run.parameters else "–",
            ]
        )
    return text.table(header, lines)


def _with_interval(accuracy: float, images: int) -> str:
    low, high = interval(accuracy, images)
    return f"{accuracy:.1%} ({low:.1%} to {high:.1%})"


def notes(runs: list[Run]) -> list[str]:
    """What the reader of the table needs to know."""
    said = ["the best val accuracy is selected on the same images that it is measured on; the last is not"]
    validated = {
        repr((run.recipe.name == "demo", run.images, run.recipe.tune_fold, *_validating(run.recipe))) for run in runs
    }
    if len(validated) > 1:
        said.append("these runs do not all validate on the same images: small differences mean nothing")
    ways = list(dict.fromkeys(_scoring(run) for run in runs if run.rows and best_row(run.rows)))
    if len(ways) > 1:
        listed = "; ".join(f"{size} px, --tta {tta}" for size, tta in ways)
        said.append(f"the last epochs are not scored the same way ({listed}); use evaluate.py with --size and --tta")
    if differing := _differing_settings([run.recipe for run in runs]):
        said.append(f"the runs differ in {'; '.join(differing)}")
    return said


def _differing_settings(recipes: Sequence[Recipe]) -> list[str]:
    """Settings other than seeds that differ between recipes and have an effect in one, each with its values."""
    flat = [continuity.flat(recipe.as_dict()) for recipe in recipes]
    idle = set.intersection(*(set(idle_settings(recipe)) for recipe in recipes)) | {"name", "seed"}
    values = {name: list(dict.fromkeys(f"{each.get(name)}" for each in flat)) for each in flat for name in each}
    return [f"{name}: {', '.join(told)}" for name, told in values.items() if len(told) > 1 and name not in idle]


def _scoring(run: Run) -> tuple[int, str]:
    """Size and TTA with which a run's last epoch so far was scored."""
    epoch = run.recipe.at(min(len(run.rows), run.recipe.epochs) - 1)
    return epoch.stage.eval_size, epoch.tta


def _validating(recipe: Recipe) -> tuple[float, ...]:
    """What chooses a run's validation images: an official fold, or a seed."""
    return (recipe.fold,) if recipe.fold is not None else (recipe.split_seed, recipe.val_fraction)


if __name__ == "__main__":
    errors.end_process(errors.report(main))
