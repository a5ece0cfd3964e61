"""Mixing that ends before the run does."""

import dataclasses
from pathlib import Path

import conftest
import pytest
import torch

import train
from augment import draw_epoch, make_batch
from harness.cli import epoch_warnings, parse_train
from recipes import RECIPES

RECIPE = dataclasses.replace(RECIPES["cpu-long"], mix_until=0.75)


def test_the_last_share_of_the_epochs_is_not_mixed() -> None:
    mixes = [RECIPE.at(done).augmentation.mixes for done in range(RECIPE.epochs)]
    assert mixes == [True] * 18 + [False] * 6
    always = dataclasses.replace(RECIPE, mix_until=1.0)
    assert all(always.at(done).augmentation == always.augmentation for done in range(always.epochs))
    never = dataclasses.replace(RECIPE, mix_until=0.0)
    assert not any(never.at(done).augmentation.mixes for done in range(never.epochs))


def test_an_unmixed_epoch_is_else_the_same() -> None:
    """By the same draws; and the trainer, which mixes by its recipe, gets views and labels as they are."""
    mixed, plain = (
        draw_epoch(torch.arange(40), 1, 20, RECIPE.at(done).augmentation, (0, 0, 20)) for done in (0, RECIPE.epochs - 1)
    )
    assert (plain.own_share == 1).all() and not (mixed.own_share == 1).all()
    assert torch.equal(plain.order, mixed.order) and torch.equal(plain.uniforms, mixed.uniforms)
    assert plain.colour_orders == mixed.colour_orders
    images = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    off = RECIPE.at(RECIPE.epochs - 1).augmentation
    for options in (off, RECIPE.augmentation):
        batch = make_batch(images, torch.arange(40), plain, 0, slice(0, 20), 32, options)
        assert torch.equal(batch.x, make_batch(images, torch.arange(40), plain, 0, slice(0, 20), 32, off).x)
        assert (batch.own_share == 1).all()


def test_a_run_ends_unmixed(tmp_path: Path, small_demo, empty_plots, monkeypatch) -> None:
    """Of four epochs the first two are mixed."""
    shares = []
    original = train.Trainer.train_epoch

    def train_epoch(trainer, images, labels, draws, *rest):
        shares.append((draws.own_share < 1).double().mean().item())
        return original(trainer, images, labels, draws, *rest)

    monkeypatch.setattr(train.Trainer, "train_epoch", train_epoch)
    place = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert train.main([*conftest.TINY_RUN, *place, "--cutmix", "1", "--mix-until", "0.5"]) == 0
    assert [share > 0.9 for share in shares] == [True, True, False, False] and shares[2:] == [0, 0]


@pytest.mark.parametrize(
    "share, told",
    [(0.9, "4 epochs: too few for --mix-until 0.9, so every"), (0.1, "so no epoch mixes"), (0.5, ""), (1, "")],
)
def test_a_share_without_effect_is_said(share: float, told: str) -> None:
    recipe = dataclasses.replace(RECIPES["cpu"], augmentation=RECIPE.augmentation, mix_until=share)
    assert recipe.epochs == 4 and told in (said := "".join(epoch_warnings(recipe))) and bool(said) == bool(told)


def test_it_needs_mixing(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train(["--mix-until", "0.5"])
    assert stop.value.code == 2 and "--mix-until is of no use without mixup or cutmix" in capsys.readouterr().err
    assert parse_train(["--mix-until", "0.5", "--mixup", "0.2"])[0].mix_until == 0.5
