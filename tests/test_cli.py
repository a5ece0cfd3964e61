"""The command line of `train.py` against the dataclasses that its flags are made from."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from augment import ViewOptions
from harness import cli
from harness.cli import Runtime, default_run_folder, parse_train
from recipes import RECIPES, Recipe, Stage


def test_plain_command_is_the_original_recipe():
    recipe, runtime = parse_train([])
    assert recipe == RECIPES["original"] and runtime == Runtime()
    first, second = recipe.stages
    assert (first.epochs, first.crop_size, first.batch, first.lr) == (300, (70,), 128, 1e-3)
    assert (second.epochs, second.crop_size, second.batch, second.lr) == (140, (120,), 64, 5e-4)
    assert (recipe.views_per_image, recipe.seed, recipe.optimizer, recipe.weight_decay) == (20, 0, "adam", 1e-4)
    assert recipe.decay_norms and recipe.label_smoothing == recipe.average == 0 and recipe.tta == "none"
    samples = sum(stage.epochs * 4000 * recipe.views_per_image for stage in recipe.stages)
    assert samples == 35_200_000


def test_the_demo_is_not_compiled_unless_asked_for():
    """It would take longer than the run."""
    assert parse_train([])[1].compile is None is parse_train(["--recipe", "cpu"])[1].compile
    for demo in (["--demo"], ["--recipe", "demo"]):
        assert parse_train(demo)[1].compile is False and parse_train([*demo, "--compile"])[1].compile is True
    assert parse_train(["--recipe", "demo", "--images", "x"])[1].compile is None


@pytest.mark.parametrize("settings_class", [Stage, ViewOptions, Recipe, Runtime])
def test_every_field_with_a_help_text_is_a_flag(settings_class):
    flags = cli.train_parser().format_help()
    for item in dataclasses.fields(settings_class):
        if "help" in item.metadata:
            name = "views" if item.name == "views_per_image" else item.name
            assert f"--{name.replace('_', '-')} " in flags


def test_flags_replace_the_recipes_values():
    recipe, runtime = parse_train(
        "--recipe cpu --epochs 3 --crop-size 32,48 --rotation 5 --crop-scale 0.5 1 --views 2 --tta none "
        "--planes 4 8 16 --fold 2 --out x --threads 1".split()
    )
    expected = dataclasses.replace(
        RECIPES["cpu"],
        stages=(dataclasses.replace(RECIPES["cpu"].stages[0], epochs=3, crop_size=(32, 48)),),
        augmentation=dataclasses.replace(RECIPES["cpu"].augmentation, rotation=5.0, crop_scale=(0.5, 1.0)),
        views_per_image=2,
        tta="none",
        planes=(4, 8, 16),
        fold=2,
    )
    assert recipe == expected
    assert (str(runtime.out), runtime.threads) == ("x", 1)


def test_one_value_a_stage():
    recipe, _ = parse_train(["--epochs", "30", "0"])
    assert [stage.epochs for stage in recipe.stages] == [30, 0]
    last = recipe.at(29)
    assert (last.stage_index, last.number) == (0, 29)
    with pytest.raises(ValueError, match="no more epochs"):
        recipe.at(30)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--views 0", "--views must be at least 1 and at most 10000, not 0"),
        ("--demo --recipe cpu", "--demo and --recipe cpu cannot be combined"),
        ("--demo --images x", "--demo draws its own pictures; with --images use --recipe demo"),
        ("--fold 1 --images x", "--fold is one of STL-10's official folds: other pictures have none"),
        ("--image-size 64", "--image-size has no effect without --images: STL-10's are 96 px"),
        ("--mix-probability 0.5", "--mix-probability has no effect without --mixup or --cutmix"),
        ("--erase-size 0.5", "--erase-size has no effect without --erase"),
        ("--warmup 0.2", "--warmup has no effect with --schedule restarts"),
        ("--recipe cpu --cycle-growth 3", "--cycle-growth has no effect with --schedule cosine"),
        ("--no-average-warmup", "--average-warmup has no effect without --average"),
        ("--train-on all --split-seed 1", "--split-seed has no effect with --train-on all"),
        ("--fold 1 --val-fraction 0.5", "--val-fraction has no effect with --fold"),
        ("--crop-size 32 4x", "'4x' is not a size or a comma-separated list of sizes"),
        ("--view 1", "unrecognized arguments: --view 1"),
    ],
)
def test_flags_that_cannot_be_are_one_sentence_with_status_2(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train(flags.split())
    assert stop.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("train.py: error: ") and last.endswith(sentence)


@pytest.mark.parametrize("flag, way_out", [("--cosine-stem", "--no-cosine-stem"), ("--no-last-pool", "--last-pool")])
def test_parts_of_the_wide_network_are_refused_for_the_other(flag, way_out, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train([flag])
    assert stop.value.code == 2
    assert f"is part of network wide: for bottleneck add {way_out}\n" in capsys.readouterr().err
    parse_train([flag, "--network", "wide", "--layers", "1", "1", "1"])


@pytest.mark.parametrize(
    "flags, folder",
    [
        ("", "runs/original-seed0"),
        ("--recipe cpu --fold 3 --seed 7", "runs/cpu-fold3-seed7"),
        ("--images some/birds --recipe cpu", "runs/birds-cpu-seed0"),
        ("--demo --out elsewhere", "elsewhere"),
    ],
)
def test_a_run_folder_is_named_for_what_tells_it_from_others(flags, folder):
    assert default_run_folder(*parse_train(flags.split())) == Path(folder)


def test_whole_numbers_within_their_bounds():
    convert = cli.whole_number(2, 10)
    assert [convert(text) for text in ("2", "10")] == [2, 10]
    for text in ("1", "11", "-3", "2.0", "", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 2 to 10"):
            convert(text)


def test_patterns_that_a_shell_has_left_are_expanded(tmp_path: Path):
    for name in ("run-b", "run-a", "run[1]"):
        (tmp_path / name).mkdir()
    given = [tmp_path / name for name in ("run-*", "run[1]", "none*", "plain")]
    names = ("run-a", "run-b", "run[1]", "none*", "plain")
    assert cli.expanded(given) == [tmp_path / name for name in names]
    folder = tmp_path / "photos [2024]"
    folder.mkdir()
    (folder / "a.jpg").touch()
    assert cli.expanded([folder / "*.jpg", folder / "*.png"]) == [folder / "a.jpg", folder / "*.png"]
    assert cli.expanded([tmp_path / "photo* ?2024?" / "*.jpg"]) == [folder / "a.jpg"]
