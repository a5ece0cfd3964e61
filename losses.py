"""Cross-entropy with part of each target spread over the other classes; the divergence from teachers' soft targets."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelSmoothingLoss(nn.Module):
    """Cross-entropy against targets of 1 − smoothing at the label and smoothing / (K − 1) at each other class.

    PyTorch's own `label_smoothing` = a spreads a over all K classes, including the label, so that each other class gets
    a / K. The two targets agree for a = smoothing · K / (K − 1), and PyTorch's fused kernel is called with that. Since
    a is at most 1, smoothing is at most (K − 1) / K, where the target is uniform. The idea comes from arXiv 1512.00567,
    which spreads it as PyTorch does.

    `classes`: K, from 2 up. `dim`: the dimension of the logits that holds the classes. `reduction`: "mean" over all
    samples, "sum", or "none" for one loss per sample. Raises ValueError for an argument out of range and for logits
    of a different K.
    """

    def __init__(self, classes: int, smoothing: float = 0.1, dim: int = -1, reduction: str = "mean") -> None:
        super().__init__()
        if not isinstance(classes, int) or classes < 2:
            raise ValueError(f"classes must be a whole number of at least 2, not {classes!r}")
        most = (classes - 1) / classes
        if not 0 <= smoothing <= most:
            raise ValueError(f"smoothing over {classes} classes must be from 0 to {most:.4g}, not {smoothing!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
        self.classes, self.smoothing, self.dim, self.reduction = classes, smoothing, dim, reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of float logits (…, K, …), classes in `dim`, and int64 labels of the same shape without that dim."""
        if logits.shape[self.dim] != self.classes:
            raise ValueError(f"logits of {logits.shape[self.dim]} classes; the loss was made for {self.classes}")
        if logits.dim() > 1:
            logits = logits.movedim(self.dim, 1)
        over_all = self.smoothing * self.classes / (self.classes - 1)
        return F.cross_entropy(logits, labels, reduction=self.reduction, label_smoothing=over_all)


def softened_mean(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean over several networks of softmax(logits / temperature): float (B, K), from float logits (B, K) each."""
    return torch.stack([(each / temperature).softmax(-1) for each in logits]).mean(0)


def distillation_loss(logits: Tensor, soft_targets: Tensor, temperature: float) -> Tensor:
    """KL(soft targets ‖ softmax(logits / temperature)) · temperature², one loss per sample, (B,): arXiv 1503.02531.

    `logits`: the student's, float (B, K); `soft_targets` (B, K): probabilities softened likewise (see `softened_mean`).
    The gradient is temperature · (the student's softened probabilities − soft targets): the square keeps its size the
    same at all temperatures.
    """
    softened = (logits / temperature).log_softmax(-1)
    return F.kl_div(softened, soft_targets, reduction="none").sum(-1) * temperature**2
