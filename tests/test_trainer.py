"""The trainer's epochs against ones written plainly, and against each other in other forms of the same arithmetic."""

import dataclasses
import functools
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from run_contents import floats
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel

from augment import Batch, EpochDraws, ViewOptions, draw_epoch, make_batch, normalise
from harness import scoring
from harness.compiled import CompiledForm
from harness.errors import RunError
from harness.machine import Machine
from model import build_model
from recipes import RECIPES, Recipe, Stage, build_network
from scheduler import warmup_cosine_rate
from train import EpochResult, Trainer

PLAIN = Machine(torch.device("cpu"), torch.float32, compile=False)
RECIPE = dataclasses.replace(
    RECIPES["cpu"],
    network="bottleneck",
    layers=(1, 1, 1),
    planes=(4, 8, 8),
    cosine_stem=False,
    zero_init_residual=True,
    optimizer="sgd",
    views_per_image=1,
    average=0.5,
)
FULL = dataclasses.replace(RECIPE, layers=(4, 9, 8), planes=(30, 60, 96))
MIXED = dataclasses.replace(RECIPE.augmentation, mixup=1.0, cutmix=1.0, erase=0.5)
STAGE = Stage(epochs=4, crop_size=(32,), eval_size=32, batch=8, lr=0.1)


def pictures(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random pictures and labels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = (F.interpolate(coarse, size=96, mode="bilinear") * 255).byte()
    return images, torch.randint(10, (count,), generator=generator)


def draw(recipe: Recipe, epoch: int = 0) -> EpochDraws:
    return draw_epoch(torch.arange(40), 1, STAGE.batch, recipe.augmentation, (0, 0, epoch))


def train_epoch(trainer: Trainer, epoch: int = 0) -> EpochResult:
    """Five steps."""
    return trainer.train_epoch(*pictures(), draw(trainer.recipe, epoch), STAGE, 32, lambda: None)


def trained(
    machine: Machine = PLAIN, layout: torch.memory_format = torch.channels_last, **changes
) -> tuple[Trainer, EpochResult]:
    """A trainer after one epoch, and the epoch's result."""
    trainer = Trainer(dataclasses.replace(RECIPE, **changes), 10, machine)
    trainer.net.to(memory_format=layout)
    trainer.begin_stage(STAGE, 40)
    return trainer, train_epoch(trainer)


@torch.no_grad()
def rising_average(averaged: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor) -> None:
    """RECIPE's average, in the form that PyTorch's AveragedModel takes it."""
    decay = min(RECIPE.average, (1 + int(updates)) / (10 + int(updates)))
    for own, value in zip(averaged, current, strict=True):
        own.copy_(decay * own + (1 - decay) * value)


def by_hand(options: ViewOptions) -> tuple[list[float], int, dict[str, torch.Tensor]]:
    """What `trained` does in float32, written plainly: NCHW, PyTorch's own loss, optimiser, schedule and average."""
    images, labels = pictures()
    torch.manual_seed(RECIPE.seed)
    net = build_model(RECIPE.layers, planes=RECIPE.planes, zero_init_residual=True)
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": RECIPE.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=STAGE.lr, momentum=0.9, nesterov=True, foreach=False)
    average = AveragedModel(net, multi_avg_fn=rising_average, use_buffers=True)
    draws = draw_epoch(torch.arange(40), 1, STAGE.batch, options, (0, 0, 0))
    losses, hits = [], 0
    for step in range(5):
        x, own, other, share = make_batch(images, labels, draws, step, slice(8 * step, 8 * step + 8), 32, options)
        logits = net(x)
        targets = share[:, None] * F.one_hot(own, 10) + (1 - share[:, None]) * F.one_hot(other, 10)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1 * 10 / 9)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine_rate(step / (5 * STAGE.epochs), STAGE.lr, RECIPE.warmup)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        losses.append(loss.item())
        hits += (logits.argmax(1) == targets.argmax(1)).sum().item()
    return losses, hits, average.module.state_dict()


