"""Learning rates as pure functions of time: restarts with falling peaks, and warm-up followed by one cosine."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def restart_rate(
    epoch: float, peak: float, T_0: int = 10, T_mult: int = 2, decay: float = 0.6, eta_min: float = 0.0
) -> float:
    """Learning rate at `epoch` (from 0, may be fractional) under cosine annealing with decaying warm restarts.

    Cycles last T_0, T_0·T_mult, T_0·T_mult² … epochs. Cycle n begins at `peak`·decayⁿ, never below `eta_min`, and
    falls along a half cosine towards `eta_min`, which it does not reach: a cycle of T epochs uses positions
    0 … T−1, and the next one begins at T. With decay 1 these are the warm restarts of SGDR (arXiv 1608.03983).
    Raises ValueError for an argument out of range.
    """
    _check_cycles(T_0, T_mult, decay, eta_min)
    _check_epoch(epoch)
    cycle, position = _locate(epoch, T_0, T_mult)
    top = max(peak * decay**cycle, eta_min)
    return eta_min + (top - eta_min) * (1 + math.cos(math.pi * position)) / 2


def restart_epochs(epochs: int, T_0: int = 10, T_mult: int = 2) -> list[int]:
    """Epochs (from 0) below `epochs` at which a new cycle begins; the first cycle's start is not a restart."""
    _check_cycles(T_0, T_mult)
    starts, start, length = [], T_0, T_0
    while start < epochs:
        starts.append(start)
        length *= T_mult
        start += length
    return starts


def warmup_cosine_rate(progress: float, peak: float, warmup: float) -> float:
    """Learning rate at `progress` (0 … 1, the share of steps done): linear from 0 to `peak`, then half a cosine to 0.

    `warmup` is the share of steps spent rising, in [0, 1). Unless it is 0, the first step has rate 0: it updates
    BatchNorm's statistics and the optimiser's momentum but no weights, except that Muon rescales its filters.
    Raises ValueError for an argument out of range.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a share of at least 0 and below 1, not {warmup!r}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be a share from 0 to 1, not {progress!r}")
    if progress < warmup:
        return peak * progress / warmup
    return peak * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


class DecayingCosineWarmRestarts(LRScheduler):
    """Sets each parameter group's rate to `restart_rate` with the group's initial rate as the first peak.

    `step()` moves on by one epoch, `step(epoch)` to any epoch, whole or fractional; `last_epoch` is the current one.
    The rate depends on nothing else. `load_state_dict` also sets the optimiser's rates, so that scheduler and
    optimiser may be created and restored in either order.
    Raises ValueError for an argument out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int = 10,
        T_mult: int = 2,
        decay: float = 0.6,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        _check_cycles(T_0, T_mult, decay, eta_min)
        if last_epoch != -1:
            _check_epoch(last_epoch)
        self.T_0, self.T_mult, self.decay, self.eta_min = T_0, T_mult, decay, eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group at `last_epoch`."""
        cycles = (self.T_0, self.T_mult, self.decay, self.eta_min)
        return [restart_rate(self.last_epoch, peak, *cycles) for peak in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Go to `epoch` (from 0), or to one epoch after the current one."""
        if epoch is None:
            epoch = self.last_epoch + 1
        _check_epoch(epoch)
        self.last_epoch = epoch
        self._apply()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._apply()

    def _apply(self) -> None:
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # a rate held as a tensor is read by captured graphs: keep its address
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _locate(epoch: float, T_0: int, T_mult: int) -> tuple[int, float]:
    """The cycle (from 0) that `epoch` lies in, and the share of it that has passed, in [0, 1)."""
    if T_mult == 1:
        return int(epoch // T_0), epoch % T_0 / T_0
    cycle, start, length = 0, 0, T_0
    while epoch >= start + length:  # whole numbers: a logarithm would miss the exact epoch of some restarts
        start += length
        length *= T_mult
        cycle += 1
    return cycle, (epoch - start) / length


def _check_cycles(T_0: int, T_mult: int, decay: float = 1.0, eta_min: float = 0.0) -> None:
    for name, value in (("T_0", T_0), ("T_mult", T_mult)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if not (isinstance(decay, int | float) and 0 < decay <= 1):
        raise ValueError(f"decay must be a factor above 0 and at most 1, not {decay!r}")
    if not (isinstance(eta_min, int | float) and 0 <= eta_min < math.inf):
        raise ValueError(f"eta_min must be a learning rate of at least 0, not {eta_min!r}")


def _check_epoch(epoch: float) -> None:
    if not (isinstance(epoch, int | float) and 0 <= epoch < math.inf):
        raise ValueError(f"epoch must be a number of at least 0, not {epoch!r}")
