"""What a run leaves behind: configuration, one row per epoch, checkpoints, plots and a summary."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from augment import EpochDraws, make_batch
from harness import checkpoint, continuity, files, ownership, plots, provenance, run_plots
from harness.cli import Runtime
from harness.errors import RunError
from harness.machine import Machine
from harness.metrics import interval
from harness.tensorboard_log import TensorBoardLog
from harness.text import duration, shortened
from model import count_parameters
from recipes import Recipe, UnknownSettings, old_rules

COLUMNS = (
    "stage",
    "epoch",
    "lr",  # of the epoch's first step: 0 in the first epoch if there is a warm-up
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "seconds",
    "samples_per_second",
)
SECONDS_BETWEEN_PLOTS = 60.0


class RunFolder:
    """The folder of a run. `rows` is the truth: CSV and plots are made from it and can always be made again.

    With several processes only the leader's writes and prints; in the others it loads the same state and counts epochs.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, classes: tuple[str, ...], images: dict[str, Any], machine: Machine
    ) -> None:
        self.folder, self.recipe, self.classes, self.images, self.machine = folder, recipe, classes, images, machine
        self.name = os.path.basename(os.path.realpath(folder))  # even if given as "."
        self._title = shortened(self.name, plots.NAME_IN_TITLE)
        self.rows: list[dict[str, Any]] = []
        self._tensorboard: TensorBoardLog | None = None
        self._drawn = time.monotonic()
        self._conditions = continuity.conditions(machine)
        self._finished_before = False  # by an earlier process, whose machine the summary names

    @property
    def epochs_done(self) -> int:
        """Number of finished epochs."""
        return len(self.rows)

    @property
    def best(self) -> dict[str, Any] | None:
        """`best_row` of the rows so far."""
        return best_row(self.rows)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A context during which no other run uses the folder. Raises RunError if one does."""
        with files.locked(self.folder, wait=False) if self.machine.leads else contextlib.nullcontext():
            try:
                yield
            finally:
                if self._tensorboard is not None:
                    self._tensorboard.close()

    def resume(self, overwrite: bool, tensorboard: bool = False) -> dict[str, Any] | None:
        """Take up the state in the folder and return it, or None if there is none or it is to be overwritten.

        A run that an older version began keeps the rules of that version: `recipe` has them from here on.
        Raises RunError if the state is unusable, or of a run with other settings or images, and where the folder holds
        files that a run would replace without the state that they belong to.
        """
        self._tensorboard = TensorBoardLog(self.folder) if tensorboard and self.machine.leads else None
        if self.machine.leads and (overwrite or ownership.overwriting(self.folder)):
            ownership.remove_run(self.folder)
        try:
            state, damage = checkpoint.resume(self.folder)
        except checkpoint.Damaged as error:
            raise RunError(f"{error}; --overwrite starts over") from error
        if state is not None:
            try:
                self._keep_old_rules(state)
                self._require_same_settings(state)
                rows = list(state["rows"])
                if not 0 < len(rows) <= self.recipe.epochs:
                    raise ValueError("rows")
                self.rows = rows
            except UnknownSettings as error:
                raise RunError(f"{self.folder / 'last.pt'} has {error}") from error
            except checkpoint.MISMATCH_ERRORS as error:
                raise RunError(
                    f"{self.folder / 'last.pt'} is not a run's checkpoint; --overwrite starts over"
                ) from error
        elif self.machine.leads:
            ownership.require_no_other(self.folder)
        if damage:
            print(f"warning: {checkpoint.go_back(self.folder, state, damage)}", file=sys.stderr)
        if self.machine.leads:
            files.remove_leftovers(self.folder, ownership.RUN_FILES)  # of a killed run; no other run writes here now
        if state is not None:
            self._finished_before = self.epochs_done == self.recipe.epochs
            self.machine.notes[:0] = [note for note in state.get("notes", []) if note not in self.machine.notes]
            state["recipe"] = self.recipe.as_dict()  # the same settings, under their present names
            self._write_derived(state)
            if self.epochs_done < self.recipe.epochs:
                for sentence in continuity.other_conditions(state, self._conditions):
                    self.machine.note(sentence)
        return state

    def _keep_old_rules(self, state: dict[str, Any]) -> None:
        """Change the recipe where the state is older than a setting and has followed a rule other than its default."""
        kept = {name: rule for name, rule in old_rules(state["recipe"]).items() if getattr(self.recipe, name) != rule}
        if kept:
            self.recipe = dataclasses.replace(self.recipe, **kept)
            settings = ", ".join(f"{name} = {rule}" for name, rule in kept.items())
            print(f"this run was begun before these settings existed, and goes on with {settings}")

    def _require_same_settings(self, state: dict[str, Any]) -> None:
        if changed := continuity.changes(state, self.recipe, self.images, self.classes):
            raise RunError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed)}); "
                "give the same settings, another --out, or --overwrite"
            )

    def write_config(self, runtime: Runtime, net: torch.nn.Module) -> None:
        """Write `config.json`: the settings, and the images, machine and versions that the run uses."""
        if not self.machine.leads:
            return
        config = {
            "recipe": self.recipe.as_dict(),
            "runtime": {name: _plain(value) for name, value in vars(runtime).items()},
            "images": self.images,
            "parameters": count_parameters(net),
            **self.machine.as_dict(),
            **provenance.as_dict(),
        }
        files.write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def require_finite(self, losses: Tensor, finite: bool, val_loss: float | None) -> None:
        """Raise a RunError naming the first number of an epoch that is not finite.

        `losses`: one per step, (steps,). `finite`: whether weights, running statistics and optimiser values all are.
        """
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            what = f"the loss of step {int(bad[0]) + 1}"
        elif not finite:
            what = "a weight, running statistic or optimiser value after the last step"
        elif val_loss is not None and not math.isfinite(val_loss):
            what = "the validation loss"
        else:
            return
        done, way_out = self.epochs_done, "a lower --lr" + self._where_settings_may_change()
        if self.machine.precision is torch.float32:
            way_out = f"Try {way_out}"
        else:  # not part of the recipe, and in fp16 the likely cause
            goes_on = f"goes on after epoch {done}" if done else "begins again"
            way_out = f"The same command with --precision fp32 {goes_on}. If that does not help, try {way_out}"
        raise RunError(f"{what} of epoch {done + 1} is not a finite number, so the run has stopped. {way_out}")

    def what_needs_memory(self) -> str:
        """The epoch in flight, as the end of a sentence about memory, with the ways out."""
        epoch = self.recipe.at(min(self.epochs_done, self.recipe.epochs - 1))
        eager = "try the same command with --no-compile; else " if self.machine.compile or self.machine.graphs else ""
        smaller = "a smaller --batch, --crop-size or --eval-size"
        smaller += ", or --image-size" if "digest" in self.images else ""
        return (
            f"epoch {self.epochs_done + 1}: batches of {epoch.stage.batch} views of {epoch.crop_size} px, "
            f"scored at {epoch.stage.eval_size} px; {eager}give {smaller}, "
            f"or fewer --views, whose random numbers are drawn an epoch at a time{self._where_settings_may_change()}"
        )

    def _where_settings_may_change(self) -> str:
        """How to go on with another setting, where the folder holds a run whose settings may not change."""
        if not self.epochs_done:
            return ""
        start = f"--init {self.folder / 'last.pt'} starts from the weights of epoch {self.epochs_done}"
        return f", with another --out; {start}"

    def commit(self, row: dict[str, Any], trained: dict[str, Any]) -> None:
        """Save an epoch's row and the trainer's state, whole or not at all; then print the row and draw the plots."""
        self.rows.append(row)
        if not self.machine.leads:
            return
        state = {
            "kind": "run",
            "recipe": self.recipe.as_dict(),
            "classes": list(self.classes),
            "images": self.images,
            "eval_size": self.recipe.stages[row["stage"] - 1].eval_size,
            "epoch": row["epoch"],
            "notes": self.machine.notes,
            "rows": self.rows,
            **self._conditions,
            **trained,
        }
        try:
            checkpoint.commit(self.folder, state)
        except RunError as error:
            done = row["epoch"] - 1
            way_out = f"; a copy of {self.folder}, given as --out, goes on after epoch {done}" if done else ""
            raise RunError(f"{error}{way_out}") from error
        self._write_derived(state)
        print(
            f"epoch {row['epoch']}/{self.recipe.epochs}  train loss {row['train_loss']:.3f}"
            f" accuracy {row['train_accuracy']:.1%}"
            + (f"  val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%}" if self.best else "")
            + f"  {row['samples_per_second']:,.0f} samples/s",
            flush=True,
        )
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_PLOTS:
            self.draw()

    def _write_derived(self, state: dict[str, Any]) -> None:
        """Write the files derived from a state: once it is saved, and again on resuming, as a kill may come between."""
        if not self.machine.leads:
            return
        if self.best is self.rows[-1]:
            checkpoint.save_weights(self.folder / "best.pt", state, self.best["val_accuracy"])
        epoch = self.recipe.at(self.epochs_done - 1)
        if epoch.number + 1 == epoch.stage.epochs and self.epochs_done < self.recipe.epochs:
            checkpoint.save_weights(self.folder / f"stage{epoch.stage_index + 1}.pt", state)
        self._write_csv()
        if self._tensorboard is not None:
            self._tensorboard.follow(self.rows)

    def _write_csv(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        with self._forgiven_if_open("metrics.csv"):
            files.write_text(self.folder / "metrics.csv", text.getvalue())

    @contextlib.contextmanager
    def _forgiven_if_open(self, name: str) -> Iterator[None]:
        """Let a run go on if Windows refuses to replace a file that another program has open: it can be made again."""
        try:
            yield
        except RunError as error:
            if not (files.PAUSES and isinstance(error.__cause__, PermissionError)):
                raise
            self.machine.note(f"{name} is open in another program and stays as it was until it is next written")

    def draw_views(self, stage_index: int, images: Tensor, labels: Tensor, draws: EpochDraws, size: int) -> None:
        """Draw the first views of a stage, as the network will see them."""
        if not self.machine.leads:
            return
        share = self.machine.share_of_batch(0, self.recipe.stages[stage_index].batch)  # within which samples are mixed
        batch = make_batch(images, labels, draws, 0, share, size, self.recipe.augmentation)
        heading = f"{self._title}, stage {stage_index + 1}: training views at {size} px"
        name = f"views-stage{stage_index + 1}.png"
        with self._forgiven_if_open(name):
            run_plots.views(self.folder / name, heading, batch, self.classes)

    def draw(self) -> None:
        """Draw the plots of the rows."""
        if not self.rows or not self.machine.leads:
            return
        curves = run_plots.curves(self.folder, self._title, self.recipe, self.rows, self.images["val"])
        for path, draw in curves.items():
            with self._forgiven_if_open(path.name):
                draw()
        self._drawn = time.monotonic()

    def finish(self, net: torch.nn.Module) -> None:
        """Draw the plots, write `summary.json` and print the result, for as many epochs as there are."""
        if not self.rows or not self.machine.leads:
            return
        self.draw()
        summary = {
            "run": self.name,
            "finished": self.epochs_done == self.recipe.epochs,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "parameters": count_parameters(net),
            "images": self.images,
            "epochs": self.epochs_done,
            "samples": self.recipe.samples(self.images["train"], self.epochs_done),
            "last": self._result(self.rows[-1]),
            "best, selected on these images": self._result(self.best),
            "seconds": round(sum(row["seconds"] for row in self.rows), 1),
            **self.machine.as_dict(),
        }
        path = self.folder / "summary.json"
        if not (self._finished_before and path.exists()):
            files.write_text(path, json.dumps(summary, indent=2) + "\n")
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
        return {
            "epoch": row["epoch"],
            "val_accuracy": row["val_accuracy"],
            "interval_95": list(interval(row["val_accuracy"], self.images["val"])),
            "eval_size": self.recipe.stages[row["stage"] - 1].eval_size,
            "tta": self.recipe.at(row["epoch"] - 1).tta,
        }


def best_row(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the highest validation accuracy, the first if several tie; None without validation."""
    scored = (row for row in rows if row["val_accuracy"] is not None)
    return max(scored, key=lambda row: row["val_accuracy"], default=None)


def _plain(value: Any) -> Any:
    """A setting in JSON's types; paths are absolute, so that the run's images are found from anywhere."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value.absolute()) if isinstance(value, Path) else value
