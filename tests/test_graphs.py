"""Captured steps against plain ones. A graph is recorded here operation by operation, on the CPU.

Like a CUDA graph, a recording knows no Python: numbers are those of the capture, tensors are where they were, and
capturing itself changes nothing. Whatever of a step depends on the host would show.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from augment import draw_epoch
from harness import scoring
from harness.graphs import Graphs
from harness.machine import Machine
from optim import rates_on_device
from recipes import RECIPES, Recipe, Stage
from train import Trainer

CPU = torch.device("cpu")
STAGE = Stage(epochs=2, crop_size=(32, 40), eval_size=32, batch=8, lr=0.05)
IMAGES = 56
SMALL = {
    "wide": dataclasses.replace(RECIPES["cpu-long"], layers=(1, 1, 1), planes=(4, 8, 8), average=0.9),
    "bottleneck": dataclasses.replace(RECIPES["original"], layers=(1, 1, 1), planes=(4, 4, 8), views_per_image=1),
}


class Recording(TorchDispatchMode):
    """Notes each operation; on exit, what was there before the capture is as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in ("running_mean", "running_var"):  # which BatchNorm's schema does not admit
                for x in tree_leaves(named.get(argument.name)):
                    place = x.untyped_storage().data_ptr() if torch.is_tensor(x) else None
                    if place is not None and place not in self._made | self._before.keys():
                        self._before[place] = (x, x.clone())
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        made = {x.untyped_storage().data_ptr() for x in tree_leaves(out) if torch.is_tensor(x)}
        self._made |= made - given - self._before.keys()
        self.calls.append((func, args, kwargs, out))
        return out

    def put_back(self) -> None:
        for x, value in self._before.values():
            x.copy_(value)


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    calls: list[tuple]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph: RecordedGraph, pool: Any, stream: Any) -> Iterator[None]:
    assert stream == "a new one"  # the default one is every run's
    with Recording() as recording:
        yield
    with torch.no_grad():
        recording.put_back()
    graph.calls = recording.calls


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a new one")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the usual one")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)


@pytest.mark.parametrize("device, graphs", [("cuda:0", True), ("cuda:0", False), ("cpu", True)])
def test_only_a_machine_that_says_so_captures(device: str, graphs: bool) -> None:
    machine = Machine(torch.device(device), torch.float32, compile=True, graphs=graphs)
    assert Graphs(machine).enabled == (device == "cuda:0" and graphs)


def begun(recipe: Recipe, precision: torch.dtype, graphs: bool) -> Trainer:
    trainer = Trainer(recipe, 10, Machine(CPU, precision, compile=False))
    trainer.graphs.enabled = graphs
    trainer.begin_stage(STAGE, IMAGES)
    return trainer


def train_epoch(trainer: Trainer, epoch: int) -> torch.Tensor:
    """The epoch's losses."""
    recipe, generator = trainer.recipe, torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, 40, 40), dtype=torch.uint8, generator=generator)
    draws = draw_epoch(torch.arange(IMAGES), recipe.views_per_image, STAGE.batch, recipe.augmentation, (epoch,))
    draws = dataclasses.replace(draws, colour_orders=[(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)] * 100)
    size = STAGE.crop_size_in(epoch)
    return trainer.train_epoch(images, torch.arange(IMAGES) % 10, draws, STAGE, size, lambda: None).losses


def trained(recipe: Recipe, precision: torch.dtype, graphs: bool, epochs: int = 2) -> tuple[Trainer, torch.Tensor]:
    trainer = begun(recipe, precision, graphs)
    return trainer, torch.cat([train_epoch(trainer, epoch) for epoch in range(epochs)])


@pytest.mark.parametrize(
    "name, precision, tolerance",
    [("wide", torch.float32, 3e-4), ("bottleneck", torch.float32, 3e-4), ("wide", torch.float16, 3e-3)],
)
def test_captured_steps_learn_what_plain_ones_do(name: str, precision: torch.dtype, tolerance: float, recorded: None):
    recipe = dataclasses.replace(SMALL[name], views_per_image=1)
    # a rate on the device is float32, which rounds otherwise than a number of Python's
    (plain, losses), (captured, their_losses) = (trained(recipe, precision, graphs) for graphs in (False, True))
    assert len(captured.graphs._graphs) == 4  # of views by three colour orders and of learning, at the second size
    torch.testing.assert_close(their_losses, losses, rtol=tolerance, atol=tolerance)
    for model in ("net", "eval_model"):
        mine, theirs = (getattr(trainer, model).state_dict() for trainer in (plain, captured))
        torch.testing.assert_close(theirs, mine, rtol=10 * tolerance, atol=10 * tolerance)
    assert their_losses[-1] != their_losses[-2]  # and they do learn


@pytest.mark.parametrize("name", ["wide", "bottleneck"])
def test_a_continued_run_captures_the_rates_that_change(name: str, recorded: None, tmp_path):
    recipe = dataclasses.replace(SMALL[name], views_per_image=1)
    whole, _ = trained(recipe, torch.float32, graphs=True, epochs=1)
    torch.save(whole.state(), tmp_path / "state.pt")
    restored = begun(recipe, torch.float32, graphs=True)
    restored.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(train_epoch(restored, 1), train_epoch(whole, 1), rtol=1e-5, atol=1e-6)
    mine, theirs = (trainer.net.state_dict() for trainer in (whole, restored))
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


