"""What is trained and how it learns: the network, its running average, the optimiser and the schedule."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import checkpoint
import distributed
from aligned import Aligned, rounded
from augment import Draws, erase, mix, normalise, view
from engine import Engine
from losses import LabelSmoothingLoss
from muon import Muon
from scheduler import DecayingCosineWarmRestarts
from settings import NO_LIMIT, Recipe, Stage

FILTER_RATE = 0.1  # of Muon's steps, as a share of the rate of everything else
RGB = 3  # a filter over the image itself, the stem's, is no hidden layer: Muon leaves it to SGD


class EpochResult(NamedTuple):
    """Of one epoch's steps: losses float32 (steps,), right answers, samples seen; is all that was learnt finite?"""

    losses: Tensor
    hits: int
    samples: int
    finite: bool


class RunningAverage:
    """Exponential average of a network's weights and BatchNorm statistics, the first update being a copy.

    PyTorch's AveragedModel gives the same numbers, but waits for the device at each update, to hand it the count.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay, self.updates = copy.deepcopy(net).requires_grad_(False), decay, 0
        self._own, self._source = (
            [value for value in module.state_dict().values() if value.is_floating_point()] for module in (self.net, net)
        )

    @torch.no_grad()
    def update(self) -> None:
        """Draw the average closer to the network's present values."""
        torch._foreach_lerp_(self._own, self._source, 1 - self.decay if self.updates else 1.0)
        self.updates += 1


