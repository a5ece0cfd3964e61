"""Figures from logits and labels against values worked out by hand."""

import math

import pytest
import torch

from harness.metrics import (
    accuracy,
    calibration_error,
    confusion,
    figures,
    hits_and_loss,
    per_class_accuracy,
    reliability,
    wilson,
)

LABELS = torch.tensor([0, 0, 1, 1, 2])
# right, wrong, right, right, wrong; the answers are 0, 2, 1, 1, 0
PROBABILITIES = torch.tensor(
    [[0.70, 0.20, 0.10], [0.05, 0.00, 0.95], [0.20, 0.60, 0.20], [0.30, 0.40, 0.30], [0.90, 0.05, 0.05]]
)


def test_right_answers_and_loss():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    hits, loss = hits_and_loss(logits, torch.tensor([0, 1, 1]))
    assert hits.item() == 2 and hits.dtype == torch.int64
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in (2, 1, -3)) / 3)
    assert accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize("hits, n", [(0, 1), (0, 10), (3, 10), (8, 10), (10, 10), (885, 1000)])
def test_the_bounds_of_an_interval_are_where_the_score_test_turns(hits: int, n: int):
    """At either bound p the observed share lies z standard errors away, with the error that p has: Wilson's rule."""
    low, high = wilson(hits, n)
    for bound in (low, high):
        assert 0 <= bound <= 1
        assert (hits / n - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=1e-12)
    assert low <= hits / n <= high and low < high
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))


def test_a_published_interval():
    assert wilson(885, 1000) == pytest.approx((0.864, 0.903), abs=5e-4)


@pytest.mark.parametrize("hits, n", [(-1, 10), (11, 10), (0, 0)])
def test_an_interval_of_nothing_is_refused(hits: int, n: int):
    with pytest.raises(ValueError, match=f"not {hits} of {n}"):
        wilson(hits, n)


def test_confusion_has_a_row_for_each_true_class():
    matrix = confusion(PROBABILITIES.argmax(1), LABELS, 4)
    assert matrix.tolist() == [[1, 0, 1, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    shares = per_class_accuracy(matrix)
    assert shares[:3].tolist() == [0.5, 1.0, 0.0] and shares[3].isnan() and shares.dtype == torch.float64


def test_reliability_bins_answers_by_their_confidence():
    count, confidence, share = reliability(PROBABILITIES, LABELS, bins=2)
    assert count.tolist() == [1, 4]
    assert confidence.tolist() == pytest.approx([0.4, (0.7 + 0.95 + 0.6 + 0.9) / 4])
    assert share.tolist() == [1, 0.5]
    edges = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]])
    count, confidence, share = reliability(edges, torch.tensor([0, 1]), bins=4)
    assert count.tolist() == [0, 1, 1, 0]  # a confidence on an edge belongs to the bin below
    assert confidence[0].isnan() and share[0].isnan() and confidence[1:3].tolist() == [0.5, 0.75]
    assert share[1:3].tolist() == [1, 0]


def test_calibration_error_is_the_mean_gap_of_the_bins():
    gaps = [1 - 0.4, (0.7 + 0.95 + 0.6 + 0.9) / 4 - 0.5]
    assert calibration_error(PROBABILITIES, LABELS, bins=2) == pytest.approx((gaps[0] + 4 * gaps[1]) / 5)
    certain = torch.eye(3)[LABELS]
    assert calibration_error(certain, LABELS) == 0
    assert calibration_error(certain.roll(1, 1), LABELS) == 1


def test_reported_figures_are_these_and_views_are_no_images():
    scores, classes = PROBABILITIES.clamp(min=1e-9).log().repeat(20, 1), ("cat", "dog", "ant", "bee")
    scores = torch.cat([scores, torch.full((100, 1), -40.0)], 1)
    found = figures(scores, LABELS.repeat(20), classes, images=5)
    loss = -sum(map(math.log, (0.7, 0.05, 0.6, 0.4, 0.05))) / 5
    assert found.pop("loss") == pytest.approx(loss, rel=1e-5)
    assert found.pop("calibration_error") == pytest.approx(calibration_error(PROBABILITIES, LABELS), abs=1e-6)
    assert found == {
        "images": 5,
        "predictions": 100,
        "accuracy": 0.6,
        "interval_95": list(wilson(3, 5)),
        "per_class": {"cat": 0.5, "dog": 1.0, "ant": 0.0, "bee": None},
    }
