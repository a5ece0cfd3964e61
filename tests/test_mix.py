"""Mixup, CutMix and erasing against what they should do to images that are everywhere their own number."""

import math

import pytest
import torch
from uniforms import DRAWS, ORIGINAL, random_uniforms

import augment
from augment import ViewOptions, draw_epoch, erase, mix


def numbered(n: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, size, size) that are everywhere their own index, and labels that are too."""
    return torch.arange(float(n)).view(-1, 1, 1, 1).repeat(1, 3, size, size), torch.arange(n)


def mixing(n: int, options: ViewOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Own shares and uniforms of a batch of n."""
    draws = draw_epoch(torch.arange(n), 1, n, options, (5,))
    return draws.own_share, draws.uniforms


def test_no_mixing_by_default():
    x, labels = numbered(4)
    mixed, others, share = mix(x, labels, *mixing(4, ORIGINAL), ORIGINAL)
    assert torch.equal(mixed, x) and torch.equal(others, labels) and torch.equal(share, torch.ones(4))


def test_mixup_blends_with_the_neighbour():
    x, labels = numbered(64)
    own_share, uniforms = mixing(64, ViewOptions(mixup=1.0))
    mixed, others, share = mix(x, labels, own_share, uniforms, ViewOptions(mixup=1.0))
    assert others.tolist() == [63, *range(63)]
    torch.testing.assert_close(share, own_share)
    torch.testing.assert_close(mixed, (own_share * labels + (1 - own_share) * others).view(-1, 1, 1, 1).expand_as(x))


def test_cutmix_pastes_a_box_and_the_share_is_what_is_left():
    n, size = 256, 32
    x, labels = numbered(n, size)
    own_share, uniforms = mixing(n, ViewOptions(cutmix=1.0))
    mixed, others, share = mix(x, labels, own_share, uniforms, ViewOptions(cutmix=1.0))
    own = mixed == labels.view(-1, 1, 1, 1)
    assert (own | (mixed == others.view(-1, 1, 1, 1))).all()
    torch.testing.assert_close(share, own.float().mean(dim=(1, 2, 3)))
    assert len(share.unique()) > 50
    whole = 0
    for i in range(n):
        rows, columns = (~own[i, 0]).any(1).nonzero(), (~own[i, 0]).any(0).nonzero()
        side = math.floor(size * math.sqrt(1 - own_share[i]))
        assert (~own[i, 0]).sum() == len(rows) * len(columns)  # a full rectangle
        if len(rows) and 0 < rows.min() and rows.max() < size - 1 and 0 < columns.min() and columns.max() < size - 1:
            whole += 1
            assert len(rows) == len(columns) == side
        assert len(rows) <= side and len(columns) <= side
    assert whole > 20


def test_each_sample_takes_mixup_or_cutmix_with_even_odds():
    n, options = 2000, ViewOptions(mixup=1.0, cutmix=1.0)
    x, labels = numbered(n, 8)
    mixed, _, share = mix(x, labels, *mixing(n, options), options)
    blended = (mixed.std(dim=(1, 2, 3)) < 1e-3) & (share > 0.02) & (share < 0.98)
    pasted = mixed.std(dim=(1, 2, 3)) > 0.1
    assert 0.4 < blended.float().mean() < 0.6 and 0.35 < pasted.float().mean() < 0.6


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 0.2), (4.0, 0.2)])
def test_own_share_follows_the_beta_distribution_of_the_kind_taken(mixup, cutmix):
    options = ViewOptions(mixup=mixup, cutmix=cutmix, mix_probability=0.25)
    draws = draw_epoch(torch.arange(DRAWS), 4, 100, options, (6,))
    taken = draws.own_share < 1
    assert taken.float().mean().item() == pytest.approx(0.25, abs=0.03 if cutmix == 0.2 or mixup == 0.2 else 0.01)
    cut = draws.uniforms[:, augment.MIX_KIND] < (0.5 if mixup and cutmix else bool(cutmix))
    for kind, alpha in ((cut, cutmix), (~cut, mixup)):
        own_share = draws.own_share[kind & taken].double()
        if alpha:  # variance of Beta(a, a)
            assert own_share.mean().item() == pytest.approx(0.5, abs=0.015)
            assert own_share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
        else:
            assert len(own_share) == 0


def test_unmixed_samples_stay_as_they_are():
    n, options = 400, ViewOptions(mixup=1.0, cutmix=1.0, mix_probability=0.5)
    x, labels = numbered(n, 8)
    own_share, uniforms = mixing(n, options)
    mixed, _, share = mix(x, labels, own_share, uniforms, options)
    untouched = own_share == 1
    assert 0.4 < untouched.float().mean() < 0.6
    assert torch.equal(mixed[untouched], x[untouched]) and (share[untouched] == 1).all()


def test_erased_patch_has_its_size_and_hangs_over_the_edge():
    options, uniforms = ViewOptions(erase=1.0, erase_size=0.25), random_uniforms(4)
    uniforms[:, augment.ERASE_ROW] = torch.tensor([0.5, 0.0, 0.5, 0.999])
    uniforms[:, augment.ERASE_COLUMN] = torch.tensor([0.5, 0.5, 0.0, 0.999])
    x = torch.ones(4, 3, 40, 40)
    erased = erase(x, uniforms, options) == 0
    assert erased.sum(dim=(2, 3)).tolist() == [[100] * 3, [50] * 3, [50] * 3, [36] * 3]
    assert erased[0, :, 15:25, 15:25].all() and erased[3, :, 34:, 34:].all()
    assert (x == 1).all()


def test_erase_happens_as_often_as_asked_and_anywhere():
    options = ViewOptions(erase=0.3, erase_size=0.2)
    erased = erase(torch.ones(4000, 1, 20, 20), random_uniforms(4000), options) == 0
    assert erased.any(dim=(1, 2, 3)).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert erased.any(dim=0).all()
    assert erase(torch.ones(1, 3, 4, 4), random_uniforms(1), ORIGINAL).all()
