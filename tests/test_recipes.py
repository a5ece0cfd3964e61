"""The recipes against what they are said to be."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import recipes
from augment import ViewOptions
from data import AUGMENTATIONS
from model import count_parameters
from recipes import RECIPES, Recipe, Stage, UnknownSettings, build_network, replace


def test_last_rates_of_the_original_are_those_it_ended_on():
    recipe = RECIPES["original"]
    assert recipe.learning_rate(recipe.stages[0], 299) == pytest.approx(1.5e-6, rel=0.3)
    assert recipe.learning_rate(recipe.stages[1], 139) == pytest.approx(5e-6, rel=0.3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    recipe = RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_by_the_names_of_older_checkpoints(name):
    recipe = RECIPES[name]
    values = json.loads(json.dumps(recipe.as_dict()))
    values["view"], values["views"] = values.pop("augmentation"), values.pop("views_per_image")
    before = json.dumps(values)
    assert Recipe.from_dict(values) == recipe
    assert json.dumps(values) == before  # what was read is not changed


@pytest.mark.parametrize("name, side", [("cpu", 4), ("cpu-long", 8)])
def test_a_recipe_says_whether_the_last_group_pools(name, side):
    """Of which neither parameters nor their shapes tell."""
    sizes = []
    with torch.device("meta"):
        net = build_network(RECIPES[name], 10).eval()
        net.groups.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))
        net(torch.zeros(1, 3, 64, 64))
    assert sizes == [(1, 224, side, side)]


def test_a_setting_that_is_gone_is_read_where_it_was_off(monkeypatch):
    monkeypatch.setattr(recipes, "RETIRED", {"mirrored": False, "blur": 0.0})
    values = RECIPES["demo"].as_dict()
    off = values | {"mirrored": False, "augmentation": values["augmentation"] | {"blur": 0.0}}
    assert Recipe.from_dict(off) == RECIPES["demo"]
    with pytest.raises(UnknownSettings, match=r"does not know \(mirrored\)"):
        Recipe.from_dict(off | {"mirrored": True})
    with pytest.raises(UnknownSettings, match=r"does not know \(blur\)"):
        Recipe.from_dict(off | {"augmentation": values["augmentation"] | {"blur": 0.5}})


def test_a_recipe_of_other_settings_is_refused():
    values = RECIPES["demo"].as_dict()
    with pytest.raises(UnknownSettings, match=r"does not know \(colour\)"):
        Recipe.from_dict(values | {"colour": 1})
    with pytest.raises(UnknownSettings, match=r"does not know \(shear\)"):
        Recipe.from_dict(values | {"augmentation": values["augmentation"] | {"shear": 1}})
    with pytest.raises(ValueError, match="views_per_image"):
        Recipe.from_dict(values | {"views_per_image": 0})
    with pytest.raises(KeyError, match="stages"):
        Recipe.from_dict({name: value for name, value in values.items() if name != "stages"})


def test_stages_follow_each_other():
    recipe = dataclasses.replace(RECIPES["original"], stages=tuple(Stage(n, (32,), 32, 4, 0.1) for n in (2, 0, 3)))
    epochs = [recipe.at(done) for done in range(5)]
    assert [(epoch.stage_index, epoch.number) for epoch in epochs] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert all(epoch.stage is recipe.stages[epoch.stage_index] for epoch in epochs)
    assert recipe.epochs == 5
    with pytest.raises(ValueError, match="no more epochs"):
        recipe.at(5)


@pytest.mark.parametrize("epochs, sizes, expected", [(6, (48, 64, 80), [48, 48, 64, 64, 80, 80]), (3, (70,), [70] * 3)])
def test_crop_sizes_share_a_stage(epochs, sizes, expected):
    stage = Stage(epochs, sizes, 96, 64, 0.1)
    assert [stage.crop_size_in(epoch) for epoch in range(epochs)] == expected
    recipe = dataclasses.replace(RECIPES["original"], stages=(Stage(1, (32,), 32, 4, 0.1), stage))
    assert [recipe.at(done).crop_size for done in range(1 + epochs)] == [32, *expected]


def test_samples_are_those_of_whole_batches():
    recipe = RECIPES["original"]
    assert recipe.samples(4_000, 1) == 80_000
    assert recipe.samples(4_010, 302) == 300 * 626 * 128 + 2 * 1253 * 64


def test_values_are_replaced_where_they_stand():
    recipe = replace(RECIPES["original"], {"epochs": [3, 1], "rotation": 5.0, "layers": [1, 1, 1], "threads": 1})
    assert [stage.epochs for stage in recipe.stages] == [3, 1]
    assert recipe.augmentation == dataclasses.replace(AUGMENTATIONS["original"], rotation=5.0)
    assert recipe == dataclasses.replace(
        RECIPES["original"], stages=recipe.stages, augmentation=recipe.augmentation, layers=(1, 1, 1)
    )
    with pytest.raises(ValueError, match=r"epochs takes 2 value\(s\) here, one per stage, not 1"):
        replace(RECIPES["original"], {"epochs": [3]})


@pytest.mark.parametrize(
    "name, parameters",
    [("original", 1_996_986), ("cpu", 1_877_386), ("cpu-long", 1_877_386), ("cpu-night", 1_877_386),
     ("gpu", 1_877_386), ("demo", 38_442)],
)  # fmt: skip
def test_networks_have_their_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        assert count_parameters(build_network(RECIPES[name], 10)) == parameters


@pytest.mark.parametrize("planes", [(30, 60, 97), (4096, 4096, 4096)])
def test_a_network_over_the_budget_is_refused_with_the_way_out(planes):
    recipe = dataclasses.replace(RECIPES["original"], planes=planes)
    with pytest.raises(ValueError, match="2,000,000: give smaller --layers or --planes, or a larger --budget"):
        build_network(recipe, 10)


@pytest.mark.parametrize(
    "name, file",
    [("cpu", "cpu-six-seed0.csv"), ("cpu-long", "cpu-long-112-seed0.csv"), ("cpu-night", "cpu-night-seed0.csv"),
     ("gpu", "gpu-seed0.csv")],
)  # fmt: skip
def test_a_recipe_is_that_of_its_recorded_run(name, file):
    """Its epochs and rates; and the share of right answers is one of whole samples."""
    with open(Path(__file__).parent.parent / "docs" / "runs" / file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    recipe = RECIPES[name]
    (stage,) = recipe.stages
    assert len(rows) == recipe.epochs
    rates = [recipe.learning_rate(stage, epoch) for epoch in range(len(rows))]
    assert rates == pytest.approx([float(row["lr"]) for row in rows], rel=1e-7)  # a GPU's are float32
    for row in rows:
        hits = float(row["train_accuracy"]) * recipe.samples(4_000, 1)
        assert hits == pytest.approx(round(hits), abs=1e-6)


@pytest.mark.parametrize(
    "name, images, samples",
    [("original", 4_000, 35_200_000), ("cpu", 4_000, 223_744), ("cpu-long", 4_000, 1_920_000),
     ("cpu-night", 4_000, 3_840_000), ("gpu", 4_000, 3_840_000), ("demo", 1_200, 18_432)],
)  # fmt: skip
def test_recipes_have_their_published_number_of_samples(name, images, samples):
    assert RECIPES[name].samples(images, RECIPES[name].epochs) == samples


def test_the_shorter_recipe_differs_from_the_longer_in_what_is_said():
    cpu, longer = RECIPES["cpu"], RECIPES["cpu-long"]
    mild = ViewOptions(
        crop_scale=(0.25, 1.0), rotation=10.0, vflip=0.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
    )
    same = {"name": "cpu", "stages": cpu.stages, "views_per_image": 14, "last_pool": True, "average": 0.995}
    assert cpu == dataclasses.replace(longer, augmentation=mild, **same)


def test_the_nights_recipe_differs_from_the_longer_in_what_is_said():
    longer, night = RECIPES["cpu-long"], RECIPES["cpu-night"]
    views = dataclasses.replace(longer.augmentation, trivial_augment=True)
    same = {"name": "cpu-night", "views_per_image": 40, "average": 0.999}
    assert night == dataclasses.replace(longer, augmentation=views, **same)


def test_the_gpus_recipe_differs_from_the_nights_in_what_is_said():
    """Larger samples."""
    night, gpu = RECIPES["cpu-night"], RECIPES["gpu"]
    stage = Stage(epochs=24, crop_size=(64, 80, 112, 112), eval_size=144, batch=128, lr=0.5)
    assert gpu == dataclasses.replace(night, name="gpu", stages=(stage,))


def test_rates_of_restarts_are_those_of_the_recipes_own_cycles():
    recipe = dataclasses.replace(RECIPES["original"], cycle=1, cycle_growth=3, cycle_decay=0.5)
    stage = recipe.stages[0]
    shares = [recipe.learning_rate(stage, epoch) / stage.lr for epoch in range(5)]
    assert shares == pytest.approx([1, 0.5, 0.375, 0.125, 0.25])
