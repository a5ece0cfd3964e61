"""Operations on batches of views, float32 (B, 3, s, s) in [0, 1], and one of them at random, as in TrivialAugment.

Each sample has its own parameter, and each operation agrees with its namesake among torchvision's functional ones.
Every view goes through the four colour operations. `trivial_augment` (arXiv 2103.10158) draws one of OPERATIONS and a
strength for each sample, both uniformly. Ranges are those of the paper's wide space, with three differences:
strengths are continuous, geometric operations sample bilinearly about the centre, and a translation is a share of the
side. As in augment.py, everything is a pure function of the views and their random numbers; nothing waits for a GPU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
COLUMNS = 2  # random numbers for each sample: which operation, and its strength
SHEAR = 0.99  # pixels of shift per row or column away from the centre
TRANSLATION = 1 / 3  # of the side
ROTATION = 135.0  # degrees
FACTOR = 0.99  # either side of 1: brightness, saturation, contrast, sharpness
LEVELS = 256  # of grey, which equalising tells apart
FEWEST_BITS = 2  # left by posterising


def grey(x: Tensor) -> Tensor:
    """Grey values (B, 1, H, W) of (B, 3, H, W)."""
    red, green, blue = GREY
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: `factor` (B, 1, 1, 1) from 0 (black) up; 1 changes nothing."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's own mean grey: `factor` (B, 1, 1, 1) from 0 (grey) up; 1 changes nothing."""
    mean = grey(x.mean(dim=(2, 3), keepdim=True))
    return torch.addcmul(mean * (1 - factor), x, factor).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the pixel's own grey: `factor` (B, 1, 1, 1) from 0 (grey) up; 1 changes nothing."""
    return torch.addcmul(grey(x).mul_(1 - factor), x, factor).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV, without branches; value and saturation stay.

    With V the largest channel and C the chroma (largest less smallest), the angle between a pixel's hue and red is
    (C + G + B - R - min) / C sixths of a turn, towards green where G > B. Conversely, a channel is
    V - C · clamp(d - 1, 0, 1), where d is the distance, in sixths of a turn, between the hue and that channel's.
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


@torch.no_grad()
def trivial_augment(x: Tensor, uniforms: Tensor) -> Tensor:
    """Views float32 (B, 3, s, s) in [0, 1], each with its operation applied; `uniforms` (B, COLUMNS) in [0, 1).

    On a CPU each operation runs only on the views that drew it. On a GPU it runs on all views and the other results are
    discarded, because selecting views would wait for the device. `x` itself may be overwritten.
    """
    x = x.clamp_(0, 1)  # rounding in the hue shift leaves values just outside, which would posterise to -1/4
    kind, strength = (uniforms[:, 0] * len(OPERATIONS)).floor(), uniforms[:, 1] * 2 - 1
    for index, operation in enumerate(OPERATIONS.values()):
        chosen = kind == index
        if x.device.type == "cpu":
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                x[rows] = operation(x[rows], strength[rows])
        else:
            x = torch.where(chosen.view(-1, 1, 1, 1), operation(x, strength), x)
    return x


def _rotate(x: Tensor, strength: Tensor) -> Tensor:
    angle = torch.deg2rad(ROTATION * strength)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _warped(x, scale=cos, column_by_row=-sin, row_by_column=sin)


def _warped(
    x: Tensor,
    scale: Tensor | float = 1.0,
    column_by_row: Tensor | float = 0.0,
    row_by_column: Tensor | float = 0.0,
    columns: Tensor | float = 0.0,
    rows: Tensor | float = 0.0,
) -> Tensor:
    """Sample (B, 3, s, s) bilinearly through an affine map, black outside; the image spans -1 to 1 on both axes.

    Output column c and row r show column scale · c + column_by_row · r + columns and row scale · r + row_by_column · c
    + rows: each a number or (B,).
    """
    batch, _, size, _ = x.shape
    centres = torch.linspace(1 / size - 1, 1 - 1 / size, size, device=x.device)
    scale, column_by_row, row_by_column, columns, rows = (
        part.view(-1, 1, 1) if isinstance(part, Tensor) else part
        for part in (scale, column_by_row, row_by_column, columns, rows)
    )
    c, r = centres.view(1, 1, -1), centres.view(1, -1, 1)
    grid = (scale * c + column_by_row * r + columns, scale * r + row_by_column * c + rows)
    grid = torch.stack([part.expand(batch, size, size) for part in grid], dim=-1)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def _blended(adjust: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, strength: adjust(x, (1 + FACTOR * strength).view(-1, 1, 1, 1))


def _adjust_sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with a blurred image: each inner pixel counts five times and its eight neighbours once."""
    blurred = x.clone()
    inner = blurred[:, :, 1:-1, 1:-1]
    inner.mul_(4).add_(F.avg_pool2d(x, 3, stride=1), alpha=9).mul_(1 / 13)
    return torch.lerp(blurred, x, factor).clamp_(0, 1)


def _posterize(x: Tensor, strength: Tensor) -> Tensor:
    """Keep 8 to FEWEST_BITS bits of each value."""
    lost = (strength.abs() * (9 - FEWEST_BITS)).floor_().clamp_(max=8 - FEWEST_BITS)
    levels = torch.exp2(8 - lost).view(-1, 1, 1, 1)
    return torch.minimum((x * levels).floor_(), levels - 1) / levels


def _solarize(x: Tensor, strength: Tensor) -> Tensor:
    """Invert the values at or above a threshold."""
    return torch.where(x >= (1 - strength.abs()).view(-1, 1, 1, 1), 1 - x, x)


def _autocontrast(x: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to span black to white; one with a single value is unchanged."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_(min=1e-12), x).clamp_(0, 1)


def _equalize(x: Tensor, strength: Tensor) -> Tensor:
    """Equalise each channel's histogram of LEVELS bins by PIL's rule.

    A channel with fewer than LEVELS - 1 pixels below its brightest level is unchanged.
    """
    level = (x * (LEVELS - 1)).round_().long().flatten(2).flatten(0, 1)  # (B·3, pixels)
    pixels = level.shape[1]
    counts = level.new_zeros(len(level), LEVELS).scatter_add_(1, level, torch.ones_like(level))
    darker = counts.cumsum(1) - counts
    brightest = counts.gather(1, level.amax(1, keepdim=True))
    step = (pixels - brightest) // (LEVELS - 1)  # pixels per level of the result
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=LEVELS - 1)
    equal = (table.gather(1, level) / (LEVELS - 1)).view_as(x)
    return torch.where((step > 0).view(*x.shape[:2], 1, 1), equal, x)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda x, strength: x,
    "shear_x": lambda x, strength: _warped(x, column_by_row=SHEAR * strength),
    "shear_y": lambda x, strength: _warped(x, row_by_column=SHEAR * strength),
    "translate_x": lambda x, strength: _warped(x, columns=-2 * TRANSLATION * strength),
    "translate_y": lambda x, strength: _warped(x, rows=-2 * TRANSLATION * strength),
    "rotate": _rotate,
    "brightness": _blended(adjust_brightness),
    "saturation": _blended(adjust_saturation),
    "contrast": _blended(adjust_contrast),
    "sharpness": _blended(_adjust_sharpness),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