@pytest.mark.parametrize("options", [RECIPE.augmentation, MIXED], ids=["clean", "mixed"])
def test_an_epoch_is_the_plainly_written_one(options: ViewOptions):
    losses, hits, average = by_hand(options)
    trainer, result = trained(augmentation=options)
    torch.testing.assert_close(result.losses, torch.tensor(losses), atol=1e-5, rtol=1e-5)
    assert (result.hits, result.samples, result.finite) == (hits, 40, True)
    torch.testing.assert_close(floats(trainer.eval_model.state_dict()), floats(average), atol=1e-4, rtol=1e-3)


def test_layout_changes_nothing_beyond_rounding():
    trainer, result = trained(layout=torch.contiguous_format)
    other, other_result = trained()
    torch.testing.assert_close(result.losses, other_result.losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(floats(trainer.net.state_dict()), floats(other.net.state_dict()), atol=1e-4, rtol=1e-3)


def first_gradient(machine: Machine) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the full network's first step, its blocks starting as their shortcuts.

    Without that start a gradient through 67 layers turns away at the least rounding, of the input alone too.
    """
    images, labels = pictures(16)
    trainer = Trainer(FULL, 10, machine)
    trainer.begin_stage(STAGE, 16)
    trainer.net.train()
    gradients = {}
    for name, parameter in trainer.net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    x = normalise(F.interpolate(images / 255, size=40, mode="area"))
    loss, _ = trainer.step(Batch(x, labels, labels, torch.ones(16)))
    assert all(gradients[name].dtype == p.dtype == torch.float32 for name, p in trainer.net.named_parameters())
    return loss.item(), torch.cat([gradients[name].flatten() for name, _ in trainer.net.named_parameters()])


def test_bf16_agrees_with_float32_to_its_precision():
    loss, gradient = first_gradient(PLAIN)
    low_loss, low_gradient = first_gradient(dataclasses.replace(PLAIN, precision=torch.bfloat16))
    assert low_loss != loss and abs(low_loss - loss) < 2**-8 * loss
    assert F.cosine_similarity(gradient, low_gradient, dim=0) > 0.99
    assert abs(low_gradient.norm() / gradient.norm() - 1) < 0.03


def test_a_step_is_captured_whole_and_once_a_crop_size(monkeypatch: pytest.MonkeyPatch):
    """The graph runs operation by operation here, which takes no compiler."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    trainer, result = trained(dataclasses.replace(PLAIN, compile=True))
    _, eager_result = trained()
    torch.testing.assert_close(result.losses, eager_result.losses, atol=1e-5, rtol=1e-5)
    labels = torch.zeros(8, dtype=torch.long)
    for graphs, size in ((1, 32), (2, 40), (2, 40), (2, 32)):
        trainer.step(Batch(torch.zeros(8, 3, size, size), labels, labels, torch.ones(8)))
        assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_compiled_epoch_agrees_with_the_eager_one(precision: torch.dtype, tolerance: float):
    _, result = trained(dataclasses.replace(PLAIN, precision=precision, compile=True))
    _, eager_result = trained(dataclasses.replace(PLAIN, precision=precision))
    torch.testing.assert_close(result.losses, eager_result.losses, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "words, kind, said",
    [
        ("no compiler", RunError, r"compiling the step failed \(no compiler\); add --no-compile"),
        ("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer", RuntimeError, "Connection closed by peer"),
    ],
)
def test_one_of_several_processes_repeats_no_step(words: str, kind: type, said: str, monkeypatch):
    """The others are in the exchanges of the first try, or are gone."""
    calls = []

    def step() -> None:
        calls.append(words)
        raise RuntimeError(words)

    form = CompiledForm(torch.nn.Linear(2, 2), dataclasses.replace(PLAIN, compile=True, world=2))
    with pytest.raises(kind, match=said):
        form.attempt(step, (2, 2))
    assert len(calls) == 1


def test_a_step_whose_compiler_fails_is_repeated_without_it(monkeypatch: pytest.MonkeyPatch, capsys):
    def failing(net: torch.nn.Module, **_) -> Callable:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            net(x)  # a compiled forward pass has moved the running statistics when its backward pass fails to compile
            raise RuntimeError("no compiler\nand more")

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    machine = dataclasses.replace(PLAIN, compile=True, notes=[])
    trainer, result = trained(machine)
    plain, expected = trained()
    assert torch.equal(result.losses, expected.losses)
    assert torch.equal(floats(trainer.net.state_dict()), floats(plain.net.state_dict()))
    assert len(machine.notes) == 1 and machine.notes[0].endswith("so it goes on uncompiled and slower: no compiler")


def test_gradients_of_a_step_that_failed_half_way_are_gone(monkeypatch: pytest.MonkeyPatch):
    def failing(net: torch.nn.Module, **_) -> Callable:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    _, result = trained(dataclasses.replace(PLAIN, compile=True, notes=[]))
    _, expected = trained()
    assert torch.equal(result.losses, expected.losses)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RunError("another matter")])
