"""Figures from logits and labels: accuracy and its interval, confusion, calibration."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def hits_and_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of correct predictions and mean cross-entropy, from float logits (N, K) and int64 labels (N,).

    Both are 0-dim tensors on the device; this does not wait for it.
    """
    return (logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels)


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


def interval(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval for a share of correct predictions on `images` images, by the nearest whole number of hits."""
    return wilson(round(share * images), images)


def mcnemar(first_alone: int, second_alone: int) -> float:
    """McNemar's exact test (Psychometrika 12, 1947): are two networks, scored on the same images, equally good?

    Of the images that only one of them predicts correctly, the first has `first_alone` and the second `second_alone`.
    Returns the two-sided p-value: the probability of a split at least this uneven if each of these images were the
    toss of a fair coin. Raises ValueError for a negative count.
    """
    if first_alone < 0 or second_alone < 0:
        raise ValueError(f"counts are from 0 up, not {first_alone} and {second_alone}")
    coins = first_alone + second_alone
    ways = tail = 1  # in which 0 of the coins show heads; in whole numbers, which do not underflow
    for heads in range(min(first_alone, second_alone)):
        ways = ways * (coins - heads) // (heads + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**coins)


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts int64 (K, K) on the CPU: row true class, column predicted, from int64 (N,) each."""
    return torch.bincount((labels * classes + predictions).cpu(), minlength=classes**2).view(classes, classes)


def per_class_accuracy(matrix: Tensor) -> Tensor:
    """Accuracy of each class, float64 (K,), from `confusion`; nan for a class without images."""
    return matrix.diagonal().double() / matrix.sum(1)


class Reliability(NamedTuple):
    """Predictions binned by the confidence in their answer: float64 (bins,) each; the means of an empty bin are nan."""

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


def figures(logits: Tensor, labels: Tensor, classes: Sequence[str], images: int) -> dict[str, Any]:
    """The reported figures of a scoring, as plain values: from logits (n, K) and labels (n,) of `images` images.

    Several views of an image count towards the accuracy, but not as images of their own in its 95% interval.
    """
    hits, loss = hits_and_loss(logits, labels)
    share = hits.item() / len(labels)
    shares = per_class_accuracy(confusion(logits.argmax(1), labels, len(classes))).tolist()
    return {
        "images": images,
        "predictions": len(labels),
        "accuracy": share,
        "interval_95": list(interval(share, images)),
        "loss": loss.item(),
        "calibration_error": calibration_error(logits.softmax(1), labels),
        "per_class": {name: None if math.isnan(value) else value for name, value in zip(classes, shares, strict=True)},
    }
