"""The running average's rising decay, against its closed form, and what runs keep that were begun without it."""

import dataclasses
import json
from fractions import Fraction
from math import factorial
from pathlib import Path

import conftest
import pytest
import torch
from torch import nn

import evaluate
import train
from harness import checkpoint
from harness.interrupt import STOPPED_BY_TIME
from harness.machine import Machine
from optim import RunningAverage
from recipes import RECIPES, Recipe, Stage

RECIPE = dataclasses.replace(RECIPES["cpu"], layers=(1, 1, 1), planes=(8, 16, 16), average=0.9)
STAGE = Stage(epochs=4, crop_size=(32,), eval_size=32, batch=8, lr=0.1)


def averaged(values: list[float], decay: float, warmup: bool) -> float:
    """What is left of a network of one weight that took these values, one after the other."""
    net = nn.Linear(1, 1, bias=False).double()
    average = RunningAverage(net, decay, warmup)
    for value in values:
        nn.init.constant_(net.weight, value)
        average.update()
    return average.net.weight.item()


@pytest.mark.parametrize("updates", [1, 2, 3, 10, 40])
def test_weights_of_a_rising_decay(updates: int) -> None:
    """Value t ends with 9 · (t+9)! / (t+1)! · T! / (T+9)!, and the first, which is copied, with 10! · T! / (T+9)!."""
    ratio = Fraction(factorial(updates), factorial(updates + 9))
    shares = [factorial(10) * ratio]
    shares += [9 * Fraction(factorial(t + 9), factorial(t + 1)) * ratio for t in range(1, updates)]
    assert sum(shares) == 1
    for t, share in enumerate(shares):
        impulse = [float(t == other) for other in range(updates)]
        assert averaged(impulse, 0.99, warmup=True) == pytest.approx(float(share), rel=1e-12)


def test_the_decay_rises_no_further_than_asked() -> None:
    """(1 + t) / (10 + t) is 0.5 at update 8: from there on each value counts as much as all before it."""
    late, early = ([float(t == place) for t in range(24)] for place in (20, 3))
    assert averaged(late, 0.5, warmup=True) == averaged(late, 0.5, warmup=False) == 0.5**4
    kept = 9 / 13 * (5 / 14) * (6 / 15) * (7 / 16) * (8 / 17) * 0.5**16
    assert averaged(early, 0.5, warmup=True) == pytest.approx(kept)


def trainer(warmup: bool) -> train.Trainer:
    recipe = dataclasses.replace(RECIPE, average_warmup=warmup)
    begun = train.Trainer(recipe, 10, Machine(torch.device("cpu"), torch.float32, compile=False))
    begun.begin_stage(STAGE, 40)
    return begun


def learn(begun: train.Trainer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        labels = torch.arange(8)
        begun.step(train.Batch(x, labels, labels, torch.ones(8)))


@pytest.mark.parametrize("warmup", [True, False])
def test_a_state_continues_exactly(warmup: bool, tmp_path: Path) -> None:
    whole, first, second = (trainer(warmup) for _ in range(3))
    learn(whole, range(6))
    learn(first, range(3))
    torch.save(first.state(), tmp_path / "state.pt")
    second.restore(torch.load(tmp_path / "state.pt"))
    learn(second, range(3, 6))
    states = [run.average.net.state_dict().values() for run in (whole, second)]
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_old_recipes_keep_the_old_rule() -> None:
    values = RECIPE.as_dict()
    del values["average_warmup"]
    assert Recipe.from_dict(values) == dataclasses.replace(RECIPE, average_warmup=False)
    assert Recipe.from_dict(values | {"average": 0.0}) == dataclasses.replace(RECIPE, average=0.0)


def run(folder: Path, *flags: str) -> int:
    place = ["--data-dir", str(folder.parent / "data"), "--out", str(folder)]
    return train.main([*conftest.TINY_RUN, "--average", "0.9", *place, *flags])


def test_an_old_run_continues_by_the_same_command_and_the_old_rule(
    tmp_path: Path, small_demo, empty_plots, capsys
) -> None:
    old, new, continued = tmp_path / "old", tmp_path / "new", tmp_path / "continued"
    assert run(new) == run(old, "--no-average-warmup") == 0
    assert run(continued, "--no-average-warmup", "--max-minutes", "1e-9") == STOPPED_BY_TIME
    state = checkpoint.load(continued / "last.pt")
    assert len(state["rows"]) == 1
    del state["recipe"]["average_warmup"]
    checkpoint.save(continued / "last.pt", state)
    capsys.readouterr()
    assert run(continued) == 0
    assert "goes on with average_warmup = False" in capsys.readouterr().out
    averages = [checkpoint.load(folder / "last.pt")["average"] for folder in (old, continued, new)]
    pairs = [[torch.equal(averages[0][name], other[name]) for name in averages[0]] for other in averages[1:]]
    assert all(pairs[0]) and not all(pairs[1])


def test_the_average_is_what_is_kept_and_scored_as_the_run_validates(
    tmp_path: Path, small_demo, empty_plots, capsys
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--tta", "mirror") == 0
    state, end = checkpoint.load(folder / "last.pt"), checkpoint.load(folder / "stage1.pt")
    before = checkpoint.load(folder / "previous.pt")["average"]  # at the end of stage 1
    kept = checkpoint.load_network(folder).model.state_dict()
    assert all(torch.equal(value, state["average"][name]) for name, value in kept.items())
    assert all(torch.equal(value, before[name]) for name, value in end["model"].items())
    assert not torch.equal(kept["fc.weight"], state["model"]["fc.weight"])
    best = max(state["rows"], key=lambda row: row["val_accuracy"])
    for flags, row in (([], state["rows"][-1]), (["--best"], best)):
        words = [str(folder), *flags, "--out", str(tmp_path / "out"), "--threads", "1", "--precision", "fp32"]
        assert evaluate.main(words) == 0
        (entry,) = json.loads((tmp_path / "out" / "report.json").read_text())["networks"]
        (result,) = entry["results"]
        assert (result["tta"], result["accuracy"]) == ("mirror", row["val_accuracy"])
        assert result["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