def test_what_is_no_failure_to_compile_is_not_called_one(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def failing(net: torch.nn.Module, **_) -> Callable:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            raise error

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    machine = dataclasses.replace(PLAIN, compile=True, notes=[])
    with pytest.raises(type(error)):
        trained(machine)
    assert machine.notes == []


def test_compiling_may_fail_for_another_batch_of_the_same_size(monkeypatch: pytest.MonkeyPatch):
    def failing(net: torch.nn.Module, **_) -> Callable:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            if len(x) == 4:
                raise RuntimeError("no compiler")
            return net(x)

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    trainer, _ = trained(dataclasses.replace(PLAIN, compile=True, notes=[]))
    assert trainer.machine.notes == []
    draws = draw_epoch(torch.arange(40), 1, 4, RECIPE.augmentation, (0, 0, 1))
    stage = dataclasses.replace(STAGE, batch=4)
    assert trainer.train_epoch(*pictures(), draws, stage, 32, lambda: None).samples == 40
    assert [note for note in trainer.machine.notes if "goes on uncompiled" in note]


@pytest.mark.parametrize("compile", [False, True])
def test_keys_and_scoring_do_not_know_how_it_is_calculated(compile: bool):
    trainer = Trainer(RECIPES["original"], 10, dataclasses.replace(PLAIN, compile=compile))
    assert list(trainer.net.state_dict()) == list(build_model().state_dict())
    assert type(trainer.eval_model) is type(build_model())
    assert trainer.step_model is not trainer.net
    weights = dict(trainer.step_model.named_parameters(remove_duplicate=False)).values()
    assert {id(p) for p in weights} == {id(p) for p in trainer.net.parameters()}


def test_an_epoch_neither_draws_from_the_global_generator_nor_depends_on_it():
    before = torch.get_rng_state()
    _, result = trained()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    _, again = trained()
    assert torch.equal(result.losses, again.losses)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_cosine_stem_does_not_learn_and_everything_else_does(optimizer: str):
    changes = {"network": "wide", "cosine_stem": True, "optimizer": optimizer}
    trainer, _ = trained(**changes)
    with torch.random.fork_rng():
        torch.manual_seed(RECIPE.seed)
        before = build_network(dataclasses.replace(RECIPE, **changes), 10).state_dict()
    stem = {"conv1.weight", "bn1.weight", "bn1.bias"}
    for state in (trainer.net.state_dict(), trainer.eval_model.state_dict()):
        same = {name for name, value in state.items() if torch.equal(value, before[name])}
        assert {name for name in same if state[name].is_floating_point()} == stem


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam", "schedule": "restarts", "average": 0.0},
        {"optimizer": "sgd"},
        {"optimizer": "muon", "augmentation": MIXED},
    ],
    ids=["adam", "sgd", "muon"],
)
def test_a_restored_trainer_goes_on_as_if_never_interrupted(changes: dict, tmp_path):
    trainer, _ = trained(**changes)
    torch.save(trainer.state(), tmp_path / "state.pt")
    restored = Trainer(trainer.recipe, 10, PLAIN)
    restored.begin_stage(STAGE, 40)
    restored.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.learning_rate == trainer.learning_rate
    assert torch.equal(train_epoch(restored, 1).losses, train_epoch(trainer, 1).losses)
    assert torch.equal(floats(restored.net.state_dict()), floats(trainer.net.state_dict()))
    assert torch.equal(floats(restored.eval_model.state_dict()), floats(trainer.eval_model.state_dict()))


