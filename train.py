#!/usr/bin/env python3
"""Train a small image classifier from scratch on STL-10's 5,000 labelled images.

    python3 train.py                    # the original recipe, on a CUDA GPU
    python3 train.py --demo             # the whole path in under a minute on a CPU, without a data set
    python3 train.py --help             # every setting
    torchrun --nproc-per-node 2 train.py …    # the same on two GPUs

Data flows one way: files → one uint8 tensor on the device → views → network → loss → optimiser and schedule →
metrics.csv and checkpoints → plots. The same command again continues where it stopped.
"""

import contextlib
import datetime
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run begins there is nothing to save, nor to explain

from torch import Tensor
from tqdm import tqdm

import augment
import checkpoint
import dataset
import distributed
import engine
import errors
import files
import plots
import scoring
import settings
from data import DataSet
from learner import EpochResult, Learner
from model import count_parameters
from record import Follower, Record, duration

STOPPED_BY_TIME = 3  # exit status
LONG = 4 * 3600.0  # seconds


class Stopped(Exception):
    """The run is to end before its last epoch; the arguments are the reason and the exit status."""


def main(argv: list[str] | None = None) -> int:
    recipe, runtime = settings.parse(argv)
    deadline = time.monotonic() + (runtime.max_minutes * 60 or math.inf)
    _, world, _ = distributed.place()
    for stage in recipe.stages:
        if stage.epochs and stage.batch % world:
            settings.build_parser().error(f"--batch {stage.batch} cannot be shared equally by {world} processes")
    machine = engine.start(runtime)
    with distributed.leader_first():
        found, train, val = dataset.load(recipe, runtime.data_dir, runtime.images)
    largest = max(stage.batch for stage in recipe.stages if stage.epochs)
    if largest > len(train) * recipe.views:
        settings.build_parser().error(f"--batch {largest} is more than an epoch's {len(train) * recipe.views} samples")
    try:
        learner = Learner(recipe, len(found.classes), machine)
    except ValueError as error:
        settings.build_parser().error(f"{error}: give smaller --layers or --planes, or a larger --budget")
    folder, kind = settings.run_folder(recipe, runtime), Record if machine.leads else Follower
    record = kind(folder, recipe, found.classes, dataset.identity(found, train, val))
    with files.held(folder, wait=False) if machine.leads else contextlib.nullcontext():
        return Run(runtime, learner, record, found, train, val).go(deadline)


