"""From images to figures: eval-mode logits, accuracy and its interval, confusion, calibration."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import normalise


def resize(images: Tensor, size: int) -> Tensor:
    """Bring uint8 images (N, 3, H, W) to float32 (N, 3, size, size) in [0, 1], bilinear with antialiasing."""
    pixels = images.float() / 255
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


@torch.no_grad()
def logits(
    model: nn.Module,
    images: Tensor,
    size: int,
    *,
    mirror: bool = False,
    batch: int = 250,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Score uint8 images (N, 3, H, W) at `size` px in eval mode; float32 (N, K) on the images' device.

    `mirror`: each image is also scored flipped left to right and the result is `average` of the two.
    `precision`: the autocast type (torch.bfloat16); None or torch.float32 calculates in float32.
    The modes of the model and of its parts are as before when this returns. Raises ValueError without images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to score")
    modes = [(module, module.training) for module in model.modules()]
    low = precision not in (None, torch.float32)
    model.eval()
    try:
        with torch.autocast(images.device.type, dtype=precision if low else None, enabled=low):
            return torch.cat([_score(model, part, size, mirror) for part in images.split(batch)])
    finally:
        for module, training in modes:
            module.training = training


def _score(model: nn.Module, images: Tensor, size: int, mirror: bool) -> Tensor:
    pixels = normalise(resize(images, size)).contiguous(memory_format=torch.channels_last)
    scores = model(pixels).float()
    return average([scores, model(pixels.flip(-1)).float()]) if mirror else scores


def average(scores: list[Tensor]) -> Tensor:
    """Log of the mean of several predictions' probabilities, from their logits (N, K) each; itself (N, K) logits.

    Probabilities rather than logits are averaged, so that one confident mistake cannot outweigh all others.
    """
    return torch.logsumexp(torch.stack(scores).log_softmax(-1), dim=0) - math.log(len(scores))


def hits_and_loss(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of right answers (int64) and mean cross-entropy, both 0-dim on the device, without waiting for it."""
    return (scores.argmax(1) == labels).sum(), F.cross_entropy(scores, labels)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of right answers, 0 … 1, from logits (N, K) and labels (N,)."""
    return (scores.argmax(1) == labels).double().mean().item()


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a share of `hits` in `n` (J. Am. Stat. Assoc. 22, 1927); z = 1.96 for 95 %.

    Raises ValueError unless 0 <= hits <= n and n >= 1.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"an interval needs 0 <= hits <= n with n from 1 up, not {hits} of {n}")
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts int64 (K, K) on the CPU: row true class, column predicted, from int64 (N,) each."""
    return torch.bincount((labels * classes + predictions).cpu(), minlength=classes**2).view(classes, classes)


def per_class_accuracy(matrix: Tensor) -> Tensor:
    """Share of each class that is answered rightly, float64 (K,), from `confusion`; nan for a class without images."""
    return matrix.diagonal().double() / matrix.sum(1)


class Reliability(NamedTuple):
    """Predictions binned by the confidence in their answer: float64 (bins,) each, nan means for an empty bin."""

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Mean confidence and accuracy in `bins` equal bins (low, high] of the top class's probability, from (N, K)."""
    confidence, predictions = probabilities.double().cpu().max(1)
    hits = (predictions == labels.cpu()).double()
    index = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    count = torch.bincount(index, minlength=bins).double()
    mean_of = [torch.bincount(index, weights=values, minlength=bins) / count for values in (confidence, hits)]
    return Reliability(count, *mean_of)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error, 0 … 1: the mean gap between confidence and accuracy (arXiv 1706.04599)."""
    count, confidence, share = reliability(probabilities, labels, bins)
    return ((confidence - share).abs().nan_to_num() * count).sum().item() / count.sum().item()