def test_restarts_are_the_recipes():
    recipe = dataclasses.replace(RECIPE, schedule="restarts", cycle=1, cycle_growth=3, cycle_decay=0.5)
    trainer, rates = Trainer(recipe, 10, PLAIN), []
    trainer.begin_stage(STAGE, 40)
    for epoch in range(5):
        rates.append(trainer.learning_rate)
        train_epoch(trainer, epoch)
    assert rates == pytest.approx([0.1 * share for share in (1, 0.5, 0.375, 0.125, 0.25)])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_validation_is_in_the_runs_precision(precision: torch.dtype):
    trainer, _ = trained(dataclasses.replace(PLAIN, precision=precision))
    seen = []
    trainer.eval_model.fc.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    trainer.validate(*pictures(), torch.arange(5), 40, "none")
    assert seen == [precision]


def test_a_step_that_raised_leaves_the_next_ones_scale_alone():
    """As where capturing it fails: GradScaler lends the optimiser its scale for the time of the step."""
    machine = dataclasses.replace(PLAIN, precision=torch.float16)
    plain, _ = trained(machine)
    trainer, _ = trained(machine)
    trainer.optimizer.grad_scale = trainer.optimizer.found_inf = torch.tensor(float("nan"))
    assert torch.equal(train_epoch(trainer, 1).losses, train_epoch(plain, 1).losses)
    assert torch.equal(floats(trainer.net.state_dict()), floats(plain.net.state_dict()))


def test_a_stage_keeps_the_weights_alone_of_the_one_before():
    trainer, _ = trained(optimizer="muon")
    weights = trainer.net.state_dict()
    later = Trainer(trainer.recipe, 10, PLAIN)
    later.net.load_state_dict(weights)
    for either in (trainer, later):
        either.begin_stage(dataclasses.replace(STAGE, lr=0.02), 40)
    assert trainer.average.updates == 0
    assert torch.equal(train_epoch(trainer, 1).losses, train_epoch(later, 1).losses)
    assert torch.equal(floats(trainer.eval_model.state_dict()), floats(later.eval_model.state_dict()))


def test_validation_scores_the_average_on_clean_images_of_that_size():
    trainer, _ = trained()
    (images, labels), val = pictures(), torch.tensor([3, 7, 8, 30, 39])
    logits = scoring.tta_logits(trainer.average.net, images[val], 40, "multi")
    loss, accuracy = trainer.validate(images, labels, val, 40, "multi")
    assert loss == pytest.approx(F.cross_entropy(logits, labels[val]).item(), rel=1e-6)
    assert accuracy == (logits.argmax(1) == labels[val]).sum().item() / 5
    assert trainer.validate(images, labels, val[:0], 40, "multi") == (None, None)
    trainer.machine = dataclasses.replace(PLAIN, rank=1, world=2)
    assert trainer.validate(images, labels, val, 40, "multi") == (None, None)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_first_weights_are_of_the_seed(seed: int):
    recipe = dataclasses.replace(RECIPE, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = build_network(recipe, 10).state_dict()
    found = Trainer(recipe, 10, PLAIN).net.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_fp16_goes_on_at_the_scale_it_had(tmp_path):
    machine = dataclasses.replace(PLAIN, precision=torch.float16)
    trainer, _ = trained(machine, network="wide", optimizer="muon")
    torch.save(trainer.state(), tmp_path / "state.pt")
    restored = Trainer(trainer.recipe, 10, machine)
    restored.begin_stage(STAGE, 40)
    fresh = restored.scaler.state_dict()
    restored.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.scaler.state_dict() == trainer.scaler.state_dict() != fresh != {}
