"""From images to figures: logits as they are scored, accuracy and its interval, confusion, calibration."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import Views, draw, normalise, view

ORIGINAL_VIEWS = 20  # of each validation image, see `original_logits`
CROPS = "the whole image and five crops of 7/8 of its side (corners and centre)"
VIEWS = {  # of each image, whose predictions are averaged
    "none": "the image alone",
    "mirror": "the image and its mirror image",
    "multi": f"{CROPS}, each with its mirror image",
}


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
    model.eval()
    try:
        with _autocast(images.device, precision):
            return torch.cat([_score(model, part, size, mirror) for part in images.split(batch)])
    finally:
        for module, training in modes:
            module.training = training


def _autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    low = precision not in (None, torch.float32)
    return torch.autocast(device.type, dtype=precision if low else None, enabled=low)


def _score(model: nn.Module, images: Tensor, size: int, mirror: bool) -> Tensor:
    pixels = normalise(resize(images, size)).contiguous(memory_format=torch.channels_last)
    scores = model(pixels).float()
    return average([scores, model(pixels.flip(-1)).float()]) if mirror else scores


def view_logits(
    model: nn.Module, images: Tensor, size: int, views: str, *, precision: torch.dtype | None = None
) -> Tensor:
    """`logits` averaged over the views of each image that `VIEWS` names: every view at `size` px."""
    parts = [images]
    if views == "multi":
        height, width = images.shape[-2:]
        h, w = round(height * 7 / 8), round(width * 7 / 8)
        down, right = height - h, width - w
        places = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
        parts += [images[:, :, top : top + h, left : left + w] for top, left in places]
    scores = [logits(model, part, size, mirror=views != "none", precision=precision) for part in parts]
    return average(scores) if len(scores) > 1 else scores[0]


@torch.no_grad()
def original_logits(
    model: nn.Module,
    images: Tensor,
    size: int,
    batch: int,
    *,
    precision: torch.dtype | None = None,
    tick: Callable[[int], Any] = lambda views: None,
) -> tuple[Tensor, Tensor]:
    """Score 20 random training views of each image by batch statistics, as the original project validated.

    uint8 images (N, 3, H, W); the views are the original's at `size` px, shuffled, and what does not fill the last
    batch is dropped. Returns logits float32 (n, K) and the index of the image (n,) that each view shows. The running
    statistics learn from the views too, in a copy of the model. `tick` is called with the number of views after each
    batch. Raises ValueError where the views fill no batch.
    """
    steps = len(images) * ORIGINAL_VIEWS // batch
    if not steps:
        raise ValueError(f"{len(images) * ORIGINAL_VIEWS} views do not fill a batch of {batch}")
    model, views = copy.deepcopy(model).train(), Views()
    draws = draw(torch.arange(len(images)), ORIGINAL_VIEWS, batch, views, (0,)).to(images.device)
    scores = []
    for step in range(steps):
        rows = slice(step * batch, (step + 1) * batch)
        x = view(images[draws.order[rows]], draws.uniforms[rows], draws.colour_orders[step], size, views)
        with _autocast(images.device, precision):
            scores.append(model(normalise(x).contiguous(memory_format=torch.channels_last)).float())
        tick(batch)
    return torch.cat(scores), draws.order[: steps * batch]


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


def figures(scores: Tensor, labels: Tensor, classes: Sequence[str], images: int) -> dict[str, Any]:
    """What is told of a scoring, as plain values: from logits (n, K) and labels (n,) of `images` images.

    Several views of an image count towards the accuracy, but not as images of their own in its 95% interval.
    """
    hits, loss = hits_and_loss(scores, labels)
    share = hits.item() / len(labels)
    shares = per_class_accuracy(confusion(scores.argmax(1), labels, len(classes))).tolist()
    return {
        "images": images,
        "predictions": len(labels),
        "accuracy": share,
        "interval_95": list(wilson(round(share * images), images)),
        "loss": loss.item(),
        "calibration_error": calibration_error(scores.softmax(1), labels),
        "per_class": {name: None if math.isnan(value) else value for name, value in zip(classes, shares, strict=True)},
    }
