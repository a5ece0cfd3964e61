"""The numbers in TensorBoard's files are those of metrics.csv, each once, also after an interruption."""

import csv
import sys
import threading
from pathlib import Path

import pytest
from picture_folders import TINY, fill

import train
from harness.errors import RunError
from harness.interrupt import STOPPED_BY_TIME


def command(folder: Path) -> list[str]:
    return [*TINY, "--images", str(fill(folder / "pictures", 5)), "--out", str(folder / "run"), "--tensorboard"]


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def failing(*args: object) -> None:
    raise RunError("full")


def test_scalars_are_the_rows_of_the_csv_once_each(tmp_path: Path, empty_plots: None, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    line = [*command(tmp_path), "--epochs", "2", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "monotonic", iter(range(0, 10**9, 1000)).__next__)  # a slow machine, it will seem
        assert train.main([*line, "--max-minutes", "1"]) == STOPPED_BY_TIME
    assert [step for step, _ in written(tmp_path / "run")["train_loss"]] == [1]
    threads = threading.active_count()
    with monkeypatch.context() as patch, pytest.raises(RunError, match="^full$"):
        patch.setattr(train, "train_epochs", failing)
        train.main(line)
    assert threading.active_count() == threads
    assert train.main(line) == 0
    assert threading.active_count() == threads  # none is left in a notebook's kernel
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    scalars = written(tmp_path / "run")
    assert scalars.keys() == rows[0].keys() - {"stage", "epoch"}
    for name, points in scalars.items():
        assert [step for step, _ in points] == [1, 2, 3]
        assert [value for _, value in points] == pytest.approx([float(row[name]) for row in rows])


def test_missing_package_is_asked_for_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(RunError, match="^--tensorboard needs the package tensorboard: pip install tensorboard$"):
        train.main(command(tmp_path))


def test_a_package_that_cannot_be_used_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __getattr__(self, name: str) -> object:
            raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Old())
    with pytest.raises(RunError, match="^--tensorboard: Descriptors cannot be created directly; pip install --upgrade"):
        train.main(command(tmp_path))
