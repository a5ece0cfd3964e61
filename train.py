#!/usr/bin/env python3
"""Train a small image classifier from scratch on STL-10's 5,000 labelled images.

    python3 train.py                    # the original recipe, meant for a CUDA GPU
    python3 train.py --demo             # the whole path in about a minute on a CPU, without a data set
    python3 train.py --help             # every setting
    torchrun --nproc-per-node 2 train.py …    # the same on two GPUs

Data flows one way: files → one uint8 tensor on the device → views → network → loss → optimiser and schedule →
metrics.csv and checkpoints → plots. Rerun the same command to continue where it stopped.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness import errors

if __name__ == "__main__":
    errors.before_imports()  # which take seconds: Ctrl-C or lack of memory there gives one line, not a traceback

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from augment import Batch, EpochDraws, augmented_batch, draw_epoch, take_samples
from data import Split, balanced_indices
from harness import checkpoint, distributed, scoring
from harness.channel_padding import with_padded_channels
from harness.cli import Runtime, default_run_folder, epoch_warnings, parse_train, usage_error
from harness.compiled import CompiledForm
from harness.cost import next_epoch_seconds
from harness.graphs import Graphs
from harness.images import fingerprint, load_images
from harness.interrupt import Interrupt, Stopped
from harness.machine import Machine, start_machine
from harness.metrics import hits_and_loss
from harness.picture_defaults import fit_to_folder
from harness.progress import Progress
from harness.run_folder import RunFolder
from harness.teachers import Teachers, digest, load_teachers, notes_on_first_weights
from losses import LabelSmoothingLoss, distillation_loss
from optim import RunningAverage, all_finite, build_optimizer, forget_scale, portable_state, rates_on_device
from recipes import Recipe, Stage, build_network
from scheduler import DecayingCosineWarmRestarts


def main(argv: list[str] | None = None) -> int:
    recipe, runtime = parse_train(argv)
    interrupt = Interrupt(runtime.max_minutes, distributed.world_size())  # --max-minutes counts from here
    machine = start_machine(runtime)
    with distributed.leader_first():
        split = load_images(recipe, runtime.data_dir, runtime.images)
    if runtime.images:
        recipe = fit_to_folder(recipe, runtime, split)
    samples = len(split.train) * recipe.views_per_image
    if any(stage.epochs and stage.batch > samples for stage in recipe.stages):
        usage_error(f"--batch is more than an epoch's {samples} samples")
    teachers = load_teachers(runtime.teacher, split.dataset, split.val, runtime.data_dir)
    recipe = dataclasses.replace(recipe, teachers=tuple(teachers))
    classes = split.dataset.classes
    try:
        trainer = Trainer(recipe, len(classes), machine, [teacher.model for teacher in teachers.values()])
    except ValueError as error:
        usage_error(str(error))
    run = RunFolder(default_run_folder(recipe, runtime), recipe, classes, fingerprint(split), machine)
    with run.locked():
        return fit(trainer, run, split, runtime, interrupt)


def fit(trainer: "Trainer", run: RunFolder, split: Split, runtime: Runtime, interrupt: Interrupt) -> int:
    """Begin or continue a run, train to the end of the recipe or until interrupted; returns the exit status."""
    status = 0
    begin_or_continue(trainer, run, split, runtime)
    with interrupt.listening():
        try:
            with interrupt.before_peer_loss(), errors.memory_reported(run.what_needs_memory):
                train_epochs(trainer, run, split, interrupt)
                distributed.leave()
        except Stopped as stop:
            reason, status = stop.args
            print(f"stopped: {reason}")
        run.finish(trainer.net)
    if status:
        without = " without --overwrite" if runtime.overwrite else ""
        print(f"the same command{without} continues this run")
    return status


def begin_or_continue(trainer: "Trainer", run: RunFolder, split: Split, runtime: Runtime) -> None:
    """Put the trainer into the state that the run folder holds, if any; else start from --init, or from scratch."""
    first, overwrite = None, runtime.overwrite
    if overwrite and (restarter := distributed.restarted_by()):
        print(f"{restarter} has restarted this command, so --overwrite is ignored and the run continues")
        overwrite = False
    if overwrite and run.recipe.init:
        first = checkpoint.take_weights(trainer.net, run.recipe.init)  # or refuse them, before anything is removed
    with distributed.leader_first():
        state = run.resume(overwrite, runtime.tensorboard)
    trainer.recipe = recipe = run.recipe  # resume may have brought back the rules of an older version
    if distributed.max_over_ranks(run.epochs_done) != run.epochs_done:
        raise errors.RunError(f"{run.folder} is not the same folder for all processes")
    if run.epochs_done == recipe.epochs:
        print("this run is finished; --overwrite starts over")
        return  # train_epochs finds nothing left to do
    epoch = recipe.at(run.epochs_done)
    if state:
        with checkpoint.mismatch_reported(run.folder / "last.pt"):
            if epoch.number:
                trainer.begin_stage(epoch.stage, run.images["train"])
                trainer.restore(state)
            else:  # between two stages only the weights carry over
                trainer.net.load_state_dict(state["model"])
    elif recipe.init:
        first = first or checkpoint.take_weights(trainer.net, recipe.init)
        for sentence in notes_on_first_weights(first, recipe, split, runtime.data_dir):
            trainer.machine.note(sentence)
    distributed.require_same({"images": run.images, "teachers": recipe.teachers, "weights": digest(trainer.net)})
    for sentence in epoch_warnings(recipe):
        trainer.machine.note(sentence)
    run.write_config(runtime, trainer.net)
    print(f"{run.folder}: {recipe.name}, {run.epochs_done} of {recipe.epochs} epochs done")
    print(trainer.machine, flush=True)


def train_epochs(trainer: "Trainer", run: RunFolder, split: Split, interrupt: Interrupt) -> None:
    """The loop over all stages' epochs: the original's are 300 at 70 px and 140 at 120. Raises Stopped to end early."""
    recipe, machine, (dataset, train, val) = trainer.recipe, trainer.machine, split
    images = machine.hold(dataset.images)
    labels, val = dataset.labels.to(images.device), val.to(images.device)
    if 0 < run.epochs_done < recipe.epochs:
        seconds = next_epoch_seconds(recipe, run.epochs_done, run.rows[-1]["seconds"])
        if shortage := interrupt.shortage(seconds):
            print(shortage, flush=True)
    progress = Progress(trainer.form, recipe, trainer.net, run.images, len(dataset.classes))
    while run.epochs_done < recipe.epochs:
        began = time.monotonic()
        stage_index, stage, number, size, tta = recipe.at(run.epochs_done)
        seed = (recipe.seed, stage_index, number)
        indices = balanced_indices(train, dataset.labels, seed) if recipe.balance else train
        draws = draw_epoch(indices, recipe.views_per_image, stage.batch, recipe.augmentation, seed)
        draws = draws.to(machine.device, images.device)
        if number == 0:
            trainer.begin_stage(stage, len(train))
            run.draw_views(stage_index, images, labels, draws, size)
        lr = trainer.learning_rate
        with distributed.peer_loss_reported(), progress.epoch(run.epochs_done, run.rows) as tick:

            def after_step() -> None:
                tick()
                interrupt.stop_if_signalled()

            result = trainer.train_epoch(images, labels, draws, stage, size, after_step)
        trained_at = time.monotonic()
        val_loss, val_accuracy = trainer.validate(images, labels, val, stage.eval_size, tta)
        run.require_finite(result.losses, result.finite, val_loss)  # none of the epoch is committed yet
        run.commit(
            {
                "stage": stage_index + 1,
                "epoch": run.epochs_done + 1,
                "lr": lr,
                "train_loss": result.losses.double().mean().item(),
                "train_accuracy": result.hits / result.samples,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "seconds": time.monotonic() - began,
                "samples_per_second": progress.samples_per_second,
            },
            trainer.state(),
        )
        if run.epochs_done < recipe.epochs:
            interrupt.stop_if_signalled(epoch_in_flight=False)
            train_seconds = trained_at - began - progress.cold_seconds  # without compiling
            rest_seconds = time.monotonic() - trained_at  # validation, checkpoint, plots
            next_seconds = next_epoch_seconds(recipe, run.epochs_done, train_seconds, rest_seconds)
            interrupt.stop_if_out_of_time(next_seconds + progress.compile_seconds(run.epochs_done))


class EpochResult(NamedTuple):
    """An epoch's figures, over all processes."""

    losses: Tensor  # float32 (steps,), one per step
    hits: int  # correct predictions
    samples: int
    finite: bool  # whether weights, running statistics and optimiser state all are


