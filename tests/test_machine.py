import dataclasses
import functools
import os
import shutil

import checkpoint
import engine
import pytest
import torch
import torch.nn.functional as F
from engine import Machine, forward_gflop, normed, predict_seconds, step_gflop
from errors import RunError
from learner import RunningAverage, Trainer
from settings import RECIPES, Runtime, Stage
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import augment
from model import build_model

CPU = torch.device("cpu")
PLAIN = Machine(CPU, torch.float32, compile=False)
RECIPE = dataclasses.replace(
    RECIPES["cpu"],
    network="bottleneck",
    layers=(1, 1, 1),
    planes=(4, 8, 8),
    cosine_stem=False,
    zero_init_residual=True,
    optimizer="sgd",
    views=1,
    average=0.5,
)
FULL = dataclasses.replace(RECIPE, layers=(4, 9, 8), planes=(30, 60, 96))
STAGE = Stage(epochs=4, crop_size=(32,), eval_size=32, batch=8, lr=0.1)


@pytest.fixture
def restored():
    """Leaves the settings of the process as they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def pictures(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random pictures and labels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = (F.interpolate(coarse, size=96, mode="bilinear") * 255).byte()
    return images, torch.randint(10, (count,), generator=generator)


def trained(machine: Machine, layout: torch.memory_format = torch.channels_last, **changes):
    """A learner after one epoch of five steps, and the epoch's result."""
    recipe = dataclasses.replace(RECIPE, **changes)
    images, labels = pictures()
    learner = Trainer(recipe, 10, machine)
    learner.net.to(memory_format=layout)
    learner.begin(STAGE, len(images))
    draws = augment.draw_epoch(torch.arange(40), 1, STAGE.batch, recipe.augmentation, (0, 0, 0))
    return learner, learner.train_epoch(images, labels, draws, STAGE, 32, lambda: None)


def by_hand() -> tuple[list[float], int, dict[str, torch.Tensor]]:
    """What `trained` does in float32, written plainly: NCHW, PyTorch's own loss, optimiser, schedule and average."""
    images, labels = pictures()
    torch.manual_seed(RECIPE.seed)
    net = build_model(RECIPE.layers, planes=RECIPE.planes, zero_init_residual=True)
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": RECIPE.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=STAGE.lr, momentum=0.9, nesterov=True, foreach=False)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(RECIPE.average), use_buffers=True)
    draws = augment.draw_epoch(torch.arange(40), 1, STAGE.batch, RECIPE.view, (0, 0, 0))
    losses, hits = [], 0
    for step in range(5):
        rows = slice(8 * step, 8 * step + 8)
        index = draws.order[rows]
        x = augment.augment(images[index], draws.uniforms[rows], draws.colour_orders[step], 32, RECIPE.view)
        logits = net(augment.normalise(x))
        loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1 * 10 / 9)
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.rate(STAGE, step / 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        losses.append(loss.item())
        hits += (logits.argmax(1) == labels[index]).sum().item()
    return losses, hits, average.module.state_dict()


def floats(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])


def test_an_epoch_is_the_plainly_written_one():
    losses, hits, average = by_hand()
    learner, result = trained(PLAIN)
    torch.testing.assert_close(result.losses, torch.tensor(losses), atol=1e-5, rtol=1e-5)
    assert (result.hits, result.samples, result.finite) == (hits, 40, True)
    torch.testing.assert_close(floats(learner.scored.state_dict()), floats(average), atol=1e-4, rtol=1e-3)


