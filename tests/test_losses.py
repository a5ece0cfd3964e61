import math

import pytest
import torch
import torch.nn.functional as F

from losses import LabelSmoothingLoss


def smoothed_by_hand(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """One loss a row of (N, K), from the target written out."""
    classes = logits.shape[1]
    target = torch.full_like(logits, smoothing / (classes - 1))
    target[torch.arange(len(labels)), labels] = 1 - smoothing
    return -(target * logits.log_softmax(1)).sum(1)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 10, generator=generator, dtype=torch.float64)
    return logits, torch.randint(10, (12,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 0.9])
def test_equals_the_target_written_out(batch, smoothing):
    expected = smoothed_by_hand(*batch, smoothing)
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        torch.testing.assert_close(LabelSmoothingLoss(10, smoothing, reduction=reduction)(*batch), value)


def test_without_smoothing_it_is_cross_entropy(batch):
    assert torch.equal(LabelSmoothingLoss(10, 0.0)(*batch), F.cross_entropy(*batch))


def test_relation_to_torchs_smoothing(batch):
    ours = LabelSmoothingLoss(10, 0.09)(*batch)
    torch.testing.assert_close(ours, F.cross_entropy(*batch, label_smoothing=0.1))


@pytest.mark.parametrize("classes", range(2, 40))
def test_the_most_smoothing_is_a_uniform_target(classes):
    logits = torch.arange(classes, dtype=torch.float64)[None]
    loss = LabelSmoothingLoss(classes, (classes - 1) / classes)(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(-logits.log_softmax(1).mean().item())


def test_lowest_where_the_probabilities_are_the_target():
    logits = torch.tensor([[math.log(0.8), math.log(0.1), math.log(0.1)]], requires_grad=True)
    LabelSmoothingLoss(3, 0.2)(logits, torch.tensor([0])).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_classes_in_another_dim(dim):
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(6, 4, generator=generator)
    labels = torch.randint(4, (6,), generator=generator)
    logits = flat.view(2, 3, 4).movedim(2, dim)
    loss = LabelSmoothingLoss(4, 0.2, dim=dim, reduction="none")(logits, labels.view(2, 3))
    torch.testing.assert_close(loss, smoothed_by_hand(flat, labels, 0.2).view(2, 3))


def test_one_sample_without_a_batch():
    logits, label = torch.tensor([0.5, -1.0, 2.0]), torch.tensor(2)
    expected = smoothed_by_hand(logits[None], label[None], 0.1)[0]
    torch.testing.assert_close(LabelSmoothingLoss(3)(logits, label), expected)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((1,), "classes"), ((10.0,), "classes"), ((10, -0.1), "smoothing"), ((10, 0.91), "smoothing"),
        ((2, 0.6), "smoothing"), ((10, math.nan), "smoothing"), ((10, 0.1, -1, "avg"), "reduction"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        LabelSmoothingLoss(*arguments)


def test_logits_of_another_number_of_classes_are_refused(batch):
    with pytest.raises(ValueError, match="10 classes; the loss was made for 7"):
        LabelSmoothingLoss(7)(*batch)