class Trainer:
    """A recipe's network on a machine, trained epoch by epoch; `state` and `restore` carry it across interruptions."""

    def __init__(self, recipe: Recipe, classes: int, machine: Machine, teachers: Sequence[nn.Module] = ()) -> None:
        self.recipe, self.machine = recipe, machine
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.net = build_network(recipe, classes)
        self.net.to(machine.device, memory_format=torch.channels_last)
        # The module that a step trains shares net's weights: it is the network as it is, compiled, or (on a CPU,
        # uncompiled) with padded channels, inside a wrapper that averages gradients over processes.
        pads = machine.device.type == "cpu" and not machine.compile
        padded = with_padded_channels(self.net, recipe, classes) if pads else self.net
        self.form = CompiledForm(padded, machine)
        self.step_model = distributed.parallel(self.form)
        self.graphs = Graphs(machine)
        self.teachers = Teachers(teachers, recipe.teacher_temperature, machine) if teachers else None
        self.loss = LabelSmoothingLoss(classes, recipe.label_smoothing, reduction="none")  # one per sample
        self.average: RunningAverage | None = None
        self.optimizer: torch.optim.Optimizer  # begin_stage makes this and the next two
        self.schedule: LRScheduler
        self.scaler: torch.amp.GradScaler

    @property
    def eval_model(self) -> nn.Module:
        """The network that is scored and kept: the average if the recipe keeps one."""
        return self.net if self.average is None else self.average.net

    @property
    def learning_rate(self) -> float:
        """The next step's learning rate (Muon's filters take a share of it)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def begin_stage(self, stage: Stage, train_count: int) -> None:
        """Start a stage over `train_count` images: the weights stay; optimiser, schedule and average are new."""
        recipe = self.recipe
        self.optimizer = build_optimizer(recipe, stage, self.net, self.machine.precision)
        fp16 = self.machine.precision is torch.float16
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=fp16)
        if recipe.rate_by_step:
            steps = recipe.steps_per_epoch(stage, train_count)  # LambdaLR takes factors of each group's own peak
            self.schedule = LambdaLR(self.optimizer, lambda step: recipe.learning_rate(stage, step / steps) / stage.lr)
        else:
            cycles = (recipe.cycle, recipe.cycle_growth, recipe.cycle_decay)
            self.schedule = DecayingCosineWarmRestarts(self.optimizer, *cycles)
        if recipe.average:
            self.average = RunningAverage(self.net, recipe.average, recipe.average_warmup)
        self._reset_graphs()

    def _reset_graphs(self) -> None:
        """Drop the graphs, which point at the old optimiser's state, and put the rates where new graphs read them."""
        self.graphs.forget()
        if self.graphs.enabled:
            rates_on_device(self.optimizer, self.machine.device)

    def train_epoch(
        self, images: Tensor, labels: Tensor, draws: EpochDraws, stage: Stage, size: int, after_step: Callable[[], None]
    ) -> EpochResult:
        """One pass over the drawn samples, of uint8 images (N, 3, H, W) and int64 labels (N,), where `hold` put them.

        `augmented_batch` makes the views: rotation, crop, flips, colours; then it normalises, erases and mixes.
        Nothing waits for the device before the end; `after_step` may raise.
        With several processes, each takes an equal share of every batch and mixes samples only within it. BatchNorm
        also normalises within the share, and the leader's running statistics are kept. The result covers all shares.
        """
        self.net.train()
        self.graphs.keep_only(size)
        steps = len(draws.order) // stage.batch
        losses = torch.zeros(steps, device=self.machine.device)
        hits = torch.zeros((), dtype=torch.int64, device=self.machine.device)
        options = self.recipe.augmentation
        for step in range(steps):
            samples = take_samples(images, labels, draws, self.machine.share_of_batch(step, stage.batch))
            batch = self.graphs.run(augmented_batch, samples, draws.colour_orders[step], size, options, warm=1)
            losses[step], step_hits = self.step(batch)
            hits += step_hits
            after_step()
        if not self.recipe.rate_by_step:
            self.schedule.step()
        return self._result(losses, hits, steps * stage.batch)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Learn from one batch. Returns the mean loss and the number of correct predictions, still on the device."""
        loss, hits = self.graphs.run(self.learn, batch)
        if self.recipe.rate_by_step:
            self.schedule.step()
        if self.average is not None:
            self.average.update()
        return loss, hits

    def learn(self, x: Tensor, labels: Tensor, other_labels: Tensor, own_share: Tensor) -> tuple[Tensor, Tensor]:
        """Forward pass, loss, backward pass, update: of normalised views (B, 3, s, s) and the fields of a `Batch`."""
        x = x.contiguous(memory_format=torch.channels_last)
        soft_targets = None if self.teachers is None else self.teachers(x)
        larger_label = torch.where(own_share >= 0.5, labels, other_labels)

        def forward_and_backward() -> tuple[Tensor, Tensor]:  # run again, uncompiled, where compiling fails
            with self.machine.autocast():
                logits = self.step_model(x)
            logits = logits.float()
            loss = self.batch_loss(logits, labels, other_labels, own_share, soft_targets)
            self.scaler.scale(loss).backward()
            return loss.detach(), (logits.detach().argmax(1) == larger_label).sum()

        self.optimizer.zero_grad()
        loss, hits = self.form.attempt(forward_and_backward, x.shape)
        forget_scale(self.optimizer)  # GradScaler's, left by a failed capture: this step would use it
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, hits

    def batch_loss(
        self, logits: Tensor, labels: Tensor, other_labels: Tensor, own_share: Tensor, soft_targets: Tensor | None
    ) -> Tensor:
        """Mean loss of logits (B, K): against the labels, mixed as the views are, and the teachers' soft targets."""
        loss = self.loss(logits, labels)
        if self.recipe.augmentation.mixes:
            loss = own_share * loss + (1 - own_share) * self.loss(logits, other_labels)
        if soft_targets is not None:
            share, temperature = self.recipe.label_share, self.recipe.teacher_temperature
            loss = share * loss + (1 - share) * distillation_loss(logits, soft_targets, temperature)
        return loss.mean()

    def _result(self, losses: Tensor, hits: Tensor, samples: int) -> EpochResult:
        """Fetch an epoch's figures from the device, all at once, and combine those of all processes."""
        finite = all_finite({self.net, self.eval_model}, self.optimizer)
        figures = torch.cat([losses.double(), hits.double()[None], finite.double()[None]])
        sums, world = distributed.sum_over_ranks(figures.cpu()), self.machine.world
        losses, hits, finite = sums.split([len(losses), 1, 1])
        return EpochResult((losses / world).float(), int(hits), samples, bool(finite == world))

    def validate(
        self, images: Tensor, labels: Tensor, val: Tensor, size: int, tta: str
    ) -> tuple[float | None, float | None]:
        """Loss and accuracy on the images `val` (indices), clean, at `size` px, in eval mode, averaged as `tta` says.

        (None, None) without validation images, and in processes that do not lead.
        """
        if not len(val) or not self.machine.leads:
            return None, None
        logits = self.graphs.making_room(
            lambda: scoring.tta_logits(self.eval_model, images[val], size, tta, precision=self.machine.precision)
        )
        hits, loss = hits_and_loss(logits, labels[val].to(logits.device))
        return loss.item(), hits.item() / len(val)

    def state(self) -> dict[str, Any]:
        """Everything needed to continue training, as plain values and tensors."""
        return {
            "model": self.net.state_dict(),
            "average": None if self.average is None else self.average.net.state_dict(),
            "averaged": 0 if self.average is None else self.average.updates,
            "optimizer": portable_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, after `begin_stage`. Raises what `MISMATCH_ERRORS` lists."""
        self.net.load_state_dict(state["model"])
        if self.average is not None:
            self.average.net.load_state_dict(state["average"])
            self.average.updates = state["averaged"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self._reset_graphs()


if __name__ == "__main__":
    distributed.end_process(errors.report(main))