def test_a_new_stage_is_learnt_by_its_own_optimiser_and_rates(recorded: None):
    """At the size of the stage before, whose graphs would go on with its momentum and at its last rate."""
    recipe = dataclasses.replace(SMALL["wide"], views_per_image=1)
    found = []
    for graphs in (False, True):
        trainer = begun(recipe, torch.float32, graphs)
        train_epoch(trainer, 0)
        assert bool(trainer.graphs._graphs) == graphs
        trainer.begin_stage(dataclasses.replace(STAGE, lr=0.005), IMAGES)
        found.append(train_epoch(trainer, 0))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(monkeypatch: pytest.MonkeyPatch, recorded: None):
    @contextlib.contextmanager
    def refused(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    _, losses = trained(SMALL["bottleneck"], torch.float32, graphs=False, epochs=1)
    trainer, their_losses = trained(SMALL["bottleneck"], torch.float32, graphs=True, epochs=1)
    torch.testing.assert_close(their_losses, losses, rtol=1e-5, atol=1e-6)
    assert not trainer.graphs._graphs and len(trainer.machine.notes) == 2
    assert all("not permitted" in note for note in trainer.machine.notes)


@pytest.mark.parametrize("what", ["operation failed due to a previous error", "CUDA error: out of memory"])
def test_a_failed_capture_costs_no_other_and_tells_its_cause(
    what: str, monkeypatch: pytest.MonkeyPatch, recorded: None
):
    """As on a card: the end of the capture raises too, its stream stays the current one, its pool is recorded into."""
    streams, pools = ["the usual one"], iter(range(9))

    @contextlib.contextmanager
    def ends_badly(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        if pool == 0:
            streams.append("the capture's")
            try:
                raise RuntimeError("x.item() cannot be captured")
            finally:
                raise RuntimeError(what)
        with capture(graph, pool, stream):
            yield

    monkeypatch.setattr(torch.cuda, "graph", ends_badly)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    graphs = Graphs(Machine(CPU, torch.float32, compile=False))
    graphs.enabled = True

    def first(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def second(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    for number in range(4):
        x = torch.full((2,), float(number))
        assert graphs.run(first, (x,), warm=1).tolist() == [number + 1] * 2
        assert graphs.run(second, (x,), warm=1).tolist() == [number + 2] * 2
    assert streams[-1] == "the usual one" and [key[0] for key in graphs._graphs] == ["second"]
    assert graphs.machine.notes == ["first could not be captured as a CUDA graph (x.item() cannot be captured), so it "
                                    "runs slower"]  # fmt: skip


def test_a_graph_reads_its_inputs_anew_and_constants_have_graphs_of_their_own(recorded: None):
    graphs = Graphs(Machine(CPU, torch.float32, compile=False))
    graphs.enabled = True
    total = torch.zeros(())

    def add(x: torch.Tensor, factor: int) -> torch.Tensor:
        total.add_(x.sum() * factor)
        return x * factor

    for number in range(1, 6):
        for factor in (2, 3):
            x = torch.full((2,), float(number))
            assert graphs.run(add, (x,), factor, warm=2).tolist() == [number * factor] * 2
    assert total == 2 * (1 + 2 + 3 + 4 + 5) * (2 + 3)


def test_what_lacks_memory_beside_the_graphs_gets_theirs(recorded: None):
    graphs = Graphs(Machine(CPU, torch.float32, compile=False))
    graphs.enabled = True

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def score() -> str:
        if graphs._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "scored"

    def broken() -> None:
        raise RuntimeError("another matter")

    x = torch.ones(2)
    for _ in range(2):
        for _ in range(3):
            assert graphs.run(double, (x,), warm=1).tolist() == [2.0, 2.0]
        assert graphs._graphs
        with pytest.raises(RuntimeError, match="another matter"):
            graphs.making_room(broken)
        assert graphs.making_room(score) == "scored" and not graphs._graphs
    with pytest.raises(torch.OutOfMemoryError):
        graphs.making_room(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))


def test_validation_may_take_the_graphs_memory(recorded: None, monkeypatch: pytest.MonkeyPatch):
    trainer, _ = trained(SMALL["bottleneck"], torch.float32, graphs=True, epochs=1)
    score = scoring.tta_logits

    def short_of_memory(*args: Any, **options: Any) -> torch.Tensor:
        if trainer.graphs._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(*args, **options)

    monkeypatch.setattr(scoring, "tta_logits", short_of_memory)
    images, labels = torch.zeros(4, 3, 40, 40, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    assert trainer.graphs._graphs
    loss, accuracy = trainer.validate(images, labels, torch.arange(4), 40, "none")
    assert loss > 0 and 0 <= accuracy <= 1 and not trainer.graphs._graphs


def test_rates_on_the_device_are_what_a_schedule_sets():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates_on_device(optimizer, CPU)
    held = optimizer.param_groups[0]["lr"]
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is held and held == 0.25
