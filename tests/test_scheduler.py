import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from scheduler import DecayingCosineWarmRestarts, restart_epochs, restart_rate, warmup_cosine_rate


def optimizer_of(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def by_hand(epochs: int, peak: float, T_0: int, T_mult: int, decay: float, eta_min: float) -> list[float]:
    rates, length = [], T_0
    while len(rates) < epochs:
        rates += [eta_min + (peak - eta_min) * (1 + math.cos(math.pi * i / length)) / 2 for i in range(length)]
        peak, length = max(peak * decay, eta_min), length * T_mult
    return rates[:epochs]


@pytest.mark.parametrize(
    "cycles", [(10, 2, 0.6, 0.0), (10, 2, 0.6, 1e-4), (1, 2, 0.5, 0.0), (7, 1, 0.9, 1e-5), (3, 3, 1.0, 0.0)]
)
def test_rate_is_that_of_cycles_written_out_one_after_another(cycles):
    rates = [restart_rate(epoch, 1e-3, *cycles) for epoch in range(400)]
    assert rates == pytest.approx(by_hand(400, 1e-3, *cycles), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("T_mult", [1, 2, 3])
def test_without_decay_it_is_torchs_own_warm_restarts(T_mult):
    ours, theirs = optimizer_of(0.1, 0.02), optimizer_of(0.1, 0.02)
    scheduler = DecayingCosineWarmRestarts(ours, 5, T_mult, decay=1.0, eta_min=1e-3)
    reference = CosineAnnealingWarmRestarts(theirs, 5, T_mult, eta_min=1e-3)
    for _ in range(100):
        assert rates_of(ours) == pytest.approx(rates_of(theirs), rel=1e-12)
        scheduler.step()
        reference.step()


def test_published_schedule():
    """The two stages of the original: 300 and 140 epochs, within their fifth and fourth cycles."""
    assert restart_epochs(300) == [10, 30, 70, 150]
    assert restart_epochs(140) == [10, 30, 70]
    assert [restart_rate(epoch, 1e-3) for epoch in (0, 10, 30, 70, 150)] == pytest.approx(
        [1e-3, 6e-4, 3.6e-4, 2.16e-4, 1.296e-4]
    )
    assert restart_rate(299, 1e-3) == pytest.approx(1.5e-6, rel=0.05)
    assert restart_rate(139, 5e-4) == pytest.approx(5e-6, rel=0.05)
    assert all(restart_rate(epoch, 1e-3) > 0 for epoch in range(300))  # no epoch is spent at rate 0


@pytest.mark.parametrize("T_0, T_mult", [(1, 3), (10, 2), (7, 1), (1, 10)])
def test_each_restart_is_met_at_its_exact_epoch(T_0, T_mult):
    for number, epoch in enumerate(restart_epochs(100_000 if T_mult > 1 else 700, T_0, T_mult), start=1):
        assert restart_rate(epoch, 1.0, T_0, T_mult, decay=0.9) == pytest.approx(0.9**number, rel=1e-12)
        assert restart_rate(epoch - 1e-6, 1.0, T_0, T_mult, decay=0.9) < 1e-6


def test_peaks_stop_falling_at_eta_min():
    rates = [restart_rate(epoch, 1e-3, 2, 1, 0.1, 5e-4) for epoch in range(2, 50)]
    assert rates == [5e-4] * 48


def test_fractional_epochs_and_steps_onwards():
    optimizer = optimizer_of(1.0, 0.25)
    scheduler = DecayingCosineWarmRestarts(optimizer)
    assert rates_of(optimizer) == [1.0, 0.25]
    scheduler.step(20.25)
    expected = 0.6 * (1 + math.cos(math.pi * 10.25 / 20)) / 2
    assert rates_of(optimizer) == scheduler.get_last_lr() == pytest.approx([expected, expected / 4])
    scheduler.step()
    assert rates_of(optimizer) == [restart_rate(21.25, 1.0), restart_rate(21.25, 0.25)]
    scheduler.step(4)  # backwards too
    scheduler.step()
    assert rates_of(optimizer) == [restart_rate(5, 1.0), restart_rate(5, 0.25)]
    assert scheduler.last_epoch == 5


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_restored_scheduler_goes_on_as_if_nothing_had_happened(scheduler_first):
    optimizer = optimizer_of(1e-3, 1e-4)
    scheduler = DecayingCosineWarmRestarts(optimizer, 3, 2, 0.5, 1e-6)
    for _ in range(11):
        scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))

    other = optimizer_of(0.5, 0.5)
    if scheduler_first:
        restored = DecayingCosineWarmRestarts(other)
        other.load_state_dict(saved[0])
    else:
        other.load_state_dict(saved[0])
        restored = DecayingCosineWarmRestarts(other)
    restored.load_state_dict(saved[1])
    for _ in range(20):
        assert rates_of(other) == rates_of(optimizer) == restored.get_last_lr()
        scheduler.step()
        restored.step()


def test_state_survives_a_weights_only_file(tmp_path):
    scheduler = DecayingCosineWarmRestarts(optimizer_of(1e-3))
    scheduler.step(12.5)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    optimizer = optimizer_of(0.7)
    restored = DecayingCosineWarmRestarts(optimizer)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert rates_of(optimizer) == [restart_rate(12.5, 1e-3)]


def test_last_epoch_continues_as_torchs_schedulers_do():
    optimizer = optimizer_of(1e-3)
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    DecayingCosineWarmRestarts(optimizer, last_epoch=31)
    assert rates_of(optimizer) == [restart_rate(32, 1e-3)]


def test_a_rate_held_in_a_tensor_is_changed_in_place():
    rate = torch.tensor(1e-3)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    locked = optimizer.param_groups[0]["lr"]
    scheduler = DecayingCosineWarmRestarts(optimizer)
    scheduler.step(15)
    assert optimizer.param_groups[0]["lr"] is locked
    assert locked.item() == pytest.approx(restart_rate(15, 1e-3))


@pytest.mark.parametrize(
    "bad",
    [
        {"T_0": 0}, {"T_0": 2.5}, {"T_0": True}, {"T_mult": 0}, {"T_mult": 1.5}, {"decay": 0.0}, {"decay": 1.1},
        {"decay": math.nan}, {"eta_min": -1e-9}, {"eta_min": math.inf}, {"eta_min": None}, {"last_epoch": -2},
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(bad):
    name = next(iter(bad)).replace("last_", "")
    with pytest.raises(ValueError, match=name):
        DecayingCosineWarmRestarts(optimizer_of(1e-3), **bad)


@pytest.mark.parametrize("epoch", [-1, -0.5, math.nan, math.inf])
def test_epochs_out_of_range_are_refused(epoch):
    scheduler = DecayingCosineWarmRestarts(optimizer_of(1e-3))
    with pytest.raises(ValueError, match="epoch"):
        scheduler.step(epoch)
    assert scheduler.last_epoch == 0


def test_warm_up_then_one_cosine():
    rates = [warmup_cosine_rate(progress, 2.0, 0.2) for progress in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([0, 1, 2, 1 + root, 1, 1 - root, 0], abs=1e-15)
    assert warmup_cosine_rate(0, 2.0, 0) == 2.0


@pytest.mark.parametrize("progress, warmup", [(-0.1, 0.1), (1.1, 0.1), (math.nan, 0.1), (0.5, 1.0), (0.5, -0.1)])
def test_warm_up_refuses_shares_out_of_range(progress, warmup):
    with pytest.raises(ValueError, match="share"):
        warmup_cosine_rate(progress, 1.0, warmup)