class Run:
    """One run: the recipe, the machine, the data on it, what is learnt, and the record of it."""

    def __init__(
        self, runtime: settings.Runtime, learner: Learner, record: Record, found: DataSet, train: Tensor, val: Tensor
    ) -> None:
        self.runtime, self.learner, self.record, self.train = runtime, learner, record, train
        self.recipe, self.machine = learner.recipe, learner.engine
        device = self.machine.device
        self.images, self.labels, self.val = found.images.to(device), found.labels.to(device), val.to(device)
        self.signal = 0

    def go(self, deadline: float) -> int:
        """Begin or continue, train to the end of the recipe or the deadline, and say what came of it.

        `deadline`: on the clock of `time.monotonic`. Returns the exit status.
        """
        record, status = self.record, 0
        self.open()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        try:
            self.epochs(deadline)
        except Stopped as stop:
            reason, status = stop.args
            print(f"stopped: {reason}")
        record.finish(self.learner.net, self.machine)
        if status:
            without = " without --overwrite" if self.runtime.overwrite else ""
            print(f"the same command{without} continues this run")
        return status

    def epochs(self, deadline: float) -> None:
        """The one loop. Raises Stopped where it ends before the recipe does."""
        record, recipe = self.record, self.recipe
        try:
            while record.done < recipe.epochs:
                seconds = self.epoch(*recipe.locate(record.done))
                self.look_at_clock(seconds, deadline)
            distributed.leave()
        except distributed.Lost:
            self.look_at_signal()  # which came to all processes, but in different steps
            raise

    def on_signal(self, number: int, _: Any) -> None:
        """Remember the signal for the end of the step; a second one ends the process at once."""
        self.signal = number
        # torchrun passes on what a terminal has sent to all processes already; it ends by itself who takes long
        again = signal.SIG_DFL if self.machine.world == 1 else signal.SIG_IGN
        for either in (signal.SIGINT, signal.SIGTERM):
            signal.signal(either, again)

    def look_at_signal(self) -> None:
        """Raise Stopped where a signal has come."""
        if self.signal:
            name = signal.Signals(self.signal).name
            raise Stopped(f"{name} came; the epoch in flight is dropped", 128 + self.signal)

    def look_at_clock(self, seconds: float, deadline: float) -> None:
        """Raise Stopped where the next epoch, judged by the `seconds` of the last one, would end after the deadline.

        Of several processes all stop where one would; none goes on before the leader has committed the epoch.
        """
        done, late = self.record.done, False
        if done < self.recipe.epochs:
            seconds *= (self.recipe.size(done) / self.recipe.size(done - 1)) ** 2
            late = time.monotonic() + seconds > deadline
        if distributed.largest(late):
            limit = f"--max-minutes {self.runtime.max_minutes:g}"
            raise Stopped(f"another epoch would overrun {limit}", STOPPED_BY_TIME)

    def open(self) -> None:
        """Take up the run folder's state, or set up a fresh one, and say how things stand."""
        record, recipe, learner = self.record, self.recipe, self.learner
        with distributed.leader_first():
            state = record.open(self.runtime.overwrite, self.runtime.tensorboard)
        if distributed.largest(record.done) != record.done:
            raise errors.RunError(f"{record.folder} is not one and the same folder for all processes")
        if record.done == recipe.epochs:
            print("this run is finished; --overwrite starts anew")
            return
        number, epoch = recipe.locate(record.done)
        try:
            if state is not None:
                learner.net.load_state_dict(state["model"])
            elif recipe.init:
                learner.net.load_state_dict(checkpoint.load_network(Path(recipe.init)).model.state_dict())
            if epoch:
                learner.begin(recipe.stages[number], len(self.train))
                learner.restore(state)
        except checkpoint.MISFITS as error:
            source = recipe.init if state is None else record.folder / "last.pt"
            raise errors.RunError(f"{source} does not fit this network: {checkpoint.first_words(error)}") from error
        record.write_config(self.runtime, self.machine, count_parameters(learner.net))
        seconds = self.machine.predict_seconds(recipe, learner.net, len(self.train), record.done)
        print(f"{record.folder}: {recipe.name}, {record.done} of {recipe.epochs} epochs done")
        print(f"{self.machine}: predicted {duration(seconds)} for the remaining epochs")
        if self.machine.device.type == "cpu" and seconds > LONG:
            cpu = settings.RECIPES["cpu"]
            shorter = self.machine.predict_seconds(cpu, checkpoint.network(cpu, len(record.classes)), len(self.train))
            print(f"that is long for a CPU; predicted for --recipe cpu: {duration(shorter)}, for --demo: one minute")

    def epoch(self, number: int, epoch: int) -> float:
        """One epoch of a stage, both counted from 0: train, validate, commit, show. Returns its seconds."""
        recipe, learner, record = self.recipe, self.learner, self.record
        stage, began = recipe.stages[number], time.monotonic()
        if epoch == 0:
            learner.begin(stage, len(self.train))
        draws = augment.draw(self.train, recipe.views, stage.batch, recipe.view, (recipe.seed, number, epoch))
        draws = draws.to(self.machine.device)
        size, lr = stage.size(epoch), learner.optimizer.param_groups[0]["lr"]
        if epoch == 0 and self.machine.leads:
            self.sheet(draws, number, size)
        result = self.train_epoch(draws, stage, size)
        trained = time.monotonic() - began
        val_loss, val_accuracy = self.validate(stage.eval_size)
        self.check(result, val_loss)
        row = {
            "stage": number + 1,
            "epoch": record.done + 1,
            "lr": lr,
            "train_loss": result.losses.double().mean().item(),
            "train_accuracy": result.hits / result.samples,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": time.monotonic() - began,
            "samples_per_second": result.samples / trained,
        }
        after = next((later for later in recipe.stages[number + 1 :] if later.epochs), None)
        if epoch + 1 == stage.epochs and after is not None and len(self.val):
            _, accuracy = self.validate(after.eval_size)
            record.crossings.append({"epoch": row["epoch"], "eval_size": after.eval_size, "val_accuracy": accuracy})
        record.commit(row, learner.state())
        record.draw(now=False)
        if epoch == 0 and stage.epochs > 1:
            rest = sum(stage.size(e) ** 2 for e in range(1, stage.epochs)) / size**2 * row["seconds"]
            end = datetime.datetime.now() + datetime.timedelta(seconds=rest)
            print(f"stage {number + 1} ends about {end:%A %H:%M} at this rate")
        return row["seconds"]

    def train_epoch(self, draws: augment.Draws, stage: settings.Stage, size: int) -> EpochResult:
        """Train on an epoch's draws behind a progress bar, which shows the epoch before: it must not wait."""
        record = self.record
        before = f"loss {record.rows[-1]['train_loss']:.3f}" if record.rows else ""
        steps = len(draws.order) // stage.batch
        title = f"epoch {record.done + 1}/{self.recipe.epochs}"
        hidden = None if self.machine.leads else True  # None: hidden where there is no terminal
        with (
            tqdm(total=steps, desc=title, postfix=before, unit="batch", leave=False, disable=hidden) as bar,
            distributed.noticing(),
        ):

            def tick() -> None:
                bar.update()
                self.look_at_signal()

            return self.learner.train_epoch(self.images, self.labels, draws, stage, size, tick)

    def validate(self, size: int) -> tuple[float | None, float | None]:
        """Loss and accuracy of the scored network on the validation images at `size` px.

        None without images, and in processes that follow.
        """
        if not len(self.val) or not self.machine.leads:
            return None, None
        scores = scoring.logits(
            self.learner.scored,
            self.images[self.val],
            size,
            mirror=self.recipe.mirror,
            precision=self.machine.precision,
        )
        hits, loss = scoring.hits_and_loss(scores, self.labels[self.val])
        return loss.item(), hits.item() / len(self.val)

    def check(self, result: EpochResult, val_loss: float | None) -> None:
        """Raise RunError where a number went wrong in the epoch: nothing of it has been committed yet."""
        bad = (~result.losses.isfinite()).nonzero()
        if len(bad):
            what = f"the loss of step {int(bad[0]) + 1}"
        elif not result.finite:
            what = "a weight, running statistic or optimiser value after the last step"
        elif val_loss is not None and not math.isfinite(val_loss):
            what = "the validation loss"
        else:
            return
        folder, done = self.record.folder, self.record.done
        way_out = "Try a lower --lr or --precision fp32"
        if done:
            way_out += f", with another --out; --init {folder / 'last.pt'} starts from the weights of epoch {done}"
        raise errors.RunError(f"{what} of epoch {done + 1} is not a finite number, so the run has stopped. {way_out}")

    def sheet(self, draws: augment.Draws, number: int, size: int) -> None:
        """Draw the first views of a stage, as the network will see them."""
        index = draws.order[:32]
        views = augment.view(
            self.images[index], draws.uniforms[:32], draws.colour_orders[0], size, self.recipe.view
        ).cpu()
        names = [self.record.classes[label] for label in self.labels[index].tolist()]
        heading = f"{self.record.folder.name}, stage {number + 1}: training views at {size} px"
        plots.sample_sheet(
            self.record.folder / f"views-stage{number + 1}.png", views.numpy(), names, columns=8, heading=heading
        )


if __name__ == "__main__":
    sys.exit(errors.report(main))
