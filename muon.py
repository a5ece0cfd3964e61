"""Muon (Keller Jordan, 2024) for convolutions: momentum whose every direction is followed equally far."""

from typing import Any

import torch
from torch import Tensor

ITERATIONS = 3
EPSILON = 1e-7


def orthogonalise(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """The nearest matrix with orthonormal rows (or columns, if there are fewer of them), roughly.

    float32 (rows, columns) to the same, with products in `precision`. Three Newton-Schulz steps with coefficients that
    lift small singular values fast and leave all of them near 1 rather than at it: the optimiser does not need more,
    nor more digits than bf16 has.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + EPSILON)).to(precision)
    square = x @ x.T
    turn = identity = torch.eye(len(x), device=x.device, dtype=precision)
    for _ in range(ITERATIONS):  # of x ← s·x, in the small matrices alone: all of them are polynomials of x·xᵀ
        step = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315) + 3.4445 * identity
        turn, square = step @ turn, step @ square @ step
    x = (turn @ x).float()
    return x.T if tall else x


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum; in groups with `orthogonal` set, 4-d filters (out, in, h, w) take Muon's step.

    There the momentum is orthogonalised as a matrix (out, in·h·w), and the filters' norm is held at √out: behind a
    BatchNorm their scale means nothing but the size of the next step, so this takes the place of weight decay.
    PyTorch's own Muon takes matrices only, and multiplies them in bf16, which not every CPU has: here `precision` says.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float, precision: torch.dtype = torch.float32
    ) -> None:
        groups = [{"orthogonal": False, **group} for group in groups]
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=True, fused=True)
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        """Learn from the gradients; those of filters are used up."""
        for group in self.param_groups:
            if group["orthogonal"]:
                for filters in group["params"]:
                    self._turn(filters, group["lr"], group["momentum"])
        super().step()

    def _turn(self, filters: Tensor, lr: float, decay: float) -> None:
        if filters.grad is None:
            return
        state = self.state[filters]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(filters)
        momentum = state["momentum_buffer"].mul_(decay).add_(filters.grad)
        direction = orthogonalise((filters.grad + decay * momentum).flatten(1), self.precision).view_as(filters)
        filters.mul_(len(filters) ** 0.5 / filters.norm()).sub_(direction, alpha=lr)
        filters.grad = None  # done: SGD's step passes over it
