"""Colour operations on float32 images (B, 3, H, W) in [0, 1], each with a parameter of its own, (B, 1, 1, 1).

They agree with torchvision's functional operations of the same names. A factor of 1 and a shift of 0 change nothing.
"""

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


def grey(x: Tensor) -> Tensor:
    """Grey values (B, 1, H, W) of (B, 3, H, W)."""
    red, green, blue = GREY
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's own mean grey."""
    mean = grey(x.mean(dim=(2, 3), keepdim=True))
    return torch.addcmul(mean * (1 - factor), x, factor).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the pixel's own grey."""
    return torch.addcmul(grey(x).mul_(1 - factor), x, factor).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV, without branches; value and saturation stay.

    With V the largest channel and C the chroma (largest less smallest), the angle between a pixel's hue and red is
    (C + G + B - R - min) / C sixths of a turn, on the side of green where G > B. In the other direction a channel is
    V - C · clamp(d - 1, 0, 1) where d is the distance, in sixths of a turn, between the hue and that channel's.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    sixths = (green + blue).sub_(red).add_(value).sub_(low, alpha=2).copysign_(green - blue)
    chroma = (value - low).clamp_(min=1e-8)  # a grey pixel has any hue, but no NaN
    hue = torch.addcdiv(shift[:, 0] + 1, sixths, chroma, value=1 / 6).frac_()  # turns, 0 = red

    def distance(turns: float) -> Tensor:
        return (hue - turns).abs_().clamp_(1 / 6, 1 / 3)

    # d - 1 clamped to 0 … 1 is d clamped to 1 … 2, less 1: that 1 goes into the first summand.
    # Red lies at both ends of the scale, so its distance is half a turn less that to its opposite.
    high = value + chroma
    turned = torch.empty_like(x)
    torch.addcmul(value.sub_(chroma, alpha=2), distance(1 / 2), chroma, value=6, out=turned[:, 0])
    torch.addcmul(high, distance(1 / 3), chroma, value=-6, out=turned[:, 1])
    torch.addcmul(high, distance(2 / 3), chroma, value=-6, out=turned[:, 2])
    return turned
