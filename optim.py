"""The recipe's optimiser with its parameter groups; Muon, for convolutions; the running average of the weights."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from model import ResNet, WideNet
from recipes import Recipe, Stage

MOMENTUM = 0.9  # of sgd and muon
ITERATIONS = 3  # of Newton-Schulz: x ← (LINEAR + CUBIC·x·xᵀ + QUINTIC·(x·xᵀ)²)·x
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315  # Keller Jordan's, see Muon
EPSILON = 1e-7
FILTER_RATE = 0.1  # of Muon's steps, as a share of the rate of everything else


def build_optimizer(
    recipe: Recipe, stage: Stage, net: ResNet | WideNet, precision: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The recipe's optimiser, in PyTorch's fused form; BatchNorm and biases without decay unless `decay_norms`.

    Muon multiplies in `precision`; all weights and states are float32. It leaves the stem's filters to SGD: they read
    the image itself, so they are not a hidden layer.
    """
    muon = recipe.optimizer == "muon"
    weights, others, filters = [], [], []
    for p in net.parameters():
        if muon and p.ndim == 4 and p is not net.conv1.weight:
            filters.append(p)
        else:
            (weights if recipe.decay_norms or p.ndim > 1 else others).append(p)
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    if muon:
        groups.append({"params": filters, "weight_decay": 0.0, "lr": stage.lr * FILTER_RATE, "orthogonal": True})
        return Muon(groups, lr=stage.lr, momentum=MOMENTUM, precision=precision)
    if recipe.optimizer == "sgd":
        return with_momentum(torch.optim.SGD(groups, lr=stage.lr, momentum=MOMENTUM, nesterov=True, fused=True))
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](groups, lr=stage.lr, fused=True)


def with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The optimiser with its momentum buffers already created, as zeros; this does not change the first step.

    PyTorch's fused SGD creates the buffers in its first step, and leaves them uninitialised if that step's fp16
    gradients overflow: the second step would then learn from whatever was in memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum; in groups with `orthogonal` set, 4-d filters (out, in, h, w) take Muon's step.

    It orthogonalises the momentum as a matrix (out, h·w·in), and resets the filters' norm to √out before moving them:
    with a BatchNorm after them, their scale affects only the relative size of the next step, so this replaces weight
    decay (Keller Jordan, 2024). PyTorch's own Muon takes only matrices, and multiplies them in bf16, which not every
    CPU supports.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float, precision: torch.dtype = torch.float32
    ) -> None:
        groups = [{"orthogonal": False, **group} for group in groups]
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=True, fused=True)
        self.precision = precision
        with_momentum(self)

    @torch.no_grad()
    def step(self) -> None:
        """One step. It clears the gradients of orthogonal groups."""
        for group in self.param_groups:
            if group["orthogonal"]:
                for filters in group["params"]:
                    self._muon_step(filters, group["lr"], group["momentum"])
        super().step()

    def _muon_step(self, filters: Tensor, lr: float | Tensor, momentum: float) -> None:
        if filters.grad is None:
            return
        state = self.state[filters]
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        buffer = state["momentum_buffer"]
        before = (filters.clone(), buffer.clone()) if overflow is not None else ()
        grad = filters.grad if scale is None else filters.grad.div_(scale)
        torch.add(grad, buffer, alpha=momentum, out=buffer)
        ahead = grad.add_(buffer, alpha=momentum)
        # The order of the columns does not matter: taken as they lie in memory, nothing has to be copied.
        order = (0, 2, 3, 1) if filters.is_contiguous(memory_format=torch.channels_last) else (0, 1, 2, 3)
        weights = filters.permute(order).view(len(filters), -1)  # a view, as it is written to
        direction = orthogonalise(ahead.permute(order).flatten(1), self.precision)
        weights.mul_(len(weights) ** 0.5 / weights.norm())
        if isinstance(lr, Tensor):  # on the device, so that a captured step reads its current value
            weights.sub_(direction * lr)
        else:
            weights.sub_(direction, alpha=lr)
        if overflow is not None:  # GradScaler's: where a gradient overflowed, nothing is learnt
            for value, old in zip((filters, buffer), before, strict=True):
                value.copy_(torch.where(overflow > 0, old, value))
        filters.grad = None  # done: SGD's step skips it


def orthogonalise(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """The nearest matrix with orthonormal rows (or columns, if there are fewer of them), roughly.

    float32 (rows, columns) to the same, with products in `precision`. Three Newton-Schulz steps with coefficients that
    lift small singular values fast and leave all of them near 1 rather than at it: the optimiser does not need more,
    nor more digits than bf16 has.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + EPSILON)).to(precision)
    lift = torch.tensor(LINEAR, dtype=precision).item()  # rounded to the precision of the products
    square, product = x @ x.T, None
    for iteration in range(ITERATIONS):  # x ← s·x with s a polynomial in x·xᵀ: the s are multiplied first
        step = torch.addmm(square, square, square, beta=CUBIC, alpha=QUINTIC)
        step.diagonal().add_(lift)
        product = step if product is None else step @ product
        if iteration + 1 < ITERATIONS:
            square = step @ square @ step
    x = (product @ x).float()
    return x.T if tall else x


def forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """Drop what GradScaler left in the optimiser if a step raised: the next step's scale would be multiplied by it."""
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)


def rates_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the learning rates on the device, where a captured step reads them and a schedule changes them."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True
            optimizer._warned_capturable_if_run_uncaptured = True  # the steps before the capture are meant to be


def portable_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state with its rates as plain numbers, which a machine without CUDA can load."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return state


def all_finite(nets: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> Tensor:
    """Whether all numbers that a checkpoint would keep from them are finite: bool, 0-dim, on the device."""
    kept = [value for net in nets for value in net.state_dict().values()]
    kept += [value for of_parameter in optimizer.state.values() for value in of_parameter.values()]
    largest = torch._foreach_norm([x for x in kept if torch.is_tensor(x) and x.is_floating_point()], math.inf)
    return torch.stack(largest).isfinite().all()


class RunningAverage:
    """Exponential average of a network's weights and BatchNorm statistics; the first update is a copy.

    With `warmup` the decay at update t, counted from 0, is min(decay, (1 + t) / (10 + t)): the average looks back over
    about a tenth of the steps so far, until it reaches 1 / (1 - decay) steps. Without warm-up, a run
    much shorter than 1 / (1 - decay) steps ends on an average that still consists largely of its first weights.

    PyTorch's AveragedModel gives the same numbers, but waits for the device at each update, to pass it the count.
    """

    def __init__(self, net: nn.Module, decay: float, warmup: bool = False) -> None:
        self.net, self.decay, self.warmup, self.updates = copy.deepcopy(net).requires_grad_(False), decay, warmup, 0
        self._own, self._source = (
            [value for value in module.state_dict().values() if value.is_floating_point()] for module in (self.net, net)
        )

    @torch.no_grad()
    def update(self) -> None:
        """Move the average closer to the network's current values."""
        torch._foreach_lerp_(self._own, self._source, 1 - self._decay_now() if self.updates else 1.0)
        self.updates += 1

    def _decay_now(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
