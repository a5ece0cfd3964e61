"""A network computed on a CPU with its channels padded to whole cache lines, which changes nothing but the speed.

PyTorch's BatchNorm on a CPU keeps each thread's sums over the channels side by side. Where a row of them (float32) does
not fill cache lines, two threads write to the same line and wait for each other at every pixel; and channels that do
not fill vectors are handled one by one. The original's 30, 60 and 120 channels are such rows.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes import NO_LIMIT, Recipe, build_network

CHANNELS = 16  # float32 numbers in a cache line of 64 bytes
WORTH = 1 / 8  # most padding, as a share of the width: beyond it the extra arithmetic costs more than is gained


def padded_widths(planes: tuple[int, ...]) -> tuple[int, ...]:
    """The widths, each rounded up to whole cache lines where that is near; widths of less than one line stay."""
    lines = (math.ceil(width / CHANNELS) * CHANNELS for width in planes)
    return tuple(
        line if CHANNELS <= width and line - width <= WORTH * width else width
        for width, line in zip(planes, lines, strict=True)
    )


def with_padded_channels(net: nn.Module, recipe: Recipe, classes: int) -> nn.Module:
    """A recipe's network in the form that a CPU trains fastest: padded, or just itself where nothing is gained."""
    planes = padded_widths(recipe.planes)
    if planes == recipe.planes or not getattr(net, "zero_channels_stay_zero", False):
        return net
    # Its weights are not used: a cosine stem, which may not have as many filters, has the shapes of any other.
    wider = dataclasses.replace(recipe, planes=planes, budget=NO_LIMIT, cosine_stem=False)
    with torch.device("meta"):
        return PaddedChannels(net, build_network(wider, classes))


class PaddedChannels(nn.Module):
    """`net` in training mode, calculated as the wider `twin`, whose weights are the net's with zeros around them.

    A channel of zeros stays zero through convolutions, BatchNorms (whose weight and bias are 0 there), LeakyReLU,
    pooling and sums. So the logits are the net's, the gradients reach the net's own parameters, and its running
    statistics are updated. `twin`: a network of the same kind and layers. Its own weights are never used, so it may be
    on the meta device.
    """

    def __init__(self, net: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._twin = [twin.train()]  # in a list, so that its parameters are not taken for this module's
        self._shapes = {name: value.shape for name, value in twin.state_dict().items()}

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, 3, H, W)."""
        own = self.net.state_dict(keep_vars=True)
        wide = {name: _padded(value, self._shapes[name]) for name, value in own.items()}
        logits = torch.func.functional_call(self._twin[0], wide, (x,))
        with torch.no_grad():
            for name, buffer in self.net.named_buffers():
                if wide[name] is not buffer:
                    buffer.copy_(wide[name][: len(buffer)])
        return logits


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    """`value` padded with zeros at the end of each dimension that is longer in `shape`; itself if none is."""
    if value.shape == shape:
        return value
    ends = [(0, there - here) for here, there in zip(reversed(value.shape), reversed(shape), strict=True)]
    return F.pad(value, [side for both in ends for side in both])
