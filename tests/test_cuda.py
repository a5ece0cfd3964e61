"""On a CUDA device: `pytest -m cuda -s` (the last test prints a rate). Elsewhere each is skipped.

An emulated device calculates compiled steps with TRITON_INTERPRET=1 only, and slowly; it captures no step that makes
tensors of its own; and it has no speed worth printing.
"""

import copy
import dataclasses
import os
import time

import pytest
import torch

from augment import COLOUR_ORDERS, EpochDraws, augment, draw_epoch
from harness import scoring
from harness.cli import Runtime
from harness.machine import Machine, start_machine
from recipes import RECIPES, Recipe, Stage
from train import Trainer

THERE = torch.cuda.is_available()
EMULATED = THERE and torch.cuda.get_device_name().startswith("Fake")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not THERE, reason="needs a CUDA GPU")]
FORMS = {
    "eager": {"compile": False},
    "compiled": {"compile": True},
    "captured": {"compile": False, "graphs": True},
    "compiled and captured": {"compile": True, "graphs": True},
}
MARKS = {
    "compiled": pytest.mark.skipif(EMULATED and not INTERPRETED, reason="an emulated device needs TRITON_INTERPRET=1"),
    "captured": pytest.mark.skipif(EMULATED, reason="an emulated device captures no step that makes tensors"),
}
HAS_BF16 = THERE and torch.cuda.is_bf16_supported(including_emulation=False)
BF16 = pytest.param(torch.bfloat16, 0.05, marks=pytest.mark.skipif(not HAS_BF16, reason="this card has no bf16"))
every_form = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[mark for word, mark in MARKS.items() if word in form]) for form in FORMS]
)

SMALL = {
    name: dataclasses.replace(RECIPES[name], layers=(1, 1, 1), planes=planes, average=0.9)
    for name, planes in (("original", (4, 4, 8)), ("cpu", (8, 16, 16)), ("cpu-night", (8, 16, 16)))
}
PLAIN = Machine(torch.device("cpu"), torch.float32, compile=False)
IMAGES = 16
BATCH = 4


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 off, so that float32 means it, and all settings as before afterwards."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


def gpu(precision: torch.dtype = torch.float32, form: str = "eager") -> Machine:
    return Machine(torch.device("cuda", 0), precision, **FORMS[form])


def pictures(device: torch.device, count: int = IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 12, 12, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (images * 255).byte().to(device), (torch.arange(count) % 10).to(device)


def stage_of(recipe: Recipe) -> Stage:
    rate = 1e-3 if recipe.optimizer == "adam" else 0.05
    return Stage(epochs=4, crop_size=(32,), eval_size=32, batch=BATCH, lr=rate)


def draw(machine: Machine, recipe: Recipe, epoch: int = 0) -> EpochDraws:
    draws = draw_epoch(torch.arange(IMAGES), 1, BATCH, recipe.augmentation, (0, 0, epoch))
    return draws.to(machine.device)


def train_epoch(trainer: Trainer, epoch: int) -> torch.Tensor:
    """The losses of an epoch of four steps."""
    images, labels = pictures(trainer.machine.device)
    draws = draw(trainer.machine, trainer.recipe, epoch)
    result = trainer.train_epoch(images, labels, draws, stage_of(trainer.recipe), 32, lambda: None)
    assert result.finite
    return result.losses


def losses(machine: Machine, recipe: Recipe = SMALL["cpu"], epochs: int = 2) -> torch.Tensor:
    """The losses of a few epochs' steps, with the network scored in between."""
    trainer = Trainer(recipe, 10, machine)
    trainer.begin_stage(stage_of(trainer.recipe), IMAGES)
    found = []
    for epoch in range(epochs):
        found.append(train_epoch(trainer, epoch))
        images, _ = pictures(machine.device)
        assert scoring.logits(trainer.eval_model, images, 32, precision=machine.precision).isfinite().all()
    assert bool(trainer.graphs._graphs) == machine.graphs  # or plain steps would be compared with themselves
    return torch.cat(found)


def test_views_are_those_of_the_cpu():
    recipe = RECIPES["original"]
    found = []
    for machine in (PLAIN, gpu()):
        images, _ = pictures(machine.device, 64)
        draws = draw_epoch(torch.arange(64), 1, 64, recipe.augmentation, (0, 0, 0)).to(machine.device)
        found.append(augment(images, draws.uniforms, COLOUR_ORDERS[7], 70, recipe.augmentation).cpu())
    off = (found[0] - found[1]).abs()
    # Rounding moves a few pixels over an edge: of a black corner, or of two colours next to each other.
    assert off.quantile(0.999) < 1e-3 and off.mean() < 1e-4


@every_form
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-3), (torch.float16, 0.05), BF16])
def test_steps_agree_with_plain_ones_on_the_cpu(precision: torch.dtype, tolerance: float, name: str, form: str):
    recipe, machine = SMALL[name], gpu(precision, form)
    found, expected = losses(machine, recipe), losses(PLAIN, recipe)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert not machine.notes  # nothing failed to compile or to be captured