def test_layout_changes_nothing_beyond_rounding():
    learner, result = trained(PLAIN, torch.contiguous_format)
    other, other_result = trained(PLAIN)
    torch.testing.assert_close(result.losses, other_result.losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(floats(learner.net.state_dict()), floats(other.net.state_dict()), atol=1e-4, rtol=1e-3)


def first_gradient(machine: Machine) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the full network's first step, its blocks starting as their shortcuts.

    Without that start a gradient through 67 layers turns away at the least rounding, of the input alone too.
    """
    images, labels = pictures(16)
    learner = Trainer(FULL, 10, machine)
    learner.begin(STAGE, 16)
    learner.net.train()
    x = augment.normalise(F.interpolate(images / 255, size=40, mode="area"))
    loss, _ = learner._forward(x, labels, torch.ones(16), torch.zeros(16, augment.COLUMNS))
    loss.backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in learner.net.parameters())
    return loss.item(), torch.cat([p.grad.flatten() for p in learner.net.parameters()])


def test_bf16_agrees_with_float32_to_its_precision():
    loss, gradient = first_gradient(PLAIN)
    low_loss, low_gradient = first_gradient(Machine(CPU, torch.bfloat16, compile=False))
    assert low_loss != loss and abs(low_loss - loss) < 2**-8 * loss
    assert F.cosine_similarity(gradient, low_gradient, dim=0) > 0.99
    assert abs(low_gradient.norm() / gradient.norm() - 1) < 0.03


def test_a_step_is_captured_whole_and_once_a_crop_size(monkeypatch):
    """The graph runs operation by operation here, which takes no compiler."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    learner, result = trained(dataclasses.replace(PLAIN, compile=True))
    _, eager_result = trained(PLAIN)
    torch.testing.assert_close(result.losses, eager_result.losses, atol=1e-5, rtol=1e-5)
    for graphs, size in ((1, 32), (2, 40), (2, 40), (2, 32)):
        learner._forward(torch.zeros(8, 3, size, size), *[torch.zeros(8, dtype=torch.long)] * 2, torch.zeros(8, 40))
        assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.skipif("COMPILE" not in os.environ, reason="takes a minute and a C++ compiler: set COMPILE=1")
@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_compiled_epoch_agrees_with_the_eager_one(precision, tolerance):
    _, result = trained(Machine(CPU, precision, compile=True))
    _, eager_result = trained(Machine(CPU, precision, compile=False))
    torch.testing.assert_close(result.losses, eager_result.losses, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("compile", [False, True])
def test_keys_and_scoring_do_not_know_how_it_is_calculated(compile: bool):
    learner = Trainer(RECIPES["original"], 10, dataclasses.replace(PLAIN, compile=compile))
    assert list(learner.net.state_dict()) == list(build_model().state_dict())
    assert type(learner.scored) is type(build_model())
    assert learner._net is not learner.net
    weights = dict(learner._net.named_parameters(remove_duplicate=False)).values()
    assert {id(p) for p in weights} == {id(p) for p in learner.net.parameters()}


def test_the_running_average_is_torchs():
    net = build_model((1, 1, 1), planes=(4, 4, 4))
    ours, theirs = (
        RunningAverage(net, 0.9),
        AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    for step in range(4):
        with torch.no_grad():
            for value in (*net.parameters(), *net.buffers()):
                value.add_(step)
        ours.update()
        theirs.update_parameters(net)
        assert torch.equal(floats(ours.net.state_dict()), floats(theirs.module.state_dict()))
    assert ours.updates == 4 and not any(p.requires_grad for p in ours.net.parameters())


def test_an_epoch_neither_draws_from_the_global_generator_nor_depends_on_it():
    before = torch.get_rng_state()
    _, result = trained(PLAIN)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    _, again = trained(PLAIN)
    assert torch.equal(result.losses, again.losses)


def test_mixed_epochs_learn_from_both_labels():
    views = dataclasses.replace(RECIPE.view, mixup=1.0, cutmix=1.0, erase=0.5)
    _, result = trained(PLAIN, view=views)
    _, plain = trained(PLAIN)
    assert result.finite and not torch.equal(result.losses, plain.losses)


@pytest.mark.parametrize("size, gflop", [(70, 0.74), (96, 1.37), (120, 2.16)])
def test_forward_gflop_of_the_original_network(size: int, gflop: float):
    net = build_model().train()
    assert round(forward_gflop(net, size), 2) == gflop
    assert step_gflop(net, size) == 3 * forward_gflop(net, size)
    assert net.training and not net._forward_hooks and net.bn1.num_batches_tracked == 0


def test_normed_numbers_are_those_of_each_norm():
    net = build_model((1, 1, 1), kind="wide", planes=(4, 6, 8))
    stem, first, second, third = 2 * 20**2, 4 * 10**2, 6 * 5**2, 8 * 2**2
    assert normed(net, 40) == stem + 2 * (first + second + third)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_cosine_stem_does_not_learn_and_everything_else_does(optimizer):
    changes = {"network": "wide", "cosine_stem": True, "optimizer": optimizer}
    learner, _ = trained(PLAIN, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(RECIPE.seed)
        before = checkpoint.network(dataclasses.replace(RECIPE, **changes), 10).state_dict()
    for state in (learner.net.state_dict(), learner.scored.state_dict()):
        same = {name for name, value in state.items() if torch.equal(value, before[name])}
        assert {name for name in same if state[name].is_floating_point()} == {"conv1.weight"}


def test_predicted_seconds_are_samples_over_rates():
    recipe = RECIPES["original"]
    rates = {70: 100.0, 120: 40.0}
    full = 300 * 80_000 / 100 + 140 * 80_000 / 40
    assert predict_seconds(recipe, 4_000, rates) == pytest.approx(full)
    assert predict_seconds(recipe, 12_000, rates) == pytest.approx(3 * full)
    assert predict_seconds(recipe, 4_000, rates, done=310) == pytest.approx(130 * 80_000 / 40)
    assert predict_seconds(recipe, 4_000, rates, done=440) == 0


def test_predicted_seconds_follow_the_sizes_within_a_stage():
    recipe = RECIPES["cpu"]
    sizes = [recipe.size(epoch) for epoch in range(recipe.epochs)]
    rates = {32: 200.0, 48: 90.0, 64: 50.0}
    expected = sum(1 / rates[size] for size in sizes) * 4_000 * recipe.views_per_image
    assert predict_seconds(recipe, 4_000, rates) == pytest.approx(expected)


def test_the_prediction_before_any_measurement_is_arithmetic(monkeypatch):
    net, recipe = build_model(), RECIPES["original"]
    monkeypatch.setattr(engine, "CPU_GFLOPS", {torch.float32: 40.0})
    monkeypatch.setattr(engine, "CPU_NORM_SECONDS", {torch.float32: 1e-8})
    images = 4_000 * 20
    seconds = images * 300 * (3 * forward_gflop(net, 70) / 40 + 1e-8 * normed(net, 70))
    seconds += images * 140 * (3 * forward_gflop(net, 120) / 40 + 1e-8 * normed(net, 120))
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert PLAIN.predict_seconds(recipe, net, 4_000) == pytest.approx(seconds / threads)


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("native", [False, True])
def test_precision_is_bf16_where_the_hardware_has_it_or_the_user_asks(restored, monkeypatch, asked, native):
    monkeypatch.setattr(engine, "_has_native_bf16", lambda device: native)
    bf16 = asked == "bf16" or (asked == "auto" and native)
    machine = engine.start(Runtime(device="cpu", precision=asked, threads=1))
    assert machine == Machine(CPU, torch.bfloat16 if bf16 else torch.float32, compile=False)
    assert torch.get_num_threads() == 1
    with machine.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == machine.precision


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:7"])
def test_a_device_that_is_not_there_is_a_sentence(name: str):
    with pytest.raises(RunError, match=f"--device '?{name}'?.* use"):
        engine.start(Runtime(device=name))


def test_compile_needs_a_compiler(restored, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RunError, match="C\\+\\+ compiler"):
        engine.start(Runtime(device="cpu", compile=True))
