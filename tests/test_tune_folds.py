"""Splits of the training images alone, by which settings are chosen without the validation images."""

import dataclasses
import json
from pathlib import Path

import conftest
import picture_folders
import pytest
import torch

import data
import evaluate
import train
from harness import errors, images
from harness.cli import default_run_folder, parse_train
from recipes import RECIPES


def expected(labels: list[int], trains: list[int], fold: int) -> tuple[list[int], list[int]]:
    """By hand: class after class, the ascending training indices, of which members[fold::5] validate."""
    val = []
    for label in sorted(set(labels)):
        members = sorted(index for index in trains if labels[index] == label)
        val += members[fold::5]
    return sorted(set(trains) - set(val)), sorted(val)


def test_a_small_split_written_out() -> None:
    labels = torch.tensor([0, 1] * 9)
    trains = torch.tensor([16, 0, 2, 4, 6, 8, 10, 1, 3, 7, 9, 11])  # of class 0 seven, of class 1 five
    train, val = data.tune_indices(labels, trains, 1)
    assert val.tolist() == [2, 3, 16] and train.tolist() == [0, 1, 4, 6, 7, 8, 9, 10, 11]
    train, val = data.tune_indices(labels, trains, 4)
    assert val.tolist() == [8, 11] and len(train) == 10


def test_the_real_split(stl10_dir: Path) -> None:
    """3,200 and 800 of split 1337's 4,000; over the folds each of them once, and none of the 1,000."""
    dataset, trains, val_images = images.load_images(RECIPES["cpu"], stl10_dir, fetch=False)
    seen: list[int] = []
    for fold in range(data.TUNE_FOLDS):
        train, val = images.split_by(dataclasses.replace(RECIPES["cpu"], tune_fold=fold), dataset, stl10_dir)
        assert (train.tolist(), val.tolist()) == expected(dataset.labels.tolist(), trains.tolist(), fold)
        assert (len(train), len(val)) == (3_200, 800)
        assert dataset.labels[val].bincount().tolist() == [80] * 10
        assert not set(val_images.tolist()) & set(train.tolist() + val.tolist())
        seen += val.tolist()
    assert sorted(seen) == trains.tolist()


@pytest.mark.parametrize("given", [False, True])
def test_the_users_own_pictures(given: bool, tmp_path: Path) -> None:
    """Whether the folder states its split or the recipe draws it, its validation pictures stay untouched."""
    folder = tmp_path / "pictures"
    if given:
        picture_folders.fill(folder / "train", 7)
        picture_folders.fill(folder / "val", 3, start=100)
    else:
        picture_folders.fill(folder, 10)
    recipe = dataclasses.replace(RECIPES["demo"], image_size=32, val_fraction=0.3)
    dataset, trains, _ = images.load_images(recipe, tmp_path, folder)
    for fold in (0, 4):
        tuned = dataclasses.replace(recipe, tune_fold=fold)
        same, train, val = images.load_images(tuned, tmp_path, folder)
        assert same.digest == dataset.digest
        assert (train.tolist(), val.tolist()) == expected(dataset.labels.tolist(), trains.tolist(), fold)
        assert len(val) == 3 * (2 if fold == 0 else 1)


def test_too_few_pictures_of_a_class(tmp_path: Path) -> None:
    folder = picture_folders.fill(tmp_path / "pictures", 5)
    recipe = dataclasses.replace(RECIPES["demo"], image_size=32, tune_fold=0)
    with pytest.raises(errors.RunError, match="class apple has only 4 pictures; --tune-fold needs five"):
        images.load_images(recipe, tmp_path, folder)


@pytest.mark.parametrize("fold", [-1, 5])
def test_other_folds(fold: int) -> None:
    with pytest.raises(ValueError, match="fold must lie between 0 and 4"):
        data.tune_indices(torch.zeros(5, dtype=torch.long), torch.arange(5), fold)


@pytest.mark.parametrize("other", ["--fold 1", "--train-on all"])
def test_it_excludes_what_else_says_which_images_train(other: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train(["--tune-fold", "2", *other.split()])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--tune-fold and" in said and "cannot be combined" in said


def test_the_run_folders_name() -> None:
    assert default_run_folder(*parse_train("--recipe cpu --tune-fold 3 --seed 7".split())).name == "cpu-tunefold3-seed7"


def test_a_run_and_its_scoring(tmp_path: Path, small_demo, empty_plots, capsys) -> None:
    """160 images train on the small demo, 16 of a class: 4 of each validate in fold 0."""
    folder, place = tmp_path / "run", ["--data-dir", str(tmp_path / "data")]
    flags = [*conftest.TINY_RUN, "--epochs", "1", "0", *place, "--out", str(folder)]
    assert train.main([*flags, "--tune-fold", "0"]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["images"] == {"train": 120, "val": 40} and config["recipe"]["tune_fold"] == 0
    capsys.readouterr()
    assert evaluate.main([str(folder), "--threads", "1", "--precision", "fp32"]) == 0
    (entry,) = json.loads((folder / "evaluation-val" / "report.json").read_text())["networks"]
    summary = json.loads((folder / "summary.json").read_text())
    assert entry["results"][0]["accuracy"] == summary["last"]["val_accuracy"]
    assert entry["members"][0]["tune_fold"] == 0
    for other in ([], ["--tune-fold", "1"]):
        assert errors.report(lambda other=other: train.main([*flags, *other])) == 1
        assert "tune_fold was 0, now" in capsys.readouterr().err
