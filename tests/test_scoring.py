import copy
import math

import pytest
import scoring
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from augment import ViewOptions, draw, normalise, view


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


def test_hits_loss_and_accuracy():
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]]).log()
    labels = torch.tensor([0, 1, 0, 2])
    hits, loss = scoring.hits_and_loss(scores, labels)
    assert hits.item() == 2 and hits.dtype == torch.int64
    assert loss.item() == pytest.approx(-math.log(0.5 * 0.8 * 0.2 * 0.1) / 4)
    assert scoring.accuracy(scores, labels) == 0.5


@pytest.mark.parametrize(
    "hits, n, low, high",
    [
        (840, 1000, 0.8160, 0.8614), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # the example of Newcombe (Statistics in Medicine 17, 1998)
    ],
)  # fmt: skip
def test_wilson_interval_of_known_cases(hits, n, low, high):
    assert scoring.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("hits, n", [(1, 9), (437, 1000), (7999, 8000)])
def test_wilson_bounds_lie_z_deviations_from_the_share(hits, n):
    """The interval's definition: at its bounds p, |hits/n − p| = z √(p (1 − p) / n)."""
    for bound in scoring.wilson(hits, n, z=2.5):
        assert abs(hits / n - bound) == pytest.approx(2.5 * math.sqrt(bound * (1 - bound) / n))


@pytest.mark.parametrize("hits, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(hits, n):
    with pytest.raises(ValueError, match="interval"):
        scoring.wilson(hits, n)


def test_confusion_and_accuracy_of_each_class():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    predictions = torch.tensor([0, 1, 0, 1, 3, 3])
    matrix = scoring.confusion(predictions, labels, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert matrix.dtype == torch.int64
    shares = scoring.per_class_accuracy(matrix)
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 0.5, math.nan, 1.0]).double(), equal_nan=True)


def test_calibration_by_hand():
    """Five bins: (0.4, 0.6] holds 0.5 and 0.6, half right; (0.8, 1] holds 0.9, 1.0 and 0.85, two right."""
    confidence = torch.tensor([0.5, 0.6, 0.9, 1.0, 0.85], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], dim=1)
    labels = torch.tensor([0, 1, 0, 0, 1])
    bins = scoring.reliability(probabilities, labels, bins=5)
    assert bins.count.tolist() == [0, 0, 2, 0, 3]
    expected = torch.tensor([math.nan, math.nan, 0.55, math.nan, 2.75 / 3], dtype=torch.float64)
    torch.testing.assert_close(bins.confidence, expected, equal_nan=True)
    assert bins.accuracy[[2, 4]].tolist() == pytest.approx([1 / 2, 2 / 3])
    error = scoring.calibration_error(probabilities, labels, bins=5)
    assert error == pytest.approx(2 / 5 * 0.05 + 3 / 5 * 0.25)


def test_calibration_extremes():
    sure = F.one_hot(torch.arange(10) % 3, 3).float()
    assert scoring.calibration_error(sure, torch.arange(10) % 3) == 0
    assert scoring.calibration_error(sure, (torch.arange(10) + 1) % 3) == 1


def test_views_of_an_image_are_averaged(images):
    """Of 24 px, crops of 7/8 are 21 px wide, their places 0, 1 and 3."""
    model = Tiny().eval()
    parts = [images] + [images[:, :, y : y + 21, x : x + 21] for y, x in ((0, 0), (0, 3), (3, 0), (3, 3), (1, 1))]
    every = [scoring.logits(model, view, 20) for part in parts for view in (part, part.flip(-1))]
    multi = scoring.view_logits(model, images, 20, "multi").softmax(1)
    torch.testing.assert_close(multi, torch.stack(every).softmax(-1).mean(0), atol=1e-5, rtol=1e-4)
    for views, expected in (("none", every[0]), ("mirror", scoring.average(every[:2]))):
        torch.testing.assert_close(scoring.view_logits(model, images, 20, views), expected, atol=1e-6, rtol=1e-5)
    assert set(scoring.VIEWS) == {"none", "mirror", "multi"}


def test_the_originals_scoring_is_its_validation_loop(images):
    """20 views of each of 7 images, in train mode, four batches of 32; the last 12 views are dropped."""
    model, ticks = Tiny().eval(), []
    before = copy.deepcopy(model.state_dict())
    scores, index = scoring.original_logits(model, images, 20, 32, tick=ticks.append)
    assert scores.shape == (128, 5) and index.shape == (128,) and ticks == [32] * 4
    assert not model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    draws, reference = draw(torch.arange(7), 20, 32, ViewOptions(), (0,)), Tiny().train()
    assert torch.equal(index, draws.order[:128]) and torch.bincount(draws.order).tolist() == [20] * 7
    for step in range(4):
        rows = slice(32 * step, 32 * step + 32)
        x = view(images[index[rows]], draws.uniforms[rows], draws.colour_orders[step], 20, ViewOptions())
        with torch.no_grad():
            torch.testing.assert_close(scores[rows], reference(normalise(x)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[rows], scoring.logits(Tiny(), images, 20)[index[rows]], atol=0.1)


def test_the_originals_scoring_needs_a_full_batch(images):
    assert len(scoring.original_logits(Tiny(), images, 20, 140)[0]) == 140
    with pytest.raises(ValueError, match="140 views do not fill a batch of 141"):
        scoring.original_logits(Tiny(), images, 20, 141)


def test_figures_by_hand():
    """Four predictions for two images, of which three are right; class c has none."""
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.1, 0.9, 0.0001]])
    found = scoring.figures((shares / shares.sum(1, keepdim=True)).log(), torch.tensor([0, 0, 1, 1]), "abc", 2)
    assert found["loss"] == pytest.approx(-math.log(0.7 * 0.6 * 0.1 * 0.9) / 4, abs=1e-4)
    assert found["accuracy"] == 0.75 and found["images"] == 2 and found["predictions"] == 4
    assert found["per_class"] == {"a": 1.0, "b": 0.5, "c": None}
    assert found["interval_95"] == list(scoring.wilson(2, 2))  # 0.75 of two images, padded_widths to whole ones
    # bins of a fifteenth: 0.6 (0.533 to 0.6] and 0.7 and 0.8 (0.733 to 0.8] and 0.9 stand alone
    assert found["calibration_error"] == pytest.approx((0.4 + 0.3 + 0.8 + 0.1) / 4, abs=1e-4)
