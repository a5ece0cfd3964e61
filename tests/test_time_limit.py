"""What `--max-minutes` counts, on a clock that the tests set; that a run which it stopped continues: test_faults.py."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY_RUN

import train
from harness import checkpoint
from harness.interrupt import STOPPED_BY_TIME, Interrupt


@pytest.mark.parametrize(
    ("sizes", "compiling", "minutes", "stops"),
    [
        ("32,32", 0, 50, False),  # enough for views of the same size, not of twice it
        ("32,64", 0, 50, True),
        ("64,32", 0, 50, False),
        ("32,32", 700, 44, True),  # seconds that the next size takes to compile count
        ("32,32", 700, 45, False),
    ],
)
def test_time_limit_knows_what_the_next_epoch_takes(
    sizes: str, compiling: int, minutes: int, stops: bool, tmp_path: Path, small_demo, empty_plots, monkeypatch
) -> None:
    """The first of two epochs takes 1000 s."""
    now, train_epoch = 0.0, train.Trainer.train_epoch

    def slow(*args: object) -> train.EpochResult:
        nonlocal now
        now += 1000
        return train_epoch(*args)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(train.Trainer, "train_epoch", slow)
    monkeypatch.setattr(train.Progress, "compile_seconds", lambda progress, epochs_done: {1: compiling}[epochs_done])
    place = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    argv = [*TINY_RUN, "--epochs", "2", "0", "--crop-size", sizes, "32", "--max-minutes", str(minutes), *place]
    assert train.main(argv) == (STOPPED_BY_TIME if stops else 0)
    state, _ = checkpoint.resume(tmp_path / "run")
    assert len(state["rows"]) == (1 if stops else 2)


@pytest.mark.parametrize(
    ("minutes", "cold", "stops"), [(54, 0.0, True), (56, 0.0, False), (48, 400.0, True), (49, 400.0, False)]
)
def test_time_limit_counts_from_the_command_and_knows_what_an_epoch_took(
    minutes: int, cold: float, stops: bool, tmp_path: Path, small_demo: None, empty_plots: None, monkeypatch
) -> None:
    """Opening the images takes 300 s; an epoch 1000 s, `cold` of them to compile, and 500 s of scoring."""
    now, watched = 0.0, train.Progress.epoch

    def slow(function: Callable, seconds: float) -> Callable:
        def call(*args: object, **options: object) -> object:
            nonlocal now
            now += seconds
            return function(*args, **options)

        return call

    @contextlib.contextmanager
    def epoch(progress: train.Progress, *args: object) -> Iterator[Callable[[], None]]:
        with watched(progress, *args) as tick:
            yield tick
        progress.cold_seconds = cold

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(train, "load_images", slow(train.load_images, 300))
    monkeypatch.setattr(train.Trainer, "train_epoch", slow(train.Trainer.train_epoch, 1000))
    monkeypatch.setattr(train.Trainer, "validate", slow(train.Trainer.validate, 500))
    monkeypatch.setattr(train.Progress, "epoch", epoch)
    place = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    argv = [*TINY_RUN, "--epochs", "2", "0", "--max-minutes", str(minutes), *place]
    assert train.main(argv) == (STOPPED_BY_TIME if stops else 0)
    state, _ = checkpoint.resume(tmp_path / "run")
    assert [row["seconds"] for row in state["rows"]] == [1500.0] * (1 if stops else 2)


def test_what_fits_is_not_called_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert Interrupt(0, 1).shortage(1e9) == "" and Interrupt(2, 1).shortage(119) == ""
    assert "an epoch takes 2.0 minutes, more than --max-minutes 2 leaves" in Interrupt(2, 1).shortage(121)


def test_a_limit_too_short_for_one_epoch_is_said(tmp_path: Path, small_demo, empty_plots, capsys) -> None:
    """And one is trained all the same: so many commands, so many epochs."""
    argv = [*TINY_RUN, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--max-minutes", "1e-9"]
    said = []
    for _ in range(4):
        train.main(argv)
        said.append("more than --max-minutes 1e-09 leaves: one is run" in "".join(capsys.readouterr()))
    assert said == [False, True, True, True]
    train.main(argv)  # of a finished run nothing is expected
    assert "--max-minutes" not in "".join(capsys.readouterr())
