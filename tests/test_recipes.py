"""The command line and the recipes against what they are said to be."""

import dataclasses
import json

import pytest
import settings
from settings import RECIPES, Recipe, Runtime, Stage, parse

from augment import ViewOptions


def test_plain_command_is_the_original_recipe():
    recipe, runtime = parse([])
    assert recipe == RECIPES["original"] and runtime == Runtime()
    first, second = recipe.stages
    assert (first.epochs, first.crop_size, first.batch, first.lr) == (300, (70,), 128, 1e-3)
    assert (second.epochs, second.crop_size, second.batch, second.lr) == (140, (120,), 64, 5e-4)
    assert (recipe.views_per_image, recipe.seed, recipe.optimizer, recipe.weight_decay) == (20, 0, "adam", 1e-4)
    assert recipe.decay_norms and recipe.label_smoothing == recipe.average == 0 and not recipe.mirror
    samples = sum(stage.epochs * 4000 * recipe.views_per_image for stage in recipe.stages)
    assert samples == 35_200_000


def test_last_rates_of_the_original_are_those_it_ended_on():
    recipe = RECIPES["original"]
    assert recipe.rate(recipe.stages[0], 299) == pytest.approx(1.5e-6, rel=0.3)
    assert recipe.rate(recipe.stages[1], 139) == pytest.approx(5e-6, rel=0.3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    recipe = RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize("settings_class", [Stage, ViewOptions, Recipe, Runtime])
def test_every_field_with_a_help_text_is_a_flag(settings_class):
    flags = settings.build_parser().format_help()
    for item in dataclasses.fields(settings_class):
        if "help" in item.metadata:
            assert f"--{item.name.replace('_', '-')} " in flags


def test_flags_replace_the_recipes_values():
    recipe, runtime = parse(
        "--recipe cpu --epochs 3 --crop-size 32,48 --rotation 5 --crop-scale 0.5 1 --views 2 --no-mirror "
        "--planes 4 8 16 --fold 2 --out x --threads 1".split()
    )
    expected = dataclasses.replace(
        RECIPES["cpu"],
        stages=(dataclasses.replace(RECIPES["cpu"].stages[0], epochs=3, crop_size=(32, 48)),),
        view=dataclasses.replace(RECIPES["cpu"].view, rotation=5.0, crop_scale=(0.5, 1.0)),
        views=2,
        mirror=False,
        planes=(4, 8, 16),
        fold=2,
    )
    assert recipe == expected
    assert (str(runtime.out), runtime.threads) == ("x", 1)


def test_one_value_a_stage():
    recipe, _ = parse(["--epochs", "30", "0"])
    assert [stage.epochs for stage in recipe.stages] == [30, 0]
    assert recipe.locate(29) == (0, 29)
    with pytest.raises(ValueError, match="no further"):
        recipe.locate(30)


def test_stages_follow_each_other():
    recipe = dataclasses.replace(RECIPES["original"], stages=tuple(Stage(n, (32,), 32, 4, 0.1) for n in (2, 0, 3)))
    assert [recipe.locate(done) for done in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert [recipe.start(number) for number in range(3)] == [0, 2, 2]
    assert recipe.epochs == 5


@pytest.mark.parametrize("epochs, sizes, expected", [(6, (48, 64, 80), [48, 48, 64, 64, 80, 80]), (3, (70,), [70] * 3)])
def test_crop_sizes_share_a_stage(epochs, sizes, expected):
    stage = Stage(epochs, sizes, 96, 64, 0.1)
    assert [stage.size(epoch) for epoch in range(epochs)] == expected


@pytest.mark.parametrize("flag, way_out", [("--cosine-stem", "--no-cosine-stem"), ("--no-last-pool", "--last-pool")])
def test_parts_of_the_wide_network_are_refused_for_the_other(flag, way_out, capsys):
    with pytest.raises(SystemExit) as stop:
        settings.parse([flag])
    assert stop.value.code == 2
    assert f"is a part of network wide: for bottleneck add {way_out}\n" in capsys.readouterr().err
    settings.parse([flag, "--network", "wide", "--layers", "1", "1", "1"])
