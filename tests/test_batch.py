"""`make_batch` against its parts called one after another, and on devices that must not be waited for."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from uniforms import ORIGINAL, random_uniforms

import augment
import operations
from augment import COLUMNS, EpochDraws, ViewOptions, draw_epoch, make_batch

ALL = ViewOptions(trivial_augment=True, erase=0.5, mixup=0.2, cutmix=1.0)
SOME = [
    ORIGINAL,
    ViewOptions(rotation=0, brightness=0, hue=0),
    ViewOptions(erase=0.5),
    ViewOptions(erase=0.5, mixup=0.2),
    ALL,
]
ALL_COLUMNS = COLUMNS + operations.COLUMNS


def noise(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", SOME)
def test_a_batch_is_its_rows_viewed_normalised_erased_and_mixed(options: ViewOptions):
    images, labels = noise(10), torch.arange(10) * 3 % 10
    draws = draw_epoch(torch.arange(10), 3, 8, options, (4,))
    for step, rows in ((0, slice(0, 8)), (2, slice(16, 24)), (2, slice(20, 24))):  # the last is one process's share
        batch = make_batch(images, labels, draws, step, rows, 40, options)
        index, uniforms = draws.order[rows], draws.uniforms[rows]
        views = augment.augment(images[index], uniforms, draws.colour_orders[step], 40, options)
        if options.trivial_augment:
            views = operations.trivial_augment(views, uniforms[:, COLUMNS:])
        erased = augment.erase(augment.normalise(views), uniforms, options)
        x, others, own_share = augment.mix(erased, labels[index], draws.own_share[rows], uniforms, options)
        assert torch.equal(batch.x, x) and torch.equal(batch.labels, labels[index])
        assert torch.equal(batch.other_labels, others) and torch.equal(batch.own_share, own_share)
        assert torch.equal(others, labels[index].roll(1) if options.mixes else labels[index])
        if options.erase and not options.mixes:
            assert (x == 0).any()
    assert len(set(draws.colour_orders)) > 1  # so that a wrong step shows


def test_nothing_given_is_changed():
    images, labels, draws = noise(8), torch.arange(8), draw_epoch(torch.arange(8), 1, 8, ALL, (0,))
    given = (images, labels, draws.order, draws.uniforms, draws.own_share)
    before = [tensor.clone() for tensor in given]
    make_batch(images, labels, draws, 0, slice(0, 8), 32, ALL)
    assert all(map(torch.equal, given, before))


@pytest.fixture
def nothing_kept():
    """Without the constants that views keep for each device: a fake one is of no use to anyone else."""
    augment._whole_numbers.cache_clear()
    yield
    augment._whole_numbers.cache_clear()


@pytest.mark.parametrize("place", ["cuda", "cpu"])  # images that would fill a card stay on the host
@pytest.mark.parametrize("options", SOME)
def test_all_stays_on_the_device_and_nothing_waits_for_it(options: ViewOptions, place: str, nothing_kept: None):
    """Fake CUDA tensors refuse to meet tensors of the CPU and to be read from the host."""
    with FakeTensorMode():
        images = torch.empty(8, 3, 96, 96, dtype=torch.uint8, device=place)
        labels = torch.empty(8, dtype=torch.int64, device=place)
        order, uniforms = torch.empty(8, dtype=torch.int64), torch.empty(8, ALL_COLUMNS)
        draws = EpochDraws(order, uniforms, torch.empty(8), [(0, 1, 2, 3)]).to("cuda", place)
        assert draws.order.device.type == place
        batch = make_batch(images, labels, draws, 0, slice(0, 8), 70, options)
    assert {tensor.device.type for tensor in batch} == {"cuda"}
    assert batch.x.shape == (8, 3, 70, 70) and batch.x.dtype == torch.float32
    assert batch.labels.shape == batch.other_labels.shape == batch.own_share.shape == (8,)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_same_batch_without_waiting():
    uniforms = torch.cat([random_uniforms(64), torch.rand(64, operations.COLUMNS)], 1)
    draws = EpochDraws(torch.arange(64), uniforms, torch.rand(64), [(0, 1, 2, 3)])

    def on(device: str) -> list[torch.Tensor]:
        inputs = [noise(64).to(device), torch.arange(64).to(device), draws.to(device)]
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            batch = make_batch(*inputs, 0, slice(0, 64), 70, ALL)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [tensor.cpu() for tensor in batch]

    for ours, theirs in zip(on("cpu"), on("cuda"), strict=True):
        # A position on the edge of the rotated image may fall on either side of it.
        assert ((ours - theirs).abs() > 1e-3).float().mean() < 1e-3
