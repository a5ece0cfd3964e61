"""What a step calculates in reduced precision, and what it must not."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from test_trainer import PLAIN, RECIPE, STAGE, pictures, train_epoch, trained

from augment import Batch, normalise
from train import Trainer


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_of_float32_logits_in_any_precision(precision: torch.dtype):
    trainer, seen = Trainer(RECIPE, 10, dataclasses.replace(PLAIN, precision=precision)), []
    trainer.begin_stage(STAGE, 40)
    trainer.loss.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    train_epoch(trainer)
    assert set(seen) == {(torch.float32, torch.float32)}


def test_fp16_learns_from_the_gradient_of_the_scaled_loss(monkeypatch: pytest.MonkeyPatch):
    """A scale of 8, at which nothing overflows; the optimiser divides by it."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=8.0))
    images, labels = pictures(8)
    x, found = normalise(F.interpolate(images / 255, size=32, mode="area")), []
    for precision in (torch.float32, torch.float16):
        trainer = Trainer(RECIPE, 10, dataclasses.replace(PLAIN, precision=precision))
        trainer.begin_stage(STAGE, 40)
        trainer.net.fc.weight.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.flatten().clone()))
        trainer.step(Batch(x, labels, labels, torch.ones(8)))
    assert F.cosine_similarity(*found, dim=0) > 0.99
    assert abs(found[1].norm() / found[0].norm() / 8 - 1) < 0.03


def test_a_run_without_a_scale_goes_on_in_fp16():
    trainer, _ = trained(network="wide", optimizer="muon")
    restored = Trainer(trainer.recipe, 10, dataclasses.replace(PLAIN, precision=torch.float16))
    restored.begin_stage(STAGE, 40)
    fresh = restored.scaler.state_dict()
    restored.restore(trainer.state())
    assert restored.scaler.state_dict() == fresh != {}
    assert restored.learning_rate == trainer.learning_rate


def test_the_rate_of_a_row_is_not_that_of_muons_filters():
    trainer = Trainer(dataclasses.replace(RECIPE, optimizer="muon", warmup=0.0), 10, PLAIN)
    trainer.begin_stage(STAGE, 40)
    assert trainer.learning_rate == pytest.approx(STAGE.lr)