class Learner:
    """A recipe's network on a device, trained epoch by epoch; `state` and `restore` carry it across interruptions."""

    def __init__(self, recipe: Recipe, classes: int, engine: Engine) -> None:
        self.recipe, self.engine = recipe, engine
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.net = checkpoint.network(recipe, classes)
        self.net.to(engine.device, memory_format=torch.channels_last)
        self._net = distributed.parallel(self._form(classes))
        self.loss = LabelSmoothingLoss(classes, recipe.label_smoothing, reduction="none")
        self.average: RunningAverage | None = None
        self.optimizer: torch.optim.Optimizer
        self.schedule: LRScheduler

    def _form(self, classes: int) -> nn.Module:
        """The network as it is calculated in training steps: compiled, aligned, or just itself."""
        recipe, machine = self.recipe, self.engine
        if machine.compile:
            return machine.compiled(self.net)
        planes = rounded(recipe.planes)
        if machine.device.type != "cpu" or planes == recipe.planes:
            return self.net
        # Its weights are not used: a cosine stem, which may not have as many filters, has the shapes of any other.
        wider = dataclasses.replace(recipe, planes=planes, budget=NO_LIMIT, cosine_stem=False)
        with torch.device("meta"):
            twin = checkpoint.network(wider, classes)
        return Aligned(self.net, twin)

    @property
    def scored(self) -> nn.Module:
        """The network that is scored and kept: the average where the recipe keeps one."""
        return self.net if self.average is None else self.average.net

    def begin(self, stage: Stage, images: int) -> None:
        """Start a stage over `images` training images: the weights stay; optimiser, schedule and average are new."""
        recipe = self.recipe
        self.optimizer = build_optimizer(recipe, stage, self.net, self.engine.precision)
        if recipe.schedule == "restarts":
            self.schedule = DecayingCosineWarmRestarts(
                self.optimizer, recipe.cycle, recipe.cycle_growth, recipe.cycle_decay
            )
        else:
            steps = images * recipe.views // stage.batch
            self.schedule = LambdaLR(self.optimizer, lambda step: recipe.rate(stage, step / steps) / stage.lr)
        if recipe.average:
            self.average = RunningAverage(self.net, recipe.average)

    def train_epoch(
        self, images: Tensor, labels: Tensor, draws: Draws, stage: Stage, size: int, tick: Callable[[], None]
    ) -> EpochResult:
        """One pass over the drawn samples: uint8 images (N, 3, H, W) and int64 labels (N,) on the device.

        Nothing waits for the device before the end; `tick` is called after each step and may raise to stop.
        Of several processes each takes its share of every batch, and mixes samples within that share only. BatchNorm
        normalises by the share, too, and keeps the leader's running statistics. The result is that of all shares.
        """
        self.net.train()
        device = images.device
        steps = len(draws.order) // stage.batch
        losses = torch.zeros(steps, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        for step in range(steps):
            rows = self.engine.rows(step, stage.batch)
            index, uniforms = draws.order[rows], draws.uniforms[rows]
            x = view(images.index_select(0, index), uniforms, draws.colour_orders[step], size, self.recipe.view)
            loss, right = self._step(normalise(x, inplace=True), labels[index], draws.mix[rows], uniforms)
            losses[step] = loss
            hits += right
            tick()
        if self.recipe.schedule == "restarts":
            self.schedule.step()
        return self._result(losses, hits, steps * stage.batch)

    def _step(self, x: Tensor, labels: Tensor, lam: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from one batch of normalised views; mean loss and number of right answers, on the device."""
        loss, right = self._forward(x, labels, lam, uniforms)
        self._learn(loss)
        return loss.detach(), right

    def _forward(self, x: Tensor, labels: Tensor, lam: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Erase and mix, and see what the network makes of it: mean loss and number of right answers."""
        views = self.recipe.view
        x, other, share = mix(erase(x, uniforms, views), labels, lam, uniforms, views)
        with self.engine.autocast():
            logits = self._net(x.contiguous(memory_format=torch.channels_last))
        logits = logits.float()
        if views.mixup or views.cutmix:
            loss = (share * self.loss(logits, labels) + (1 - share) * self.loss(logits, other)).mean()
            labels = torch.where(share >= 0.5, labels, other)
        else:
            loss = self.loss(logits, labels).mean()
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _learn(self, loss: Tensor) -> None:
        """Step down the loss's gradient."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recipe.schedule == "cosine":
            self.schedule.step()
        if self.average is not None:
            self.average.update()

    def _result(self, losses: Tensor, hits: Tensor, samples: int) -> EpochResult:
        """Fetch an epoch's figures from the device, all at once, and put those of all processes together."""
        together = torch.cat([losses.double(), hits.double()[None], self._all_finite().double()[None]])
        together, world = distributed.total(together.cpu()), self.engine.world
        return EpochResult((together[:-2] / world).float(), int(together[-2]), samples, bool(together[-1] == world))

    def _all_finite(self) -> Tensor:
        """Whether all numbers that a checkpoint would keep are finite: bool, 0-dim, on the device."""
        kept = [*self.net.state_dict().values(), *self.scored.state_dict().values()]
        kept += [value for of_parameter in self.optimizer.state.values() for value in of_parameter.values()]
        largest = torch._foreach_norm([x for x in kept if torch.is_tensor(x) and x.is_floating_point()], math.inf)
        return torch.stack(largest).isfinite().all()

    def state(self) -> dict[str, Any]:
        """Everything that continues the training, as plain values and tensors."""
        return {
            "model": self.net.state_dict(),
            "average": None if self.average is None else self.average.net.state_dict(),
            "averaged": 0 if self.average is None else self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, after `begin`. Raises RuntimeError, KeyError or ValueError where it does not fit."""
        self.net.load_state_dict(state["model"])
        if self.average is not None:
            self.average.net.load_state_dict(state["average"])
            self.average.updates = state["averaged"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def build_optimizer(
    recipe: Recipe, stage: Stage, net: nn.Module, precision: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The recipe's optimiser, in PyTorch's fused form; norms and biases without decay unless `decay_norms`.

    Muon multiplies in `precision`; all weights and states are float32.
    """
    muon = recipe.optimizer == "muon"
    weights, others, filters = [], [], []
    for p in net.parameters():
        if muon and p.ndim == 4 and p.shape[1] > RGB:
            filters.append(p)
        else:
            (weights if recipe.decay_norms or p.ndim > 1 else others).append(p)
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    if muon:
        groups.append({"params": filters, "weight_decay": 0.0, "lr": stage.lr * FILTER_RATE, "orthogonal": True})
        return Muon(groups, lr=stage.lr, momentum=0.9, precision=precision)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=0.9, nesterov=True, fused=True)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=stage.lr, fused=True)
