"""The networks: a bottleneck ResNet of 1,996,986 parameters, and a plain one of wide 3×3 convolutions.

The ResNet's modules and parameters are named as in torchvision's, so that weights can move between the two.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor, nn

PARAMETER_BUDGET = 2_000_000
SMALLER_NETWORK = "give smaller --layers or --planes, or a larger --budget"
SMALLEST_INPUT = 32
NETWORKS = ("bottleneck", "wide")
SLOPE = 0.1


def count_parameters(model: nn.Module) -> int:
    """Number of parameters (buffers such as running statistics not counted)."""
    return sum(p.numel() for p in model.parameters())


def build_model(
    layers: Sequence[int] = (4, 9, 8), *, kind: str = "bottleneck", budget: int = PARAMETER_BUDGET, **options
) -> "ResNet | WideNet":
    """The original network, or the wide one with `kind` "wide"; `options` are those of its class.

    Raises ValueError where an option is out of range or the network has more than `budget` parameters.
    """
    if kind not in NETWORKS:
        raise ValueError(f"kind must be one of {', '.join(NETWORKS)}, not {kind!r}")
    model = WideNet(layers, **options) if kind == "wide" else ResNet(Bottleneck, layers, **options)
    parameters = count_parameters(model)
    if parameters > budget:
        over = f"{parameters - budget:,} over the budget of {budget:,}"
        raise ValueError(f"the network has {parameters:,} parameters, {over}: {SMALLER_NETWORK}")
    return model


class Bottleneck(nn.Module):
    """1×1 → 3×3 → 1×1 convolutions with BatchNorm after each, beside a shortcut (arXiv 1512.03385).

    The 3×3 carries the stride, as in torchvision. Maps (N, inplanes, H, W) to (N, 4·planes, H/stride, W/stride), where
    halves are rounded up.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        width = int(planes * base_width / 64) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.LeakyReLU(SLOPE, inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        return self.relu(x)


class ResNet(nn.Module):
    """Stem, three groups of blocks, global average pool, linear layer.

    `layers`: blocks in each group. `planes`: inner width of each group's blocks. `width_per_group` and `groups`
    scale and split that width. `replace_stride_with_dilation`: one flag for each of layer2, layer3 and an
    unused third, which keeps the constructor call of a four-group ResNet valid. `norm_layer`: maps a number of
    channels to a module. `zero_init_residual`: each block starts as its shortcut.

    Takes float images (N, 3, H, W) from 32 px up, normalised; gives logits (N, num_classes).
    Raises ValueError for options out of range, and for smaller inputs.
    """

    zero_channels_stay_zero = True  # see WideNet

    def __init__(
        self,
        block: type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 10,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        planes: Sequence[int] = (30, 60, 96),
    ) -> None:
        super().__init__()
        dilate = (False,) * 3 if replace_stride_with_dilation is None else tuple(replace_stride_with_dilation)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation takes three flags, not {replace_stride_with_dilation!r}")
        _check_groups(layers, planes)
        _check_counts(num_classes=num_classes, groups=groups, width_per_group=width_per_group)
        if int(min(planes) * width_per_group / 64) < 1:
            raise ValueError(f"width_per_group {width_per_group} leaves no channels for planes {min(planes)}")

        self._norm_layer = norm_layer or nn.BatchNorm2d
        self._block, self._groups, self._base_width = block, groups, width_per_group
        self._inplanes, self._dilation = 64, 1

        self.conv1 = nn.Conv2d(3, 64, 4, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.LeakyReLU(SLOPE, inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = self._make_layer(planes[0], layers[0])
        self.layer2 = self._make_layer(planes[1], layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(planes[2], layers[2], stride=2, dilate=dilate[1])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes[2] * block.expansion, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, Bottleneck) and hasattr(module.bn3, "weight"):
                nn.init.zeros_(module.bn3.weight)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        first_dilation = self._dilation
        if dilate:
            self._dilation *= stride
            stride = 1
        outplanes = planes * self._block.expansion
        downsample = None
        if stride != 1 or self._inplanes != outplanes:
            downsample = nn.Sequential(
                nn.Conv2d(self._inplanes, outplanes, 1, stride, bias=False), self._norm_layer(outplanes)
            )
        shared = (self._groups, self._base_width)
        modules = [self._block(self._inplanes, planes, stride, downsample, *shared, first_dilation, self._norm_layer)]
        for _ in range(1, blocks):
            modules.append(self._block(outplanes, planes, 1, None, *shared, self._dilation, self._norm_layer))
        self._inplanes = outplanes
        return nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class WideGroup(nn.Module):
    """A 3×3 convolution and a max-pool; then `layers` 3×3 convolutions with a shortcut around them.

    Each convolution is followed by a BatchNorm and a LeakyReLU. Maps (N, inplanes, H, W) to (N, planes, H/2, W/2),
    halves rounded down; without `pool` to (N, planes, H, W).
    """

    def __init__(self, inplanes: int, planes: int, layers: int, pool: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.bn = nn.BatchNorm2d(planes)
        self.relu = nn.LeakyReLU(SLOPE, inplace=True)
        self.convs = nn.ModuleList(nn.Conv2d(planes, planes, 3, padding=1, bias=False) for _ in range(layers))
        self.bns = nn.ModuleList(nn.BatchNorm2d(planes) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x = self.relu(self.bn(self.pool(self.conv(x))))
        for number, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True), start=1):
            x = bn(conv(x))
            if number == len(self.convs):
                x = x + shortcut
            x = self.relu(x)
        return x


class WideNet(nn.Module):
    """Stem of stride 2, three groups of a few wide 3×3 convolutions, global average pool, linear layer.

    About as many parameters as the ResNet in a seventh of the layers: large matrix products keep a processor's
    arithmetic busy where the ResNet's many thin layers wait for memory, and pooling first makes each product cheaper
    (the layout is that of David Page's ResNet-9 for CIFAR-10 and of arXiv 2404.00498).

    `layers`: convolutions of each group after its first. `planes`: channels of each group; the stem has half the
    first group's. `zero_init_residual`: each group starts as its first convolution. `cosine_stem`: the stem is
    `cosine_filters`, which do not learn, and every other convolution starts as the identity on its first channels, so
    that the first step already distinguishes colours and edges (an idea from arXiv 2404.00498, which takes the
    principal directions of the images' patches instead; for STL-10's views both span the same space to 99 %).
    `last_pool`: whether the last group halves its maps too; without it, its later convolutions see four times as many
    pixels, which is a third more arithmetic in recipe `cpu`.

    Takes float images (N, 3, H, W) from 32 px up, normalised; gives logits (N, num_classes).
    Raises ValueError for options out of range, and for smaller inputs.
    """

    # A channel of zeros stays zero through convolutions, BatchNorm, LeakyReLU, pooling and sums; through GroupNorm or
    # LayerNorm it would not. So a CPU may compute the network with extra channels (harness/channel_padding.py).
    zero_channels_stay_zero = True

    def __init__(
        self,
        layers: Sequence[int] = (1, 1, 1),
        num_classes: int = 10,
        zero_init_residual: bool = False,
        planes: Sequence[int] = (64, 256, 256),
        cosine_stem: bool = False,
        last_pool: bool = True,
    ) -> None:
        super().__init__()
        _check_groups(layers, planes)
        _check_counts(num_classes=num_classes)
        stem = max(planes[0] // 2, 1)
        self.conv1 = nn.Conv2d(3, stem, 4, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.LeakyReLU(SLOPE, inplace=True)
        widths = zip((stem, *planes[:-1]), planes, layers, strict=True)
        pools = (True, True, last_pool)
        self.groups = nn.Sequential(*(WideGroup(*width, pool) for width, pool in zip(widths, pools, strict=True)))
        self.fc = nn.Linear(planes[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if cosine_stem and module is not self.conv1:
                    nn.init.dirac_(module.weight.detach()[: module.in_channels])
            elif zero_init_residual and isinstance(module, WideGroup):
                nn.init.zeros_(module.bns[-1].weight)
        if cosine_stem:
            self.conv1.weight = nn.Parameter(cosine_filters(stem), requires_grad=False)
            self.bn1.requires_grad_(False)  # nothing below the first group learns, so no gradient has to reach it

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x)
        x = self.groups(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def cosine_filters(count: int) -> Tensor:
    """Filters of the cosine transform of 4 × 4 patches, lowest frequencies first: float32 (count, 3, 4, 4).

    Each is the product of a wave along each side and one of three axes of colour: grey, red against blue, green
    against both. The first half are orthonormal; the second half are their negatives, since LeakyReLU keeps one
    side of each. Colour changes more slowly than brightness, so its filters rank two frequencies later.
    Raises ValueError for more than 96.
    """
    if count > 96:
        raise ValueError(f"planes: a cosine stem has at most 96 filters, not {count}")
    place = torch.arange(4)
    waves = torch.cos(math.pi / 4 * (place + 0.5) * place[:, None])
    axes = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    waves, axes = (rows / rows.norm(dim=1, keepdim=True) for rows in (waves, axes))
    order = sorted(product(range(3), range(4), range(4)), key=lambda n: sum(n[1:]) + (2 if n[0] else 0))
    half = [torch.einsum("c,y,x->cyx", axes[a], waves[i], waves[j]) for a, i, j in order[: math.ceil(count / 2)]]
    return torch.cat([torch.stack(half), -torch.stack(half)])[:count]


def _check_groups(layers: Sequence[int], planes: Sequence[int]) -> None:
    for name, values in (("layers", layers), ("planes", planes)):
        if len(values) != 3 or any(not isinstance(v, int) or v < 1 for v in values):
            raise ValueError(f"{name} takes 3 whole numbers of at least 1, not {values!r}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_input(x: Tensor) -> None:
    if min(x.shape[-2:]) < SMALLEST_INPUT:
        raise ValueError(f"images of {x.shape[-1]}×{x.shape[-2]} px; the network takes {SMALLEST_INPUT} px and up")
