"""On a real GPU: `pytest -m cuda -s` (the last test prints a rate). Elsewhere each is skipped."""

import dataclasses
import time

import engine
import pytest
import scoring
import torch
from engine import Machine
from learner import Trainer
from settings import RECIPES, Recipe, Runtime, Stage

import augment

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SMALL = dataclasses.replace(RECIPES["cpu"], layers=(1, 1, 1), planes=(8, 16, 16), average=0.9)
PLAIN = Machine(torch.device("cpu"), torch.float32, compile=False)
IMAGES = 64
STAGE = Stage(epochs=4, crop_size=(48,), eval_size=48, batch=16, lr=0.05)


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 off, so that float32 means it, and all settings as before afterwards."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


def gpu(precision: torch.dtype = torch.float32, compile: bool = False) -> Machine:
    return Machine(torch.device("cuda"), precision, compile)


def pictures(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, 12, 12, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (images * 255).byte().to(device), (torch.arange(IMAGES) % 10).to(device)


def draws(machine: Machine, recipe: Recipe, epoch: int = 0) -> augment.EpochDraws:
    return augment.draw_epoch(torch.arange(IMAGES), 1, STAGE.batch, recipe.augmentation, (0, 0, epoch)).to(
        machine.device
    )


def losses(machine: Machine, recipe: Recipe = SMALL, epochs: int = 2) -> torch.Tensor:
    """The losses of a few epochs' steps, with the network scored in between."""
    images, labels = pictures(machine.device)
    learner = Trainer(recipe, 10, machine)
    learner.begin(STAGE, IMAGES)
    found = []
    for epoch in range(epochs):
        result = learner.train_epoch(images, labels, draws(machine, recipe, epoch), STAGE, 48, lambda: None)
        scores = scoring.logits(learner.scored, images, 48, precision=machine.precision)
        assert result.finite and scores.isfinite().all()
        found.append(result.losses)
    return torch.cat(found)


def test_views_are_those_of_the_cpu():
    recipe = RECIPES["original"]
    found = []
    for machine in (PLAIN, gpu()):
        images, _ = pictures(machine.device)
        given = draws(machine, recipe)
        found.append(augment.augment(images, given.uniforms, augment.COLOUR_ORDERS[7], 70, recipe.augmentation).cpu())
    off = (found[0] - found[1]).abs()
    # Rounding moves a few pixels over an edge: of a black corner, or of two colours next to each other.
    assert off.quantile(0.999) < 1e-3 and off.mean() < 1e-4


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_steps_agree_with_plain_ones_on_the_cpu(precision: torch.dtype, tolerance: float, compile: bool):
    torch.testing.assert_close(losses(gpu(precision, compile)), losses(PLAIN), atol=tolerance, rtol=tolerance)


def test_deterministic_runs_give_the_same_bits():
    machine = engine.start(Runtime(device="cuda", deterministic=True))
    assert torch.equal(losses(machine), losses(machine))


@pytest.mark.parametrize("name", ["original", "cpu"])
@pytest.mark.parametrize("compile", [False, True])
def test_an_epoch_never_waits_for_the_device(name: str, compile: bool, monkeypatch: pytest.MonkeyPatch):
    machine, recipe = gpu(torch.bfloat16, compile), RECIPES[name]
    images, labels = pictures(machine.device)
    learner = Trainer(recipe, 10, machine)
    learner.begin(STAGE, IMAGES)
    for epoch in range(3):  # compilation, the warm-up and the capture of graphs may wait
        learner.train_epoch(images, labels, draws(machine, recipe, epoch), STAGE, 48, lambda: None)
    given = draws(machine, recipe, 3)
    fetch = Trainer._result

    def result(*arguments) -> tuple:
        torch.cuda.set_sync_debug_mode("default")  # the one transfer at the end
        return fetch(*arguments)

    monkeypatch.setattr(Trainer, "_result", result)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert learner.train_epoch(images, labels, given, STAGE, 48, lambda: None).finite
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_goes_on_from_its_state_as_if_never_interrupted():
    machine = gpu()
    images, labels = pictures(machine.device)

    def epoch(learner: Trainer, number: int) -> torch.Tensor:
        return learner.train_epoch(images, labels, draws(machine, SMALL, number), STAGE, 48, lambda: None).losses

    first, second = Trainer(SMALL, 10, machine), Trainer(SMALL, 10, machine)
    first.begin(STAGE, IMAGES)
    epoch(first, 0)
    second.begin(STAGE, IMAGES)
    second.restore(first.state())
    torch.testing.assert_close(epoch(second, 1), epoch(first, 1), atol=1e-4, rtol=1e-4)


def test_throughput_is_printed(capsys: pytest.CaptureFixture):
    machine, recipe = engine.start(Runtime(device="cuda")), RECIPES["original"]
    stage, count = Stage(1, (70,), 96, 128, 1e-3), 128 * 100
    images, labels = pictures(machine.device)
    learner = Trainer(recipe, 10, machine)
    learner.begin(stage, IMAGES)
    given = augment.draw_epoch(torch.arange(IMAGES), count // IMAGES, stage.batch, recipe.augmentation, (0,)).to(
        machine.device
    )
    for _ in range(2):
        start = time.perf_counter()
        result = learner.train_epoch(images, labels, given, stage, 70, lambda: None)
        seconds = time.perf_counter() - start
    assert result.finite and result.samples == count
    with capsys.disabled():
        print(f"\n{machine}: {count / seconds:,.0f} images/s end to end at 70 px, batch 128")