@every_form
def test_deterministic_runs_give_the_same_bits(form: str):
    start_machine(Runtime(device="cuda", deterministic=True))
    machine = gpu(form=form)
    assert torch.equal(losses(machine), losses(machine))


@every_form
@pytest.mark.parametrize("name", SMALL)
def test_an_epoch_never_waits_for_the_device(name: str, form: str):
    machine, recipe = gpu(torch.bfloat16 if HAS_BF16 else torch.float16, form), SMALL[name]
    images, labels = pictures(machine.device)
    trainer = Trainer(recipe, 10, machine)
    trainer.begin_stage(stage_of(trainer.recipe), IMAGES)
    for epoch in range(3):  # compilation, the warm-up and the capture of graphs may wait
        train_epoch(trainer, epoch)
    draws, ticks = draw(machine, recipe, 3), []

    def tick() -> None:
        ticks.append(torch.cuda.get_sync_debug_mode())
        if len(ticks) == IMAGES // BATCH:
            torch.cuda.set_sync_debug_mode("default")  # the one transfer at the end

    torch.cuda.set_sync_debug_mode("error")
    try:
        assert trainer.train_epoch(images, labels, draws, stage_of(recipe), 32, tick).finite
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ticks == [2] * 4  # "error" at the end of each step


@every_form
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_a_deterministic_run_goes_on_from_its_state_bit_for_bit(name: str, precision: torch.dtype, form: str):
    start_machine(Runtime(device="cuda", deterministic=True))
    first, second = (Trainer(SMALL[name], 10, gpu(precision, form)) for _ in range(2))
    for trainer in (first, second):
        trainer.begin_stage(stage_of(trainer.recipe), IMAGES)
    for epoch in range(2):
        train_epoch(first, epoch)
    second.restore(copy.deepcopy(first.state()))  # an optimiser keeps the tensors that it is given
    for epoch in (2, 3):  # of which the second captures its own graphs
        assert torch.equal(train_epoch(second, epoch), train_epoch(first, epoch))
    for one, other in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(EMULATED, reason="speed is its subject")
def test_throughput_is_printed(capsys: pytest.CaptureFixture):
    machine, recipe = start_machine(Runtime(device="cuda")), RECIPES["original"]
    stage, count = Stage(1, (70,), 96, 128, 1e-3), 128 * 100
    images, labels = pictures(machine.device, 64)
    trainer = Trainer(recipe, 10, machine)
    trainer.begin_stage(stage, 64)
    draws = draw_epoch(torch.arange(64), count // 64, stage.batch, recipe.augmentation, (0,)).to(machine.device)
    for _ in range(2):
        start = time.perf_counter()
        result = trainer.train_epoch(images, labels, draws, stage, 70, lambda: None)
        seconds = time.perf_counter() - start
    assert result.finite and result.samples == count
    with capsys.disabled():
        print(f"\n{machine}: {count / seconds:,.0f} images/s end to end at 70 px, batch 128")


def test_images_on_the_host_are_scored_on_the_device_batch_by_batch():
    machine = gpu()
    net = Trainer(SMALL["cpu"], 10, machine).net
    images, _ = pictures(torch.device("cpu"))
    scores = scoring.tta_logits(net, images, 32, "multi")
    assert scores.device == machine.device
    assert torch.equal(scores, scoring.tta_logits(net, images.to(machine.device), 32, "multi"))
