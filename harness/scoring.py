"""From images to logits, as they are scored: at a size, mirrored, by the original's protocol."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import ViewOptions, draw_epoch, make_batch, normalise
from harness.machine import autocast
from model import SMALLEST_INPUT

ORIGINAL_VIEWS = 20  # of each validation image, see `original_logits`
CROP = 7 / 8  # of the side
# Pixels scored per image, as a multiple of its own, for each of `recipes.TTA`.
PIXELS = {"none": 1.0, "mirror": 2.0, "multi": 2 * (1 + 5 * CROP**2)}


def resize(images: Tensor, size: int) -> Tensor:
    """Bring uint8 images (N, 3, H, W) to float32 (N, 3, size, size) in [0, 1], bilinearly with antialiasing."""
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
    """Score uint8 images (N, 3, H, W) at `size` px in eval mode; float32 (N, K) on the model's device.

    The images may be on another device: they are moved one batch at a time, of `batch` images, or fewer where a GPU
    scores them at more than 96 px, a CPU at more than 144.

    `mirror`: each image is also scored flipped left to right and the result is `average` of the two.
    `precision`: the autocast type (torch.bfloat16); None or torch.float32 calculates in float32.
    The model and its parts are back in their former modes when this returns. Raises ValueError without images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to score")
    device = next((parameter.device for parameter in model.parameters()), images.device)
    most = 96 if device.type == "cuda" else 144  # a small machine may not have the memory for that many large images
    batch = max(1, min(batch, batch * most**2 // size**2))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with autocast(device, precision):
            return torch.cat([_score(model, part.to(device), size, mirror) for part in images.split(batch)])
    finally:
        for module, training in modes:
            module.training = training


def _score(model: nn.Module, images: Tensor, size: int, mirror: bool) -> Tensor:
    pixels = normalise(resize(images, size)).contiguous(memory_format=torch.channels_last)
    scores = model(pixels).float()
    return average([scores, model(pixels.flip(-1)).float()]) if mirror else scores


def tta_logits(
    model: nn.Module, images: Tensor, size: int, tta: str, *, precision: torch.dtype | None = None
) -> Tensor:
    """`logits` averaged over the forms of each image that `recipes.TTA` names, the whole image at `size` px.

    Crops are scored at their share of `size`, so that objects are the same size as in the whole image.
    """
    parts = [(images, size)]
    if tta == "multi":
        height, width = images.shape[-2:]
        h, w = round(height * CROP), round(width * CROP)
        down, right = height - h, width - w
        places = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
        cropped = max(round(size * CROP), SMALLEST_INPUT)
        parts += [(images[:, :, top : top + h, left : left + w], cropped) for top, left in places]
    scores = [logits(model, part, side, mirror=tta != "none", precision=precision) for part, side in parts]
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
    """Score 20 random training views of each image with batch statistics, as the original project validated.

    uint8 images (N, 3, H, W); the views are the original's at `size` px, shuffled, and an incomplete last batch is
    dropped. Returns logits float32 (n, K) and the index of the image (n,) that each view shows. The running
    statistics learn from the views too, in a copy of the model. `tick` is called with the number of views after each
    batch. Raises ValueError where the views do not fill a batch.
    """
    steps = len(images) * ORIGINAL_VIEWS // batch
    if not steps:
        raise ValueError(f"{len(images) * ORIGINAL_VIEWS} views do not fill a batch of {batch}")
    model, options = copy.deepcopy(model).train(), ViewOptions()
    every = torch.arange(len(images))
    draws = draw_epoch(every, ORIGINAL_VIEWS, batch, options, (0,)).to(images.device)
    index = every.to(images.device)  # in place of labels
    scores = []
    for step in range(steps):
        rows = slice(step * batch, (step + 1) * batch)
        x = make_batch(images, index, draws, step, rows, size, options).x
        with autocast(images.device, precision):
            scores.append(model(x.contiguous(memory_format=torch.channels_last)).float())
        tick(batch)
    return torch.cat(scores), draws.order[: steps * batch]


def average(scores: list[Tensor]) -> Tensor:
    """Average several predictions: the log of their mean probabilities, from logits (N, K) each to logits (N, K).

    Probabilities rather than logits are averaged, so that one confident mistake cannot outweigh all the others.
    """
    return torch.logsumexp(torch.stack(scores).log_softmax(-1), dim=0) - math.log(len(scores))
