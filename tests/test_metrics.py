"""Figures against cases worked out by hand, and against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from harness import metrics


def test_hits_and_loss():
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]]).log()
    labels = torch.tensor([0, 1, 0, 2])
    hits, loss = metrics.hits_and_loss(scores, labels)
    assert hits.item() == 2 and hits.dtype == torch.int64
    assert loss.item() == pytest.approx(-math.log(0.5 * 0.8 * 0.2 * 0.1) / 4)


@pytest.mark.parametrize(
    "hits, n, low, high",
    [
        (840, 1000, 0.8160, 0.8614), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # the example of Newcombe (Statistics in Medicine 17, 1998)
    ],
)  # fmt: skip
def test_wilson_interval_of_known_cases(hits, n, low, high):
    assert metrics.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("hits, n", [(1, 9), (437, 1000), (7999, 8000)])
def test_wilson_bounds_lie_z_deviations_from_the_share(hits, n):
    """The interval's definition: at its bounds p, |hits/n − p| = z √(p (1 − p) / n)."""
    for bound in metrics.wilson(hits, n, z=2.5):
        assert abs(hits / n - bound) == pytest.approx(2.5 * math.sqrt(bound * (1 - bound) / n))


@pytest.mark.parametrize("hits, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(hits, n):
    with pytest.raises(ValueError, match="interval"):
        metrics.wilson(hits, n)


def test_confusion_and_accuracy_of_each_class():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    predictions = torch.tensor([0, 1, 0, 1, 3, 3])
    matrix = metrics.confusion(predictions, labels, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert matrix.dtype == torch.int64
    shares = metrics.per_class_accuracy(matrix)
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 0.5, math.nan, 1.0]).double(), equal_nan=True)


def test_calibration_by_hand():
    """Five bins: (0.4, 0.6] holds 0.5 and 0.6, half right; (0.8, 1] holds 0.9, 1.0 and 0.85, two right."""
    confidence = torch.tensor([0.5, 0.6, 0.9, 1.0, 0.85], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], dim=1)
    labels = torch.tensor([0, 1, 0, 0, 1])
    bins = metrics.reliability(probabilities, labels, bins=5)
    assert bins.count.tolist() == [0, 0, 2, 0, 3]
    expected = torch.tensor([math.nan, math.nan, 0.55, math.nan, 2.75 / 3], dtype=torch.float64)
    torch.testing.assert_close(bins.confidence, expected, equal_nan=True)
    assert bins.accuracy[[2, 4]].tolist() == pytest.approx([1 / 2, 2 / 3])
    error = metrics.calibration_error(probabilities, labels, bins=5)
    assert error == pytest.approx(2 / 5 * 0.05 + 3 / 5 * 0.25)


def test_calibration_extremes():
    sure = F.one_hot(torch.arange(10) % 3, 3).float()
    assert metrics.calibration_error(sure, torch.arange(10) % 3) == 0
    assert metrics.calibration_error(sure, (torch.arange(10) + 1) % 3) == 1


def test_figures_by_hand():
    """Four predictions for two images, of which three are right; class c has none."""
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.1, 0.9, 0.0001]])
    found = metrics.figures((shares / shares.sum(1, keepdim=True)).log(), torch.tensor([0, 0, 1, 1]), "abc", 2)
    assert found["loss"] == pytest.approx(-math.log(0.7 * 0.6 * 0.1 * 0.9) / 4, abs=1e-4)
    assert found["accuracy"] == 0.75 and found["images"] == 2 and found["predictions"] == 4
    assert found["per_class"] == {"a": 1.0, "b": 0.5, "c": None}
    assert found["interval_95"] == list(metrics.wilson(2, 2))  # 0.75 of two images, rounded to whole ones
    # bins of a fifteenth: 0.6 (0.533 to 0.6] and 0.7 and 0.8 (0.733 to 0.8] and 0.9 stand alone
    assert found["calibration_error"] == pytest.approx((0.4 + 0.3 + 0.8 + 0.1) / 4, abs=1e-4)
