import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from augment import ViewOptions, augment, draw_epoch, normalise
from harness import scoring


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (7, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """Depends on batch statistics in train mode, on position (so that a mirrored image differs) and on size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 5 * 3, 5)
        self.seen = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((tuple(x.shape), torch.is_grad_enabled()))
        x = F.adaptive_avg_pool2d(self.bn(self.conv(x)).relu(), (3, 5))
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("size", [17, 24, 40])
def test_resize_is_torchvisions_antialiased_bilinear(images, size):
    expected = TF.resize(images.float() / 255, [size, size], InterpolationMode.BILINEAR, antialias=True)
    resized = scoring.resize(images, size)
    assert resized.dtype == torch.float32 and resized.shape == (7, 3, size, size)
    torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)


def test_resize_to_the_same_size_changes_nothing(images):
    assert torch.equal(scoring.resize(images, 24), images / 255)


@pytest.mark.parametrize("batch", [1, 3, 7, 250])
def test_logits_are_those_of_eval_mode_in_any_batches(images, batch):
    model = Tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = scoring.logits(model, images, 20, batch=batch)
    with torch.no_grad():
        expected = Tiny().eval()(normalise(scoring.resize(images, 20)))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert sum(shape[0] for shape, _ in model.seen) == 7
    assert all(shape[1:] == (3, 20, 20) and not grad for shape, grad in model.seen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_large_images_come_in_smaller_batches():
    model = Tiny()
    scoring.logits(model, torch.zeros(25, 3, 24, 24, dtype=torch.uint8), 288, batch=40)  # twice 144 px
    assert [shape[0] for shape, _ in model.seen] == [10, 10, 5]


def test_modes_of_all_parts_are_given_back(images):
    model = Tiny().train()
    model.bn.eval()
    scoring.logits(model, images, 24)
    assert [part.training for part in (model, model.conv, model.bn, model.fc)] == [True, True, False, True]


def test_modes_are_given_back_after_a_failure(images):
    model = Tiny().train()
    model.fc = nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        scoring.logits(model, images, 24)
    assert model.training and model.bn.training


def test_mirror_averages_the_probabilities_of_both(images):
    model = Tiny().eval()
    straight, mirrored = (scoring.logits(model, batch, 20) for batch in (images, images.flip(-1)))
    assert not torch.allclose(straight, mirrored, atol=1e-2)
    both = scoring.logits(model, images, 20, mirror=True)
    torch.testing.assert_close(both.exp(), (straight.softmax(1) + mirrored.softmax(1)) / 2, atol=1e-5, rtol=1e-4)


def test_precision_reaches_the_network_and_scores_stay_float32(images):
    types = []
    model = Tiny()
    model.conv.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    for precision in (None, torch.float32, torch.bfloat16):
        assert scoring.logits(model, images, 24, precision=precision).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # float32 is meant where it is asked for
        scoring.logits(model, images, 24, precision=torch.float32)
    assert types == [torch.float32, torch.float32, torch.bfloat16, torch.float32]


def test_no_images_is_an_error(images):
    with pytest.raises(ValueError, match="no images"):
        scoring.logits(Tiny(), images[:0], 24)


def test_average_of_predictions():
    first, second = torch.tensor([[0.9, 0.1]]).log() + 5, torch.tensor([[0.2, 0.8]]).log() - 3
    torch.testing.assert_close(scoring.average([first, second]).exp(), torch.tensor([[0.55, 0.45]]))


@pytest.mark.parametrize("size, cropped", [(40, 35), (32, 32)])
def test_forms_of_an_image_are_averaged(images, size, cropped):
    """Of 24 px, crops of 7/8 are 21 px wide, at 0, 1 and 3. They are scored at 7/8 of the size, at least 32 px."""
    model = Tiny().eval()
    crops = [images[:, :, y : y + 21, x : x + 21] for y, x in ((0, 0), (0, 3), (3, 0), (3, 3), (1, 1))]
    parts = [(images, size), *((crop, cropped) for crop in crops)]
    every = [scoring.logits(model, form, side) for part, side in parts for form in (part, part.flip(-1))]
    multi = scoring.tta_logits(model, images, size, "multi").softmax(1)
    torch.testing.assert_close(multi, torch.stack(every).softmax(-1).mean(0), atol=1e-5, rtol=1e-4)
    for tta, expected in (("none", every[0]), ("mirror", scoring.average(every[:2]))):
        torch.testing.assert_close(scoring.tta_logits(model, images, size, tta), expected, atol=1e-6, rtol=1e-5)


def test_the_originals_scoring_is_its_validation_loop(images):
    """20 views of each of 7 images, in train mode, four batches of 32; the last 12 views are dropped."""
    model, ticks = Tiny().eval(), []
    before = copy.deepcopy(model.state_dict())
    scores, index = scoring.original_logits(model, images, 20, 32, tick=ticks.append)
    assert scores.shape == (128, 5) and index.shape == (128,) and ticks == [32] * 4
    assert not model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    draws, reference = draw_epoch(torch.arange(7), 20, 32, ViewOptions(), (0,)), Tiny().train()
    assert torch.equal(index, draws.order[:128]) and torch.bincount(draws.order).tolist() == [20] * 7
    for step in range(4):
        rows = slice(32 * step, 32 * step + 32)
        x = augment(images[index[rows]], draws.uniforms[rows], draws.colour_orders[step], 20, ViewOptions())
        with torch.no_grad():
            torch.testing.assert_close(scores[rows], reference(normalise(x)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[rows], scoring.logits(Tiny(), images, 20)[index[rows]], atol=0.1)


def test_the_originals_scoring_needs_a_full_batch(images):
    assert len(scoring.original_logits(Tiny(), images, 20, 140)[0]) == 140
    with pytest.raises(ValueError, match="140 views do not fill a batch of 141"):
        scoring.original_logits(Tiny(), images, 20, 141)
