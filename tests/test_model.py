import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

from model import PARAMETER_BUDGET, SLOPE, Bottleneck, ResNet, build_model, cosine_filters, count_parameters

SMALL = {"layers": (1, 2, 1), "planes": (4, 6, 8)}
WIDE = {"kind": "wide", **SMALL}
BOTH = pytest.mark.parametrize("options", [SMALL, WIDE], ids=["bottleneck", "wide"])


def with_random_norms(module: nn.Module) -> nn.Module:
    """Norms away from their initial identity, so that a comparison notices where each of them stands."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                values.uniform_(0.5, 1.5)
    return module.eval()


def torchvision_network(**options) -> nn.Module:
    return torchvision.models.ResNet(TorchvisionBottleneck, [4, 9, 8, 1], num_classes=10, **options)


def test_published_number_of_parameters():
    model = build_model()
    assert count_parameters(model) == 1_996_986
    assert PARAMETER_BUDGET == 2_000_000
    assert model.fc.in_features == 384


def test_names_are_torchvisions():
    ours = list(build_model().state_dict())
    assert len(ours) == 404
    assert ours == [name for name in torchvision_network().state_dict() if not name.startswith("layer4")]


@pytest.mark.parametrize("stride, groups, base_width, dilation", [(1, 1, 64, 1), (2, 1, 64, 1), (1, 2, 96, 2)])
def test_block_is_torchvisions_with_a_leaky_relu(stride, groups, base_width, dilation):
    def shortcut() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 48, 1, stride, bias=False), nn.BatchNorm2d(48))

    options = (16, 12, stride, shortcut(), groups, base_width, dilation)
    theirs = with_random_norms(TorchvisionBottleneck(*options))
    theirs.relu = nn.LeakyReLU(0.1)
    ours = Bottleneck(*options[:3], shortcut(), *options[4:]).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 9, 11)
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))


@pytest.mark.parametrize("stride_flags", [None, (True, False, False), (False, True, True), (True, True, False)])
def test_strides_and_dilations_are_torchvisions(stride_flags):
    def geometry(model: nn.Module) -> dict:
        convolutions = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
        return {
            name: (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.bias)
            for name, conv in convolutions.items()
            if name.startswith(("layer1", "layer2", "layer3"))
        }

    with torch.device("meta"):
        ours = build_model(replace_stride_with_dilation=stride_flags)
        theirs = torchvision_network(replace_stride_with_dilation=stride_flags)
    assert geometry(ours) == geometry(theirs)
    assert count_parameters(ours) == 1_996_986


@pytest.mark.parametrize("stride_flags, size", [(None, 9), ((True, False, False), 17), ((True, True, False), 34)])
def test_dilation_keeps_resolution(stride_flags, size):
    model = build_model(replace_stride_with_dilation=stride_flags, **SMALL)
    sizes = []
    model.layer3.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))
    assert model(torch.randn(2, 3, 72, 72)).shape == (2, 10)
    assert sizes == [(2, 32, size, size)]


def test_whole_network_is_its_table_written_out():
    model = with_random_norms(build_model(**SMALL))
    x = torch.randn(2, 3, 40, 33)
    leaky = nn.LeakyReLU(0.1)
    y = torch.nn.functional.conv2d(x, model.conv1.weight)
    assert y.shape == (2, 64, 37, 30)  # 4×4, stride 1, no padding
    y = torch.nn.functional.max_pool2d(leaky(model.bn1(y)), 2, 2)
    inplanes = 64
    for layer, planes, stride in ((model.layer1, 4, 1), (model.layer2, 6, 2), (model.layer3, 8, 2)):
        for index, block in enumerate(layer):
            twin = TorchvisionBottleneck(inplanes, planes, 1 if index else stride, block.downsample)
            twin.relu = leaky
            twin.load_state_dict(block.state_dict())
            y, inplanes = twin.eval()(y), 4 * planes
    expected = y.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("last_pool", [True, False])
def test_wide_network_is_its_table_written_out(last_pool: bool):
    model = with_random_norms(build_model(last_pool=last_pool, **WIDE))
    x = torch.randn(2, 3, 70, 37)

    def conv(y: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
        return nn.functional.conv2d(y, layer.weight, padding=1)

    leaky = nn.LeakyReLU(0.1)
    y = leaky(model.bn1(nn.functional.conv2d(x, model.conv1.weight, stride=2, padding=1)))
    assert y.shape == (2, 2, 35, 18)  # the stem has half the first group's channels
    for group, layers, planes in zip(model.groups, (1, 2, 1), (4, 6, 8), strict=True):
        y = conv(y, group.conv)
        if last_pool or planes != 8:
            y = nn.functional.max_pool2d(y, 2)
        y = shortcut = leaky(group.bn(y))
        if layers == 2:
            y = leaky(group.bns[0](conv(y, group.convs[0])))
        y = leaky(group.bns[-1](conv(y, group.convs[-1])) + shortcut)
        assert y.shape[1] == planes and len(group.convs) == layers
    expected = y.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(x), expected)


def test_wide_network_is_within_the_budget():
    assert count_parameters(build_model((1, 1, 1), kind="wide", planes=(64, 256, 256))) == 1_978_698
    with pytest.raises(ValueError, match="kind must be one of bottleneck, wide, not 'deep'"):
        build_model(kind="deep")


def test_cosine_filters_are_an_orthonormal_basis_and_its_negatives():
    filters = cosine_filters(96).double().flatten(1)
    torch.testing.assert_close(filters[:48] @ filters[:48].T, torch.eye(48, dtype=torch.double), atol=1e-6, rtol=0)
    assert torch.equal(filters[48:], -filters[:48])
    assert torch.equal(cosine_filters(31), cosine_filters(32)[:31])
    with pytest.raises(ValueError, match="planes: a cosine stem has at most 96 filters, not 97"):
        cosine_filters(97)


def test_cosine_filters_are_waves_in_three_colours():
    """The waves are the eigenvectors of a chain of four springs with free ends; frequency n has 2 - 2·cos(π·n/4)."""
    springs = torch.tensor([[1.0, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 2, -1], [0, 0, -1, 1]])
    colours = {(1, 1, 1): [], (1, 0, -1): [], (1, -2, 1): []}
    for filters in cosine_filters(32)[:16]:
        patch = filters.abs().sum(0)
        strongest = filters[:, *divmod(int(patch.argmax()), 4)]
        axis = max(colours, key=lambda axis: abs(strongest @ torch.tensor(axis).float()) / math.hypot(*axis))
        light = torch.einsum("cyx,c->yx", filters, torch.tensor(axis).float()) / math.hypot(*axis)
        assert light.norm().item() == pytest.approx(1, abs=1e-6)  # nothing lies off that axis
        down, across = ((light * (springs @ light)).sum(), (light * (light @ springs)).sum())
        frequencies = tuple(round(4 / math.pi * math.acos(1 - energy.item() / 2)) for energy in (down, across))
        for turned, n in zip((springs @ light, light @ springs), frequencies, strict=True):
            torch.testing.assert_close(turned, (2 - 2 * math.cos(math.pi * n / 4)) * light, atol=1e-6, rtol=0)
        colours[axis].append(frequencies)
    grey, *others = (sorted(found) for found in colours.values())
    assert grey == [(i, j) for i in range(4) for j in range(4 - i)]
    assert others == [[(0, 0), (0, 1), (1, 0)]] * 2


def test_cosine_stem_stays_and_further_convolutions_start_as_identities():
    model = build_model(cosine_stem=True, **WIDE)
    assert list(model.state_dict()) == list(build_model(**WIDE).state_dict())
    assert torch.equal(model.conv1.weight, cosine_filters(2))
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["conv1.weight", "bn1.weight", "bn1.bias"]
    x = torch.randn(2, 8, 5, 7)
    for conv in (conv for group in model.groups for conv in (group.conv, *group.convs)):
        given = x[:, : conv.in_channels]
        torch.testing.assert_close(conv(given)[:, : conv.in_channels], given)
        assert (conv.weight[conv.in_channels :] != 0).all()


@BOTH
@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (150, 32)])
def test_any_size_from_32_px_up(options, shape):
    logits = build_model(**options).eval()(torch.zeros(1, 3, *shape))
    assert logits.shape == (1, 10) and logits.isfinite().all()


@BOTH
@pytest.mark.parametrize("shape, told", [((31, 31), "31×31"), ((32, 31), "31×32"), ((16, 64), "64×16")])
def test_smaller_images_are_refused(options, shape, told):
    with pytest.raises(ValueError, match=f"{told} px; the network takes 32 px and up"):
        build_model(**options)(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize(
    "options", [{}, {"kind": "wide", "layers": (1, 1, 1), "planes": (64, 256, 256)}], ids=["bottleneck", "wide"]
)
def test_initial_weights(options):
    torch.manual_seed(0)
    for name, part in build_model(**options).named_modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.out_channels * part.kernel_size[0] ** 2
            assert part.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06), name
        elif isinstance(part, nn.BatchNorm2d):
            assert (part.weight == 1).all() and (part.bias == 0).all()


def test_zero_init_makes_each_block_its_shortcut():
    model = build_model(zero_init_residual=True, **SMALL).eval()
    x = torch.randn(2, 64, 12, 12)
    for block in (*model.layer1, *model.layer2, *model.layer3):
        shortcut = x if block.downsample is None else block.downsample(x)
        expected = torch.where(shortcut > 0, shortcut, SLOPE * shortcut)
        x = block(x)
        torch.testing.assert_close(x, expected)


def test_zero_init_makes_each_wide_group_its_first_convolution():
    model = build_model(zero_init_residual=True, **WIDE).eval()
    x = torch.randn(2, 2, 12, 12)
    for group in model.groups:
        first = group.bn(group.pool(group.conv(x)))
        expected = torch.where(first > 0, first, SLOPE**2 * first)
        x = group(x)
        torch.testing.assert_close(x, expected)


def test_width_and_groups():
    block = build_model(groups=2, width_per_group=32, **SMALL).layer2[1]
    assert (block.conv2.in_channels, block.conv2.groups) == (6, 2)  # int(6 · 32 / 64) · 2
    wide = build_model(width_per_group=128, **SMALL).layer3[0]
    assert wide.conv2.out_channels == 16 and wide.conv3.out_channels == 32


def test_other_norm_layers_and_classes():
    model = build_model(num_classes=3, norm_layer=lambda channels: nn.GroupNorm(1, channels), **SMALL)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    build_model(norm_layer=lambda channels: nn.Identity(), zero_init_residual=True, **SMALL)


def test_budget_tells_the_excess():
    with pytest.raises(ValueError, match="1,996,986 parameters, 986 over the budget of 1,996,000"):
        build_model(budget=1_996_000)
    assert count_parameters(build_model(budget=1_996_986)) == 1_996_986
    with torch.device("meta"), pytest.raises(ValueError, match="over the budget of 2,000,000"):
        build_model((4, 9, 9))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"kind": "wide", "layers": (1, 0, 1)}, "layers"), ({"kind": "wide", "planes": (4, 8)}, "planes"),
        ({"kind": "wide", "num_classes": 0}, "num_classes"),
        ({"replace_stride_with_dilation": (True, False)}, "three flags"),
        ({"replace_stride_with_dilation": ()}, "three flags"),
        ({"layers": (1, 2)}, "layers"), ({"layers": (1, 0, 1)}, "layers"), ({"layers": (1, 2, 1.5)}, "layers"),
        ({"planes": (4, 8)}, "planes"), ({"num_classes": 0}, "num_classes"), ({"groups": 0}, "groups"),
        ({"width_per_group": -64}, "width_per_group"), ({"width_per_group": 1}, "leaves no channels"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, word):
    with pytest.raises(ValueError, match=word):
        build_model(**{**SMALL, **options})


def test_constructor_takes_the_block_and_three_depths():
    assert count_parameters(ResNet(Bottleneck, [4, 9, 8])) == 1_996_986
